"""Boxes of pixels: cut into tiles, grown by a halo, counted from one another's corner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sanrt.arrays import Array


@dataclass(frozen=True)
class Box:
    """Rows top to bottom and columns left to right of a map, the ends left out."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def area(self) -> int:
        return self.height * self.width

    def grown(self, halo: int, within: Box) -> Box:
        """With `halo` more pixels on every side, as far as `within` goes."""
        return Box(
            max(self.top - halo, within.top),
            max(self.left - halo, within.left),
            min(self.bottom + halo, within.bottom),
            min(self.right + halo, within.right),
        )

    def middle(self, most: int) -> Box:
        """The part in the middle whose sides are at most `most`; the whole box where it is no larger."""
        height, width = min(self.height, most), min(self.width, most)
        top, left = self.top + (self.height - height) // 2, self.left + (self.width - width) // 2
        return Box(top, left, top + height, left + width)

    def inside(self, outer: Box) -> Box:
        """The same box counted from `outer`'s corner."""
        top, left = outer.top, outer.left
        return Box(self.top - top, self.left - left, self.bottom - top, self.right - left)

    def scaled(self, factor: int) -> Box:
        """The same box in a map `factor` times as large."""
        return Box(self.top * factor, self.left * factor, self.bottom * factor, self.right * factor)

    def grid(self, rows: int, columns: int) -> Iterator[Box]:
        """rows x columns parts, cut at floor(i * size / n), in reading order."""
        ys = [self.top + self.height * i // rows for i in range(rows + 1)]
        xs = [self.left + self.width * i // columns for i in range(columns + 1)]
        return (Box(top, left, bottom, right) for top, bottom in pairwise(ys) for left, right in pairwise(xs))

    def tiles(self, side: int) -> Iterator[Box]:
        """The fewest parts with sides of at most `side`, nearly equal, in reading order."""
        return self.grid(-(-self.height // side), -(-self.width // side))

    def array(self) -> npt.NDArray[np.int64]:
        """(top, left, bottom, right), as the stages take a crop."""
        return np.array([self.top, self.left, self.bottom, self.right])


def padded_side(side: int, min_side: int, multiple: int) -> int:
    """The smallest side that a graph takes and that holds `side` pixels."""
    return -(-max(side, min_side) // multiple) * multiple


def pad(pictures: Array, min_side: int, multiple: int) -> Array:
    """(B, 3, H, W) -> (B, 3, H', W'), its last row and column repeated below and to the right; contiguous."""
    height, width = pictures.shape[2:]
    below, right = padded_side(height, min_side, multiple) - height, padded_side(width, min_side, multiple) - width
    if below or right:
        pictures = np.pad(pictures, ((0, 0), (0, 0), (0, below), (0, right)), mode="edge")
    return np.ascontiguousarray(pictures)


@dataclass(frozen=True)
class TileAxis:
    """One axis of a picture cut into tiles of one size; the last is pulled back to end at the border."""

    side: int
    """Length of the picture along this axis, pixels."""
    limit: int
    """Tiles are no longer than this."""
    overlap: int
    """Neighbours share at least this; at most half of `limit`."""

    @property
    def tile(self) -> int:
        """Every tile's length."""
        return min(self.limit, self.side)

    @property
    def starts(self) -> list[int]:
        """Where the tiles begin."""
        return [*range(0, self.side - self.tile, self.limit - self.overlap), self.side - self.tile]

    def weights(self, scale: int) -> Array:
        """Blending weights (tiles, scale * tile) at the output's resolution: wherever tiles meet, theirs sum to 1.

        Half a sine squared over the overlap, so that a tile counts least where it knows least of its surroundings.
        """
        place = np.arange(scale * self.tile)
        inside = np.minimum(place, place[::-1]) + 0.5
        raw = np.sin(np.pi / 2 * np.minimum(inside / max(scale * self.overlap, 1), 1)) ** 2
        total = np.zeros(scale * self.side)
        for start in self.starts:
            total[scale * start :][: len(raw)] += raw
        return np.stack([raw / total[scale * start :][: len(raw)] for start in self.starts]).astype(np.float32)
