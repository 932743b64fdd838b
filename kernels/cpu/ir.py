"""Writes CPU kernels as LLVM IR with explicit vectors and compiles them for the processor at hand, with llvmlite alone.

A kernel is a Python function that builds the IR of a native one through `Code`, an IRBuilder with the operations of vector
registers. Loops in Python unroll; loops in the compiled kernel are `with code.loop(...)` blocks.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir

from sanrt.files import cache_folder, cached_file, source_digest

INT, FLOAT, WORD, SHORT = ir.IntType(64), ir.FloatType(), ir.IntType(32), ir.IntType(16)
POINTER = FLOAT.as_pointer()
PMADD = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}
PMADD_FEATURE = {16: "avx512bw", 8: "avx2", 4: "sse2"}
"""x86's multiply-and-add of 16-bit pairs, and the CPU feature that has it, for vectors of so many float32 lanes."""
FAST_VNNI = "fast-dpwssd"
"""LLVM's property of processors that do VNNI's multiply-and-add of 16-bit pairs as fast as a multiplication alone."""
YIELD = "sanrt_yield"
"""What compiled code calls to let another thread run."""
TO_L1, OF_DATA = 3, 1
"""Arguments of llvm.prefetch: into the first-level cache; data, not instructions."""
ROUND_DOWN, CURRENT_ROUNDING = 1, 4
"""Rounding-mode operands of AVX-512's intrinsics."""
CACHE_LINE = 64
"""Bytes in a cache line."""


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Zeros that start on a cache line: a vector load that straddles two lines costs two accesses."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.zeros(size + CACHE_LINE, np.uint8)  # NumPy itself aligns to 16 bytes only
    begin = -room.ctypes.data % CACHE_LINE
    return room[begin : begin + size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Processor:
    """The instruction set and register file that kernels are written for."""

    name: str
    """LLVM's name for the CPU, such as `znver5`; empty is the plainest of the architecture."""
    features: str
    """LLVM's feature string, such as `+avx2,-avx512f`."""
    lanes: int
    """float32 values in one vector register."""
    registers: int
    """Number of vector registers."""
    pmadd: str = ""
    """The intrinsic that multiplies 16-bit integers and adds neighbouring products; empty where there is none."""
    avx512dq: bool = False
    """Whether x - floor(x) and x * 2^floor(y) are one instruction each (vreduceps and vscalefps)."""


@cache
def this_processor() -> Processor:
    """The processor that this process runs on."""
    return described(binding.get_default_triple(), binding.get_host_cpu_name(), binding.get_host_cpu_features())


def described(triple: str, name: str, features: Any) -> Processor:
    """A processor by LLVM's target triple, name and feature map; here alone is decided how wide its vectors are.

    Its architecture comes first: under an emulator, flags may be those of the machine that emulates.
    """
    # Vectors of 128 bits (SSE2, NEON) are there on every processor that LLVM compiles these kernels for.
    if not triple.startswith("x86_64"):
        return Processor(name, features.flatten(), lanes=4, registers=32 if triple.startswith(("aarch64", "arm64")) else 16)
    lanes = 16 if features.get("avx512f") else 8 if features.get("avx2") and features.get("fma") else 4
    pairs = PMADD[lanes] if features.get(PMADD_FEATURE[lanes]) else ""
    exponents = lanes == 16 and bool(features.get("avx512dq"))
    # Without that property, as for Intel's, LLVM takes VNNI's instruction apart again, to shorten the chain of additions.
    # The kernels have chains enough beside each other, and products of 16 bits would take twice the instructions.
    return Processor(name, f"{features.flatten()},+{FAST_VNNI}", lanes, 32 if lanes == 16 else 16, pairs, exponents)


class Code(ir.IRBuilder):  # type: ignore[misc]
    """Builds the body of one function; offsets count elements of their pointer's type, which is mostly float32."""

    def __init__(self, function: ir.Function, processor: Processor) -> None:
        super().__init__(function.append_basic_block("entry"))
        self.processor, self.lanes = processor, processor.lanes
        self.vector, self.integers, self.shorts = (ir.VectorType(kind, processor.lanes) for kind in (FLOAT, WORD, SHORT))

    def index(self, value: int) -> ir.Constant:
        """A 64-bit constant."""
        return ir.Constant(INT, value)

    def total(self, *terms: ir.Value) -> ir.Value:
        """The sum of 64-bit integers."""
        first, *rest = terms
        for term in rest:
            first = self.add(first, term)
        return first

    def at(self, pointer: ir.Value, *offsets: ir.Value) -> ir.Value:
        """The pointer plus the sum of the offsets."""
        return self.gep(pointer, [self.total(*offsets)])

    def read(self, pointer: ir.Value) -> ir.Value:
        """Load a vector of float32."""
        return self.read_as(self.vector, pointer)

    def read_as(self, kind: ir.Type, pointer: ir.Value) -> ir.Value:
        """Load a value of another type from a pointer."""
        # The least alignment that any array here has: with more, LLVM may use instructions that fault on odd addresses.
        return self.load(self.bitcast(pointer, kind.as_pointer()), align=2)

    def write(self, value: ir.Value, pointer: ir.Value) -> None:
        """Store a vector."""
        self.store(value, self.bitcast(pointer, value.type.as_pointer()), align=4)

    def write_int16(self, value: ir.Value, pointer: ir.Value) -> None:
        """Store the lowest 16 bits of every lane."""
        low = self.trunc(self.bitcast(value, self.integers), self.shorts)
        self.store(low, self.bitcast(pointer, self.shorts.as_pointer()), align=2)

    def field(self, table: ir.Value, index: int) -> ir.Value:
        """Load the index-th 64-bit integer of a table."""
        return self.load(self.gep(self.bitcast(table, INT.as_pointer()), [self.index(index)]))

    def constant(self, value: float) -> ir.Constant:
        """A float32 constant in every lane."""
        return ir.Constant(self.vector, [float(value)] * self.lanes)

    def broadcast(self, scalar: ir.Value) -> ir.Value:
        """A scalar in every lane."""
        undefined = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
        return self.shuffled(self.insert_element(undefined, scalar, ir.Constant(WORD, 0)), [0] * self.lanes)

    def rotated(self, vector: ir.Value, by: int) -> ir.Value:
        """Lane i takes lane i + by."""
        return self.shuffled(vector, [(lane + by) % self.lanes for lane in range(self.lanes)])

    def shuffled(self, vector: ir.Value, order: list[int]) -> ir.Value:
        """Lane i takes lane order[i]."""
        return self.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), ir.Constant(self.integers, order))

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, rounded once where one instruction does both, else twice: a call would take twelve times as long."""
        return self.call(self.intrinsic("fmuladd", 3), [a, b, c])

    def scaled_add(self, factor: float, a: ir.Value, b: ir.Value) -> ir.Value:
        """factor * a + b."""
        if abs(factor) == 1:
            return self.fadd(b, a) if factor == 1 else self.fsub(b, a)
        return self.multiply_add(self.constant(factor), a, b)

    def weighted_sum(self, factors: Sequence[float], values: Sequence[ir.Value]) -> ir.Value:
        """Sum of factor * value; a value whose factor is 1 comes first, as it then needs no multiplication."""
        (factor, done), *rest = sorted(zip(factors, values, strict=True), key=lambda term: term[0] != 1)
        done = done if factor == 1 else self.fmul(self.constant(factor), done)
        for factor, value in rest:
            done = self.scaled_add(factor, value, done)
        return done

    def multiply_add_pairs(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """In each 32-bit lane c + a0 * b0 + a1 * b1, where a0, a1 and b0, b1 are the lane's two signed 16-bit integers."""
        shorts = ir.VectorType(SHORT, 2 * self.lanes)
        pairs = self.declared(self.processor.pmadd, self.integers, [shorts, shorts])
        return self.add(c, self.call(pairs, [self.bitcast(a, shorts), self.bitcast(b, shorts)]))

    def magnitude_bits(self, value: ir.Value) -> ir.Value:
        """The bits of |x|, which order as the magnitudes do when compared as unsigned integers."""
        return self.and_(self.bitcast(value, self.integers), ir.Constant(self.integers, [0x7FFFFFFF] * self.lanes))

    def square_root(self, value: ir.Value) -> ir.Value:
        """The square root of one float32."""
        return self.call(self.declared("llvm.sqrt.f32", FLOAT, [FLOAT]), [value])

    def unsigned_maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The larger of two unsigned integers, lane by lane."""
        return self.select(self.icmp_unsigned("<", a, b), b, a)

    def reduced(self, operation: Callable[[ir.Value, ir.Value], ir.Value], vector: ir.Value) -> ir.Value:
        """All lanes combined into one scalar, the upper half onto the lower half until one is left."""
        width = self.lanes
        while width > 1:
            width //= 2
            vector = operation(vector, self.rotated(vector, width))
        return self.extract_element(vector, ir.Constant(WORD, 0))

    def maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The larger of two float32, lane by lane; a where either is NaN.

        So NaN in a running value passed as `a` stays; x86's own maxps would drop it or not, by the order of its operands.
        """
        return self.select(self.fcmp_ordered("<", a, b), b, a)

    def fraction(self, value: ir.Value) -> ir.Value:
        """x - floor(x)."""
        if not self.processor.avx512dq:
            # Two instructions; for NaN it is NaN, as the one of AVX-512 is.
            return self.fsub(value, self.call(self.intrinsic("floor", 1), [value]))
        mode, *masked = ir.Constant(WORD, ROUND_DOWN), *self.unmasked()
        name, operands = "llvm.x86.avx512.mask.reduce.ps.512", [self.vector, WORD, self.vector, SHORT, WORD]
        return self.call(self.declared(name, self.vector, operands), [value, mode, *masked])

    def scaled_by_power_of_two(self, value: ir.Value, exponent: ir.Value) -> ir.Value:
        """value * 2^floor(exponent); without the processor's own instruction only for exponents from -126 to 127."""
        if self.processor.avx512dq:
            name, operands = "llvm.x86.avx512.mask.scalef.ps.512", [self.vector, self.vector, self.vector, SHORT, WORD]
            return self.call(self.declared(name, self.vector, operands), [value, exponent, *self.unmasked()])
        whole = self.fptosi(self.call(self.intrinsic("floor", 1), [exponent]), self.integers)
        # A float32 power of two is its exponent plus 127, in the bits from 23 on.
        biased = self.add(whole, ir.Constant(self.integers, [127] * self.lanes))
        power = self.shl(biased, ir.Constant(self.integers, [23] * self.lanes))
        return self.fmul(value, self.bitcast(power, self.vector))

    def unmasked(self) -> list[ir.Value]:
        """The trailing operands of AVX-512's masked intrinsics: nothing to merge with, all lanes, the current rounding."""
        return [ir.Constant(self.vector, ir.Undefined), ir.Constant(SHORT, -1), ir.Constant(WORD, CURRENT_ROUNDING)]

    def intrinsic(self, name: str, operands: int) -> ir.Function:
        """An LLVM intrinsic over float32 vectors, such as llvm.floor.v16f32."""
        return self.declared(f"llvm.{name}.v{self.lanes}f32", self.vector, [self.vector] * operands)

    def declared(self, name: str, result: ir.Type, operands: Sequence[ir.Type]) -> ir.Function:
        """An external function, declared in the module once."""
        return self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(result, operands), name)

    def minimum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The smaller of two 64-bit integers."""
        return self.select(self.icmp_signed("<", a, b), a, b)

    def prefetch(self, pointer: ir.Value, *, write: bool) -> None:
        """Ask for the cache line at an address that is read or written soon; an invalid address does no harm."""
        byte = ir.IntType(8).as_pointer()
        function = self.declared("llvm.prefetch.p0", ir.VoidType(), [byte, WORD, WORD, WORD])
        self.call(function, [self.bitcast(pointer, byte), *(ir.Constant(WORD, n) for n in (int(write), TO_L1, OF_DATA))])

    def is_null(self, pointer: ir.Value) -> ir.Value:
        """Whether a pointer is null."""
        return self.icmp_signed("==", self.ptrtoint(pointer, INT), self.index(0))

    def wait(self, flag: ir.Value) -> None:
        """Wait until another thread has set an integer.

        The load acquires what that thread wrote before it released the flag. The loop yields: where there are more threads
        than free cores, a thread that only spins would take the time of the one it waits for.
        """
        head, idle, after = (self.append_basic_block() for _ in range(3))
        self.branch(head)
        self.position_at_end(head)
        self.cbranch(self.icmp_signed("!=", self.load_atomic(flag, "acquire", 8), self.index(0)), after, idle)
        self.position_at_end(idle)
        self.call(self.declared(YIELD, WORD, []), [])
        self.branch(head)
        self.position_at_end(after)

    @contextmanager
    def shared_loop(self, counter: ir.Value, stop: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """A loop whose rounds are shared by threads: each round takes the next `step` indices off a common counter.

        Threads that are slower, or come later, take fewer. Relaxed order is enough: the counter publishes no other data.
        """
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
        """A loop around the `with` block over 0, step, 2 step, ... below stop.

        Gives the index and the list of `carried` values, which the block replaces for the next round; after the block the
        list holds their last values. These are phi nodes: accumulators stay in registers.
        """
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
        # The body may have made further blocks (inner loops, branches): the phis' values come from wherever it ended.
        index.add_incoming(self.add(index, self.index(step)), self.block)
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, self.block)
        self.branch(head)
        self.position_at_end(after)
        values[:] = phis


class Module:
    """Functions that are compiled together; each takes pointers (of float32, cast where needed), then 64-bit integers."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.module = ir.Module()
        self.module.triple = binding.get_default_triple()
        self.signatures: dict[str, tuple[int, int]] = {}

    @contextmanager
    def function(self, name: str, pointers: int, integers: int) -> Iterator[tuple[ir.Function, Code]]:
        """A new function, whose body the `with` block writes."""
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [POINTER] * pointers + [INT] * integers), name)
        # Unrolled bodies are large: inlined, they would be compiled, and take up instruction cache, once for each call.
        function.attributes.add("noinline")
        self.signatures[name] = pointers, integers
        code = Code(function, self.processor)
        yield function, code
        code.ret_void()

    def compile(self) -> dict[str, Callable[..., None]]:
        """The functions by name, called with addresses and integers; ctypes releases the GIL around each call."""
        provide_yield()
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), self.machine())
        engine.add_object_file(binding.ObjectFileRef.from_data(self.machine_code()))
        engine.finalize_object()
        functions: dict[str, Callable[..., None]] = {}
        for name, (pointers, integers) in self.signatures.items():
            kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * integers)
            function: Any = kind(engine.get_function_address(name))
            function.engine = engine  # the code is freed with its engine, so the engine must outlive the function
            functions[name] = function
        return functions

    def machine_code(self) -> bytes:
        """The module as an object file, from the user's cache if the same IR was compiled for the same processor before."""
        source = str(self.module)
        made_by = version("llvmlite"), source_digest("sanrt.kernels.cpu")
        identity = "\0".join([source, self.processor.name, self.processor.features, *made_by])
        name = f"cpu-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.o"

        def compiled() -> bytes:
            parsed, machine = binding.parse_assembly(source), self.machine()
            passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
            passes.getModulePassManager().run(parsed, passes)
            code: bytes = machine.emit_object(parsed)
            return code

        return cached_file([cache_folder() / "kernels"], name, compiled)

    def machine(self) -> Any:
        """LLVM's code generator for the module's processor."""
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        target = binding.Target.from_default_triple()
        return target.create_target_machine(
            cpu=self.processor.name, features=self.processor.features, opt=3, reloc="pic", codemodel="jitdefault"
        )


@cache
def provide_yield() -> None:
    """Tell LLVM where the system's call is by which a thread lets another one run: its name differs."""
    if sys.platform == "win32":
        system = ctypes.windll.kernel32.SwitchToThread
    else:
        system = ctypes.CDLL(None).sched_yield
    binding.add_symbol(YIELD, ctypes.cast(system, ctypes.c_void_p).value)
