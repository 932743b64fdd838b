"""Videos through one network: decoded, enlarged and encoded at the same time, in segments that a killed run goes on from.

Animations, GIF or WebP, are videos here. `run` takes pictures and videos mixed, in order; pictures go the way of
`pipeline.run`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, islice, repeat
from pathlib import Path
from typing import IO

import numpy as np

from sanrt.errors import PictureError
from sanrt.files import file_digest, replacing
from sanrt.runtime.pictures.codec import Encoding, upscale_alpha
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.pictures.provenance import digest_of, identify, require_unchanged, seal
from sanrt.runtime.pictures.resize import reduced
from sanrt.runtime.pictures.storage import RemotePath, delivered, fetched, scratch_folder
from sanrt.runtime.pictures.transparency import fill_hidden
from sanrt.runtime.runs import pipeline
from sanrt.runtime.runs.pipeline import (
    Advanced,
    AlreadyWrittenError,
    Failed,
    Finished,
    Listener,
    Opened,
    Outcome,
    PipelineOptions,
    Planned,
    Skipped,
    Written,
    ahead,
    guarded,
    nobody,
    result_note,
    tiling_note,
    without_leftovers,
)
from sanrt.runtime.runs.results import appeared
from sanrt.runtime.tiling.plan import TilingPlan
from sanrt.runtime.tiling.upscaling import NetworkRunner
from sanrt.runtime.video import animated
from sanrt.runtime.video.animated import AnimationOutput, FrameWriter, upright
from sanrt.runtime.video.container import SourceFrame, VideoInfo, frames, look, picture_of, require_opaque
from sanrt.runtime.video.encoding import SegmentEncoder, VideoOutput, plan_video
from sanrt.runtime.video.formats import Container
from sanrt.runtime.video.frames import Pixels
from sanrt.runtime.video.joining import Copying, join, plan_copying, rounded_times
from sanrt.runtime.video.segments import Segment, WorkFolder, frames_in_segment, remove_others, work_folder

WAITING = 2
"""Enlarged frames that wait for the encoder, at most."""


@dataclass(frozen=True)
class Video:
    """A video whose result can be made and written."""

    job: Job
    info: VideoInfo
    output: VideoOutput | AnimationOutput
    copying: Copying
    background: tuple[int, int, int] | None = None
    """8-bit RGB to lay transparent frames onto; None keeps their opacity."""
    display_matrix: tuple[int, ...] = ()
    """By which frames are turned, where the result cannot say it; see VideoInfo."""
    source_notes: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be told of its source, and what its result lacks, one line each."""
        return self.source_notes + self.output.notes + self.copying.notes


@dataclass(frozen=True)
class SourcePicture:
    """A frame as the network takes it."""

    pts: int
    duration: int
    pixels: Pixels
    """(H, W, 3), or (H, W, 4) with opacity."""
    damaged: bool
    """Whether the decoder had to repair it."""


Maker = Callable[[Video, WorkFolder, list[Segment], Listener], TilingPlan]
"""Makes the segments of a video that are not there; returns how its frames really went through the network."""


def run(
    jobs: Iterable[Job], runner: NetworkRunner, options: PipelineOptions, listener: Listener = nobody
) -> Generator[Outcome, None, None]:
    """Every job's outcome, in order, as `pipeline.run` has them: pictures by it, videos one after another."""

    def pictures(group: list[Job]) -> Iterator[Outcome]:
        return pipeline.run(group, runner, options, listener)

    yield from mixed(jobs, pictures, partial(make_segments, runner), options, listener)


def mixed(
    jobs: Iterable[Job],
    pictures: Callable[[list[Job]], Iterator[Outcome]],
    maker: Maker,
    options: PipelineOptions,
    listener: Listener,
) -> Generator[Outcome, None, None]:
    """The same with `pictures` for those, and segments by `maker`."""
    for are_videos, group in groupby(jobs, lambda job: job.is_video):
        if not are_videos:
            yield from pictures(list(group))
            continue
        for job in without_leftovers(group):
            outcome = guarded(job, partial(enlarge, job, maker, options, listener))
            listener(Finished(outcome))
            yield outcome


def preview(
    jobs: Iterable[Job], runner: NetworkRunner, options: PipelineOptions
) -> Generator[Planned | Skipped | Failed, None, None]:
    """What `run` would do, as far as headers and first frames tell."""
    for are_videos, group in groupby(jobs, lambda job: job.is_video):
        if not are_videos:
            yield from pipeline.preview(group, runner, options)
            continue
        for job in group:
            yield guarded(job, partial(planned, job, runner, options))


def planned(job: Job, runner: NetworkRunner, options: PipelineOptions) -> Planned:
    """The result that a video's header promises; raises as `settle` does."""
    with fetched(job.source) as path:
        video = settle(job, path, options.scale, options.encoding)
        plan = runner.decide_array(video.info.height, video.info.width)
        return Planned(job, video.output.width, video.output.height, video.notes + tiling_note(plan))


