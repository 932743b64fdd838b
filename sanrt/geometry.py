"""Boxes of pixels: cut into tiles, grown by a halo, counted from one another's corner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt


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
