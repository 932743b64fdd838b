"""Animated GIF and WebP files, read and written by libvips: a picture of several frames, all as large as its canvas."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from sanrt.errors import PictureError, TooManyPixelsError
from sanrt.runtime.pictures import gif, libvips, metadata
from sanrt.runtime.pictures.codec import (
    MAX_PIXELS,
    Encoding,
    Output,
    PictureInfo,
    Pixels,
    encode,
    is_lossless_webp,
    orientation,
    plan_output,
    with_metadata,
)
from sanrt.runtime.pictures.formats import ANIMATED, Format
from sanrt.runtime.pictures.libvips import vips
from sanrt.runtime.pictures.pages import count, format_of, loaded
from sanrt.wording import option

if TYPE_CHECKING:
    import pyvips

MOST_ROWS = 100_000_000
"""Of all frames together: libvips has them as one high picture."""
UNTIMED = 100
"""Milliseconds for which players show a frame that says none."""
MARKED = 16
"""Milliseconds that every frame of a WebP is written with, before its own."""
MOST_TICKS = {Format.GIF: 65_535, Format.WEBP: (1 << 24) - 1}
"""For which a frame can be shown at most."""


@dataclass(frozen=True)
class Animation:
    """What an animated file's header says."""

    info: PictureInfo
    """Of every frame, as it is composed on the canvas."""
    delays: tuple[int, ...]
    """Milliseconds for which each frame is shown; 0 where the file says none."""
    plays: int
    """How often it is shown; 0 is for ever."""


def ticks(form: Format) -> int:
    """How many units a second has in which a format counts durations."""
    return 100 if form is Format.GIF else 1000


def open_animation(path: Path) -> Animation:
    """What the header of a GIF or WebP file says, also of one with a single frame, and whether any pixel is transparent.

    PictureError where it is damaged, or no such file.
    """
    form = format_of(path)
    if form is None:
        raise PictureError(f"{path}: neither GIF nor WebP by its content; expected an animation")
    if form is Format.GIF:
        gif.check(path, animated=True)

    def opened() -> Animation:
        image = loaded(path, form)
        frames, height = count(image), image.get_page_height()
        if image.width * height > MAX_PIXELS:
            raise TooManyPixelsError(f"{path}: claims {image.width} x {height} pixels a frame")
        if orientation(image) != 1:
            raise PictureError(f"{path}: its EXIF turns the frames; sanrt turns no animations, save it upright first")
        found = metadata.read(path, form, image)
        found.frames = 1
        alpha = bool(image.hasalpha()) and image.extract_band(image.bands - 1).min() < 255
        delays = image.get("delay") if image.get_typeof("delay") else [0]
        plays = image.get("loop") if image.get_typeof("loop") else 1
        info = PictureInfo(
            path,
            form,
            image.width,
            height,
            alpha=alpha,
            lossless=form is Format.WEBP and is_lossless_webp(path),
            metadata=found.kept,
            notes=tuple(found.notes()),
        )
        return Animation(info, tuple(delays[:frames]), plays)

    return libvips.read(damaged(path, form), opened)


def damaged(path: Path, form: Format) -> str:
    """How a line on a file that cannot be decoded begins."""
    return f"{path}: damaged {form.upper()} file"


def frames(animation: Animation) -> Iterator[Pixels]:
    """Every frame, (H, W, 3), or (H, W, 4) where the animation has transparency; PictureError where it is damaged."""
    info = animation.info
    region: list[pyvips.Region] = []

    def frame(number: int) -> Pixels:
        held = region.pop() if region else vips().Region.new(as_rgb(loaded(info.path, info.format), info.alpha))
        data = held.fetch(0, number * info.height, info.width, info.height)
        region.append(held)
        return np.frombuffer(data, np.uint8).reshape(info.height, info.width, -1)

    for number in range(len(animation.delays)):
        yield libvips.read(damaged(info.path, info.format), partial(frame, number))


def as_rgb(image: pyvips.Image, alpha: bool) -> pyvips.Image:
    """Three bands, or four with opacity."""
    image = image.colourspace("srgb")
    image = image if image.hasalpha() or not alpha else image.bandjoin(255)
    return image if alpha else image.extract_band(0, n=3)


