"""Animated GIF and WebP files as results: their frames wait in segments, without loss, until all are there."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np

from sanrt.errors import PictureError
from sanrt.runtime.pictures.animations import MOST_TICKS, plan_animation, ticks, write_animation
from sanrt.runtime.pictures.codec import Encoding, Output, PictureInfo
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.video.container import VideoInfo, opened
from sanrt.runtime.video.frames import Pixels, rounded
from sanrt.runtime.video.segments import Segment

HDR_TRANSFERS = (16, 18)
"""PQ and HLG, by their numbers in H.273."""
WIDE_PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
SIZE_BYTES = 8
"""Before each frame of a segment, the bytes of it; none where it equals the one before."""
SHORTEST = 2
"""Hundredths of a second: players show a frame of a GIF that says less for ten."""


@dataclass(frozen=True)
class AnimationOutput:
    """How one animated result will be written."""

    picture: Output
    """Every frame, as a picture of this format would be."""
    plays: int
    """How often it is shown; 0 is for ever."""

    @property
    def path(self) -> Path:
        """The result's file."""
        return self.picture.path

    @property
    def container(self) -> Format:
        """What kind of file it is."""
        return self.picture.format

    @property
    def width(self) -> int:
        """Pixels."""
        return self.picture.width

    @property
    def height(self) -> int:
        """Pixels."""
        return self.picture.height

    @property
    def notes(self) -> tuple[str, ...]:
        """What it cannot hold, one line each."""
        return self.picture.notes


def plan(info: VideoInfo, path: Path, scale: int, encoding: Encoding) -> AnimationOutput:
    """How the animation of a video, or of another animation, is written to `path`; PictureError for what it cannot hold."""
    form = Format.of_suffix(path)
    assert form is not None
    if info.animation:
        picture = info.animation.info
    else:
        require_plain(info, path)
        sides = (info.height, info.width) if is_sideways(info.display_matrix) else (info.width, info.height)
        picture = PictureInfo(info.path, form, *sides, bits=info.format.bits, notes=(*info.notes, *losses(info, form)))
    output = plan_animation(picture, info.frames, path, scale, encoding)
    return AnimationOutput(output, info.animation.plays if info.animation else 0)


def require_plain(info: VideoInfo, path: Path) -> None:
    """Raise PictureError for a video whose samples or pixels mean what no animation can say."""
    if info.tags.transfer in HDR_TRANSFERS:
        raise PictureError(
            f"{path}: {info.path} is HDR, which animations do not show; name a video, or bring it to BT.709 first"
        )
    if info.aspect and info.aspect != 1:
        raise PictureError(
            f"{path}: pixels of {info.path} are {info.aspect} times as wide as high, which animations do not say; make them "
            "square first (ffmpeg -i IN -vf scale=iw*sar:ih,setsar=1 OUT)"
        )


def losses(info: VideoInfo, form: Format) -> Iterator[str]:
    """What of a video file an animation does not hold, one line each."""
    with opened(info.path) as source:
        types = {stream.type for stream in source.streams if stream.index != info.stream}
        more = ("chapters",) * bool(source.chapters()) + ("metadata",) * bool(source.metadata.keys() & {"title", "comment"})
    names = {"audio": "sound", "subtitle": "subtitles", "video": "other pictures", "attachment": "attachments"}
    if left_out := [*sorted(names.get(each, each) for each in types), *more]:
        yield f"left out: {', '.join(left_out)}, which {form.upper()} does not hold"
    if wide := WIDE_PRIMARIES.get(info.tags.primaries):
        yield f"its primaries are {wide}, which {form.upper()} does not say: colours look paler"


def is_sideways(matrix: tuple[int, ...]) -> bool:
    """Whether a display matrix makes rows of columns."""
    return bool(matrix) and abs(matrix[1]) > abs(matrix[0])


def upright(picture: Pixels, matrix: tuple[int, ...]) -> Pixels:
    """A picture as players show it by a display matrix, of whose angles the nearest quarter turn counts."""
    if not matrix:
        return picture
    a, b, _, c, d = matrix[:5]
    across, down = a, d
    if is_sideways(matrix):
        picture, across, down = picture.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


