"""From picture files to upscaled picture files: three steps per picture, and the threads that overlap them.

The steps (`read`, `enlarge`, `write`) know nothing of threads, so that any scheduler can run them anywhere; `run` is the
one for a single machine.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np

from sanrt.errors import SanrtError
from sanrt.runtime import host as machine
from sanrt.runtime.pictures.codec import (
    Encoding,
    Output,
    PictureInfo,
    Pixels,
    SourcePicture,
    open_picture,
    plan_output,
    remove_leftovers,
    streamed_alpha,
    upscale_alpha,
    write_picture,
)
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.pictures.provenance import SourceIdentity, identify
from sanrt.runtime.pictures.scratch import ScratchPicture
from sanrt.runtime.pictures.storage import RemotePath, delivered, fetched, scratch_folder
from sanrt.runtime.runs.results import Recipe, appeared
from sanrt.runtime.tiling.plan import PAPER_REGIONS, Tiling, Way

log = logging.getLogger(__name__)

Upscale = Callable[[Pixels], Pixels]
"""RGB (H, W, 3) -> (sH, sW, 3) of the same type; how (whole, tiled, streamed) is its own affair."""
T = TypeVar("T")
R = TypeVar("R")

WAITING = 2
"""Upscaled pictures that wait for an encoder, at most: they are large."""
MOST_ENCODERS, CORES_PER_ENCODER = 4, 4
"""A GPU outruns one encoder; on few cores the network needs them itself."""


class Streamer(Protocol):
    """Upscales picture files without holding them in memory."""

    def way(self, height: int, width: int) -> Way:
        """How a picture of this size goes through the network; EXACT ones are streamed."""
        ...

    def stream(self, source: SourcePicture, result: ScratchPicture) -> None:
        """Upscale `source` into `result`."""
        ...


@dataclass(frozen=True)
class PipelineOptions:
    """What happens around the network."""

    recipe: Recipe
    """What the results say of their making, beside their sources."""
    encoding: Encoding = field(default_factory=Encoding)
    streamer: Streamer | None = None
    """Takes the pictures that are too large to be held in memory."""

    @property
    def scale(self) -> int:
        """Upscaling factor."""
        return self.recipe.scale

    def way(self, info: PictureInfo) -> Way | None:
        """How a picture goes through the network; None where nobody chose."""
        return self.streamer.way(info.height, info.width) if self.streamer else None


@dataclass(frozen=True)
class Loaded:
    """A picture in memory, and how its result will be written."""

    job: Job
    source: SourceIdentity
    output: Output
    rgb: Pixels | ScratchPicture | None
    """None until it is streamed: it is too large to be held."""
    alpha: Pixels | None
    """None also where it is read as it is written, as the colours are too large to be held."""
    notes: tuple[str, ...]
    way: Way | None = None
    """As the streamer chose."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What each step so far took."""


@dataclass(frozen=True)
class Written:
    """A result that is complete on disk."""

    job: Job
    pixels: int
    """Of the result."""
    notes: tuple[str, ...] = ()
    """What was not taken over from the source, one line each."""
    way: Way | None = None
    """How it went through the network."""
    source: SourceIdentity | None = field(default=None, compare=False)
    """What the picture was made from."""
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    """What each step took."""


@dataclass(frozen=True)
class Planned:
    """A result that a run would write."""

    job: Job
    width: int
    height: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A picture whose result was there already."""

    job: Job


@dataclass(frozen=True)
class Failed:
    """A picture that could not be read, upscaled or written; nothing of its result exists."""

    job: Job
    reason: str
    """One line that names the source."""


Outcome = Written | Planned | Skipped | Failed


def read(job: Job, options: PipelineOptions) -> Loaded:
    """Decode a picture whose result can be written; PictureError otherwise."""
    started = time.perf_counter()
    with fetched(job.source) as path, open_picture(path) as source:
        output = plan_output(source.info, job.destination, options.scale, options.encoding)
        identity = identify(path, job.source)
        output = replace(output, provenance=options.recipe.provenance(identity, output.format))
        way = options.way(source.info)
        streams = way is not None and way.tiling is Tiling.EXACT
        rgb = None if streams else source.rgb()
        alpha = source.alpha() if source.info.alpha and not streams else None
        notes = source.info.notes + output.notes + told(way)
        return Loaded(job, identity, output, rgb, alpha, notes, way, {"read": since(started)})


def told(way: Way | None) -> tuple[str, ...]:
    """A note on how a picture goes, if that is not as the paper's network would."""
    return (str(way),) if way and (way.tiling is not Tiling.WHOLE or way.regions != PAPER_REGIONS) else ()


def enlarge(picture: Loaded, upscale: Upscale, streamer: Streamer | None = None) -> Loaded:
    """The same picture with its colours upscaled."""
    started = time.perf_counter()
    rgb = upscale(picture.rgb) if isinstance(picture.rgb, np.ndarray) else streamed(picture, streamer)
    return replace(picture, rgb=rgb, seconds={**picture.seconds, "upscale": since(started)})


def streamed(picture: Loaded, streamer: Streamer | None) -> ScratchPicture:
    """The colours of a picture that is too large to be held, upscaled into a scratch file beside its destination."""
    assert streamer
    output = picture.output
    with fetched(picture.job.source) as path, open_picture(path) as source, ExitStack() as undo:
        result = ScratchPicture(output.width, output.height, 3, source.info.dtype.type, scratch_folder(output.path))
        undo.callback(result.close)
        streamer.stream(source, result)
        undo.pop_all()
        return result


