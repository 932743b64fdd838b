"""One picture through one backend: number formats, tiles, self-ensemble, and memory that does not suffice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sanrt.errors import BackendError, OutOfMemoryError, UsageError
from sanrt.model.spec import Architecture
from sanrt.runtime.backends import Array, Backend
from sanrt.runtime.memory import free_host_memory
from sanrt.runtime.tiling import TileAxis, pad

log = logging.getLogger(__name__)

Picture = TypeVar("Picture", npt.NDArray[np.uint8], npt.NDArray[np.uint16], npt.NDArray[np.float32])
Infer = Callable[[Array], Array]
"""float32 (1, 3, H, W) -> (1, 3, sH, sW), of any size from 1 x 1."""

DEFAULT_OVERLAP = 32
MEMORY_SHARE = 0.6
"""Of the free memory: the rest is for decoding, encoding and everybody else."""


@dataclass(frozen=True)
class UpscaleOptions:
    """How pictures go through the network."""

    tile: int | None = None
    """Cut larger pictures into overlapped tiles of at most this side; None cuts only what does not fit the memory."""
    overlap: int | None = None
    """Pixels that neighbouring tiles share; None is 32, or a quarter of a smaller tile."""
    self_ensemble: bool = False
    """Average over the 8 flips and rotations (SAN+, section 4 of the paper)."""

    def __post_init__(self) -> None:
        if self.tile is not None and self.tile < 16:
            raise UsageError(f"tiles of {self.tile} pixels; expected at least 16")
        if self.overlap is not None and not 0 <= self.overlap <= (self.tile or 2 * self.overlap) // 2:
            raise UsageError(f"overlap {self.overlap} with tiles of {self.tile}; expected 0 to half a tile")

    def overlap_of(self, tile: int) -> int:
        """The overlap that tiles of this side get."""
        return min(
            DEFAULT_OVERLAP if self.overlap is None else self.overlap, tile // 4 if self.overlap is None else tile // 2
        )


def upscale(backend: Backend, picture: Picture, options: UpscaleOptions = UpscaleOptions()) -> Picture:
    """RGB (H, W, 3), uint8, uint16 or float32 in 0..1 -> (sH, sW, 3) of the same type, rounded and clipped.

    The whole picture at once where memory suffices, else overlapped, blended tiles; after an out-of-memory the picture is
    done again in tiles half as large, which is logged. OutOfMemoryError when the smallest tiles do not fit either.
    """
    arch = backend.spec.architecture
    x = network_input(picture, arch.value_range)
    infer: Infer = lambda tile: infer_padded(backend, tile)  # noqa: E731
    if options.self_ensemble:
        infer = self_ensembled(infer)
    y = infer_in_tiles(infer, x, arch, options)
    return network_output(y, picture, arch.value_range)


def full_scale(dtype: np.dtype[Any]) -> float:
    """The largest value of a picture's number format; 1 for floats."""
    return float(np.iinfo(dtype).max) if dtype.kind == "u" else 1.0


def network_input(picture: Picture, value_range: float) -> Array:
    """(H, W, 3) of any supported type -> contiguous float32 (1, 3, H, W) in 0..value_range."""
    factor = np.float32(value_range / full_scale(picture.dtype))
    return np.ascontiguousarray(picture.transpose(2, 0, 1)[None], np.float32) * factor


def network_output(y: Array, like: Picture, value_range: float) -> Picture:
    """(1, 3, H, W) -> (H, W, 3) of the same type as `like`, clipped to its range and rounded to the nearest integer."""
    y = np.clip(y[0], 0, value_range) * np.float32(full_scale(like.dtype) / value_range)
    if like.dtype.kind == "u":
        np.rint(y, out=y)
    return np.ascontiguousarray(y.astype(like.dtype).transpose(1, 2, 0))


def infer_padded(backend: Backend, x: Array) -> Array:
    """Run a picture of any size, padded to what the graph takes, and crop the result; BackendError if it is not finite."""
    spec = backend.spec
    height, width = (spec.architecture.scale * side for side in x.shape[2:])
    y = backend.infer(pad(x, spec.min_side, spec.multiple))[..., :height, :width]
    if not np.isfinite(y).all():
        raise BackendError(f"backend {backend.name} gave values that are not finite ({spec.precision}); try fp32")
    return y


def self_ensembled(infer: Infer) -> Infer:
    """The mean over the 8 flips and rotations of the input, each undone on its output (SAN+, section 4 of the paper)."""

    def ensemble(x: Array) -> Array:
        total: Array | None = None
        for turned in (False, True):
            for axes in ((), (2,), (3,), (2, 3)):
                seen = np.flip(x.swapaxes(2, 3) if turned else x, axes)
                y = np.flip(infer(np.ascontiguousarray(seen)), axes)
                y = y.swapaxes(2, 3) if turned else y
                total = y.copy() if total is None else np.add(total, y, out=total)
        assert total is not None
        return total / np.float32(8)

    return ensemble


def infer_in_tiles(infer: Infer, x: Array, arch: Architecture, options: UpscaleOptions) -> Array:
    """Whole, or in the largest tiles that are allowed and fit."""
    tile = options.tile or affordable_side(arch, x.shape[2], x.shape[3])
    while True:
        try:
            return infer_tiled(infer, x, arch.scale, tile, options.overlap_of(tile))
        except OutOfMemoryError as error:
            tried, tile = tile, min(tile, max(x.shape[2:])) // 2
            if tile < max(16, 2 * (options.overlap or 0)):
                raise
            log.warning("%s with tiles of %d; doing this picture again with tiles of %d", error, tried, tile)


def affordable_side(arch: Architecture, height: int, width: int) -> int:
    """The side of the largest square tiles that fit the free memory; the picture's longer side if it fits whole."""
    room = int(free_host_memory() * MEMORY_SHARE) - height * width * result_bytes(arch)
    if room <= 0:
        size = f"{arch.scale * width} x {arch.scale * height}"
        raise OutOfMemoryError(f"the {size} result alone exceeds {MEMORY_SHARE:.0%} of the free memory")
    pixels = room // network_bytes(arch)
    return max(height, width) if height * width <= pixels else max(64, isqrt(pixels) // 16 * 16)


def result_bytes(arch: Architecture) -> int:
    """Of the float32 result, per input pixel, and of its copy in the picture's own type."""
    return 3 * arch.scale**2 * (4 + 4)


def network_bytes(arch: Architecture) -> int:
    """What the network holds at its peak, per input pixel, as float32.

    That is in the tail: its last convolution's C * s^2 values, their pixel-shuffled copy and another that libraries make to
    reorder memory, beside some ten maps of C channels that the skip connections and blocks keep.
    """
    return 4 * arch.channels * (3 * arch.scale**2 + 10)


def infer_tiled(infer: Infer, x: Array, scale: int, tile: int, overlap: int) -> Array:
    """Overlapped tiles of one size, blended; a picture no larger than a tile goes through untouched."""
    rows, columns = TileAxis(x.shape[2], tile, overlap), TileAxis(x.shape[3], tile, overlap)
    if len(rows.starts) == len(columns.starts) == 1:
        return infer(x)
    result = np.zeros((1, 3, scale * rows.side, scale * columns.side), np.float32)
    for top, row_weights in zip(rows.starts, rows.weights(scale), strict=True):
        for left, column_weights in zip(columns.starts, columns.weights(scale), strict=True):
            y = infer(np.ascontiguousarray(x[..., top : top + rows.tile, left : left + columns.tile]))
            place = result[..., scale * top :, scale * left :][..., : y.shape[2], : y.shape[3]]
            place += y * row_weights[:, None] * column_weights
    return result