def plan_animation(info: PictureInfo, frames: int, path: Path, scale: int, encoding: Encoding) -> Output:
    """How an animation of about so many frames that look like `info`, enlarged by `scale`, is written to `path`.

    PictureError for what its format does not hold, else as `plan_output`.
    """
    form = Format.of_suffix(path)
    assert form in ANIMATED
    width, height = encoding.result_size.checked(info.width, info.height, scale)
    remedy = f"take a smaller {option('outscale')} or {option('size')}, or name a video, such as {path.stem}.mp4"
    if max(width, height) > form.facts.max_side:
        raise PictureError(
            f"{path}: {form.upper()} holds at most {form.facts.max_side} pixels a side, the result has {width} x {height}; "
            f"{remedy}"
        )
    require_rows(path, height, frames)
    output = plan_output(info, path, scale, encoding, forms=ANIMATED)
    notes = info.notes + output.notes
    if form is Format.GIF:
        notes += ("GIF holds 256 colours a frame: others are dithered",)
        notes += ("GIF holds no half-transparent pixels: they become opaque or fully transparent",) * output.alpha
        notes += ("its ICC profile is not kept, as GIF holds none",) * (metadata.ICC in info.metadata)
    return replace(output, grey=False, notes=notes)


def require_rows(path: Path, height: int, frames: int) -> None:
    """Raise PictureError for more frames of a height than can be written."""
    if height * frames > MOST_ROWS:
        raise PictureError(
            f"{path}: {frames} frames of {height} rows; animations have at most {MOST_ROWS / 1e6:.0f} million rows in all; "
            f"name a video, such as {path.stem}.mp4"
        )


def write_animation(output: Output, frames: Iterator[bytes], delays: Sequence[int], plays: int, file: IO[bytes]) -> int:
    """Encode frames, each shown for so many milliseconds, into an open file; how many there are in it.

    frames: (H, W, 3) or, with `output.alpha`, (H, W, 4) samples of each. In WebP a frame that equals the one before is not
    there, and that one is shown longer. The memory taken does not depend on how many there are, beside the encoded ones of
    WebP.
    """
    require_rows(output.path, output.height, len(delays))
    source = vips().SourceCustom()
    source.on_read(Reader(png(output.width, output.height * len(delays), 3 + output.alpha, frames)).read)
    with libvips.writing(f"{output.path}: cannot be written"):
        image = with_metadata(vips().Image.pngload_source(source, access="sequential"), output)
        image.set_type(vips().GValue.gint_type, "page-height", output.height)
        said = [MARKED] * len(delays) if output.format is Format.WEBP else [*delays]
        image.set_type(vips().GValue.array_int_type, "delay", said)
        image.set_type(vips().GValue.gint_type, "loop", plays)
        encode(image, output, file)
        if output.format is Format.WEBP:
            put_durations(file, delays, output.path)
        file.seek(0)
        load = getattr(vips().Image, f"{output.format.facts.libvips}load_source")
        return count(load(vips().Source.new_from_descriptor(file.fileno()), n=-1))


def put_durations(file: IO[bytes], delays: Sequence[int], path: Path) -> None:
    """Say in a WebP file for how many milliseconds frames are shown, where each was written with MARKED.

    libvips takes 100 for what is 10 or less. A frame that stands for several, equal ones has a multiple of MARKED.
    PictureError, for the result `path`, where these are shown longer together than a frame can be.
    """
    left = iter(delays)
    file.seek(at := 12)
    while len(header := file.read(8)) == 8:
        size = int.from_bytes(header[4:], "little")
        if header[:4] == b"ANMF":
            file.seek(at + 8 + 12)
            frames = int.from_bytes(file.read(3), "little") // MARKED
            file.seek(at + 8 + 12)
            if (shown := sum(islice(left, frames))) > MOST_TICKS[Format.WEBP]:
                raise PictureError(
                    f"{path}: equal frames are shown for {shown // 1000} s, WEBP holds at most "
                    f"{MOST_TICKS[Format.WEBP] // 1000}; name a video, such as {path.stem}.mp4"
                )
            file.write(shown.to_bytes(3, "little"))
        file.seek(at := at + 8 + size + size % 2)


def png(width: int, height: int, bands: int, parts: Iterator[bytes]) -> Iterator[bytes]:
    """A PNG file without compression, piece by piece: what libvips reads from a program from top to bottom.

    parts: 8-bit samples of some whole rows each.
    """
    packer = zlib.compressobj(0)
    colour = {3: 2, 4: 6}[bands]
    yield b"\x89PNG\r\n\x1a\n" + metadata.png_chunk("IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    for part in parts:
        rows = np.frombuffer(part, np.uint8).reshape(-1, width * bands)
        yield metadata.png_chunk("IDAT", packer.compress(np.insert(rows, 0, 0, axis=1).tobytes()))
    yield metadata.png_chunk("IDAT", packer.flush()) + metadata.png_chunk("IEND", b"")


class Reader:
    """Pieces of bytes as a stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.left = pieces, memoryview(b"")

    def read(self, size: int) -> bytes:
        """Up to so many bytes; none at the end."""
        while not self.left and (piece := next(self.pieces, None)) is not None:
            self.left = memoryview(piece)
        read, self.left = self.left[:size], self.left[size:]
        return bytes(read)
