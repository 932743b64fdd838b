"""Time and peak memory over picture size, whole and exact, with the fitted growth: `python benchmarks/scaling.py`.

Every picture is measured in a process of its own: from 64 x 64 on, each with `--step` times the pixels of the last, up to
the largest. Several backends in one run, and a plot of them all: `--backend native:int16 --backend openvino --plot a.png`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from rich.table import Table
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is its own folder, not the repository

from benchmarks.measure import console, environment, found_model, picture, run_command
from sanrt.errors import BackendError, UsageError
from sanrt.extras import extra
from sanrt.model.spec import parse_precision
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_unguarded
from sanrt.runtime.runs.timing import Size, Worker, peak_memory
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.runtime.tiling.plan import PAPER_REGIONS
from sanrt.runtime.tiling.upscaling import upscale

SMALLEST = 64
TILINGS = (Tiling.WHOLE, Tiling.EXACT)
AUTO = ["auto"]
LEAST_POINTS = 3
"""Fewest pictures that a growth is fitted to."""


@dataclass(frozen=True)
class Point:
    """One picture, upscaled with one tiling."""

    tiling: Tiling
    size: Size
    seconds: float
    idle: int
    """Bytes resident at most before the picture."""
    peak: int
    """Bytes resident at most, of the whole process."""


class Upscaling:
    """A loaded backend in a process of its own."""

    def __init__(self, backend: str, model: Path, run_options: RunOptions, options: UpscaleOptions) -> None:
        self.network, self.options = load_unguarded(backend, model, run_options), options

    def upscale(self, pixels: npt.NDArray[np.uint8]) -> tuple[float, int, int]:
        """Seconds, and the peak memory before and after."""
        idle = peak_memory()
        upscale(self.network, pixels[:SMALLEST, :SMALLEST], self.options)  # loads what is loaded late; does not count
        started = time.perf_counter()
        upscale(self.network, pixels, self.options)
        return time.perf_counter() - started, idle, peak_memory()


def scaling(
    model: Annotated[Path | None, typer.Option(help="Exported ONNX; else models/'s, else the bundled weights.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's network (G=20, m=10), random weights.")] = False,
    scale: Annotated[int, typer.Option(help="Of the network, where --model is left out.")] = 4,
    backend: Annotated[list[str], typer.Option(help="NAME or NAME:PRECISION of what runs it; may be repeated.")] = AUTO,
    largest: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the last picture.")] = "4096x4096",
    step: Annotated[int, typer.Option(help="2 or 4: how many times the pixels the next picture has.")] = 2,
    minutes: Annotated[
        float, typer.Option(help="Of all; each backend and tiling stops before a picture that would exceed its share.")
    ] = 5,
    regions: Annotated[int | None, typer.Option(min=1, help="k of the regions; by the picture's size if left out.")] = None,
    tile: Annotated[int | None, typer.Option(min=16, help="Side of exact tiles; by the memory if left out.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all if left out.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of time and memory per pixel, to be written.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """Print a line per picture, and the fitted growth of time and memory."""
    last, deadline = Size.parse(largest), time.monotonic() + 60 * minutes
    if minutes <= 0:
        raise UsageError(f"--minutes {minutes:g}: expected more than 0")
    if step not in (2, 4):
        raise UsageError(f"--step {step}: expected 2 or 4")
    stamp = environment(threads)
    for name, value in stamp.items():
        print(f"{name:<10}{value}")
    found: dict[str, list[Point]] = {}
    with found_model(model, scale, paper) as path:
        for number, (each, tiling) in enumerate(series := list(product(backend, TILINGS))):
            name, _, precision = each.partition(":")
            options = UpscaleOptions(tiling=tiling, tile=tile if tiling is Tiling.EXACT else None, regions=regions)
            run_options = RunOptions(threads, parse_precision(precision) if precision else None, regions or PAPER_REGIONS)
            share = (deadline - time.monotonic()) / (len(series) - number)
            points, end = measure(partial(Upscaling, name, path, run_options, options), tiling, sizes(last, step), share)
            found[f"{each}, {tiling}"] = points
            console().print(Text(each), table(points), Text(f"{end}; {growth(points)}\n"))
    if json_:
        rows = {name: [{**asdict(each), "size": str(each.size)} for each in points] for name, points in found.items()}
        json_.write_text(json.dumps({"environment": stamp, "points": rows}, indent=2) + "\n")
    if plot:
        draw(found, plot)
    raise typer.Exit(int(not all(found.values())))


def draw(found: dict[str, list[Point]], path: Path) -> None:
    """Time and memory per input pixel over the number of pixels; a colour for each backend, dashed where exact."""
    with extra("training", f"{path}: a plot"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels: dict[str, Callable[[Point], float]] = {
        "microseconds per pixel": lambda point: point.seconds / point.size.pixels * 1e6,
        "bytes per pixel above idle": lambda point: (point.peak - point.idle) / point.size.pixels,
    }
    backends = list(dict.fromkeys(name.rpartition(", ")[0] for name in found))
    for axes, (label, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, points in found.items():
            backend, _, tiling = name.rpartition(", ")
            shown = [point for point in points if value(point) > 0]  # the smallest pictures fit into what was held before
            style = {"color": f"C{backends.index(backend)}", "linestyle": "--" if tiling == Tiling.EXACT else "-"}
            axes.plot([each.size.pixels for each in shown], list(map(value, shown)), marker=".", label=name, **style)
        axes.set(xscale="log", yscale="log", xlabel="input pixels", ylabel=label)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def measure(
    make: Callable[[], Upscaling], tiling: Tiling, wanted: Iterable[Size], seconds: float
) -> tuple[list[Point], str]:
    """Pictures of these sizes, smallest first, as long as they take no more than `seconds` in all; why there are no more."""
    points: list[Point] = []
    begun, opening = time.monotonic(), 0.0
    for size in wanted:
        left = seconds - (time.monotonic() - begun)
        if points and (next_seconds := predicted(points, size) + opening) > left:
            return points, f"{size} would take {next_seconds:.0f} s of the {max(left, 0):.0f} left of its share of --minutes"
        started = time.monotonic()
        try:
            with Worker(make) as worker:
                points.append(Point(tiling, size, *worker.call("upscale", picture(size))))
        except BackendError as error:
            return points, f"{size} failed: {error}"
        opening = time.monotonic() - started - points[-1].seconds
    return points, "stopped at --largest"


def predicted(points: list[Point], size: Size) -> float:
    """Seconds of a size, by how time grew over the last two, at least with the pixels."""
    last = points[-2:]
    growth = exponent([each.size.pixels for each in last], [each.seconds for each in last]) if len(last) > 1 else 1.0
    return float(points[-1].seconds * (size.pixels / points[-1].size.pixels) ** max(growth, 1.0))


def sizes(largest: Size, step: int = 2) -> Iterator[Size]:
    """64x64, 128x64, 128x128 and so on, or every second of them, up to the largest, which comes last."""
    width = height = SMALLEST
    while width * height < largest.pixels:
        yield Size(width, height)
        wide = step == 2 and width == height
        width, height = (2 * width, height) if wide else (max(width, 2 * height), 2 * height)
    yield largest


def table(points: list[Point]) -> Table:
    """A line per picture; pixels are the input's."""
    shown = Table("tiling", "size")
    for heading in ("seconds", "us/pixel", "peak, MiB", "above idle, MiB", "bytes/pixel"):
        shown.add_column(heading, justify="right")
    for each in points:
        own, pixels = each.peak - each.idle, each.size.pixels
        values = each.seconds, each.seconds / pixels * 1e6, each.peak / 2**20, own / 2**20, own / pixels
        texts = [f"{value:.{digits}f}" for value, digits in zip(values, (3, 2, 0, 0, 0), strict=True)]
        shown.add_row(str(each.tiling), str(each.size), *texts)
    return shown


def growth(points: list[Point]) -> str:
    """Exponents over pixels, fitted to the larger half of the pictures: 1 is linear."""
    larger = points[len(points) // 2 :] if len(points) >= 2 * LEAST_POINTS else points
    if len(larger) < LEAST_POINTS:
        return "too few pictures for a fit"
    pixels = [each.size.pixels for each in larger]
    time_growth = exponent(pixels, [each.seconds for each in larger])
    memory = exponent(pixels, [max(each.peak - each.idle, 1) for each in larger])
    return f"time grows with pixels^{time_growth:.2f}, memory above idle with pixels^{memory:.2f}"


def exponent(x: list[int], y: list[float] | list[int]) -> float:
    """b of the power law y = a x^b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


if __name__ == "__main__":
    run_command("scaling", scaling)
