"""Reading and writing picture files with libvips: what the network sees, and what must survive it.

The network sees the numbers as they are stored, as RGB: an ICC profile is not applied but kept, and embedded again. Only
CMYK is converted (by its profile, else libvips' own), to sRGB.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sanrt.errors import PictureError, TooManyPixelsError, system_reason
from sanrt.files import replacing
from sanrt.runtime.pictures import gif, jpeg, libvips, metadata, pillow, tiff
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.kinds import is_video_content, kind_of_content
from sanrt.runtime.pictures.libvips import vips
from sanrt.runtime.pictures.provenance import Provenance, seal
from sanrt.runtime.pictures.resize import ResultSize, reduced
from sanrt.runtime.pictures.scratch import ScratchPicture
from sanrt.runtime.video.formats import VideoEncoding
from sanrt.wording import option

if TYPE_CHECKING:
    import pyvips

MAX_PIXELS = 1_000_000_000
"""A picture whose header claims more is refused, unless the caller allows it."""
MAX_SIDE = 1_000_000
"""Wider or higher ones are refused always: strips of such rows would not be small."""

Pixels = NDArray[np.uint8] | NDArray[np.uint16]

_PIECE_ROWS = 64
_LOSSLESS = (Format.PNG, Format.TIFF, Format.GIF, Format.BMP, Format.TGA)
_COLOURS = {"b-w": 1, "grey16": 1, "srgb": 3, "rgb": 3, "rgb16": 3, "cmyk": 4}
"""Channels of the colour spaces that are read."""
_OPTIMISED_PIXELS = 20_000_000
_UNKNOWN_RESOLUTION, _EXIF_RESOLUTION = (1.0, 1.0), (72 / 25.4, 72 / 25.4)
"""Pixels per millimetre: what libvips has for a file that does not say, and what EXIF takes for granted then."""
_ALL_METADATA, _ALL_BUT_EXIF = 31, 30
"""libvips' flags of what to write."""


@dataclass(frozen=True)
class PictureInfo:
    """What a picture file's header says."""

    path: Path
    format: Format
    """By its content, whatever its name."""
    width: int
    """Pixels, after the EXIF orientation is applied."""
    height: int
    bits: int = 8
    """Significant bits per sample: 8 (also for fewer), 10, 12 or 16."""
    grey: bool = False
    alpha: bool = False
    lossless: bool = False
    """For WebP: whether it is compressed without loss."""
    resolution: tuple[float, float] | None = None
    """Pixels per millimetre, x and y; None if the file does not say."""
    metadata: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """What a result may keep, as stored, by the names in `sanrt.runtime.pictures.metadata`."""
    notes: tuple[str, ...] = ()
    """What of the file is not taken over, one line each, for people."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its samples in memory: uint8, or uint16 over the whole 0..65535."""
        return np.dtype(np.uint8 if self.bits == 8 else np.uint16)

    @property
    def channels(self) -> int:
        """1 or 3, and one more with alpha."""
        return (1 if self.grey else 3) + self.alpha


