"""The CUDA kernels' own source, compiled as C++ and run on the CPU, thread by thread (emulation.h)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from platform import machine

import pytest
import torch
from torch import Tensor

from sanrt.kernels.cuda import nvrtc
from sanrt.kernels.cuda.launch import dense
from sanrt.kernels.cuda.region_attention import AttentionLaunch
from sanrt.kernels.cuda.residual import VECTOR_BYTES
from sanrt.kernels.cuda.soca import SocaLaunch

HERE = Path(__file__).parent
BARRIER = "__syncthreads();"


@cache
def library(kernel: str, scalar_type: str, define: str) -> ctypes.CDLL:
    """The emulated kernels of `kernel`.cu with its two definitions, the experimental ones among them."""
    return built((nvrtc.SOURCES / f"{kernel}.cu").read_text(), kernel, scalar_type, define)


@cache
def without_barrier(kernel: str, scalar_type: str, define: str, number: int) -> ctypes.CDLL:
    """The same with the `number`-th `__syncthreads()` of the source left out."""
    pieces = (nvrtc.SOURCES / f"{kernel}.cu").read_text().split(BARRIER)
    return built(BARRIER.join(pieces[:number]) + BARRIER.join(pieces[number:]), kernel, scalar_type, define)


@cache
def without(text: str, kernel: str, scalar_type: str, define: str) -> ctypes.CDLL:
    """The same with a text of the source left out."""
    source = (nvrtc.SOURCES / f"{kernel}.cu").read_text()
    assert source.count(text) == 1
    return built(source.replace(text, "//" if "//" in text else ""), kernel, scalar_type, define)


def built(source: str, kernel: str, scalar_type: str, define: str) -> ctypes.CDLL:
    """Compile a kernel file's text for emulation, with the C++ compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("emulating the kernels needs g++")
    parts = [
        (HERE / "emulation.h").read_text(),
        (nvrtc.SOURCES / "formats.cuh").read_text(),
        source,
        (HERE / f"emulate_{kernel}.cpp").read_text(),
    ]
    fast_halves = ["-mf16c"] if machine() == "x86_64" else []
    experimental = ["-DEXPERIMENTAL"] if kernel == "soca" or scalar_type != "float" else []
    defines = [f"-DSCALAR={scalar_type}", f"-D{define}", *experimental]
    options = ["-std=c++17", "-O2", *fast_halves, "-w", "-shared", "-fPIC", *defines]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernel.so"
        subprocess.run([compiler, *options, "-o", library, "-x", "c++", "-"], input="\n".join(parts), text=True, check=True)
        return ctypes.CDLL(str(library))


def pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """What a kernel must overwrite: not-a-numbers."""
    return torch.full(shape, float("nan"), dtype=dtype)


def soca(
    x: Tensor,
    down: tuple[Tensor, Tensor],
    up: tuple[Tensor, Tensor],
    steps: int,
    seed: int = 0,
    launch: SocaLaunch | None = None,
) -> tuple[Tensor, Tensor]:
    """The statistics that the gate is computed of, and gates (B, C), of maps (B, C, H, W), contiguous or channels-last."""
    launch = launch or SocaLaunch.of(x)
    assert dense(x) is x
    partials = poisoned(*launch.partials, dtype=torch.float32)
    counters = torch.zeros(len(x) * launch.merged, dtype=torch.int32)
    gates = poisoned(len(x), x.shape[1], dtype=x.dtype)
    row = poisoned(len(x), 1, launch.partials[2], dtype=torch.float32)
    run = library("soca", nvrtc.scalar_type(x.dtype), f"CHANNELS={x.shape[1]}").emulate_soca
    run(
        *(pointer(t) for t in (x, *down, *up)), len(x), launch.pixels, int(launch.channels_last),
        launch.blocks, launch.group, launch.merge_grid[0] if launch.merge_grid else 0, int(launch.experimental),
        1 if launch.merge_grid else launch.rows, launch.merged, steps, len(down[0]), seed,
        *map(pointer, (partials, row, counters, gates)),
    )  # fmt: skip
    return (row if launch.merge_grid else partials), gates


def region_attention(maps: Tensor, regions: int, seed: int = 0, ahead: bool = False) -> Tensor:
    """Attention (B, I, H, W) of maps (B, 3 I, H, W), contiguous or channels-last."""
    launch = AttentionLaunch.of(maps, regions, ahead)
    assert dense(maps) is maps
    keys, values = (poisoned(*launch.workspace, dtype=maps.dtype) for _ in range(2))
    y = torch.full_like(maps[:, : launch.inner], float("nan"), memory_format=launch.memory_format)
    run = library("region_attention", nvrtc.scalar_type(maps.dtype), f"INNER={launch.inner}").emulate_region_attention
    run(
        pointer(maps), len(maps), *maps.shape[2:], regions, launch.padded, int(launch.channels_last),
        launch.grid[0], int(ahead), seed, pointer(keys), pointer(values), pointer(y),
    )  # fmt: skip
    return y


def residual(y: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """y + bias + x of channels-last maps."""
    total = torch.full_like(y, float("nan"))
    run = library("residual", nvrtc.scalar_type(y.dtype), f"CHANNELS={y.shape[1]}").emulate_residual
    run(pointer(y), pointer(bias), pointer(x), y.nbytes // VECTOR_BYTES, pointer(total))
    return total