class FrameWriter:
    """Frames of an animation in a segment's file, compressed without loss; the same object as before takes no room.

    Opened, used and closed as a `SegmentEncoder` is.
    """

    def __init__(self) -> None:
        self.order: list[int] = []
        """Numbers of the frames in the order of decoding, so far."""
        self.last: Pixels | None = None
        """The picture that was added last."""

    def open(self, file: IO[bytes]) -> None:
        """Begin; the file is open for writing, and stays so."""
        self.file = file

    def close(self) -> None:
        """Nothing is held."""

    def add(self, picture: Pixels) -> None:
        """The next frame, (H, W, 3) or with opacity (H, W, 4)."""
        packed = b""
        if picture is not self.last:
            packed = zlib.compress(eight_bits(picture).tobytes(), 1)
        self.last = picture
        self.file.write(len(packed).to_bytes(SIZE_BYTES, "big") + packed)
        self.order.append(len(self.order))

    def finish(self) -> None:
        """Nothing is kept back."""


def eight_bits(picture: Pixels) -> Pixels:
    """The samples as uint8, rounded."""
    return picture if picture.dtype == np.uint8 else rounded(picture.astype(np.float32) / np.float32(257), 255, np.uint8)


def frames_of(segments: Sequence[Segment]) -> Iterator[bytes]:
    """The samples of every frame."""
    for segment in segments:
        samples = b""
        with segment.path.open("rb") as file:
            for _ in segment.times:
                size = int.from_bytes(file.read(SIZE_BYTES), "big")
                samples = zlib.decompress(file.read(size)) if size else samples
                yield samples


def assemble(info: VideoInfo, output: AnimationOutput, segments: Sequence[Segment], file: IO[bytes]) -> tuple[str, ...]:
    """Write the result into an open file; what is not as in the source, one line each.

    PictureError for a frame that is shown longer than the format can say.
    """
    durations, notes = durations_of(info, output, segments)
    milliseconds = [duration * 1000 // ticks(output.container) for duration in durations]
    count = write_animation(output.picture, frames_of(segments), milliseconds, output.plays, file)
    if count == 1 < len(durations):
        notes += ("all frames are equal: a still picture, without durations",)
    elif merged := len(durations) - count:
        nearly = "" if output.picture.lossless else ", or nearly"
        notes += (f"{merged} of {len(durations)} frames equal the one before{nearly}; it is shown longer in their place",)
    return notes


def durations_of(info: VideoInfo, output: AnimationOutput, segments: Sequence[Segment]) -> tuple[list[int], tuple[str, ...]]:
    """For how many ticks each frame is shown, and notes; what is rounded off one is counted for the next."""
    form = output.container
    times = [time for segment in segments for time in segment.times]
    spans = [duration for _, duration in times]
    if not info.animation:
        last = spans[-1] or max(1, round(1 / (info.rate * info.time_base)))
        spans = [later - now for (now, _), (later, _) in pairwise(times)] + [last]
    exact = [Fraction(0), *(end * info.time_base * ticks(form) for end in accumulate(spans))]
    durations = [later - now for now, later in pairwise(map(round, exact))]
    if max(durations) > MOST_TICKS[form]:
        raise PictureError(
            f"{output.path}: a frame is shown for {max(durations) / ticks(form):.0f} s, {form.upper()} holds at most "
            f"{MOST_TICKS[form] / ticks(form):.0f}; name a video, such as {output.path.stem}.mp4"
        )
    notes = []
    if any(end.denominator > 1 for end in exact):
        notes.append(f"times are rounded to 1/{ticks(form)} s, in which {form.upper()} counts")
    if form is Format.GIF and info.container != form and min(durations) < SHORTEST:
        notes.append("frames of less than 0.02 s: most players show these longer; WebP does not have this limit")
    return durations, tuple(notes)


def encoding_seconds(output: AnimationOutput, pictures: Sequence[Pixels]) -> float:
    """What it takes to encode frames."""
    samples = (eight_bits(picture).tobytes() for picture in pictures)
    with TemporaryFile() as file:
        started = time.perf_counter()
        write_animation(output.picture, samples, [100] * len(pictures), 0, file)
        return time.perf_counter() - started
