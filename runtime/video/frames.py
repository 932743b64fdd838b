"""Frames of a video as RGB pictures, and RGB pictures as frames: the arithmetic of ITU-T H.273, rounded to nearest.

FFmpeg's own converter is some levels off for more than 8 bits, and for full range; this one is not, and gives the same on
every machine. A frame is converted in strips of rows that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sanrt.arrays import Array
from sanrt.errors import PictureError

if TYPE_CHECKING:
    import av

Pixels = npt.NDArray[Any]
"""RGB, (H, W, 3): uint8, or uint16 over 0..65535 for more than 8 bits a sample."""

RGB, BT709, UNSPECIFIED, FCC, BT470BG, SMPTE170M, SMPTE240M, BT2020 = 0, 1, 2, 4, 5, 6, 7, 9
"""Matrices by their numbers in H.273."""
WEIGHTS = {
    BT709: (0.2126, 0.0722),
    FCC: (0.30, 0.11),
    BT470BG: (0.299, 0.114),
    SMPTE170M: (0.299, 0.114),
    SMPTE240M: (0.212, 0.087),
    BT2020: (0.2627, 0.0593),
}
"""How much red and blue count in the luma of a matrix."""
UNSPECIFIED_RANGE, LIMITED, FULL = 0, 1, 2
"""FFmpeg's numbers of ranges."""
HIGH_DEFINITION = (1280, 576)
"""Wider or higher pictures whose matrix is not said are BT.709 to players, others BT.601."""
STRIP_ROWS = 64


@dataclass(frozen=True)
class ColourTags:
    """What a stream says of its colours, in the numbers of H.273; 2 (range: 0) is unspecified."""

    matrix: int = UNSPECIFIED
    range: int = UNSPECIFIED_RANGE
    primaries: int = 2
    transfer: int = 2


