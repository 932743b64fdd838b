"""A video end to end beside its network alone, memory over many frames, repeated frames: `python benchmarks/video.py`.

The clip is made here: a natural scene that moves, compressed by x264, with sound.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import psutil
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is its own folder, not the repository

from benchmarks.measure import environment, found_model, picture, run_command
from sanrt.errors import SanrtError
from sanrt.runtime.backends.protocol import Backend, RunOptions
from sanrt.runtime.backends.registry import load_unguarded
from sanrt.runtime.pictures.codec import Encoding
from sanrt.runtime.pictures.jobs import Job, Replaceable
from sanrt.runtime.runs import videos
from sanrt.runtime.runs.pipeline import Advanced, Event, Listener, PipelineOptions, Written, nobody
from sanrt.runtime.runs.results import Recipe
from sanrt.runtime.runs.timing import Size
from sanrt.runtime.tiling.options import UpscaleOptions
from sanrt.runtime.tiling.upscaling import NetworkRunner
from sanrt.runtime.video.container import ffmpeg, frames, look, picture_of

RATE = 25
TINY = Size(16, 16)
"""Frames of the clips that are timed, and of that by which memory is followed."""
ROWS = 10
"""Of the table of memory."""


@dataclass(frozen=True)
class Pace:
    """One clip, timed."""

    frames: int
    alone: float
    """Seconds of its frames through the network, one after the other, decoded before."""
    whole: float
    """Seconds from its file to the result's."""

    @property
    def share(self) -> float:
        """Frames per second end to end, by those of the network alone."""
        return self.alone / self.whole


def video(
    size: Annotated[Size, typer.Option(parser=Size.parse, help="Of a frame.")] = "160x90",  # type: ignore[assignment]
    count: Annotated[int, typer.Option(min=1, help="Frames.")] = 100,
    many: Annotated[int, typer.Option(min=0, help="Tiny frames by which memory is followed; 0 for none.")] = 10_000,
    codec: Annotated[str | None, typer.Option(help="Of the result.")] = None,
    preset: Annotated[str | None, typer.Option(help="Of its encoder.")] = None,
    scale: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    model: Annotated[Path | None, typer.Option(help="Instead of the exported or bundled one.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the network.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the network; all if left out.")] = None,
) -> None:
    """Measure and print."""
    for name, value in environment(threads).items():
        print(f"{name}: {value}")
    encoding = Encoding(codec=codec, preset=preset)
    with found_model(model, scale) as path, load_unguarded(backend, path, RunOptions(threads)) as network:
        print(f"{path.name} by {network.name} on {network.device}")
        with TemporaryDirectory() as folder:
            moving = clip(Path(folder, "moving.mp4"), size, count, repeated=1)
            pace = timed(moving, network, encoding)
            print(f"{pace.frames} frames of {size}: the network alone {pace.frames / pace.alone:.2f} frames/s")
            print(f"end to end {pace.frames / pace.whole:.2f} frames/s, {100 * pace.share:.0f} % of that")
            twice = clip(Path(folder, "twice.mp4"), size, count, repeated=2)
            seconds = run(twice, network, encoding)
            saved = 1 - seconds / pace.whole
            print(f"each frame shown twice: {seconds:.1f} s instead of {pace.whole:.1f} s, {saved:.0%} saved")
            if many:
                follow_memory(clip(Path(folder, "many.mp4"), TINY, many, repeated=1), network, encoding, many)


def clip(path: Path, size: Size, count: int, repeated: int) -> Path:
    """A scene that moves by two pixels a frame, each frame so many times; lossless, so that repeated ones are equal."""
    av = ffmpeg()
    scene = picture(size)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"qp": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = size.width, size.height, "yuv420p"
        for number in range(count):
            moved = np.roll(scene, 2 * (number // repeated), axis=1)
            frame = av.VideoFrame.from_ndarray(moved, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def timed(source: Path, network: Backend, encoding: Encoding) -> Pace:
    """A clip's frames through the network alone, and the clip end to end, after a run that does not count."""
    info, runner = look(source), NetworkRunner(network)
    pictures = [picture_of(found.frame, info) for found in frames(info)]
    plan = runner.decide_array(info.height, info.width)
    run(source, network, encoding)
    began = time.perf_counter()
    for rgb in pictures:
        _, plan = runner.run_array(plan, rgb)
    return Pace(len(pictures), time.perf_counter() - began, run(source, network, encoding))


def run(source: Path, network: Backend, encoding: Encoding, listener: Listener = nobody) -> float:
    """Seconds of a clip from its file to the result's."""
    recipe = Recipe.of(network.spec, None, UpscaleOptions(), encoding)
    job = Job(source, source.with_name(f"{source.stem}_large.mp4"), Replaceable.ANYTHING)
    began = time.perf_counter()
    (outcome,) = videos.run([job], NetworkRunner(network), PipelineOptions(recipe, encoding), listener)
    if not isinstance(outcome, Written):
        raise SanrtError(getattr(outcome, "reason", f"{source}: was not written"))
    return time.perf_counter() - began


def follow_memory(source: Path, network: Backend, encoding: Encoding, count: int) -> None:
    """Print what the process holds as a clip goes by."""
    print(f"{'frames':>8} {'MiB':>8}")
    run(source, network, encoding, told_memory(count))


def told_memory(count: int) -> Callable[[Event], None]:
    """A listener that prints the resident memory ten times in so many frames."""
    process, done = psutil.Process(), 0

    def hear(event: Event) -> None:
        nonlocal done
        if isinstance(event, Advanced):
            done += 1
            if done % max(1, count // ROWS) == 0:
                print(f"{done:8} {process.memory_info().rss / 2**20:8.0f}", flush=True)

    return hear


if __name__ == "__main__":
    run_command("video", video)
