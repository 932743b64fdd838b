"""The eight flips and rotations of a picture, of arrays and of boxes in them (for SAN+, section 4 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from sanrt.arrays import Array
from sanrt.geometry import Box
from sanrt.runtime.tiling.streaming import PixelSource


@dataclass(frozen=True)
class Turn:
    """Rows and columns swapped, then flipped."""

    swap: bool
    flip_rows: bool
    flip_columns: bool

    @property
    def flips(self) -> tuple[int, ...]:
        """The flipped axes of (1, C, H, W)."""
        return (2,) * self.flip_rows + (3,) * self.flip_columns

    def of(self, x: Array) -> Array:
        """(1, C, H, W) turned."""
        return np.ascontiguousarray(np.flip(x.swapaxes(2, 3) if self.swap else x, self.flips))

    def undone(self, y: Array) -> Array:
        """The opposite; a view."""
        y = np.flip(y, self.flips)
        return y.swapaxes(2, 3) if self.swap else y

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width once turned."""
        return (width, height) if self.swap else (height, width)

    def origin(self, box: Box, height: int, width: int) -> Box:
        """Where a box of the turned picture, which has this size, lies in the picture itself."""
        rows = (height - box.bottom, height - box.top) if self.flip_rows else (box.top, box.bottom)
        columns = (width - box.right, width - box.left) if self.flip_columns else (box.left, box.right)
        (top, bottom), (left, right) = (columns, rows) if self.swap else (rows, columns)
        return Box(top, left, bottom, right)


TURNS = tuple(Turn(*each) for each in product((False, True), repeat=3))
"""The first one changes nothing."""


@dataclass(frozen=True)
class TurnedSource:
    """A picture as it is seen turned."""

    source: PixelSource
    turn: Turn

    @property
    def size(self) -> tuple[int, int]:
        return self.turn.size(*self.source.size)

    def read(self, box: Box) -> Array:
        return self.turn.of(self.source.read(self.turn.origin(box, *self.size)))
