"""CPU kernels written as LLVM IR with explicit vectors and compiled for this very processor; no compiler is needed."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir

from sanrt.kernels.cuda.nvrtc import cache_folder, write_whole
from sanrt.version import __version__

INT, FLOAT, WORD, SHORT = ir.IntType(64), ir.FloatType(), ir.IntType(32), ir.IntType(16)
POINTER = FLOAT.as_pointer()
PAIRS = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}
PAIRS_FEATURE = {16: "avx512bw", 8: "avx2", 4: "sse2"}
"""By lanes of float32."""
NEAREST, DATA = 3, 1
"""Of llvm.prefetch: into the first cache, of data."""
DOWN, AS_USUAL = 1, 4
"""Modes of rounding of AVX-512's intrinsics."""
LINE = 64
"""Bytes of a line of the cache."""
DIGEST = hashlib.sha256().digest_size
"""Bytes before the code in a cached file."""


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """An array of zeros that begins with a line of the cache, so that no vector lies across two."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.zeros(size + LINE, np.uint8)
    begin = -room.ctypes.data % LINE
    return room[begin : begin + size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Processor:
    """What the kernels are written for."""

    name: str
    """As LLVM calls it; empty is any of its family."""
    features: str
    lanes: int
    """float32 numbers in one register."""
    registers: int
    """Vector registers."""
    pairs: str = ""
    """The intrinsic that multiplies 16-bit integers and adds neighbouring products; empty where there is none."""
    exponents: bool = False
    """Whether one instruction takes the fraction of a float32, and one scales by a power of two (AVX-512DQ)."""


@cache
def this_processor() -> Processor:
    """The processor this runs on."""
    found = binding.get_host_cpu_features()
    lanes = 16 if found.get("avx512f") else 8 if found.get("avx2") and found.get("fma") else 4
    registers = 32 if lanes == 16 or found.get("neon") else 16
    pairs = PAIRS[lanes] if binding.get_default_triple().startswith("x86_64") and found.get(PAIRS_FEATURE[lanes]) else ""
    exponents = lanes == 16 and bool(found.get("avx512dq"))
    return Processor(binding.get_host_cpu_name(), found.flatten(), lanes, registers, pairs, exponents)


class Code(ir.IRBuilder):  # type: ignore[misc]
    """The body of one function over vectors; indices are counted in what their pointer leads to, mostly float32."""

    def __init__(self, function: ir.Function, processor: Processor) -> None:
        super().__init__(function.append_basic_block("entry"))
        self.processor, self.lanes = processor, processor.lanes
        self.vector, self.integers, self.shorts = (ir.VectorType(kind, processor.lanes) for kind in (FLOAT, WORD, SHORT))

    def index(self, value: int) -> ir.Constant:
        """A constant index."""
        return ir.Constant(INT, value)

    def total(self, *terms: ir.Value) -> ir.Value:
        """Sum of indices."""
        first, *rest = terms
        for term in rest:
            first = self.add(first, term)
        return first

    def at(self, pointer: ir.Value, *offsets: ir.Value) -> ir.Value:
        """The pointer moved by a sum of offsets."""
        return self.gep(pointer, [self.total(*offsets)])

    def read(self, pointer: ir.Value) -> ir.Value:
        """The vector that begins at a pointer."""
        return self.read_as(self.vector, pointer)

    def read_as(self, kind: ir.Type, pointer: ir.Value) -> ir.Value:
        """Something of another type that begins at a pointer."""
        return self.load(self.bitcast(pointer, kind.as_pointer()), align=2)

    def write(self, value: ir.Value, pointer: ir.Value) -> None:
        """Store a vector."""
        self.store(value, self.bitcast(pointer, value.type.as_pointer()), align=4)

    def write_short(self, value: ir.Value, pointer: ir.Value) -> None:
        """Store the lowest 16 bits of every lane."""
        low = self.trunc(self.bitcast(value, self.integers), self.shorts)
        self.store(low, self.bitcast(pointer, self.shorts.as_pointer()), align=2)

    def field(self, table: ir.Value, index: int) -> ir.Value:
        """A 64-bit integer of a table."""
        return self.load(self.gep(self.bitcast(table, INT.as_pointer()), [self.index(index)]))

    def constant(self, value: float) -> ir.Constant:
        """The same number in every lane."""
        return ir.Constant(self.vector, [float(value)] * self.lanes)

    def spread(self, scalar: ir.Value) -> ir.Value:
        """One value in every lane."""
        undefined = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
        return self.shuffled(self.insert_element(undefined, scalar, ir.Constant(WORD, 0)), [0] * self.lanes)

    def rotated(self, vector: ir.Value, by: int) -> ir.Value:
        """Lane i takes lane i + by."""
        return self.shuffled(vector, [(lane + by) % self.lanes for lane in range(self.lanes)])

    def shuffled(self, vector: ir.Value, order: list[int]) -> ir.Value:
        """Lane i takes lane order[i]."""
        return self.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), ir.Constant(self.integers, order))

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, rounded once."""
        return self.call(self.intrinsic("fma", 3), [a, b, c])

    def scaled_add(self, factor: float, a: ir.Value, b: ir.Value) -> ir.Value:
        """factor * a + b."""
        if abs(factor) == 1:
            return self.fadd(b, a) if factor == 1 else self.fsub(b, a)
        return self.multiply_add(self.constant(factor), a, b)

    def weighted_sum(self, factors: Sequence[float], values: Sequence[ir.Value]) -> ir.Value:
        """Sum of factor * value, from one with the factor 1 if there is any."""
        (factor, done), *rest = sorted(zip(factors, values, strict=True), key=lambda term: term[0] != 1)
        done = done if factor == 1 else self.fmul(self.constant(factor), done)
        for factor, value in rest:
            done = self.scaled_add(factor, value, done)
        return done

    def add_pairs(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """c plus, in every 32-bit lane, both products of its two 16-bit integers."""
        shorts = ir.VectorType(SHORT, 2 * self.lanes)
        pairs = self.declared(self.processor.pairs, self.integers, [shorts, shorts])
        return self.add(c, self.call(pairs, [self.bitcast(a, shorts), self.bitcast(b, shorts)]))

    def magnitude_bits(self, value: ir.Value) -> ir.Value:
        """A float32's bits without its sign."""
        return self.and_(self.bitcast(value, self.integers), ir.Constant(self.integers, [0x7FFFFFFF] * self.lanes))

    def square_root(self, value: ir.Value) -> ir.Value:
        """Of one float32."""
        return self.call(self.declared("llvm.sqrt.f32", FLOAT, [FLOAT]), [value])

    def largest_word(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The larger of two integers, lane by lane."""
        return self.select(self.icmp_unsigned("<", a, b), b, a)

    def folded(self, operation: Callable[[ir.Value, ir.Value], ir.Value], vector: ir.Value) -> ir.Value:
        """All lanes of a vector combined into one number, half and half."""
        width = self.lanes
        while width > 1:
            width //= 2
            vector = operation(vector, self.rotated(vector, width))
        return self.extract_element(vector, ir.Constant(WORD, 0))

    def largest(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The larger of two, lane by lane; a where either is NaN, so that NaN in a stays visible."""
        return self.select(self.fcmp_ordered("<", a, b), b, a)

    def fraction(self, value: ir.Value) -> ir.Value:
        """x - floor(x)."""
        if not self.processor.exponents:
            return self.fsub(value, self.call(self.intrinsic("floor", 1), [value]))
        mode, *masked = ir.Constant(WORD, DOWN), *self.unmasked()
        name, operands = "llvm.x86.avx512.mask.reduce.ps.512", [self.vector, WORD, self.vector, SHORT, WORD]
        return self.call(self.declared(name, self.vector, operands), [value, mode, *masked])

    def scaled_by_power_of_two(self, value: ir.Value, exponent: ir.Value) -> ir.Value:
        """value * 2^floor(exponent); without the processor's own instruction only for exponents from -126 to 127."""
        if self.processor.exponents:
            name, operands = "llvm.x86.avx512.mask.scalef.ps.512", [self.vector, self.vector, self.vector, SHORT, WORD]
            return self.call(self.declared(name, self.vector, operands), [value, exponent, *self.unmasked()])
        whole = self.fptosi(self.call(self.intrinsic("floor", 1), [exponent]), self.integers)
        biased = self.add(whole, ir.Constant(self.integers, [127] * self.lanes))
        power = self.shl(biased, ir.Constant(self.integers, [23] * self.lanes))
        return self.fmul(value, self.bitcast(power, self.vector))

    def unmasked(self) -> list[ir.Value]:
        """What the intrinsics of AVX-512 want besides: every lane, and rounding as usual."""
        return [ir.Constant(self.vector, ir.Undefined), ir.Constant(SHORT, -1), ir.Constant(WORD, AS_USUAL)]

    def intrinsic(self, name: str, operands: int) -> ir.Function:
        """An LLVM intrinsic of vectors, such as llvm.fma.v16f32."""
        return self.declared(f"llvm.{name}.v{self.lanes}f32", self.vector, [self.vector] * operands)

    def declared(self, name: str, result: ir.Type, operands: Sequence[ir.Type]) -> ir.Function:
        """A function that is not written here."""
        return self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(result, operands), name)

    def smallest(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The smaller of two indices."""
        return self.select(self.icmp_signed("<", a, b), a, b)

    def prefetch(self, pointer: ir.Value, *, write: bool) -> None:
        """Ask for a line of memory that is read or written soon; any address will do."""
        byte = ir.IntType(8).as_pointer()
        function = self.declared("llvm.prefetch.p0", ir.VoidType(), [byte, WORD, WORD, WORD])
        self.call(function, [self.bitcast(pointer, byte), *(ir.Constant(WORD, n) for n in (int(write), NEAREST, DATA))])

    def is_null(self, pointer: ir.Value) -> ir.Value:
        """Whether a pointer leads nowhere."""
        return self.icmp_signed("==", self.ptrtoint(pointer, INT), self.index(0))

    def wait(self, flag: ir.Value) -> None:
        """Until another thread has set an integer; meanwhile the processor is left to others."""
        head, idle, after = (self.append_basic_block() for _ in range(3))
        self.branch(head)
        self.position_at_end(head)
        self.cbranch(self.icmp_signed("!=", self.load_atomic(flag, "acquire", 8), self.index(0)), after, idle)
        self.position_at_end(idle)
        self.call(self.declared("sched_yield", WORD, []), [])
        self.branch(head)
        self.position_at_end(after)

    @contextmanager
    def shared_loop(self, counter: ir.Value, stop: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """A loop that threads share: each round takes the next `step` below stop, which the counter keeps."""
        head, body, after = (self.append_basic_block() for _ in range(3))
        self.branch(head)
        self.position_at_end(head)
        taken = self.atomic_rmw(
            "add",
            self.bitcast(counter, INT.as_pointer()),
            self.index(step),
            "monotonic",
        )
        self.cbranch(self.icmp_signed("<", taken, stop), body, after)
        self.position_at_end(body)
        yield taken
        self.branch(head)
        self.position_at_end(after)

    @contextmanager
    def loop(self, stop: ir.Value, step: int = 1, carried: Sequence[ir.Value] = ()) -> Any:
        """A counted loop around the `with` block: gives the index and a list of values that one round hands to the next."""
        before, head, body, after = self.block, *(self.append_basic_block() for _ in range(3))
        self.branch(head)
        self.position_at_end(head)
        index = self.phi(INT)
        index.add_incoming(self.index(0), before)
        phis = [self.phi(value.type) for value in carried]
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value, before)
        self.cbranch(self.icmp_signed("<", index, stop), body, after)
        self.position_at_end(body)
        values = list(phis)
        yield index, values
        index.add_incoming(self.add(index, self.index(step)), self.block)
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, self.block)
        self.branch(head)
        self.position_at_end(after)
        values[:] = phis


class Module:
    """Functions that are compiled together; each takes pointers to float32 arrays, then 64-bit integers."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.module = ir.Module()
        self.module.triple = binding.get_default_triple()
        self.signatures: dict[str, tuple[int, int]] = {}

    @contextmanager
    def function(self, name: str, pointers: int, integers: int) -> Iterator[tuple[ir.Function, Code]]:
        """A new function around the `with` block that writes its body; compiled once, however many others call it."""
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [POINTER] * pointers + [INT] * integers), name)
        function.attributes.add("noinline")
        self.signatures[name] = pointers, integers
        code = Code(function, self.processor)
        yield function, code
        code.ret_void()

    def compile(self) -> dict[str, Callable[..., None]]:
        """The functions by name; they release the GIL, and take addresses and integers."""
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), self.machine())
        engine.add_object_file(binding.ObjectFileRef.from_data(self.machine_code()))
        engine.finalize_object()
        functions: dict[str, Callable[..., None]] = {}
        for name, (pointers, integers) in self.signatures.items():
            kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * integers)
            function: Any = kind(engine.get_function_address(name))
            function.engine = engine  # lives as long as its code is in use
            functions[name] = function
        return functions

    def machine_code(self) -> bytes:
        """An object file, from the user's cache where this very code was compiled for this processor before."""
        source = str(self.module)
        identity = "\0".join([source, self.processor.name, self.processor.features, version("llvmlite"), __version__])
        name = f"cpu-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.o"
        # Without a cache it is compiled in every process; damaged code would end the process.
        with suppress(OSError, RuntimeError):
            kept = (cache_folder() / name).read_bytes()
            if hashlib.sha256(kept[DIGEST:]).digest() == kept[:DIGEST]:
                return kept[DIGEST:]
        parsed, machine = binding.parse_assembly(source), self.machine()
        passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(parsed, passes)
        code: bytes = machine.emit_object(parsed)
        with suppress(OSError, RuntimeError):
            write_whole(cache_folder() / name, hashlib.sha256(code).digest() + code)
        return code

    def machine(self) -> Any:
        """LLVM's code generator for the processor."""
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        target = binding.Target.from_default_triple()
        return target.create_target_machine(
            cpu=self.processor.name, features=self.processor.features, opt=3, reloc="pic", codemodel="jitdefault"
        )