def settle(job: Job, path: Path, scale: int, encoding: Encoding) -> Video:
    """How the result of a video is written, from its header and first frame; PictureError for what cannot be."""
    info = look(path)
    notes = result_note(path)
    if Container.of_suffix(job.destination) is None:
        animation = animated.plan(info, job.destination, scale, encoding)
        return Video(job, info, animation, Copying((), ()), encoding.background, info.display_matrix, notes)
    require_opaque(info, encoding.background)
    size = result_sides(encoding, info.width, info.height, scale)
    output = plan_video(info, job.destination, size, encoding.video)
    return Video(job, info, output, plan_copying(info, output), encoding.background, source_notes=notes)


def result_sides(encoding: Encoding, width: int, height: int, scale: int) -> tuple[int, int]:
    """Width and height of the result of a video of this size; raises as `ResultSize.checked` does."""
    result = encoding.result_size
    width, height = result.checked(width, height, scale)
    if str(result):  # sides that any chroma divides
        return max(2, width - width % 2), max(2, height - height % 2)
    return width, height


def enlarge(job: Job, maker: Maker, options: PipelineOptions, listener: Listener = nobody) -> Written | Skipped:
    """A video from its file to the result's, which is there whole or not at all, unless another run wrote it meanwhile."""
    with suppress(AlreadyWrittenError):
        if not appeared(job, options.recipe):
            return upscale(job, maker, options, listener)
    remove_others(local_result(job))
    return Skipped(job)


def local_result(job: Job) -> Path:
    """Where a result is on this machine, or would be if it were not sent to a URL: its segments are beside that.

    Results of one name at several URLs would be in one place: a digest of the URL is in the name.
    """
    result = job.destination
    name = f"{digest_of(str(result))[:16]}-{result.name}" if isinstance(result, RemotePath) else result.name
    return scratch_folder(result) / name


def upscale(job: Job, maker: Maker, options: PipelineOptions, listener: Listener) -> Written:
    """The same; AlreadyWrittenError where another run wrote it."""
    with fetched(job.source) as path:
        video = settle(job, path, options.scale, options.encoding)
        source = identify(path, job.source)
        made = options.recipe.provenance(source, video.output.container)
        result = local_result(job)
        with work_folder(result, made) as work:
            there = work.all()
            plan = maker(video, work, there, listener)
            try:
                require_unchanged(source, path, job.source)
            except PictureError:
                work.empty()  # the folder is named by what the source was
                raise
            segments = work.all()
            with delivered(job.destination) as local:
                with replacing(local) as file:
                    notes = joined(video, segments, file)
                    seal(file, video.output.container, made)
                    if appeared(job, options.recipe):
                        raise AlreadyWrittenError
                digest = file_digest(local, "run again") if options.digests else None
        remove_others(result)
    return replace(written(video, plan, segments, len(there), notes), source=source, digest=digest)


def joined(video: Video, segments: list[Segment], file: IO[bytes]) -> tuple[str, ...]:
    """Write the result into an open file; what of its times is not as in the source, one line each."""
    if isinstance(video.output, AnimationOutput):
        return animated.assemble(video.info, video.output, segments, file)
    join(video.info, video.output, video.copying, segments, file)
    return rounded_times(video.info, video.output, segments)


def written(
    video: Video, plan: TilingPlan, segments: list[Segment], there: int, time_notes: tuple[str, ...] = ()
) -> Written:
    """The outcome of a video whose result is in its place; `there` segments were made by earlier runs."""
    frames_in_all = sum(len(segment.times) for segment in segments)
    fresh = sum(len(segment.times) for segment in segments[there:])
    repeated = sum(segment.repeated for segment in segments)
    notes = [*time_notes]
    if repeated:
        share = f"{100 * repeated / frames_in_all:.0f} %"
        notes.append(f"{repeated} of {frames_in_all} frames ({share}) equal the one before and were not computed again")
    if damaged := [time for segment in segments for time in segment.damaged]:
        first = float(damaged[0] * video.info.time_base)
        notes.append(
            f"{len(damaged)} of {frames_in_all} frames are damaged in the source and enlarged as the decoder repaired them; "
            f"the first is shown at {first:.3f} s"
        )
    if there:
        notes.append(f"{frames_in_all - fresh} of {frames_in_all} frames were there of an earlier run")
    pixels = video.info.width * video.info.height * fresh
    return Written(video.job, pixels, (*video.notes, *notes, *tiling_note(plan)), plan, frames=fresh)


def make_segments(
    runner: NetworkRunner, video: Video, work: WorkFolder, there: list[Segment], listener: Listener
) -> TilingPlan:
    """Make the segments that are not there; how the frames really went through the network."""
    info = video.info
    plan = runner.decide_array(info.height, info.width)
    length = frames_in_segment(info.rate)
    done = sum(len(segment.times) for segment in there)
    share = opened(video, done, listener)
    with ThreadPoolExecutor(1, "sanrt-read") as reader, ThreadPoolExecutor(1, "sanrt-write") as writer:
        pictures = source_pictures(reader, islice(frames(info), done, None), info)
        for number in range(len(there), 1 << 30):
            segment = Enlarging(video, runner, plan, writer, lambda: listener(Advanced(video.job, share)))
            if (first := next(pictures, None)) is None:
                return plan
            work.finished(segment.made(work.path(number), chain([first], islice(pictures, length - 1))))
            plan = segment.plan
    return plan


