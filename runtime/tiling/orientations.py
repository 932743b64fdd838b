"""The eight flips and rotations of a picture, of arrays and of boxes in them (for SAN+, section 4 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from sanrt.arrays import Array
from sanrt.geometry import Box
from sanrt.runtime.backends.protocol import PixelSource


@dataclass(frozen=True)
class Orientation:
    """Rows and columns swapped, then flipped."""

    swap: bool
    flip_rows: bool
    flip_columns: bool

    @property
    def flips(self) -> tuple[int, ...]:
        """The flipped axes of (1, C, H, W)."""
        return (2,) * self.flip_rows + (3,) * self.flip_columns

    def apply(self, x: Array) -> Array:
        """A picture (1, C, H, W) as it is seen in this orientation; contiguous."""
        return np.ascontiguousarray(np.flip(x.swapaxes(2, 3) if self.swap else x, self.flips))

    def inverse(self, y: Array) -> Array:
        """The opposite of `apply`; a view."""
        y = np.flip(y, self.flips)
        return y.swapaxes(2, 3) if self.swap else y

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width as seen in this orientation."""
        return (width, height) if self.swap else (height, width)

    def origin(self, box: Box, height: int, width: int) -> Box:
        """Where a box of the oriented picture, which has this size, lies in the picture itself."""
        rows = (height - box.bottom, height - box.top) if self.flip_rows else (box.top, box.bottom)
        columns = (width - box.right, width - box.left) if self.flip_columns else (box.left, box.right)
        (top, bottom), (left, right) = (columns, rows) if self.swap else (rows, columns)
        return Box(top, left, bottom, right)


ORIENTATIONS = tuple(Orientation(*each) for each in product((False, True), repeat=3))
"""The first one changes nothing."""


@dataclass(frozen=True)
class OrientedSource:
    """A picture as it is seen in an orientation."""

    source: PixelSource
    orientation: Orientation

    @property
    def size(self) -> tuple[int, int]:
        return self.orientation.size(*self.source.size)

    def read(self, box: Box) -> Array:
        return self.orientation.apply(self.source.read(self.orientation.origin(box, *self.size)))
