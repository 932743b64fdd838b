"""What a video takes beside the network: its first frames decoded, enlarged without it, and encoded."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice

from sanrt.runtime.runs.videos import WAITING, Video
from sanrt.runtime.video.container import frames, picture_of
from sanrt.runtime.video.encoding import SegmentEncoder, VideoOutput
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
    """Of its encoded result."""


def sample_of(video: Video) -> VideoSample:
    """Decode the first frames and encode their middle, enlarged by interpolation; raises as a run would."""
    output = video.output
    small = replace(output, width=min(output.width, WIDTH), height=min(output.height, HEIGHT))
    started = time.perf_counter()
    middles = [middle(picture_of(each.frame, video.info), small, output) for each in islice(frames(video.info), FRAMES)]
    reading = time.perf_counter() - started
    pictures, file = [interpolated(picture, small) for picture in middles], BytesIO()
    started = time.perf_counter()
    encoder = SegmentEncoder(small)
    encoder.open(file)
    with closing(encoder):
        for picture in pictures:
            encoder.add(picture)
        encoder.finish()
    encoding = time.perf_counter() - started
    share = len(pictures) * small.width * small.height / (output.width * output.height)
    return VideoSample(reading / len(pictures), encoding / share, len(file.getvalue()) / share)


def middle(picture: Pixels, small: VideoOutput, output: VideoOutput) -> Pixels:
    """The part of a source's frame that a smaller result shows, (h, w, 3), in memory of its own."""
    height, width = picture.shape[:2]
    rows, columns = max(1, height * small.height // output.height), max(1, width * small.width // output.width)
    top, left = (height - rows) // 2, (width - columns) // 2
    return picture[top : top + rows, left : left + columns].copy()


def interpolated(picture: Pixels, small: VideoOutput) -> Pixels:
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
    encoder = ENCODER_BYTES[output.encoder.codec] * output.format.dtype.itemsize
    waiting = (WAITING + 1) * 3 * info.format.dtype.itemsize
    return source + (encoder + waiting) * output.width * output.height
