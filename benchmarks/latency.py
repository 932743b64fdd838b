"""Latency of every way of running SAN that is installed here, side by side: `python benchmarks/latency.py`.

Candidates take turns, spread evenly over the whole time, so that whatever else the machine does hits all of them alike; each
lives in a process of its own. How to read the table: benchmarks/README.md.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is its own folder, not the repository

from benchmarks.contenders import AUTO, chosen
from benchmarks.measure import Limits, console, environment, found_model, operations, picture, run_command
from sanrt.errors import UsageError
from sanrt.extras import extra
from sanrt.model.spec import GRAPH_PRECISIONS, SCALES, Architecture, Precision
from sanrt.runtime.artifacts.models import read_spec
from sanrt.runtime.runs import latency as runs
from sanrt.runtime.runs.latency import Case, Contender, Result
from sanrt.runtime.runs.timing import Interval, Size, Worker
from sanrt.runtime.tiling.plan import PAPER_REGIONS, choose_regions

SIZES = ("160x90", "320x180")
GPU = "gpu "
"""Before a GPU's limits."""
LIKE = {Precision.INT16: Precision.BF16}
"""PyTorch multiplies no matrices of 16-bit integers: their limit is that of the other 16-bit type."""


@dataclass(frozen=True)
class Row:
    """A line of the table: what came of a contender, and how fast that is."""

    result: Result
    rate: float | None = None
    """Operations per second at p50; None where nothing was measured, as the next."""
    share: float | None = None
    """Rate over the measured limit of the CPU or GPU it ran on, in this precision; None also where that is not known."""


