"""What a video takes beside the network: its first frames decoded, enlarged without it, and encoded."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from tempfile import TemporaryFile

from sanrt.runtime.runs.videos import WAITING, Video, encoder_of
from sanrt.runtime.video.animated import AnimationOutput, encoding_seconds
from sanrt.runtime.video.container import frames, picture_of
from sanrt.runtime.video.encoding import VideoOutput
from sanrt.runtime.video.formats import Codec
from sanrt.runtime.video.frames import Pixels

FRAMES = 24
"""Of the sample, at most."""
WIDTH, HEIGHT = 640, 360
"""Pixels of the results' middle that are encoded, at most."""
ENCODER_BYTES = {Codec.H264: 320, Codec.HEVC: 450, Codec.AV1: 620, Codec.FFV1: 70, Codec.PRORES: 60}
"""What an encoder and its waiting frames hold, in bytes per pixel of an 8-bit result: the growth of a process that encoded
70 frames of 640 x 360; of 1280 x 720 it was less per pixel."""


@dataclass(frozen=True)
class VideoSample:
    """What a frame takes beside the network, measured on the first ones."""

    reading: float
    """Seconds to decode and convert it."""
    encoding: float
    """Seconds to convert and encode its result."""
    bytes: float
    """Of its encoded result, as it waits in a segment."""


def sample_of(video: Video) -> VideoSample:
    """Decode the first frames and encode their middle, enlarged by interpolation; raises as a run would."""
    output = video.output
    small = smaller(output, min(output.width, WIDTH), min(output.height, HEIGHT))
    started = time.perf_counter()
    middles = [middle(picture_of(each.frame, video.info), small, output) for each in islice(frames(video.info), FRAMES)]
    reading = time.perf_counter() - started
    pictures = [interpolated(picture, small) for picture in middles]
    with TemporaryFile() as file:
        started = time.perf_counter()
        encoder = encoder_of(small)
        encoder.open(file)
        with closing(encoder):
            for picture in pictures:
                encoder.add(picture)
            encoder.finish()
        encoding = time.perf_counter() - started
        size = file.seek(0, os.SEEK_END)
    if isinstance(small, AnimationOutput):
        encoding += encoding_seconds(small, pictures)
    share = len(pictures) * small.width * small.height / (output.width * output.height)
    return VideoSample(reading / len(pictures), encoding / share, size / share)


def smaller(output: VideoOutput | AnimationOutput, width: int, height: int) -> VideoOutput | AnimationOutput:
    """The same for frames of another size."""
    if isinstance(output, AnimationOutput):
        return replace(output, picture=replace(output.picture, width=width, height=height))
    return replace(output, width=width, height=height)


def middle(picture: Pixels, small: VideoOutput | AnimationOutput, output: VideoOutput | AnimationOutput) -> Pixels:
    """The part of a source's frame that a smaller result shows, in memory of its own."""
    height, width = picture.shape[:2]
    rows, columns = max(1, height * small.height // output.height), max(1, width * small.width // output.width)
    top, left = (height - rows) // 2, (width - columns) // 2
    return picture[top : top + rows, left : left + columns].copy()


def interpolated(picture: Pixels, small: VideoOutput | AnimationOutput) -> Pixels:
    """A picture at the size of a result."""
    from sanrt.runtime.pictures.libvips import vips

    image = vips().Image.new_from_array(picture)
    across, down = small.width / image.width, small.height / image.height
    made: Pixels = image.resize(across, vscale=down, kernel="cubic").numpy()
    return made


def frame_bytes(video: Video) -> int:
    """Bytes of the frames that wait beside the one in the network, and of the encoder."""
    info, output = video.info, video.output
    source = 2 * 3 * info.format.dtype.itemsize * info.width * info.height
    if isinstance(output, AnimationOutput):
        return source + (WAITING + 4) * 4 * output.width * output.height
    encoder = ENCODER_BYTES[output.encoder.codec] * output.format.dtype.itemsize
    waiting = (WAITING + 1) * 3 * info.format.dtype.itemsize
    return source + (encoder + waiting) * output.width * output.height
