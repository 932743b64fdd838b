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
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sanrt.errors import LargeEnoughError, PictureError, SanrtError
from sanrt.extras import tracker
from sanrt.files import file_digest, remove_leftovers
from sanrt.runtime import host as machine
from sanrt.runtime.pictures.codec import (
    Encoding,
    Output,
    PictureInfo,
    Pixels,
    open_picture,
    plan_output,
    streamed_alpha,
    upscale_alpha,
    write_picture,
)
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.pictures.provenance import SourceIdentity, identify, read_mark, require_unchanged
from sanrt.runtime.pictures.scratch import ScratchPicture
from sanrt.runtime.pictures.storage import RemotePath, delivered, fetched, scratch_folder
from sanrt.runtime.pictures.transparency import fill_hidden
from sanrt.runtime.runs.results import Recipe, appeared
from sanrt.runtime.tiling.options import Tiling
from sanrt.runtime.tiling.plan import PAPER_REGIONS, TilingPlan
from sanrt.runtime.tiling.upscaling import NetworkRunner

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

WAITING = 2
"""Upscaled pictures that wait for an encoder, at most: they are large."""
MOST_ENCODERS, CORES_PER_ENCODER = 4, 4
"""A GPU outruns one encoder; on few cores the network needs them itself."""


@dataclass(frozen=True)
class PipelineOptions:
    """What happens around the network."""

    recipe: Recipe
    """What the results say of their making, beside their sources."""
    encoding: Encoding = field(default_factory=Encoding)
    digests: bool = False
    """Whether the results' digests are wanted, for a record."""

    @property
    def scale(self) -> int:
        """Upscaling factor."""
        return self.recipe.scale


@dataclass(frozen=True)
class Loaded:
    """A picture in memory, and how its result will be written."""

    job: Job
    source: SourceIdentity
    output: Output
    rgb: Pixels | ScratchPicture | None
    """None until it is streamed: it is too large to be held in memory."""
    alpha: Pixels | None
    """None also where it is read as it is written, as the colours are too large to be held."""
    notes: tuple[str, ...]
    """What is not taken over from the source, one line each."""
    plan: TilingPlan
    """How it goes through the network; once it is enlarged, how it really went."""
    pixels: int = 0
    """Of the source."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What each step so far took."""


@dataclass(frozen=True)
class Written:
    """A result that is complete on disk."""

    job: Job
    pixels: int
    """Pixels of the source, as the benchmarks count."""
    notes: tuple[str, ...] = ()
    """What was not taken over from the source, one line each."""
    plan: TilingPlan | None = field(default=None, compare=False)
    """How it really went through the network, after an out-of-memory too."""
    source: SourceIdentity | None = field(default=None, compare=False)
    """What the picture was made from."""
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    """What each step took."""
    digest: str | None = field(default=None, compare=False)
    """SHA-256 of the result's file as it was written, where that was wanted."""
    frames: int = 0
    """Of a video, as far as this run made them."""


@dataclass(frozen=True)
class Planned:
    """A result that a run would write."""

    job: Job
    width: int
    height: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A picture whose result was there already, or that needs none."""

    job: Job
    reason: str = ""
    """One line that names the source, where its result is not there."""


@dataclass(frozen=True)
class Failed:
    """A picture that could not be read, upscaled or written; nothing of its result exists."""

    job: Job
    reason: str
    """One line that names the source."""


Outcome = Written | Planned | Skipped | Failed


@dataclass(frozen=True)
class Opened:
    """A picture's header was read."""

    job: Job
    pixels: int
    """Pixels of the source: what its work is measured by."""
    frames: int = 0
    """Of a video, as far as they are to be made."""


@dataclass(frozen=True)
class Advanced:
    """A part of a picture went through the network."""

    job: Job
    share: float
    """Of the picture; negative where it must be done again in smaller tiles."""


@dataclass(frozen=True)
class Finished:
    """A picture's outcome is certain; a result is on disk."""

    outcome: Outcome


Event = Opened | Advanced | Finished
Listener = Callable[[Event], None]
"""Told what happens to the pictures as it happens, from several threads."""


def nobody(event: Event) -> None:
    """Listen to nothing."""