def write(picture: Loaded, options: PipelineOptions) -> Written | Skipped:
    """Upscale the transparency, encode, and put the file in its place, unless another run did so meanwhile."""
    started, rgb, output = time.perf_counter(), picture.rgb, picture.output
    assert rgb is not None
    with ExitStack() as opened:
        alpha: Any = None
        if isinstance(rgb, ScratchPicture):
            opened.enter_context(rgb)
            if output.alpha or output.background:
                alpha = streamed_alpha(opened.enter_context(fetched(picture.job.source)), options.scale)
        elif picture.alpha is not None:
            alpha = upscale_alpha(picture.alpha, options.scale)
        if appeared(picture.job, options.recipe):
            return Skipped(picture.job)
        path = opened.enter_context(delivered(output.path))
        write_picture(replace(output, path=path), rgb, alpha)
    seconds = {**picture.seconds, "write": since(started)}
    return Written(picture.job, output.width * output.height, picture.notes, picture.way, picture.source, seconds)


def since(started: float) -> float:
    """Seconds, to the millisecond."""
    return round(time.perf_counter() - started, 3)


def run(jobs: Iterable[Job], upscale: Upscale, options: PipelineOptions) -> Generator[Outcome, None, None]:
    """Every job's outcome, in order, on this machine; what killed runs left in the destination folders is removed.

    Close the iterator to stop early: what is being written is finished, nothing half-written stays.
    """
    yield from overlapped(without_leftovers(jobs), upscale, options)


def encoders() -> int:
    """Threads that encode, a picture each."""
    return max(1, min(MOST_ENCODERS, machine.cores() // CORES_PER_ENCODER))


def overlapped(jobs: Iterable[Job], upscale: Upscale, options: PipelineOptions) -> Generator[Outcome, None, None]:
    """Every job's outcome, in order; the next picture is decoded and the last ones encoded while this thread computes."""

    def start(job: Job) -> Loaded | Skipped | Failed:
        return guarded(job, lambda: Skipped(job) if appeared(job, options.recipe) else read(job, options))

    def finish(picture: Loaded | Skipped | Failed) -> Outcome:
        return then(picture, lambda picture: write(picture, options))

    writers = encoders()
    reader, writer = ThreadPoolExecutor(1, "sanrt-read"), ThreadPoolExecutor(writers, "sanrt-write")
    writing: deque[Future[Outcome]] = deque()
    try:
        for reading in ahead(reader, start, jobs):
            enlarged = then(reading.result(), lambda picture: enlarge(picture, upscale, options.streamer))
            writing.append(writer.submit(finish, enlarged))
            while len(writing) >= WAITING + writers or (writing and writing[0].done()):
                yield writing.popleft().result()
        while writing:
            yield writing.popleft().result()
    finally:
        for pool in (reader, writer):
            pool.shutdown(wait=True, cancel_futures=True)


def plan(jobs: Iterable[Job], options: PipelineOptions) -> Generator[Planned | Failed, None, None]:
    """What `run` would do, as far as the pictures' headers tell."""
    for job in jobs:
        yield guarded(job, partial(planned, job, options))


def planned(job: Job, options: PipelineOptions) -> Planned:
    """The result that a picture's header promises; PictureError if it cannot be written."""
    with fetched(job.source) as path, open_picture(path) as source:
        output = plan_output(source.info, job.destination, options.scale, options.encoding)
        return Planned(job, output.width, output.height, source.info.notes + output.notes + told(options.way(source.info)))


def ahead(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T]) -> Iterator[Future[R]]:
    """The work of each item, in order, begun while the item before it was handled."""
    items = iter(items)
    begun = deque(pool.submit(work, item) for item in islice(items, 1))
    while begun:
        begun.extend(pool.submit(work, item) for item in islice(items, 1))
        yield begun.popleft()


def then(picture: Loaded | Skipped | Failed, step: Callable[[Loaded], R]) -> R | Skipped | Failed:
    """The next step of a picture that got this far; anything else stays what it is."""
    return guarded(picture.job, lambda: step(picture)) if isinstance(picture, Loaded) else picture


def guarded(job: Job, step: Callable[[], R]) -> R | Failed:
    """The step's result, or its failure in one line: a bad picture never stops the others."""
    try:
        return step()
    except SanrtError as error:
        return Failed(job, str(error) if str(job.source) in str(error) else f"{job.source}: {error}")
    except MemoryError:
        return Failed(job, f"{job.source}: not enough memory for it; free some")
    except Exception as error:
        log.debug("%s", job.source, exc_info=True)
        text = next(iter(str(error).splitlines()), "")
        return Failed(job, f"{job.source}: unexpected {type(error).__name__} ({text}); please report it, with --verbose")


def without_leftovers(jobs: Iterable[Job]) -> Iterator[Job]:
    """The jobs; what killed runs left in a destination folder is removed before its first one."""
    cleaned = set()
    for job in jobs:
        folder = job.destination.parent
        if folder not in cleaned and not isinstance(folder, RemotePath):
            cleaned.add(folder)
            remove_leftovers(folder)
        yield job
