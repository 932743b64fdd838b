"""Maps of which memory holds some rows at a time, as steps pass over a picture from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from sanrt.arrays import Array
from sanrt.kernels.cpu.ir import aligned
from sanrt.kernels.cpu.winograd import PaddedMap
from sanrt.model.contract import RowFile

ByRows = Callable[[int, Callable[[slice], object]], None]
"""Calls work(rows) on every thread, each with its share of so many rows."""


class MapWindow:
    """A padded map, whole in memory, or some of its rows at a time.

    The others are in a file or, without one, of no use any more. Rows are counted with the padding, from its first row on.
    """

    def __init__(self, padded: PaddedMap, by_rows: ByRows) -> None:
        """The map has no memory yet; see `allocate`."""
        self.map, self.by_rows, self.end = padded, by_rows, 0
        self.file: RowFile | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all rows are in memory."""
        return len(self.map.array) == self.map.rows_in_all

    def allocate(self, rows: int, file: RowFile | None = None) -> None:
        """Make room for so many rows at a time; the file has the others."""
        self.map.array, self.file = aligned((min(rows, self.map.rows_in_all), *self.map.array.shape[1:])), file

    def rewind(self) -> None:
        """Begin at the top again."""
        self.end = 0

    def move(self, first: int, end: int) -> tuple[int, int]:
        """Hold rows from `first` up to `end`; those among them that were held before stay. Returns the pixel rows beyond."""
        padded, border = self.map, self.map.transform.border
        begin, self.end = max(self.end, first), max(self.end, end)
        assert self.is_whole or end - first <= len(padded.array)  # the kernel checks nothing
        if not self.is_whole:
            self.shift(first - padded.first_row, begin - first)
            padded.first_row = first
            for zeros in padded.array[: max(0, border - first)], padded.array[max(0, border + padded.height - first) :]:
                zeros[:] = 0
        return max(begin, border), min(end, border + padded.height)

    def shift(self, by: int, count: int) -> None:
        """Move `count` rows up by so many."""
        array = self.map.array
        for begin in range(0, count, by) if by > 0 else ():  # parts that do not overlap where they go to
            part = min(by, count - begin)
            self.by_rows(part, partial(copy, array[begin + by :][:part], array[begin:]))

    def load(self, first: int, end: int) -> None:
        """Read rows that the window holds from the file."""
        self.transfer(first, end, self.file.read if self.file else None)

    def save(self, first: int, end: int) -> None:
        """Write rows that the window holds to the file."""
        self.transfer(first, end, self.file.write if self.file else None)

    def transfer(self, first: int, end: int, move: Callable[[int, Array], None] | None) -> None:
        """Read or write rows on all threads."""
        border = self.map.transform.border
        first, end = max(first, border), min(end, border + self.map.height)
        if move and first < end:
            held = self.map.array[first - self.map.first_row : end - self.map.first_row]
            self.by_rows(end - first, lambda rows: rows.start < rows.stop and move(first + rows.start, held[rows]))

    def read(self, top: int, bottom: int) -> Array:
        """Rows of pixels, wherever they are: a view (rows, width, channels), good until the next call."""
        if not self.is_whole:
            border = self.map.transform.border
            self.rewind()
            self.load(*self.move(top + border, bottom + border))
        return self.map.rows(top, bottom)


def copy(source: Array, target: Array, rows: slice) -> None:
    """Copy some rows of `source` to the same rows of `target`."""
    np.copyto(target[rows], source[rows])
