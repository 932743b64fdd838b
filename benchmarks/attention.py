"""Region attention on the CPU against what its arithmetic allows, and its share of a picture.

`python benchmarks/attention.py`. The limits are loops over numbers in a core's first cache: powers of two as the kernel
computes them, multiply-adds as its two products need them. Both use the same units of the processor, so that the kernel
cannot take less than their sum. Of a picture of some megapixels a part is computed, of regions as large as the picture's:
the rest costs the same a pixel.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is its own folder, not the repository

from benchmarks.measure import console, environment, found_model, picture, run_command
from sanrt.kernels.cpu import attention
from sanrt.kernels.cpu.ir import Code, Module, aligned, this_processor
from sanrt.kernels.cpu.network import Network
from sanrt.kernels.cpu.workers import Workers
from sanrt.model.bundled import WeightsKind
from sanrt.runtime.backends.native import NativeBackend
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.runs.timing import Size
from sanrt.runtime.tiling.plan import MAX_REGION_PIXELS, choose_regions
from sanrt.runtime.tiling.upscaling import network_input

SIZES = ["1216x832"]
WHOLE_PIXELS, PART_REGIONS = 2**21, 8
"""Pixels of the largest picture that is computed as a whole; of others, a part of k x k regions."""
VECTORS = 64
"""Vectors of the loop of powers: 4 KiB of 16 lanes, and as much for the results."""
CHAINS = 12
"""Independent sums of the loop of multiply-adds: more than their latency times the units."""
LOOPS, ROUNDS = 20_000, 5
"""Rounds of the limits' loops, and measurements of which the fastest counts."""


@dataclass(frozen=True)
class Limits:
    """Seconds per pair of a query and a key, on one core."""

    powers: float
    products: float

    @property
    def both(self) -> float:
        """One after the other, as on the same units."""
        return self.powers + self.products


def limits(channels: int) -> Limits:
    """The limits for so many inner channels."""
    module = Module(this_processor())
    for name, body in (("powers", power_loop), ("products", product_loop)):
        with module.function(name, 1, 1) as (function, code):
            memory, count = function.args
            with code.loop(count) as (_, _unused):
                body(code, memory)
    kernels, memory = module.compile(), aligned((2 * VECTORS * this_processor().lanes,))
    memory[:] = -1.0

    def per_vector(name: str, vectors: int) -> float:
        return fastest(lambda: kernels[name](memory.ctypes.data, LOOPS)) / LOOPS / vectors / this_processor().lanes

    # A score and a weighted value for each inner channel, and the weights' sum.
    return Limits(per_vector("powers", VECTORS), per_vector("products", CHAINS * VECTORS) * (2 * channels + 1))


def power_loop(code: Code, memory: object) -> None:
    """2^x of all vectors, stored: loads and stores are on other units."""
    with code.loop(code.index(VECTORS * code.lanes), code.lanes) as (at, _):
        power = attention.power_of_two(code, code.read(code.at(memory, at)))
        code.write(power, code.at(memory, at, code.index(VECTORS * code.lanes)))


def product_loop(code: Code, memory: object) -> None:
    """A multiply-add for each chain, their sums kept in memory between two rounds of a loop of LOOPS."""
    places = [code.at(memory, code.index(number * code.lanes)) for number in range(CHAINS)]
    factor = code.constant(0.5)
    with code.loop(code.index(VECTORS), carried=[code.read(at) for at in places]) as (_, sums):
        sums[:] = [code.multiply_add(each, factor, factor) for each in sums]
    for at, value in zip(places, sums, strict=True):
        code.write(value, at)


def fastest(work: Callable[[], object]) -> float:
    """Seconds of this thread's processor time in the fastest of some runs, after one that does not count."""
    times = []
    for _ in range(ROUNDS + 1):
        started = time.thread_time()
        work()
        times.append(time.thread_time() - started)
    return min(times[1:])