def read(job: Job, runner: NetworkRunner, options: PipelineOptions, listener: Listener = nobody) -> Loaded:
    """Decode a picture whose result can be made and written; anything else is refused before a pixel is decoded.

    Raises PictureError, and BackendError or UsageError where the backend cannot take it.
    """
    started = time.perf_counter()
    with fetched(job.source) as path, open_picture(path) as source:
        listener(Opened(job, pixels := source.info.width * source.info.height))
        output = plan_output(source.info, job.destination, options.scale, options.encoding)
        plan = runner.decide(source.info)
        identity = identify(path, job.source)
        made = options.recipe.provenance(identity, output.format)
        output = replace(output, provenance=made)
        streams = plan.tiling is Tiling.EXACT
        rgb = None if streams else source.rgb()
        alpha = source.alpha() if source.info.alpha and not streams else None
        if rgb is not None and alpha is not None and not runner.options.keep_hidden:
            rgb = fill_hidden(rgb, alpha)
        notes = picture_notes(source.info, path, output)
        require_unchanged(identity, path, job.source)
        return Loaded(job, identity, output, rgb, alpha, notes, plan, pixels, {"read": since(started)})


def picture_notes(info: PictureInfo, path: Path, output: Output) -> tuple[str, ...]:
    """What is not taken over from a source, as its header tells, and that sanrt made it."""
    return info.notes + result_note(path) + output.notes


def result_note(path: Path) -> tuple[str, ...]:
    """A note on a source that sanrt made: enlarging a result again is seldom meant."""
    mark = read_mark(path)
    return (f"its source is itself a result of sanrt, made at x{mark.provenance.scale}",) if mark else ()


def tiling_note(plan: TilingPlan) -> tuple[str, ...]:
    """A note on how a picture goes, if that is not as the paper's network would: whole, in 2 x 2 regions."""
    return (str(plan),) if plan.tiling is not Tiling.WHOLE or plan.regions != PAPER_REGIONS else ()


def enlarge(picture: Loaded, runner: NetworkRunner, listener: Listener = nobody) -> Loaded:
    """The same picture with its colours upscaled, and the plan that really ran."""

    def progress(share: float) -> None:
        listener(Advanced(picture.job, share))

    started = time.perf_counter()
    folder = scratch_folder(picture.output.path)
    rgb: Pixels | ScratchPicture
    if picture.rgb is None:
        with fetched(picture.job.source) as path, open_picture(path) as source:
            rgb, plan = runner.run_file(picture.plan, source, folder, progress)
            try:
                require_unchanged(picture.source, path, picture.job.source)
            except PictureError:
                rgb.close()
                raise
    else:
        assert isinstance(picture.rgb, np.ndarray)
        rgb, plan = runner.run_array(picture.plan, picture.rgb, progress, folder)
    return replace(picture, rgb=rgb, plan=plan, seconds={**picture.seconds, "upscale": since(started)})


class AlreadyWrittenError(Exception):
    """Another run wrote this very result meanwhile."""


def write(picture: Loaded, options: PipelineOptions) -> Written | Skipped:
    """Upscale the transparency, encode, and put the file in its place, unless another run did so meanwhile."""
    started, rgb, output = time.perf_counter(), picture.rgb, picture.output
    assert rgb is not None
    streamed: Path | None = None

    def look_again() -> None:
        if streamed:
            require_unchanged(picture.source, streamed, picture.job.source)
        if appeared(picture.job, options.recipe):
            raise AlreadyWrittenError

    try:
        with ExitStack() as opened:
            alpha: Any = None
            if isinstance(rgb, ScratchPicture):
                opened.enter_context(rgb)
                if output.alpha or output.background:
                    streamed = opened.enter_context(fetched(picture.job.source))
                    alpha = streamed_alpha(streamed, options.scale)
            elif picture.alpha is not None:
                alpha = upscale_alpha(picture.alpha, options.scale)
            path = opened.enter_context(delivered(output.path))
            write_picture(replace(output, path=path), rgb, alpha, look_again)
            digest = file_digest(path, "run again") if options.digests else None
    except AlreadyWrittenError:
        return Skipped(picture.job)
    seconds = {**picture.seconds, "write": since(started)}
    notes = picture.notes + tiling_note(picture.plan)
    return Written(picture.job, picture.pixels, notes, picture.plan, picture.source, seconds, digest)


def since(started: float) -> float:
    """Seconds, to the millisecond."""
    return round(time.perf_counter() - started, 3)


