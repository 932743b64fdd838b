"""What `sanrt plan` says that a picture takes, and what `sanrt run` then takes: `python benchmarks/estimates.py`.

Every run is a process of its own, whose seconds are those of its record and whose largest memory the system tells.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import pyvips
import typer
from rich.table import Table
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is its own folder, not the repository

from benchmarks.measure import console, environment, found_model, picture, run_alone, run_command
from sanrt.cli.request import memory_size
from sanrt.errors import BackendError, UsageError
from sanrt.model.spec import parse_precision
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_unguarded
from sanrt.runtime.pictures.codec import Encoding
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.runs.estimate import LoadedProcess, PictureEstimate, costs_of, picture_estimate
from sanrt.runtime.runs.timing import Size, Worker
from sanrt.runtime.tiling.options import UpscaleOptions

BACKENDS = ["native", "onnxruntime", "openvino"]
SIZES = "384x256,576x384,768x512,1152x768,1536x1024,2112x1408,3000x2000,4256x2832,6000x4000,8448x5632"
"""0.1 to 48 megapixels, each with about twice the pixels of the one before."""
MOST_PIXELS = 12_500_000
"""Of pictures for other backends than native, which take minutes for larger ones."""
LEAVE = 1.25
"""A run begins only where the time left is so many times what it asks for."""

NEAR = 0.25
"""How far asked over taken may lie from 1."""


@dataclass(frozen=True)
class Row:
    """One picture on one backend."""

    backend: str
    size: str
    plan: str = ""
    asked_seconds: float = 0.0
    asked_memory: int = 0
    """Bytes, as the next."""
    asked_scratch: int = 0
    measured: bool = False
    """Whether it was run; else the next four are empty."""
    seconds: float = 0.0
    """Of reading, upscaling and writing."""
    wall: float = 0.0
    """Seconds of the whole process."""
    cpu: float = 0.0
    """The same of all its threads."""
    memory: int = 0
    """Bytes resident at most."""
    reason: str = ""
    """Why it was not run."""
    failed: bool = False

    @property
    def time_ratio(self) -> float:
        """Asked over taken, as the next."""
        return self.asked_seconds / self.seconds

    @property
    def memory_ratio(self) -> float:
        return self.asked_memory / self.memory


class Planner:
    """A loaded backend in a process of its own, which plans."""

    def __init__(self, backend: str, model: Path, loading: RunOptions, options: UpscaleOptions) -> None:
        self.network, self.options = load_unguarded(backend, model, loading), options
        self.loaded, self.costs = LoadedProcess.this(), cache(partial(costs_of, self.network, model, loading))

    def estimate(self, source: Path, destination: Path) -> PictureEstimate:
        """As `sanrt plan` has it."""
        job = Job(source, destination)
        return picture_estimate(job, self.network, self.costs, self.options, Encoding(), self.loaded)


class Pictures:
    """Makes pictures in a process of its own, which may become large."""

    def save(self, size: Size, path: Path) -> None:
        """Write a picture with natural statistics."""
        pyvips.Image.new_from_array(picture(size)).write_to_file(str(path), compression=1)


def estimated(
    model: Annotated[Path | None, typer.Option(help="Exported ONNX; else models/'s, else the bundled weights.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's network (G=20, m=10), random weights.")] = False,
    scale: Annotated[int, typer.Option(help="Of the network, where --model is left out.")] = 2,
    backend: Annotated[list[str], typer.Option(help="NAME or NAME:PRECISION; may be repeated.")] = BACKENDS,
    sizes: Annotated[str, typer.Option(help="WIDTHxHEIGHT, with commas between.")] = SIZES,
    minutes: Annotated[float, typer.Option(help="Leave out runs that would take longer than is left of these.")] = 15,
    memory: Annotated[str | None, typer.Option(help="--memory of the runs; most of what is free if left out.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all if left out.")] = None,
    folder: Annotated[Path | None, typer.Option(help="For pictures and scratch files; the system's if left out.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """Print what was asked for and taken, and the largest error of both; exit 1 when a run failed."""
    listed, end = [Size.parse(text) for text in sizes.split(",")], time.monotonic() + 60 * minutes
    if minutes <= 0:
        raise UsageError(f"--minutes {minutes}: expected more than 0")
    before = environment(threads)
    rows: list[Row] = []
    with found_model(model, scale, paper) as path, TemporaryDirectory(dir=folder) as name:
        options = UpscaleOptions(memory=memory_size(memory) if memory else None)
        for row in measured(path, backend, listed, threads, options, memory, Path(name), end):
            rows.append(row)
            print(line(row), flush=True)
    stamp = {**before, "load": f"{before['load']} at the start, {environment(threads)['load']} at the end"}
    for each, value in stamp.items():
        print(f"{each:<10}{value}")
    console().print(table(rows))
    console().print(Text(summary(rows)))
    if json_:
        json_.write_text(json.dumps({"environment": stamp, "rows": list(map(asdict, rows))}, indent=2) + "\n")
    raise typer.Exit(int(any(row.failed for row in rows)))


def measured(
    model: Path,
    backends: list[str],
    sizes: list[Size],
    threads: int | None,
    options: UpscaleOptions,
    memory: str | None,
    folder: Path,
    end: float,
) -> Iterator[Row]:
    """A row per size and backend, the backends of one size one after the other."""
    with ExitStack() as stack:
        planners = {}
        for each in backends:
            name, _, precision = each.partition(":")
            loading = RunOptions(threads, parse_precision(precision) if precision else None)
            planners[each] = stack.enter_context(Worker(partial(Planner, name, model, loading, options)))
        for size in sizes:
            source = folder / f"{size}.png"
            with Worker(Pictures) as maker:
                maker.call("save", size, source)
            for each, planner in planners.items():
                if size.pixels > MOST_PIXELS and each.partition(":")[0] != "native":
                    continue
                named = ["--model", str(model), *(["--threads", str(threads)] if threads else [])]
                named += ["--memory", memory] if memory else []
                yield row(each, size, planner, source, folder / f"{size}.out.png", named, end)
            source.unlink()


def row(backend: str, size: Size, planner: Worker, source: Path, destination: Path, named: list[str], end: float) -> Row:
    """Ask, then run where the time suffices."""
    try:
        asked: PictureEstimate = planner.call("estimate", source, destination)
    except BackendError as error:
        return Row(backend, str(size), reason=str(error), failed=True)
    if asked.refusal:
        return Row(backend, str(size), reason=asked.refusal)
    plan = Row(backend, str(size), str(asked.plan), asked.seconds, asked.memory, asked.scratch)
    left = end - time.monotonic()
    if asked.seconds * LEAVE > left:
        return replace(plan, reason=f"it asks for {asked.seconds:.0f} s, {max(left, 0):.0f} s are left of --minutes")
    name, _, precision = backend.partition(":")
    record = destination.with_suffix(".jsonl")
    command = [sys.executable, "-m", "sanrt", "run", str(source), str(destination), "--quiet", "--backend", name, *named]
    command += ["--overwrite", "--record", str(record), *(["--precision", precision] if precision else [])]
    run = run_alone(command)
    if run.status:
        return replace(plan, reason=run.problem[-200:] or f"exit status {run.status}", failed=True)
    seconds = sum(json.loads(record.read_text())["seconds"].values())
    for path in destination, record:
        path.unlink()
    return replace(plan, measured=True, seconds=seconds, wall=run.wall, cpu=run.cpu, memory=run.peak)


def line(row: Row) -> str:
    """A row as it comes."""
    asked = f"{row.backend} {row.size}: asked {row.asked_seconds:.1f} s, {row.asked_memory / 2**20:.0f} MiB"
    if not row.measured:
        return f"{asked}; {'failed' if row.failed else 'left out'}: {row.reason}"
    return f"{asked}; took {row.seconds:.1f} s ({row.cpu:.1f} CPU s), {row.memory / 2**20:.0f} MiB"


def table(rows: list[Row]) -> Table:
    """What was asked for and taken; of runs that were made."""
    shown = Table("backend", "size", "plan")
    for heading in ("asked, s", "took, s", "ratio", "wall, s", "CPU, s", "asked, MiB", "took, MiB", "ratio", "scratch, MiB"):
        shown.add_column(heading, justify="right")
    for each in rows:
        asked = f"{each.asked_seconds:.1f}", f"{each.asked_memory >> 20}"
        if not each.measured:
            shown.add_row(each.backend, each.size, Text(each.plan), asked[0], "", "", "", "", asked[1])
            continue
        times = f"{each.seconds:.1f}", f"{each.time_ratio:.2f}", f"{each.wall:.1f}", f"{each.cpu:.1f}"
        sizes = f"{each.memory >> 20}", f"{each.memory_ratio:.2f}", f"{each.asked_scratch >> 20}"
        shown.add_row(each.backend, each.size, Text(each.plan), asked[0], *times, asked[1], *sizes)
    return shown


def summary(rows: list[Row]) -> str:
    """How far apart the ratios of asked to taken lie."""
    ratios = [(each.time_ratio, each.memory_ratio) for each in rows if each.measured]
    if not ratios:
        return "nothing was measured"
    (least, most), (small, large) = ((min(each), max(each)) for each in zip(*ratios, strict=True))
    near = [sum(abs(ratio - 1) <= NEAR for ratio in each) / len(ratios) for each in zip(*ratios, strict=True)]
    return (
        f"asked / took: time {least:.2f} to {most:.2f} ({near[0]:.0%} within {NEAR:.0%}), "
        f"memory {small:.2f} to {large:.2f} ({near[1]:.0%}), of {len(ratios)} runs"
    )


if __name__ == "__main__":
    run_command("estimates", estimated)
