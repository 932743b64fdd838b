"""Segments of videos that other processes make: each one on its own, to the bytes of a run in one process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import chain, islice
from pathlib import Path

from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.runs.pipeline import Advanced, Listener, PipelineOptions
from sanrt.runtime.runs.videos import Enlarging, Video, settle, source_pictures
from sanrt.runtime.tiling.plan import TilingPlan
from sanrt.runtime.tiling.upscaling import NetworkRunner
from sanrt.runtime.video.container import SourceFrame, frames
from sanrt.runtime.video.segments import WorkFolder, frames_in_segment


@dataclass(frozen=True)
class VideoPart(Job):
    """One segment of a video, whose source and result the job names."""

    folder: Path = Path()
    """Of the segments, as every process sees it."""
    number: int = 0
    share: float = 0.0
    """Of the video's work, that one frame is."""

    @property
    def video(self) -> Job:
        """The job that it is a part of."""
        return Job(**{field.name: getattr(self, field.name) for field in fields(Job)})


@dataclass(frozen=True)
class PartMade:
    """What became of a part."""

    job: Job
    plan: TilingPlan
    """How its frames really went through the network."""
    there: bool
    """Whether it has frames; else the video has ended before it."""


class PartMaker:
    """Makes parts in one process; one behind the last of the same video is decoded from there, not from the beginning."""

    def __init__(self, runner: NetworkRunner, options: PipelineOptions) -> None:
        self.runner, self.options = runner, options
        self.reached: tuple[Video, TilingPlan, Iterator[SourceFrame], int] | None = None
        """The last part's video, tiling and decoder, and the number of the part that comes next in it."""

    def made(self, part: VideoPart, listener: Listener) -> PartMade:
        """Write the segment into the folder; raises as `videos.make_segments` does."""
        video, plan, decoded, at = self.before(part)
        self.reached = None
        info = video.info
        length = frames_in_segment(info.rate)
        passed_over = (part.number - at) * length
        wanted = islice(decoded, passed_over, passed_over + length)
        work = WorkFolder(part.folder)
        with ThreadPoolExecutor(1, "sanrt-read") as reader, ThreadPoolExecutor(1, "sanrt-write") as writer:
            pictures = source_pictures(reader, wanted, info)
            if (first := next(pictures, None)) is None:
                return PartMade(part, plan, False)
            segment = Enlarging(video, self.runner, plan, writer, lambda: listener(Advanced(part.video, part.share)))
            work.finished(segment.made(work.path(part.number), chain([first], pictures)))
        self.reached = video, segment.plan, decoded, part.number + 1
        return PartMade(part, segment.plan, True)

    def before(self, part: VideoPart) -> tuple[Video, TilingPlan, Iterator[SourceFrame], int]:
        """A decoder that has not passed the part's first frame, with what belongs to it."""
        if self.reached and self.reached[0].job == part.video and self.reached[-1] <= part.number:
            return self.reached
        video = settle(part.video, part.source, self.options.scale, self.options.encoding)
        plan = self.runner.decide_array(video.info.height, video.info.width)
        return video, plan, frames(video.info), 0