@dataclass(frozen=True)
class PixelFormat:
    """How a frame's samples are stored."""

    bits: int
    """Of a sample."""
    chroma: tuple[int, int] | None
    """Pixels, across and down, that share their chroma; None for grey."""
    rgb: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its samples."""
        return np.dtype(np.uint8 if self.bits == 8 else np.uint16)

    @property
    def name(self) -> str:
        """FFmpeg's name of the planar format, little-endian."""
        depth = "" if self.bits == 8 else f"{self.bits}le"
        if self.rgb:
            return f"gbrp{depth}"
        if self.chroma is None:
            return f"gray{depth}"
        return f"yuv{_SUBSAMPLINGS[self.chroma]}p{depth}"

    @property
    def subsampling(self) -> str:
        """`4:2:0`, for people."""
        return "RGB" if self.rgb else "grey" if self.chroma is None else ":".join(_SUBSAMPLINGS[self.chroma])

    @classmethod
    def of(cls, found: av.VideoFormat) -> PixelFormat | None:
        """The planar format that holds what another does; None for transparency, floats, and what no planar one holds."""
        components, bits = found.components, max(each.bits for each in found.components)
        if found.name.startswith("pal8"):
            return cls(8, (1, 1), rgb=True)
        if found.name in ("rgb0", "bgr0", "0rgb", "0bgr"):
            components = components[:3]
        if any(each.is_alpha for each in components) or bits > 16 or "f16" in found.name or "f32" in found.name:
            return None
        bits = max(8, bits)
        if found.is_rgb:
            return cls(bits, (1, 1), rgb=True)
        if len(components) == 1:
            return cls(bits, None)
        chroma = (-(-64 // found.chroma_width(64)), -(-64 // found.chroma_height(64)))
        return cls(bits, chroma) if chroma in _SUBSAMPLINGS else None


_SUBSAMPLINGS = {(1, 1): "444", (2, 1): "422", (2, 2): "420", (4, 1): "411", (4, 4): "410", (1, 2): "440"}


@dataclass(frozen=True)
class Conversion:
    """Between the samples of a pixel format and RGB."""

    format: PixelFormat
    matrix: int
    """One of WEIGHTS; of no importance for RGB and grey."""
    full_range: bool
    centred: bool = False
    """Whether chroma lies between its pixels across, as in JPEG and MPEG-1; else on the left ones. Down it lies between."""

    @property
    def most(self) -> int:
        """The largest sample."""
        return (1 << self.format.bits) - 1

    @property
    def luma(self) -> tuple[float, float]:
        """The sample of black, and how many more white has."""
        step = 1 << (self.format.bits - 8)
        return (0.0, float(self.most)) if self.full_range else (16.0 * step, 219.0 * step)

    @property
    def colour(self) -> tuple[float, float]:
        """The chroma sample of grey, and how many lie between the ends of its range."""
        step = 1 << (self.format.bits - 8)
        return 128.0 * step, float(self.most) if self.full_range else 224.0 * step

    @cached_property
    def from_rgb(self) -> Array:
        """(3, 3): rows Y, Cb, Cr of columns R, G, B."""
        red, blue = WEIGHTS[self.matrix]
        luma = np.array([red, 1 - red - blue, blue])
        rows = [luma, (np.array([0, 0, 1]) - luma) / (2 - 2 * blue), (np.array([1, 0, 0]) - luma) / (2 - 2 * red)]
        return np.array(rows)

    def to_rgb(self, planes: list[Pixels]) -> Pixels:
        """Planes as FFmpeg has them (Y, Cb, Cr; G, B, R; or grey alone) -> (H, W, 3)."""
        height, width = planes[0].shape
        dtype = self.format.dtype
        rgb = np.empty((height, width, 3), dtype)
        white = 255.0 if dtype == np.uint8 else 65535.0
        if self.format.rgb:
            return self.stretched(np.stack([planes[2], planes[0], planes[1]], axis=2))
        black, span = self.luma
        if self.format.chroma is None:
            grey = (planes[0].astype(np.float32) - np.float32(black)) * np.float32(white / span)
            rgb[...] = rounded(grey, white, dtype)[..., None]
            return rgb
        inverse = np.linalg.inv(self.from_rgb)
        grey_sample, chroma_span = self.colour
        across, down = self.format.chroma
        for rows in strips(height):
            y = (planes[0][rows].astype(np.float32) - np.float32(black)) * np.float32(white / span)
            cb, cr = (
                (enlarged(plane, rows, width, across, down, self.centred) - np.float32(grey_sample))
                * np.float32(white / chroma_span)
                for plane in planes[1:3]
            )
            for channel in range(3):
                of_y, of_cb, of_cr = (np.float32(weight) for weight in inverse[channel])
                rgb[rows, :, channel] = rounded(of_y * y + of_cb * cb + of_cr * cr, white, dtype)
        return rgb

    def from_picture(self, rgb: Pixels) -> list[Pixels]:
        """(H, W, 3) -> planes as FFmpeg has them, with the mean of the channels as grey."""
        height, width = rgb.shape[:2]
        dtype, full = self.format.dtype, 255 if rgb.dtype == np.uint8 else 65535
        if self.format.rgb:
            scaled = rounded(rgb.astype(np.float32) * np.float32(self.most / full), self.most, dtype)
            return [np.ascontiguousarray(scaled[..., channel]) for channel in (1, 2, 0)]
        black, span = self.luma
        if self.format.chroma is None:
            mean = rgb.mean(axis=2, dtype=np.float32)
            return [rounded(mean * np.float32(span / full) + np.float32(black), self.most, dtype)]
        across, down = self.format.chroma
        grey_sample, chroma_span = self.colour
        y_weights = (self.from_rgb[0] * span / full).astype(np.float32)
        chroma_weights = (self.from_rgb[1:] * chroma_span / full).astype(np.float32)
        small = (-(-height // down), -(-width // across))
        planes = [np.empty((height, width), dtype), np.empty(small, dtype), np.empty(small, dtype)]
        for rows in strips(height):
            channels = [rgb[rows, :, channel].astype(np.float32) for channel in range(3)]
            y = sum_of(y_weights, channels) + np.float32(black)
            planes[0][rows] = rounded(y, self.most, dtype)
            reduced = [shrunk(channel, across, down, self.centred) for channel in channels]
            at = slice(rows.start // down, -(-rows.stop // down))
            for plane, weights in zip(planes[1:], chroma_weights, strict=True):
                plane[at] = rounded(sum_of(weights, reduced) + np.float32(grey_sample), self.most, dtype)
        return planes

    def stretched(self, rgb: Pixels) -> Pixels:
        """RGB samples over the whole range of their type."""
        if self.format.bits in (8, 16):
            return rgb
        return rounded(rgb.astype(np.float32) * np.float32(65535 / self.most), 65535, rgb.dtype)


def strips(height: int) -> Iterator[slice]:
    """Rows in groups, each of which shares no chroma with another."""
    for top in range(0, height, STRIP_ROWS):
        yield slice(top, min(top + STRIP_ROWS, height))


def sum_of(weights: Array, channels: list[Array]) -> Array:
    """The weighted sum of three channels."""
    total: Array = weights[0] * channels[0]
    total += weights[1] * channels[1]
    total += weights[2] * channels[2]
    return total


def rounded(values: Array, most: float, dtype: npt.DTypeLike) -> Pixels:
    """The nearest whole numbers of 0..most."""
    np.rint(values, out=values)
    np.clip(values, 0, most, out=values)
    return values.astype(dtype)


def enlarged(plane: Pixels, rows: slice, width: int, across: int, down: int, centred: bool) -> Array:
    """Some rows of a chroma plane at the size of the luma, by linear interpolation."""
    values = plane[rows].astype(np.float32) if down == 1 else between(plane, 0, rows, down, True)
    return values if across == 1 else between(values, 1, slice(0, width), across, centred)


def between(values: Pixels, axis: int, wanted: slice, factor: int, centred: bool) -> Array:
    """Samples `wanted` of an axis that is enlarged by a factor, by linear interpolation; the ends are repeated."""
    offset = (factor - 1) / 2 if centred else 0
    position = np.clip((np.arange(wanted.start, wanted.stop) - offset) / factor, 0, values.shape[axis] - 1)
    low = np.floor(position).astype(np.intp)
    high = np.minimum(low + 1, values.shape[axis] - 1)
    share = (position - low).astype(np.float32)
    share = share[:, None] if axis == 0 else share
    left = values.take(low, axis).astype(np.float32)
    left += share * (values.take(high, axis) - left)
    return left


def shrunk(channel: Array, across: int, down: int, centred: bool) -> Array:
    """A channel at the size of the chroma: means down, and across means or, where chroma lies on pixels, triangles."""
    if down > 1:
        missing = -channel.shape[0] % down
        channel = np.concatenate([channel, channel[-1:].repeat(missing, axis=0)]) if missing else channel
        channel = channel.reshape(-1, down, channel.shape[1]).mean(axis=1)
    if across == 1:
        return channel
    width = -(-channel.shape[1] // across)
    reach = 0 if centred else across - 1
    weights = [1.0] * across if centred else [across - abs(at) for at in range(-reach, reach + 1)]
    padded = np.pad(channel, ((0, 0), (reach, across * width - channel.shape[1] + across)), mode="edge")
    total = sum(np.float32(weight) * padded[:, at::across][:, :width] for at, weight in enumerate(weights))
    return np.asarray(total / np.float32(sum(weights)))


def guessed_matrix(width: int, height: int) -> int:
    """What players take for the matrix of a stream that does not say."""
    wide, high = HIGH_DEFINITION
    return BT709 if width >= wide or height > high else SMPTE170M


def planes_of(frame: av.VideoFrame, form: PixelFormat) -> list[Pixels]:
    """The samples of a frame, copied, each plane (H, W), as the planar format has them."""
    if frame.format.name.replace("yuvj", "yuv") != form.name:
        frame = frame.reformat(format=form.name)
    planes = []
    for plane in frame.planes:
        rows = np.frombuffer(memoryview(plane), form.dtype).reshape(-1, plane.line_size // form.dtype.itemsize)
        planes.append(rows[: plane.height, : plane.width].copy())
    return planes


def frame_of(planes: list[Pixels], form: PixelFormat, tags: ColourTags) -> av.VideoFrame:
    """A frame of the planar format with these samples."""
    import av

    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, form.name)
    for plane, samples in zip(frame.planes, planes, strict=True):
        line = plane.line_size // form.dtype.itemsize
        rows = np.zeros((plane.height, line), form.dtype)
        rows[:, : plane.width] = samples
        plane.update(rows.tobytes())
    frame.colorspace, frame.color_range = tags.matrix, tags.range
    frame.color_primaries, frame.color_trc = tags.primaries, tags.transfer
    return frame


def require_matrix(subject: str, matrix: int) -> None:
    """Raise PictureError for a matrix that is none of three weights."""
    if matrix not in (RGB, UNSPECIFIED, *WEIGHTS):
        raise PictureError(
            f"{subject}: colour matrix {matrix} of H.273, which sanrt does not convert; expected BT.601, BT.709, BT.2020 or "
            "RGB, convert it first (ffmpeg -i IN -vf scale=out_color_matrix=bt709 OUT)"
        )
