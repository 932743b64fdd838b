"""A folder of pictures end to end, and where its time goes: `python benchmarks/pipeline.py`.

The pictures go through twice: one step after the other, which gives each step's own time, and overlapped as in `sanrt run`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pyvips
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is its own folder, not the repository

from benchmarks.measure import environment, found_model, picture, run_command
from sanrt.arrays import Array
from sanrt.errors import PictureError, SanrtError, UsageError
from sanrt.runtime.backends.protocol import Backend, RunOptions
from sanrt.runtime.backends.registry import load_unguarded
from sanrt.runtime.pictures.codec import Encoding
from sanrt.runtime.pictures.jobs import Job, Naming, Replaceable, find_pictures
from sanrt.runtime.runs.pipeline import Outcome, PipelineOptions, Written, encoders, enlarge, read, run, write
from sanrt.runtime.runs.results import Recipe
from sanrt.runtime.runs.timing import Size
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.runtime.tiling.upscaling import NetworkRunner

STEPS = {
    "read": "decode",
    "convert": "convert, blend",
    "infer": "compute (and copies to a GPU)",
    "write": "encode",
}


@dataclass
class Stopwatch:
    """A backend with the time of its `infer` kept, for whatever regions."""

    backend: Backend
    seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        # Where there is an earlier one of these, the later ones call it.
        names = ("infer_reporting", "infer_with_regions", "infer")
        name = next(name for name in names if getattr(self.backend, name, None))
        setattr(self.backend, name, partial(self.timed, getattr(self.backend, name)))

    def timed(self, infer: Callable[..., Array], *arguments: Any) -> Array:
        """Call `infer`, and add its time to `seconds`."""
        started = time.perf_counter()
        try:
            return infer(*arguments)
        finally:
            self.seconds += time.perf_counter() - started


@dataclass(frozen=True)
class Measured:
    """One folder."""

    pixels: int
    """Pixels of all sources."""
    steps: dict[str, float]
    """Seconds of each of STEPS, one after the other."""
    overlapped: float
    """Seconds of the whole folder, overlapped."""

    @property
    def total(self) -> float:
        return sum(self.steps.values())

    @property
    def slowest(self) -> float:
        """Seconds of the slowest: the thread that decodes, the one that computes, those that encode together."""
        return max(self.steps["read"], self.steps["convert"] + self.steps["infer"], self.steps["write"] / encoders())

    @property
    def closeness(self) -> float:
        """Time of the slowest step over that of the overlapped run; 1 is as fast as it can be."""
        return self.slowest / self.overlapped


def pipeline(
    folder: Annotated[Path | None, typer.Argument(help="Pictures; generated PNG files if left out.")] = None,
    model: Annotated[Path | None, typer.Option(help="Exported ONNX; else models/'s, else the bundled weights.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's network (G=20, m=10), random weights.")] = False,
    backend: Annotated[str, typer.Option(help="What runs it.")] = "auto",
    tiling: Annotated[
        Tiling, typer.Option(help="As of `sanrt run`, but for exact: its stages are not timed.")
    ] = Tiling.AUTO,
    count: Annotated[int, typer.Option(min=1, help="Of the generated pictures.")] = 6,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the generated pictures.")] = "320x180",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the network; all if left out.")] = None,
) -> None:
    """Print each step's share, and how close the overlapped pipeline comes to its slowest step."""
    if tiling is Tiling.EXACT:
        raise UsageError("--tiling exact: its stages are not timed one by one; expected auto, whole or overlap")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        source = folder or generated(scratch / "pictures", count, Size.parse(size))
        jobs = find_pictures([source], scratch / "results", Naming())
        path = stack.enter_context(found_model(model, 4, paper))
        network = stack.enter_context(load_unguarded(backend, path, RunOptions(threads=threads)))
        found = measure(jobs, network, UpscaleOptions(tiling=tiling))
        subject = f"{path.name}, {network.name} on {network.device}, {network.spec.precision}"
    for name, value in environment(threads).items():
        print(f"{name:<10}{value}")
    print(f"\n{subject}: {len(jobs)} pictures, {found.pixels / 1e6:.2f} Mpx of input")
    for name, title in STEPS.items():
        print(f"{title:<30}{found.steps[name]:8.2f} s {found.steps[name] / found.total:7.1%}")
    print(f"{'one after the other':<30}{found.total:8.2f} s {len(jobs) / found.total:7.2f} pictures/s")
    print(f"{'overlapped':<30}{found.overlapped:8.2f} s {len(jobs) / found.overlapped:7.2f} pictures/s")
    print(f"slowest step / overlapped: {found.closeness:.0%}")


def generated(folder: Path, count: int, size: Size) -> Path:
    """A folder of PNG files."""
    folder.mkdir()
    pixels = picture(size)
    for index in range(count):
        pyvips.Image.new_from_array(pixels[:, :: -1 if index % 2 else 1].copy()).write_to_file(folder / f"{index}.png")
    return folder


def measure(jobs: list[Job], network: Backend, options: UpscaleOptions) -> Measured:
    """The pictures one step after the other, then overlapped; raises SanrtError when one of them fails."""
    recipe = Recipe.of(network.spec, None, options, Encoding())
    steps, runner = PipelineOptions(recipe), NetworkRunner(network, options)
    jobs = [replace(job, replaces=Replaceable.ANYTHING) for job in jobs]
    watch = Stopwatch(network)
    step_by_step(jobs[0], runner, steps)  # warms up, and does not count
    watch.seconds = 0.0
    done = [step_by_step(job, runner, steps) for job in jobs]
    infer = watch.seconds
    started = time.perf_counter()
    for outcome in run(jobs, runner, steps):
        require_written(outcome)
    overlapped = time.perf_counter() - started
    spent = {name: sum(each.seconds[name] for each in done) for name in ("read", "upscale", "write")}
    seconds = {"read": spent["read"], "convert": spent["upscale"] - infer, "infer": infer, "write": spent["write"]}
    return Measured(sum(each.pixels for each in done), seconds, overlapped)


def step_by_step(job: Job, runner: NetworkRunner, options: PipelineOptions) -> Written:
    """One picture; PictureError for one that would be streamed, as its stages are not timed one by one."""
    loaded = read(job, runner, options)
    if loaded.plan.tiling is Tiling.EXACT:
        raise PictureError(f"{job.source}: too large to be held in memory; expected pictures that are not streamed")
    return require_written(write(enlarge(loaded, runner), options))


def require_written(outcome: Outcome) -> Written:
    """The outcome of a picture that was written; SanrtError for any other."""
    if not isinstance(outcome, Written):
        raise SanrtError(getattr(outcome, "reason", f"{outcome.job.source}: was not written"))
    return outcome


if __name__ == "__main__":
    run_command("pipeline", pipeline)