def run(
    jobs: Iterable[Job], runner: NetworkRunner, options: PipelineOptions, listener: Listener = nobody
) -> Generator[Outcome, None, None]:
    """Every job's outcome, in order, on this machine; what killed runs left in the destination folders is removed.

    Close the iterator to stop early: what is being written is finished, nothing half-written stays. After an interrupt the
    outcomes of what is on disk still come, then the KeyboardInterrupt.
    """
    yield from overlapped(without_leftovers(jobs), runner, options, listener)


def encoders() -> int:
    """Threads that encode, a picture each."""
    return max(1, min(MOST_ENCODERS, machine.cores() // CORES_PER_ENCODER))


def overlapped(
    jobs: Iterable[Job], runner: NetworkRunner, options: PipelineOptions, listener: Listener = nobody
) -> Generator[Outcome, None, None]:
    """Every job's outcome, in order; the next picture is decoded and the last ones encoded while this thread computes."""

    def start(job: Job) -> Loaded | Skipped | Failed:
        return guarded(job, lambda: Skipped(job) if appeared(job, options.recipe) else read(job, runner, options, listener))

    def finish(picture: Loaded | Skipped | Failed) -> Outcome:
        outcome = then(picture, lambda picture: write(picture, options))
        listener(Finished(outcome))
        return outcome

    writers = encoders()
    reader, writer = ThreadPoolExecutor(1, "sanrt-read"), ThreadPoolExecutor(writers, "sanrt-write")
    writing: deque[Future[Outcome]] = deque()

    def oldest() -> Outcome:
        outcome = writing[0].result()  # an interrupt may come here; it is told all the same
        writing.popleft()
        return outcome

    try:
        for reading in ahead(reader, start, jobs):
            enlarged = then(reading.result(), lambda picture: enlarge(picture, runner, listener))
            writing.append(writer.submit(finish, enlarged))
            while len(writing) >= WAITING + writers or (writing and writing[0].done()):
                yield oldest()
        while writing:
            yield oldest()
    except KeyboardInterrupt:
        for pool in (reader, writer):
            pool.shutdown(wait=True, cancel_futures=True)
        yield from (future.result() for future in writing if not future.cancelled())
        raise
    finally:
        for pool in (reader, writer):
            pool.shutdown(wait=True, cancel_futures=True)


def preview(
    jobs: Iterable[Job], runner: NetworkRunner | None, options: PipelineOptions
) -> Generator[Planned | Skipped | Failed, None, None]:
    """What `run` would do, as far as the pictures' headers tell; without a runner nothing is said of tiles."""
    for job in jobs:
        yield guarded(job, partial(planned, job, runner, options))


def planned(job: Job, runner: NetworkRunner | None, options: PipelineOptions) -> Planned:
    """The result that a picture's header promises; raises as `read` does."""
    with fetched(job.source) as path, open_picture(path) as source:
        output = plan_output(source.info, job.destination, options.scale, options.encoding)
        notes = picture_notes(source.info, path, output)
        notes += tiling_note(runner.decide(source.info)) if runner else ()
        return Planned(job, output.width, output.height, notes)


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


def guarded(job: Job, step: Callable[[], R]) -> R | Skipped | Failed:
    """The step's result, or in one line why there is none: a bad picture never stops the others."""
    try:
        return step()
    except LargeEnoughError as error:
        return Skipped(job, f"{reason(job, error)}; left as it is")
    except Exception as error:
        return Failed(job, reason(job, error))


def reason(job: Job, error: Exception) -> str:
    """Why a picture failed, in one line that names it."""
    if isinstance(error, SanrtError):
        return str(error) if str(job.source) in str(error) else f"{job.source}: {error}"
    if isinstance(error, MemoryError):
        return f"{job.source}: not enough memory for it; free some"
    log.debug("%s", job.source, exc_info=error)
    text = next(iter(str(error).splitlines()), "")
    unexpected = f"unexpected {type(error).__name__} ({text})"
    return f"{job.source}: {unexpected}; please report it {tracker()}, with what `sanrt run --verbose` tells"


def without_leftovers(jobs: Iterable[Job]) -> Iterator[Job]:
    """The jobs; what killed runs left in a destination folder is removed before its first one."""
    cleaned = set()
    for job in jobs:
        folder = job.destination.parent
        if folder not in cleaned and not isinstance(folder, RemotePath):
            cleaned.add(folder)
            remove_leftovers(folder)
        yield job