@dataclass(frozen=True)
class Encoding:
    """What the user may choose about written files."""

    quality: int | None = None
    """1 to 100 for JPEG, WebP and AVIF; None is 95 (AVIF: 90)."""
    lossless: bool = False
    """WebP and AVIF without loss; a lossless WebP stays so anyway."""
    background: tuple[int, int, int] | None = None
    """8-bit RGB to lay transparent pictures onto; None keeps the transparency."""
    outscale: float | None = None
    """Times the source's width and height, by a reduction of what the network makes; None keeps that."""
    size: tuple[int, int] | None = None
    """Width and height that the result fits inside, likewise."""
    codec: str | None = None
    """Of videos, as are the next two: see `VideoEncoding`."""
    crf: int | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for sizes that no result has, and for codecs that are none."""
        self.result_size, self.video  # noqa: B018

    @property
    def result_size(self) -> ResultSize:
        """How large results are."""
        return ResultSize(self.outscale, self.size)

    @property
    def video(self) -> VideoEncoding:
        """What was chosen about videos."""
        return VideoEncoding(self.codec, self.crf, self.preset)


@dataclass(frozen=True)
class Output:
    """How one result will be written: settled, and checked, before the network runs."""

    path: Path
    format: Format
    width: int
    height: int
    bits: int = 8
    grey: bool = False
    alpha: bool = False
    lossless: bool = False
    quality: int = 95
    background: tuple[int, int, int] | None = None
    resolution: tuple[float, float] | None = None
    metadata: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    """What the format cannot hold and the user asked to go without, one line each."""
    provenance: Provenance | None = None
    """What the file says of its making; None for files that are no results."""


class SourcePicture:
    """An opened picture file; pixels are decoded as they are asked for.

    Rows asked for from top to bottom, overlapping or not, are decoded once and only the last ones asked for are held. Rows
    above those start the decoding over. Not for several threads at once.
    """

    def __init__(self, info: PictureInfo) -> None:
        self.info = info
        self._start_over()

    def _start_over(self) -> None:
        self._region: pyvips.Region | None = None
        self._held, self._top = np.empty((0, 0, 0), self.info.dtype), 0

    def rgb(self, top: int = 0, height: int | None = None) -> Pixels:
        """Rows `top` to `top + height` (all by default) as (height, W, 3) in the file's depth; grey is in all three.

        PictureError if the file is truncated or damaged there.
        """
        rows = self._rows(top, height)[..., : 1 if self.info.grey else 3]
        return rows.repeat(3, axis=2) if self.info.grey else np.ascontiguousarray(rows)

    def alpha(self, top: int = 0, height: int | None = None) -> Pixels:
        """The same rows' opacity as (height, W), full for a picture without transparency."""
        rows = self._rows(top, height)
        if not self.info.alpha:
            return np.full(rows.shape[:2], np.iinfo(rows.dtype).max, rows.dtype)
        return np.ascontiguousarray(rows[..., -1])

    def _rows(self, top: int, height: int | None) -> NDArray[Any]:
        bottom = self.info.height if height is None else top + height
        if not 0 <= top < bottom <= self.info.height:
            raise ValueError(f"rows {top} to {bottom} of a picture with {self.info.height}")
        if top < self._top:
            self._start_over()
        held = self._held[top - self._top :]
        if top + len(held) < bottom:
            fresh = self._decode(top + len(held), bottom)
            held = np.concatenate([held, fresh]) if len(held) else fresh
        self._held, self._top = held, top
        return held[: bottom - top]

    def _decode(self, top: int, bottom: int) -> NDArray[Any]:
        """In pieces, so that a damaged file with a large header fails soon: libvips tries again for every few rows asked."""
        info, step = self.info, _PIECE_ROWS

        def decode() -> list[Any]:
            region, self._region = self._region, None
            region = region or vips().Region.new(_decoded(_loaded(info.path, info.format)))
            pieces = [region.fetch(0, at, info.width, min(step, bottom - at)) for at in range(top, bottom, step)]
            if bottom < info.height:  # libvips lets go of a finished one, and tells whether its last pixels are missing
                self._region = region
            return pieces

        pieces = libvips.read(_damaged(info.path, info.format), decode)
        rows = [np.frombuffer(piece, info.dtype).reshape(-1, info.width, info.channels) for piece in pieces]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def close(self) -> None:
        """Let go of the file and of the held rows."""
        self._start_over()

    def __enter__(self) -> SourcePicture:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_picture(path: Path, max_pixels: int = MAX_PIXELS) -> SourcePicture:
    """Open a picture and check its header; no pixel is decoded yet.

    PictureError if it cannot be opened, is no supported picture, or claims more than `max_pixels` (TooManyPixelsError).
    """
    head = _head(path)
    form = Format.of_file(head, path)
    if form is None and is_video_content(path):
        raise PictureError(f"{path}: a video with a picture's name; rename it, such as {path.with_suffix('.mp4').name}")
    if form is None:
        expected = ", ".join(form.upper() for form in Format if form.is_readable)
        raise PictureError(f"{path}: {_unknown(head)}; expected {expected}")
    if form is Format.TIFF:
        tiff.check(path)
    if form is Format.GIF:
        gif.check(path)
    return SourcePicture(libvips.read(_damaged(path, form), lambda: _header(path, form, max_pixels)))


