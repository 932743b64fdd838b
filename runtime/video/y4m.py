"""YUV4MPEG2, raw frames that programs hand each other through pipes: read and written as a stream, without FFmpeg.

A header line, then for each frame a line and its planes. A result's header is the source's with another width and height,
so that frame rate, aspect ratio, siting of chroma and whatever programs add are kept to the letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import IO

import numpy as np

from sanrt.errors import PictureError, TooManyPixelsError
from sanrt.runtime.video.container import MAX_PIXELS
from sanrt.runtime.video.frames import Conversion, PixelFormat, Pixels, guessed_matrix

MAGIC = b"YUV4MPEG2"
LONGEST_LINE = 1024
SUBSAMPLINGS = {"420": (2, 2), "422": (2, 1), "444": (1, 1), "411": (4, 1), "440": (1, 2), "mono": None}
CENTRED = ("420", "420jpeg")
"""Of the 8-bit ones those whose chroma lies between its pixels across."""
COLOURS = re.compile(r"(420|422|444|411|440|mono)(?:(jpeg|mpeg2)|p?(\d{1,2}))?")
"""What the parameter C says: subsampling, siting of 4:2:0, or bits."""
FULL_RANGE, LIMITED_RANGE = "XCOLORRANGE=FULL", "XCOLORRANGE=LIMITED"


@dataclass(frozen=True)
class Header:
    """What the first line of a stream says."""

    parameters: tuple[str, ...]
    """As they are, without width and height."""
    width: int
    height: int
    format: PixelFormat
    centred: bool
    full_range: bool

    @property
    def conversion(self) -> Conversion:
        """Between its samples and RGB. The stream says no matrix: it is what players take for its size."""
        return Conversion(self.format, guessed_matrix(self.width, self.height), self.full_range, self.centred)

    def line(self, width: int, height: int) -> bytes:
        """The header of a stream of another size that is like this one else."""
        return b" ".join([MAGIC, *(word.encode() for word in (f"W{width}", f"H{height}", *self.parameters))]) + b"\n"


@dataclass(frozen=True)
class RawFrame:
    """A frame as it is stored."""

    line: bytes
    """What stands before it."""
    planes: list[Pixels]
    """Y, Cb and Cr, or grey alone, each (H, W)."""


def read_header(file: IO[bytes], name: str) -> Header:
    """The first line of a stream; PictureError where it is none, or of frames that are not enlarged."""
    line = file.readline(LONGEST_LINE)
    if not line:
        raise PictureError(f"{name}: nothing in it; expected YUV4MPEG2 frames")
    words = line.rstrip(b"\n").split(b" ")
    if words[0] != MAGIC or not line.endswith(b"\n") or not line.isascii():
        raise PictureError(f"{name}: no YUV4MPEG2; expected what `ffmpeg -i IN -f yuv4mpegpipe -` writes")
    given = [word.decode() for word in words[1:] if word]
    said = {word[0]: word[1:] for word in given if word[0] != "X"}
    width, height = (side(said.get(letter, ""), letter, name) for letter in "WH")
    if width * height > MAX_PIXELS:
        raise TooManyPixelsError(f"{name}: claims {width} x {height} pixels a frame")
    if said.get("I", "p") not in ("p", "?"):
        raise PictureError(f"{name}: interlaced; deinterlace it first (ffmpeg -i IN -vf bwdif -f yuv4mpegpipe -)")
    colours = said.get("C", "420jpeg")
    kept = tuple(word for word in given if word[0] not in "WH")
    form = pixel_format(colours, name)
    full = FULL_RANGE in given or (form.chroma is None and LIMITED_RANGE not in given)  # grey that says none, as in swscale
    return Header(kept, width, height, form, colours in CENTRED, full)


def side(digits: str, letter: str, name: str) -> int:
    """Width or height of a header; PictureError without it."""
    if not re.fullmatch(r"[0-9]{1,6}", digits) or not int(digits):
        raise PictureError(f"{name}: its header says {letter}{digits}; expected {letter} and a number of pixels")
    return int(digits)


def pixel_format(colours: str, name: str) -> PixelFormat:
    """How samples of a header's colours are stored; PictureError for transparency, and for what sanrt does not know."""
    found = COLOURS.fullmatch(colours)
    bits = int(found[3] or 8) if found else 0
    if not found or not 8 <= bits <= 16 or (found[2] and found[1] != "420"):
        raise PictureError(
            f"{name}: its samples are {colours}; expected 420jpeg, 420mpeg2, 422, 444, 411, 440 or mono, of 8 to 16 bits"
        )
    return PixelFormat(bits, SUBSAMPLINGS[found[1]])


def plane_shapes(form: PixelFormat, width: int, height: int) -> list[tuple[int, int]]:
    """(H, W) of every plane."""
    if form.chroma is None:
        return [(height, width)]
    across, down = form.chroma
    return [(height, width), *[(ceil(height / down), ceil(width / across))] * 2]


def read_frames(file: IO[bytes], header: Header, name: str) -> Iterator[RawFrame]:
    """Every frame that is there whole; then PictureError where the stream ends within one, or without any."""
    shapes = plane_shapes(header.format, header.width, header.height)
    size = sum(map(prod, shapes)) * header.format.dtype.itemsize
    number = 0
    while line := file.readline(LONGEST_LINE):
        if not re.fullmatch(rb"FRAME( [^\n]*)?\n?", line):
            raise PictureError(f"{name}: no frame where frame {number} is expected; it is damaged")
        samples = file.read(size)
        if len(samples) < size:
            raise PictureError(f"{name}: ends within frame {number}; the {number} before it are written")
        values = np.frombuffer(samples, header.format.dtype.newbyteorder("<")).astype(header.format.dtype, copy=False)
        parts = np.split(values, np.cumsum([prod(shape) for shape in shapes])[:-1])
        yield RawFrame(line, [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])
        number += 1
    if not number:
        raise PictureError(f"{name}: no frames in it; expected at least one")


def write_frame(file: IO[bytes], frame: RawFrame) -> None:
    """A frame, handed on at once."""
    file.write(frame.line)
    for plane in frame.planes:
        file.write(np.ascontiguousarray(plane, plane.dtype.newbyteorder("<")).data)
    file.flush()