def latency(
    model: Annotated[Path | None, typer.Option(help="Exported ONNX; else models/'s, else the bundled weights.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's network (G=20, m=10), random weights.")] = False,
    scale: Annotated[int, typer.Option(help="Of the network, where --model is left out.")] = 4,
    backend: Annotated[
        list[str] | None, typer.Option(help="A backend, `auto` or a baseline; repeated. All if left out.")
    ] = None,
    precision: Annotated[list[Precision] | None, typer.Option(help="Of sanrt's backends; repeated.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="WIDTHxHEIGHT, repeated; 160x90 and 320x180 if left out.")] = None,
    regions: Annotated[
        str, typer.Option(help="k of the k x k attention regions, or auto: by the picture's size, as in `sanrt run`.")
    ] = str(PAPER_REGIONS),
    seconds: Annotated[float, typer.Option(min=0, help="Of measured runs in all.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all if left out.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw latency over size into this picture.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Print ratios to an earlier --json file.")] = None,
) -> None:
    """Measure backends x precisions x sizes; exit 1 when one of them failed."""
    if scale not in SCALES:
        raise UsageError(f"--scale {scale}: expected {', '.join(map(str, SCALES))}")
    require_writable(json_, plot)
    sizes = sorted({case(text, regions) for text in size or SIZES}, key=lambda each: each.pixels)
    contenders = chosen(backend or [], precision or [])
    old = read_report(compare) if compare else None
    before = environment(threads)
    with found_model(model, scale, paper) as path:
        arch = read_spec(path).architecture
        rows, limits = race(contenders, path, arch, sizes, seconds / len(sizes), threads)
        subject = f"{arch.name}, {path.name}"
    stamp = {**before, "load": f"{before['load']} at the start, {environment(threads)['load']} at the end"}
    show(subject, stamp, limits, rows)
    if old:
        console().print(comparison(subject, rows, old))
    if json_:
        json_.write_text(json.dumps(report(subject, stamp, limits, rows), indent=2) + "\n")
    if plot:
        draw(rows, subject, plot)
    raise typer.Exit(int(any(row.result.failed for row in rows)))


def case(size: str, regions: str) -> Case:
    """A size of the command line with its regions; raises UsageError."""
    parsed = Size.parse(size)
    if regions == "auto":
        return Case(parsed.width, parsed.height, choose_regions(parsed.height, parsed.width))
    if not regions.isdecimal() or not 1 <= int(regions) <= min(parsed.width, parsed.height) // 2:
        raise UsageError(f"--regions {regions}: expected auto, or a k of at least 1 whose regions have 2 x 2 pixels or more")
    return Case(parsed.width, parsed.height, int(regions))


def require_writable(report: Path | None, plot: Path | None) -> None:
    """Raise before anything is measured where the results could not be written afterwards."""
    for path in filter(None, (report, plot)):
        if not path.parent.is_dir():
            raise UsageError(f"{path}: its folder does not exist; expected one that does")
    if plot:
        with extra("training", "drawing --plot"):
            from matplotlib.figure import Figure
        known = Figure().canvas.get_supported_filetypes()
        if plot.suffix[1:] not in known:
            raise UsageError(f"--plot {plot}: unknown kind of picture; expected an ending of {', '.join(sorted(known))}")


def race(
    contenders: list[Contender], model: Path, arch: Architecture, sizes: list[Case], seconds: float, threads: int | None
) -> tuple[list[Row], dict[str, float]]:
    """Every contender on every size, from the smallest, and this machine's limits."""
    found: list[Result] = []
    with Worker(partial(Limits, threads)) as limit:
        limits = measure_limits(limit)
        reference = runs.in_precision("torch", None)
        for results in runs.race(contenders, reference, model, arch.value_range, picture, sizes, seconds, threads):
            # Again after the turns: the better of all is nearest to the machine's limit.
            limits = {name: max(value, limits[name]) for name, value in measure_limits(limit).items()}
            found += results
    return [row(result, arch, limits) for result in found], limits


def measure_limits(worker: Worker) -> dict[str, float]:
    """Operations per second of a matrix product by precision, bytes per second of a copy; a GPU's too where there is one."""
    products = {str(each): worker.call("product", each) for each in (Precision.FP32, Precision.BF16)}
    limits = {**products, "copy": worker.call("copy")}
    if worker.call("gpu"):
        limits |= {f"{GPU}{each}": worker.call("product", each, "cuda") for each in GRAPH_PRECISIONS}
        limits[f"{GPU}copy"] = worker.call("copy", "cuda")
    return limits


def row(result: Result, arch: Architecture, limits: dict[str, float]) -> Row:
    """The table's row of a result, given the limits of what it may have run on."""
    size, found = result.size, result.timing
    if found is None:
        return Row(result)
    rate = operations(arch, size, size.regions) / found.p50.value
    place = "" if found.on.endswith("CPU") else GPU
    limit = limits.get(f"{place}{LIKE.get(found.precision, found.precision)}")
    return Row(result, rate, rate / limit if limit else None)


def show(subject: str, stamp: dict[str, str], limits: dict[str, float], rows: list[Row]) -> None:
    """Print the environment, the limits and the table."""
    out = console()
    for name, value in stamp.items():
        out.print(Text(f"{name:<10}{value}"))
    products = ", ".join(f"{value / 1e9:.0f} GFLOP/s {name}" for name, value in limits.items() if "copy" not in name)
    copies = ", ".join(f"{value / 1e9:.1f} GB/s {name}" for name, value in limits.items() if "copy" in name)
    out.print(Text(f"{'limits':<10}{products} (matrix product), {copies} (read and written)\n"))
    out.print(table(subject, rows))
    for each in rows:
        if (result := each.result).reason:
            out.print(Text(f"{result.size} {result.name}: {result.reason}"))


def table(subject: str, rows: list[Row]) -> Table:
    """Rows for a terminal; times in milliseconds, pixels are the input's."""
    shown = Table(title=Text(subject))
    for heading in ("size", "backend", "runs"):
        shown.add_column(heading, no_wrap=True)
    rates = "pictures/s", "Mpx/s", "GFLOP/s", "of limit"
    for heading in ("p50, ms", "p90", "p99", *rates, "MiB", "GPU", "PSNR, dB", "x auto"):
        shown.add_column(heading, justify="right", no_wrap=True)
    results = [row.result for row in rows]
    base = {each.size: each.timing.p50.value for each in results if each.name == AUTO and each.timing}
    for each, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is None or following.result.size != each.result.size
        shown.add_row(*map(Text, cells(each, base.get(each.result.size))), end_section=last)
    return shown


def cells(row: Row, auto: float | None) -> list[str]:
    """A row's texts."""
    size, name, found = row.result.size, row.result.name, row.result.timing
    if found is None or row.rate is None:
        return [str(size), name, "failed" if row.result.failed else "left out"]
    return [
        str(size),
        name,
        f"{found.on.removesuffix(' on CPU')}, {found.precision}",
        f"{found.p50.value * 1e3:.1f} ({found.p50.low * 1e3:.1f}-{found.p50.high * 1e3:.1f})",
        f"{found.p90.value * 1e3:.1f}",
        f"{found.p99.value * 1e3:.1f}",
        f"{1 / found.p50.value:.2f}",
        f"{size.pixels / found.p50.value / 1e6:.3f}",
        f"{row.rate / 1e9:.0f}",
        f"{row.share:.0%}" if row.share is not None else "",
        f"{found.peak >> 20}",
        f"{found.gpu_memory >> 20}" if found.gpu_memory is not None else "",
        "equal" if found.psnr is None else f"{found.psnr:.1f}",
        f"{found.p50.value / auto:.2f}" if auto else "",
    ]


def report(subject: str, stamp: dict[str, str], limits: dict[str, float], rows: list[Row]) -> dict[str, Any]:
    """Everything, for --json."""
    return {"subject": subject, "environment": stamp, "limits": limits, "rows": list(map(listed, rows))}


def listed(row: Row) -> dict[str, Any]:
    """A row for --json."""
    result = row.result
    measured = {**asdict(result.timing), "rate": row.rate, "share": row.share} if result.timing else None
    return {
        "size": str(result.size),
        "name": result.name,
        "measured": measured,
        "reason": result.reason,
        "failed": result.failed,
    }


def read_report(path: Path) -> dict[str, Any]:
    """Read what --json wrote; raises UsageError for anything else."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return {"subject": found["subject"], "rows": {(each["size"], each["name"]): each for each in found["rows"]}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--compare {path}: not a report of this benchmark ({error}); make one with --json") from error


def comparison(subject: str, rows: list[Row], old: dict[str, Any]) -> Table:
    """p50 now and then, and its ratio to `auto`'s, for the rows that both runs have; apart where intervals do not touch.

    A machine that is slower as a whole moves all times, but not their ratios.
    """
    titles = "p50 then, ms", "p50 now, ms", "now / then", "", "x auto then", "x auto now", ""
    shown = Table("size", "backend", *titles, title=Text(f"then: {old['subject']}"))
    results = [row.result for row in rows]
    now = {(str(each.size), each.name): each.timing.p50 for each in results if each.timing}
    then = {key: Interval(**row["measured"]["p50"]) for key, row in old["rows"].items() if row["measured"]}
    for key in filter(then.__contains__, now):
        autos = now.get((key[0], AUTO)), then.get((key[0], AUTO))
        times = f"{then[key].value * 1e3:.1f}", f"{now[key].value * 1e3:.1f}", f"{now[key].value / then[key].value:.2f}"
        ratios: tuple[str, ...] = ()
        if autos[0] and autos[1] and key[1] != AUTO:
            slower = ratio(now[key], autos[0]), ratio(then[key], autos[1])
            ratios = f"{slower[1].value:.2f}", f"{slower[0].value:.2f}", agreement(*slower)
        shown.add_row(*map(Text, (*key, *times, agreement(now[key], then[key]), *ratios)))
    if subject != old["subject"]:
        shown.caption = "the networks differ"
    return shown


def ratio(a: Interval, b: Interval) -> Interval:
    """a / b, as far as both intervals allow."""
    return Interval(a.value / b.value, a.low / b.high, a.high / b.low)


def agreement(a: Interval, b: Interval) -> str:
    """Whether two intervals touch."""
    return "apart" if a.low > b.high or a.high < b.low else "within intervals"


def draw(rows: list[Row], subject: str, path: Path) -> None:
    """Latency over size, a line per contender, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6))
    axes = figure.subplots()
    results = [row.result for row in rows]
    for name in dict.fromkeys(each.name for each in results):
        points = [(each.size.pixels, each.timing.p50.value) for each in results if each.name == name and each.timing]
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="input pixels", ylabel="seconds, median", title=subject)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    run_command("latency", latency)
