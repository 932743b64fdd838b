"""YUV4MPEG2 from one pipe through the network into another: frame by frame, none of them kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from typing import IO

import numpy as np

from sanrt.errors import PictureError
from sanrt.runtime.pictures.codec import Encoding
from sanrt.runtime.runs.pipeline import ahead
from sanrt.runtime.runs.videos import result_sides, sized, waiting
from sanrt.runtime.tiling.plan import TilingPlan
from sanrt.runtime.tiling.upscaling import NetworkRunner
from sanrt.runtime.video.frames import Pixels, guessed_matrix
from sanrt.runtime.video.y4m import Header, RawFrame, read_frames, write_frame


@dataclass(frozen=True)
class Stream:
    """Frames that come, and where they go."""

    source: IO[bytes]
    """Behind its header."""
    name: str
    """Of the source, for people."""
    header: Header
    result: IO[bytes]


def enlarge(
    stream: Stream, runner: NetworkRunner, encoding: Encoding, advanced: Callable[[], None] = lambda: None
) -> TilingPlan:
    """Every frame enlarged, in order, those equal to the one before without the network; how they went through it.

    Samples keep the source's matrix, which the stream cannot say. `advanced` is called for each frame.
    Raises PictureError where the source ends within a frame, once all before it are written; OSError where nobody takes
    the result; and as `NetworkRunner.decide_array` does.
    """
    header = stream.header
    width, height = result_sides(encoding, header.width, header.height, runner.scale)
    plan = runner.decide_array(header.height, header.width)
    conversion, ended = header.conversion, None

    def write(frame: RawFrame, picture: Pixels) -> None:
        write_frame(stream.result, replace(frame, planes=conversion.from_picture(picture)))

    with (
        ThreadPoolExecutor(1, "sanrt-read") as reader,
        ThreadPoolExecutor(1, "sanrt-write") as writer,
        waiting(writer) as later,
    ):
        stream.result.write(header.line(width, height))
        last, result = None, None
        for found in pictures(reader, stream):
            if isinstance(found, PictureError):
                ended = found
                break
            frame, rgb = found
            if result is None or last is None or not np.array_equal(rgb, last):
                made, plan = runner.run_array(plan, rgb)
                result = sized(made, width, height)
            later(write, frame, result)
            last = rgb
            advanced()
    if ended:
        raise ended
    return plan


def matrix_note(stream: Stream, runner: NetworkRunner, encoding: Encoding) -> str:
    """What to tell the encoder, where players would take another matrix for the result's size; else empty."""
    header = stream.header
    matrix = header.conversion.matrix
    if header.format.chroma is None or matrix == guessed_matrix(
        *result_sides(encoding, header.width, header.height, runner.scale)
    ):
        return ""
    return (
        f"{stream.name}: YUV4MPEG2 says no colour matrix; unless the source's was another, tell the encoder of the result "
        "that it is BT.601 (ffmpeg: -colorspace smpte170m)"
    )


def pictures(reader: ThreadPoolExecutor, stream: Stream) -> Iterator[tuple[RawFrame, Pixels] | PictureError]:
    """Every frame and its RGB, read while the one before it is handled; what is wrong with the stream comes last."""
    frames = read_frames(stream.source, stream.header, stream.name)

    def read(_: object) -> tuple[RawFrame, Pixels] | PictureError | None:
        try:
            frame = next(frames, None)
        except PictureError as error:
            return error
        return (frame, stream.header.conversion.to_rgb(frame.planes)) if frame else None

    for reading in ahead(reader, read, repeat(None)):
        if (found := reading.result()) is None:
            return
        yield found