def kernel(channels: int) -> float:
    """Seconds per pair of the kernel on one thread, for a region as large as `--regions auto` makes them."""
    random = np.random.default_rng(0)
    query, key, value = (
        random.standard_normal((n, channels)).astype(np.float32)
        for n in (MAX_REGION_PIXELS, MAX_REGION_PIXELS // 4, MAX_REGION_PIXELS // 4)
    )
    workers = Workers(1)
    try:
        return fastest(lambda: attention.attention(workers, query, key, value)) / (len(query) * len(key))
    finally:
        workers.close()


@dataclass(frozen=True)
class Share:
    """Seconds that a picture takes, and the attention's kernel in it."""

    seconds: float
    inside: float
    computed: Size
    """The picture, or the part of it from which its time was computed."""


def share(model: Path, size: Size, threads: int | None) -> Share:
    """Measure a picture, or the part of it that stands for it."""
    computed, regions = part(size)
    spent, inner = [0.0], Network.attended

    def timed(network: Network, *arrays: object) -> object:
        started = time.perf_counter()
        made = inner(network, *arrays)  # type: ignore[arg-type]
        spent[0] += time.perf_counter() - started
        return made

    with NativeBackend(model, RunOptions(threads)) as backend:
        x = network_input(picture(computed), backend.spec.architecture.value_range)
        backend.infer_with_regions(x[:, :, :64, :64], 1)
        Network.attended = timed  # type: ignore[assignment,method-assign]
        try:
            started = time.perf_counter()
            backend.infer_with_regions(x, regions)
            seconds, factor = time.perf_counter() - started, size.pixels / computed.pixels
            return Share(seconds * factor, spent[0] * factor, computed)
        finally:
            Network.attended = inner  # type: ignore[method-assign]


def part(size: Size) -> tuple[Size, int]:
    """Size and k of the regions of what is computed for a picture: itself, or some regions as large as its own."""
    regions = choose_regions(size.height, size.width)
    if size.pixels <= WHOLE_PIXELS:
        return size, regions
    width, height = (PART_REGIONS * -(-side // regions) for side in (size.width, size.height))
    return Size(width, height), PART_REGIONS


def main(
    model: Annotated[Path | None, typer.Option(help="Exported ONNX; else the bundled weights, C=32 and C=64.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's network (G=20, m=10), random weights.")] = False,
    scale: Annotated[int, typer.Option(help="Of the network, where --model is left out.")] = 2,
    size: Annotated[list[str], typer.Option(help="WIDTHxHEIGHT of whole pictures; may be repeated.")] = SIZES,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the pictures; all if left out.")] = None,
) -> None:
    """Print the kernel beside its limits for 4 and 8 inner channels (C=32, C=64), and its share of pictures."""
    for name, value in environment(threads).items():
        print(f"{name:<10}{value}")
    shown = Table(
        "inner channels", *(f"{name}, ps a pair" for name in ("powers", "products", "both", "kernel")), "x powers", "x both"
    )
    for channels in 4, 8:
        limit, took = limits(channels), kernel(channels)
        values = *(each * 1e12 for each in (limit.powers, limit.products, limit.both, took)), took / limit.powers
        shown.add_row(str(channels), *(f"{value:.1f}" for value in values), f"{took / limit.both:.2f}")
    console().print(shown)
    kinds = [WeightsKind.CLEAN] if model or paper else [WeightsKind.FAST, WeightsKind.CLEAN]
    for kind in kinds:
        with found_model(model, scale, paper, kind) as path:
            for each in map(Size.parse, size):
                found = share(path, each, threads)
                by = "" if found.computed == each else f" (computed from {found.computed} of it)"
                print(
                    f"{path.name}, {each}{by}: {found.seconds:.2f} s, of which attention {found.inside:.2f} s, "
                    f"{found.inside / found.seconds:.1%}"
                )


if __name__ == "__main__":
    run_command("attention", main)