def opened(video: Video, done: int, listener: Listener) -> float:
    """Tell that a video is begun of which so many frames are done; the share of the others that one of them is."""
    left = max(1, video.info.frames - done)
    listener(Opened(video.job, video.info.width * video.info.height * left, left))
    return 1 / left


def source_pictures(reader: ThreadPoolExecutor, decoded: Iterator[SourceFrame], info: VideoInfo) -> Iterator[SourcePicture]:
    """Decoded frames as the network takes them, each decoded while the one before it is handled.

    Where some are passed over, these are decoded as well: only so the others are what they are in a run from the beginning.
    """

    def read(_: object) -> SourcePicture | None:
        found = next(decoded, None)
        if found is None:
            return None
        return SourcePicture(found.pts, found.duration, picture_of(found.frame, info), found.damaged)

    for reading in ahead(reader, read, repeat(None)):
        if (picture := reading.result()) is None:
            return
        yield picture


class Enlarging:
    """A segment in the making: frames through the network in this thread, through the encoder in another."""

    def __init__(
        self, video: Video, runner: NetworkRunner, plan: TilingPlan, writer: ThreadPoolExecutor, advanced: Callable[[], None]
    ) -> None:
        """advanced: called for every frame."""
        self.video, self.runner, self.plan, self.writer, self.advanced = video, runner, plan, writer, advanced
        self.folder = scratch_folder(video.job.destination)

    def made(self, path: Path, pictures: Iterator[SourcePicture]) -> Segment:
        """The segment of these frames in a file of its own."""
        times, repeated, damaged = list[tuple[int, int]](), 0, list[int]()
        last: SourcePicture | None = None
        encoder = encoder_of(self.video.output)
        with replacing(path) as file, opened_in(self.writer, encoder, file), waiting(self.writer) as later:
            for picture in pictures:
                if last is not None and np.array_equal(picture.pixels, last.pixels):
                    repeated += 1
                else:
                    enlarged = self.enlarged(picture.pixels)
                later(encoder.add, enlarged)
                times.append((picture.pts, picture.duration))
                damaged += [picture.pts] * picture.damaged
                last = picture
                self.advanced()
            later(encoder.finish)
        return Segment(path, tuple(times), tuple(encoder.order), repeated, tuple(damaged))

    def enlarged(self, picture: Pixels) -> Pixels:
        """A frame through the network, at the result's size; smaller tiles, once they were needed, are kept to."""
        rgb, opacity = np.ascontiguousarray(picture[..., :3]), picture[..., 3:]
        if opacity.size and not self.runner.options.keep_hidden:
            rgb = fill_hidden(rgb, opacity[..., 0])
        result, self.plan = self.runner.run_array(self.plan, rgb, folder=self.folder)
        video, output = self.video, self.video.output
        if opacity.size:
            result = np.dstack([result, upscale_alpha(opacity[..., 0], self.runner.scale)])
            result = laid_onto(result, video.background) if video.background else result
        return sized(upright(result, video.display_matrix), output.width, output.height)


def encoder_of(output: VideoOutput | AnimationOutput) -> SegmentEncoder | FrameWriter:
    """What writes frames into the file of a segment."""
    return FrameWriter() if isinstance(output, AnimationOutput) else SegmentEncoder(output)


def laid_onto(picture: Pixels, background: tuple[int, int, int]) -> Pixels:
    """(H, W, 4) -> (H, W, 3), uint8."""
    from sanrt.runtime.pictures.libvips import vips

    made: Pixels = vips().Image.new_from_array(picture).flatten(background=[*background]).numpy()
    return made


def sized(picture: Pixels, width: int, height: int) -> Pixels:
    """A picture reduced to a size, where it is of another."""
    if picture.shape[:2] == (height, width):
        return picture
    from sanrt.runtime.pictures.libvips import vips

    made: Pixels = reduced(vips().Image.new_from_array(picture), width, height).numpy()
    return made


@contextmanager
def opened_in(pool: ThreadPoolExecutor, encoder: SegmentEncoder | FrameWriter, file: IO[bytes]) -> Iterator[None]:
    """An encoder opened and closed by the one thread that uses it: closed by another one while it works, it would crash."""
    pool.submit(encoder.open, file).result()
    try:
        yield
    finally:
        pool.submit(encoder.close).result()


@contextmanager
def waiting(pool: ThreadPoolExecutor) -> Iterator[Callable[..., None]]:
    """What hands work to a thread and waits while too much of it is begun; all is done, or called off, at the end."""
    begun: deque[Future[None]] = deque()

    def later(work: Callable[..., None], *arguments: object) -> None:
        begun.append(pool.submit(work, *arguments))
        while len(begun) > WAITING:
            begun[0].result()  # an interrupt may come here, and the work has to be waited for all the same
            begun.popleft()

    try:
        yield later
        while begun:
            begun[0].result()
            begun.popleft()
    finally:
        for future in begun:
            future.cancel()
        wait(begun)