def _damaged(path: Path, form: Format) -> str:
    return f"{path}: damaged {form.upper()} file"


def _head(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise PictureError(f"{path}: not a regular file; expected a picture")
        with path.open("rb") as file:
            return file.read(4096)
    except OSError as error:
        raise PictureError(f"{path}: cannot be read ({system_reason(error)})") from None


def _unknown(head: bytes) -> str:
    if kind := kind_of_content(head):
        return f"{kind.name}, which sanrt does not read"
    return "unknown content, no picture that sanrt reads" if head else "empty file"


def _loaded(path: Path, form: Format, max_pixels: int = sys.maxsize) -> pyvips.Image:
    """The file as stored, by the loader of its format and no other, so that no untrusted loader is ever tried.

    Decoded once from top to bottom if its orientation allows, else as a whole (libvips uses a nameless file above 100 MB).
    Warnings of libjpeg mean pixels made up, once the file is repaired; those of other formats are about metadata.
    """
    if form.facts.packages:
        return pillow.load(path, form, max_pixels)
    load = getattr(vips().Image, f"{form.facts.libvips}load_source")
    fail_on = "warning" if form is Format.JPEG else "error"
    repaired = jpeg.repaired(path) if form is Format.JPEG else None

    def opened(access: str) -> pyvips.Image:
        if repaired:
            return vips().Image.jpegload_buffer(repaired, access=access, fail_on=fail_on)
        return load(vips().Source.new_from_file(os.fsencode(path)), access=access, fail_on=fail_on)

    image = opened("sequential")
    image = image if orientation(image) in (1, 2) else opened("random")
    if form is Format.TIFF and (more := image.bands - _COLOURS.get(image.interpretation, image.bands)) > 0:
        return image.extract_band(0, n=image.bands - more + tiff.first_extra_is_opacity(path))
    if form is Format.GIF and image.hasalpha() and image.width * image.height <= max_pixels and _is_opaque(opened("random")):
        return image.extract_band(0, n=image.bands - 1)
    return image


def _is_opaque(image: pyvips.Image) -> bool:
    """Whether no pixel is transparent. A GIF has no channel that says so, but a colour that need not occur."""
    return bool(image.extract_band(image.bands - 1).min() == 255)


def orientation(image: pyvips.Image) -> int:
    return image.get("orientation") if image.get_typeof("orientation") else 1


def _header(path: Path, form: Format, max_pixels: int) -> PictureInfo:
    image = _loaded(path, form, max_pixels)
    _check_header(path, image, max_pixels)
    return _info(path, form, image)


def _check_header(path: Path, image: pyvips.Image, max_pixels: int) -> None:
    """PictureError unless it is of a size, sample type and colour space that sanrt reads."""
    if image.width * image.height > max_pixels or max(image.width, image.height) > MAX_SIDE:
        raise TooManyPixelsError(
            f"{path}: claims {image.width} x {image.height} pixels; "
            f"at most {max_pixels / 1e6:.0f} megapixels and {MAX_SIDE} a side are allowed"
        )
    if image.format not in ("uchar", "ushort"):
        raise PictureError(f"{path}: samples are {image.format}; expected 8 or 16 bit unsigned, convert it to 16 bit first")
    if image.bands - image.hasalpha() != _COLOURS.get(image.interpretation):
        raise PictureError(f"{path}: {image.interpretation} with {image.bands} channels; expected grey, RGB or CMYK")


def _decoded(image: pyvips.Image) -> pyvips.Image:
    """Upright, CMYK converted."""
    if orientation(image) != 1:
        image = image.autorot()
    if image.interpretation == "cmyk":
        depth = 8 if image.format == "uchar" else 16
        image = image.icc_transform("srgb", embedded=True, input_profile="cmyk", intent="relative", depth=depth)
    return image


def _info(path: Path, form: Format, image: pyvips.Image) -> PictureInfo:
    turned = orientation(image) >= 5
    found = metadata.read(path, form, image)
    return PictureInfo(
        path,
        form,
        width=image.height if turned else image.width,
        height=image.width if turned else image.height,
        bits=8 if image.format == "uchar" else image.get("bits-per-sample") if form in (Format.AVIF, Format.HEIC) else 16,
        grey=image.bands - image.hasalpha() == 1,
        alpha=bool(image.hasalpha()),
        lossless=form is Format.WEBP and is_lossless_webp(path),
        resolution=_resolution(image) if found.says_resolution else None,
        metadata=found.kept,
        notes=(*found.notes(), *_notes(path, form, image)),
    )


def _resolution(image: pyvips.Image) -> tuple[float, float]:
    """Pixels per millimetre, x and y, upright."""
    return (image.yres, image.xres) if orientation(image) >= 5 else (image.xres, image.yres)


def _notes(path: Path, form: Format, image: pyvips.Image) -> Iterator[str]:
    if form is Format.JPEG and (reasons := dict.fromkeys(repair.reason for repair in jpeg.repairs(path))):
        yield f"odd JPEG ({', '.join(reasons)}): read only if no pixel is missing"
    if image.interpretation == "cmyk":
        yield "CMYK converted to sRGB"
    if form is Format.TIFF and (more := tiff.other_channels(path)):
        yield f"left out: channels that are neither colours nor transparency ({more})"


def is_lossless_webp(path: Path) -> bool:
    """Whether the first frame's chunk is VP8L (RFC 9649, section 2)."""
    with path.open("rb") as file:
        file.seek(12)
        while len(header := file.read(8)) == 8:
            if header[:4] in (b"VP8L", b"VP8 "):
                return header[:4] == b"VP8L"
            size = 16 if header[:4] == b"ANMF" else int.from_bytes(header[4:], "little")
            file.seek(size + size % 2, os.SEEK_CUR)
    return False


def plan_output(
    source: PictureInfo,
    path: Path,
    scale: int,
    encoding: Encoding = Encoding(),
    bits: int | None = None,
    forms: Collection[Format] = metadata.WRITTEN,
) -> Output:
    """How the result for `source`, which the network enlarges by `scale`, is written to `path`, by whose suffix.

    PictureError if that format is none of `forms` or cannot hold the size or the transparency, or the network is too small
    for the size that is asked for. Depth that the format cannot hold is reduced, with a note.
    """
    form = Format.of_suffix(path)
    if form is None or form not in forms:
        names = ", ".join(suffix for form in Format if form in forms for suffix in form.facts.suffixes)
        raise PictureError(f"{path}: cannot be written as '{path.suffix}'; expected a name ending in one of {names}")
    width, height = encoding.result_size.checked(source.width, source.height, scale)
    if max(width, height) > form.facts.max_side:
        raise PictureError(
            f"{path}: {form.upper()} holds at most {form.facts.max_side} pixels a side, the result has {width} x {height}; "
            "choose PNG or TIFF"
        )
    alpha = source.alpha and encoding.background is None
    if alpha and not form.facts.alpha:
        raise PictureError(
            f"{path}: {form.upper()} holds no transparency, {source.path} has it; lay it onto a colour "
            f"with {option('flatten', 'white')}, or write a PNG ({option('format', 'png')}, or a name with such an ending)"
        )
    wanted = bits or source.bits
    written = min(wanted, form.facts.max_bits)
    grey = source.grey and form.facts.grey and encoding.background is None
    lossless = encoding.lossless or (source.lossless and form is Format.WEBP)
    kept, losses = metadata.fitting(source.metadata, form, grey, (1 if grey else 3) + alpha, written == source.bits)
    return Output(
        path,
        form,
        width,
        height,
        bits=written,
        grey=grey,
        alpha=alpha,
        lossless=lossless,
        quality=encoding.quality or form.facts.quality or 100,
        background=encoding.background if source.alpha else None,
        resolution=source.resolution,
        metadata=kept,
        notes=(*losses, *_losses(source, form, wanted, lossless)),
    )


def _losses(source: PictureInfo, form: Format, bits: int, lossless: bool) -> Iterator[str]:
    if bits > form.facts.max_bits:
        yield f"{bits}-bit samples become {form.facts.max_bits}-bit: {form.upper()} holds no more"
    if form is not source.format and form is source.format.written_as:
        yield f"{source.format.upper()} is written as {form.upper()}"
    misnamed = Format.of_suffix(source.path) not in (None, source.format)
    if misnamed and source.format in _LOSSLESS and form not in _LOSSLESS and not lossless:
        yield f"a lossless {source.format.upper()} is written as a lossy {form.upper()}, as its name says"


def write_picture(
    output: Output,
    rgb: Pixels | ScratchPicture,
    alpha: Pixels | pyvips.Image | None = None,
    look_again: Callable[[], None] = lambda: None,
) -> None:
    """Encode (H, W, 3) pixels, uint8 or uint16, and (H, W) opacity to `output.path`, whole or not at all.

    Pixels of a larger size than the output's are reduced to it. Grey outputs get the mean of the three channels. `alpha` is
    needed if the output has alpha, or a background to lay it onto. FileError if the file cannot be written.

    look_again: called once all is encoded, right before it takes its place; what it raises leaves the place as it is.
    """
    with libvips.writing(f"{output.path}: cannot be written"):
        image = with_metadata(_encodable(output, rgb, alpha), output)
        with replacing(output.path) as file:
            encode(image, output, file)
            if output.resolution is None and metadata.EXIF not in output.metadata:
                metadata.forget_resolution(file, output.format)
            metadata.put(file, output.format, output.metadata)
            if output.provenance:
                seal(file, output.format, output.provenance)
            look_again()


def encode(image: pyvips.Image, output: Output, file: IO[bytes]) -> None:
    """The encoded image into an open file. libvips' target, which duplicates the descriptor, does not outlive the call."""
    target = vips().Target.new_to_descriptor(file.fileno())
    try:
        save = getattr(image, f"{output.format.facts.libvips}save_target")
        save(target, keep=_kept(output), **_saver_options(output))
    except vips().Error as error:
        del target
        error.__traceback__ = None  # whose frames hold it too
        _raise_if_full(file)
        raise


def _raise_if_full(file: IO[bytes]) -> None:
    """The system's own error if no more can be written, which libvips tells as an unknown one."""
    file.seek(0, os.SEEK_END)
    file.write(bytes(1 << 16))
    file.flush()


def _encodable(output: Output, rgb: Pixels | ScratchPicture, alpha: Pixels | pyvips.Image | None) -> pyvips.Image:
    image = _image(rgb)
    if image.width < output.width or image.height < output.height:
        raise ValueError(f"pixels are {image.width} x {image.height}, the output {output.width} x {output.height}")
    sixteen = output.bits > 8
    image = _in_depth(image, sixteen)
    if output.grey and image.bands == 3:
        image = image.bandmean()
    if output.alpha or output.background:
        if alpha is None:
            raise ValueError("an output with transparency needs alpha")
        image = image.bandjoin(_in_depth(_image(alpha), sixteen))
    grey, colour = ("grey16", "rgb16") if sixteen else ("b-w", "srgb")
    image = image.copy(interpretation=grey if image.bands < 3 else colour)
    if output.background:
        image = image.flatten(background=[value * (257 if sixteen else 1) for value in output.background])
    return reduced(image, output.width, output.height)


def _image(pixels: Pixels | ScratchPicture | pyvips.Image) -> pyvips.Image:
    if isinstance(pixels, ScratchPicture):
        return pixels.image()
    return vips().Image.new_from_array(np.ascontiguousarray(pixels)) if isinstance(pixels, np.ndarray) else pixels


def _in_depth(image: pyvips.Image, sixteen: bool) -> pyvips.Image:
    """The samples scaled to 8 or 16 bit, rounded."""
    if sixteen == (image.format == "ushort"):
        return image
    return (image * 257).cast("ushort") if sixteen else (image / 257).rint().cast("uchar")


def with_metadata(image: pyvips.Image, output: Output) -> pyvips.Image:
    """The metadata, its EXIF without thumbnail and orientation; libvips itself sets the EXIF size on writing."""
    image = image.copy()
    for name in metadata.BY_LIBVIPS:
        if name in output.metadata:
            image.set_type(vips().GValue.blob_type, name, output.metadata[name])
    for name in image.get_fields():
        if name == "jpeg-thumbnail-data" or name.startswith("exif-ifd1"):
            image.remove(name)
    image.set_type(vips().GValue.gint_type, "orientation", 1)
    xres, yres = output.resolution or (_EXIF_RESOLUTION if metadata.EXIF in output.metadata else _UNKNOWN_RESOLUTION)
    return image.copy(xres=xres, yres=yres)


def _kept(output: Output) -> int:
    """libvips writes EXIF of its own making, to say a resolution: only where it has one, and no other place for it."""
    has_place = output.format in (Format.PNG, Format.TIFF)
    needed = metadata.EXIF in output.metadata or (output.resolution and not has_place)
    return _ALL_METADATA if needed else _ALL_BUT_EXIF


def _saver_options(output: Output) -> dict[str, Any]:
    """PNG and TIFF: quick compression, a few per cent larger than the slowest. Lossy formats: full colour resolution.

    PNG, TIFF and large JPEG are encoded strip by strip; libwebp and the AV1 encoder hold the whole picture.
    """
    match output.format:
        case Format.PNG:
            return {"compression": 3, "filter": "paeth"}
        case Format.JPEG:
            # Optimised Huffman tables make libjpeg hold all coefficients, 6 bytes a pixel.
            optimised = output.width * output.height <= _OPTIMISED_PIXELS
            return {"Q": output.quality, "subsample_mode": "off", "optimize_coding": optimised}
        case Format.WEBP:
            # kmax=1: every frame of an animation is whole. Else libwebp leaves out what differs little from the frame
            # before, again and again, and a slow change stands still.
            exact = output.lossless
            return {"Q": output.quality, "lossless": exact, "exact": exact, "effort": 2, "kmin": 0, "kmax": 1}
        case Format.GIF:
            return {"effort": 3, "keep_duplicate_frames": True}
        case Format.TIFF:
            bigtiff = output.width * output.height * 8 > 1 << 32
            return {"compression": "deflate", "predictor": "horizontal", "bigtiff": bigtiff}
        case _:
            depth = {"bitdepth": 8 if output.bits == 8 else max(10, output.bits)}
            quality = {"Q": output.quality, "lossless": output.lossless, "subsample_mode": "off"}
            return {"compression": "av1", "effort": 2, **quality, **depth}


def upscale_alpha(alpha: Pixels, scale: int) -> Pixels:
    """(H, W) opacity to (scale*H, scale*W) by bicubic interpolation, clipped; where all is opaque it stays exactly so."""
    with libvips.writing("the transparency: cannot be upscaled"):
        upscaled: Pixels = _bicubic(_image(alpha), scale).numpy()
    return upscaled.reshape(scale * alpha.shape[0], scale * alpha.shape[1])


def streamed_alpha(path: Path, scale: int) -> pyvips.Image:
    """The same of a picture file with opacity, decoded and upscaled only as it is written, from top to bottom."""
    info = open_picture(path).info

    def opacity() -> pyvips.Image:
        image = _decoded(_loaded(path, info.format))
        return _bicubic(image.extract_band(image.bands - 1), scale)

    return libvips.read(_damaged(path, info.format), opacity)


def _bicubic(image: pyvips.Image, scale: int) -> pyvips.Image:
    area = [0, 0, scale * image.width, scale * image.height]
    centred = {"idx": 0.5, "idy": 0.5, "odx": -0.5, "ody": -0.5, "oarea": area, "extend": "copy"}
    return image.affine([scale, 0, 0, scale], interpolate=vips().Interpolate.new("bicubic"), **centred)
