"""The whole network in vectors of any width, and what processors of any kind are taken for."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from sanrt.arrays import psnr
from sanrt.errors import BackendError
from sanrt.kernels.cpu import ir
from sanrt.kernels.cpu.network import Network
from sanrt.kernels.cpu.passes import upscale
from sanrt.kernels.cpu.winograd import Arithmetic
from sanrt.model.bundled import bundled_checkpoint, read_weights
from tests.kernels.cpu.references import INT16


def picture(height=24, width=30):
    """(1, 3, h, w) of 0..255: waves, and a little noise."""
    y, x = np.mgrid[:height, :width] / 7
    waves = np.stack([np.sin(x * (c + 1)) * np.cos(y) for c in range(3)])
    noise = np.random.default_rng(0).standard_normal(waves.shape)
    return (127 + 100 * waves + 9 * noise).clip(0, 255).astype(np.float32)[None]


def upscaled(arithmetic, scale=4):
    weights = read_weights(bundled_checkpoint(scale))
    network = Network(weights.spec, weights.tensors, 2, arithmetic)
    try:
        return upscale(network, picture(), 2)
    finally:
        network.close()


def test_the_bundled_network_gives_in_128_bit_vectors_what_it_gives_in_this_processors(narrow):
    wide = upscaled(Arithmetic.FP32)
    narrow()
    assert ir.this_processor().lanes == 4
    np.testing.assert_allclose(upscaled(Arithmetic.FP32), wide, atol=0.01)


@pytest.mark.parametrize("arithmetic", [INT16])
def test_int16_comes_as_close_to_fp32_in_128_bit_vectors_as_in_this_processors(narrow, arithmetic):
    exact, wide = upscaled(Arithmetic.FP32), upscaled(arithmetic)
    narrow()
    near = psnr(upscaled(arithmetic), exact, peak=255)
    assert near > psnr(wide, exact, peak=255) - 3
    assert near > 50


class Features(dict):
    """LLVM's feature map."""

    def flatten(self):
        return ",".join(f"{'+' if found else '-'}{name}" for name, found in self.items())


V2 = {"sse2": True, "sse4.1": True}
V3 = {**V2, "avx2": True, "fma": True}
V4 = {**V3, "avx512f": True, "avx512dq": True, "avx512bw": True}


@pytest.mark.parametrize(
    ("triple", "features", "lanes", "registers", "int16"),
    [
        ("x86_64-unknown-linux-gnu", V4, 16, 32, True),
        ("x86_64-unknown-linux-gnu", {**V4, "avx512bw": False}, 16, 32, False),
        ("x86_64-apple-darwin23.0", V3, 8, 16, True),
        ("x86_64-pc-windows-msvc", {**V3, "fma": False}, 4, 16, True),
        ("x86_64-pc-windows-msvc", V2, 4, 16, True),
        ("aarch64-unknown-linux-gnu", {"neon": True}, 4, 32, False),
        ("aarch64-unknown-linux-gnu", V4, 4, 32, False),  # the flags of the machine below an emulator
        ("arm64-apple-darwin23.0", {}, 4, 32, False),
    ],
)
def test_the_architecture_and_its_flags_choose_the_vectors(triple, features, lanes, registers, int16):
    found = ir.described(triple, "", Features(features))
    assert (found.lanes, found.registers, bool(found.pmadd)) == (lanes, registers, int16)
    assert not found.avx512dq or lanes == 16


def test_int16_says_in_one_line_that_a_processor_has_none(monkeypatch):
    from sanrt.kernels.cpu import network

    monkeypatch.setattr(network, "this_processor", lambda: ir.described("aarch64-unknown-linux-gnu", "", Features()))
    weights = read_weights(bundled_checkpoint(4))
    with pytest.raises(BackendError, match=r"no int16 on this processor .*; use precision='fp32'$"):
        Network(weights.spec, weights.tensors, 1, Arithmetic.INT16)


FOREIGN = """
import re, sys
from llvmlite import binding
from sanrt.kernels.cpu import attention, ir, schedule, soca, winograd

binding.initialize_all_targets()
binding.initialize_all_asmprinters()
triple, cpu, lanes, registers = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
for module in (ir, winograd, attention, schedule, soca):
    module.this_processor = lambda: ir.Processor(cpu, "", lanes, registers)

def compiled(self):
    self.module.triple = triple
    target = binding.Target.from_triple(triple)
    machine = target.create_target_machine(cpu=cpu, opt=3, reloc="pic", codemodel="jitdefault")
    text = machine.emit_assembly(binding.parse_assembly(str(self.module)))
    print(*set(re.findall("fmaf|__chkstk|sanrt_yield", text)), len(text) > 9999)
    return {"run": None}

ir.Module.compile = compiled
schedule.kernels(winograd.Arithmetic.FP32, 2, 3)
attention.kernels(4)
soca.kernels(32)
"""


@pytest.mark.parametrize(
    ("triple", "cpu", "lanes", "registers"),
    [
        ("x86_64-pc-windows-msvc", "x86-64", 4, 16),
        ("x86_64-pc-windows-msvc", "x86-64-v4", 16, 32),
        ("arm64-apple-darwin23.0", "apple-m1", 4, 32),
        ("aarch64-pc-windows-msvc", "generic", 4, 32),
        ("aarch64-unknown-linux-gnu", "generic", 4, 32),
    ],
)
def test_kernels_for_other_systems_compile_and_need_no_runtime_library(triple, cpu, lanes, registers):
    """Compiled, not run. A frame of a page or more would call Windows' __chkstk, a multiply-add rounded once C's fmaf."""
    code = [sys.executable, "-c", FOREIGN, triple, cpu, str(lanes), str(registers)]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["sanrt_yield True", "True", "True"]
