"""Maps of any size (features, decoded pixels): on the GPU or in memory while that lasts, then in nameless scratch files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from sanrt.errors import OutOfMemoryError, ScratchError, system_reason
from sanrt.geometry import Box
from sanrt.runtime.backends.protocol import DeviceMaps, FeatureMap
from sanrt.runtime.host import reserve
from sanrt.wording import option

Array = npt.NDArray[Any]

BAND = 64
"""Columns that lie together in a scratch file: a tile's rows are then a few long runs instead of one per channel."""


class MemoryMap:
    """A feature map in memory."""

    def __init__(self, channels: int, height: int, width: int, dtype: npt.DTypeLike) -> None:
        self.array: Array = np.empty((channels, height, width), dtype)

    def read(self, box: Box) -> Array:
        return self.array[None, :, box.top : box.bottom, box.left : box.right].copy()

    def write(self, box: Box, part: Array) -> None:
        self.array[:, box.top : box.bottom, box.left : box.right] = part[0]

    def close(self) -> None:
        del self.array


class ScratchMap:
    """A feature map in a file without a name: [column band][row][channel][column], read and written, never mapped.

    (Pages of a mapped file would count as this process' memory.)
    """

    def __init__(self, channels: int, height: int, width: int, dtype: npt.DTypeLike, folder: Path) -> None:
        self.channels, self.height, self.dtype = channels, height, np.dtype(dtype)
        self.row = channels * BAND * self.dtype.itemsize
        self.file, self.folder = scratch_file(-(-width // BAND) * height * self.row, folder), folder

    def read(self, box: Box) -> Array:
        part: Array = np.empty((1, self.channels, box.height, box.width), self.dtype)
        for band in self.bands(box):
            shared = band.inside(box)
            start = band.left % BAND
            part[0, :, :, shared.left : shared.right] = self.load(band)[:, :, start : start + band.width].transpose(1, 0, 2)
        return part

    def write(self, box: Box, part: Array) -> None:
        for band in self.bands(box):
            start, shared = band.left % BAND, band.inside(box)
            whole = band.width == BAND
            rows = np.empty((box.height, self.channels, BAND), self.dtype) if whole else self.load(band)
            rows[:, :, start : start + band.width] = part[0, :, :, shared.left : shared.right].transpose(1, 0, 2)
            self.save(band, rows)

    def bands(self, box: Box) -> Iterator[Box]:
        """The box cut at multiples of BAND columns."""
        edges = [box.left, *range(box.left // BAND * BAND + BAND, box.right, BAND), box.right]
        return (Box(box.top, left, box.bottom, right) for left, right in pairwise(edges))

    def offset(self, band: Box) -> int:
        """Where the first row of a band's part lies in the file."""
        return (band.left // BAND * self.height + band.top) * self.row

    def load(self, band: Box) -> Array:
        """All columns of a band's rows: (h, C, BAND)."""
        rows = np.empty((band.height, self.channels, BAND), self.dtype)
        view, done = rows.reshape(-1).view(np.uint8).data, 0
        self.file.seek(self.offset(band))
        while done < len(view):
            done += self.file.readinto(view[done:])
        return rows

    def save(self, band: Box, rows: Array) -> None:
        """The opposite of `load`."""
        view, done = rows.reshape(-1).view(np.uint8).data, 0
        try:
            self.file.seek(self.offset(band))
            while done < len(view):
                done += self.file.write(view[done:])
        except OSError as error:
            raise scratch_error(self.folder, len(view), error) from error

    def close(self) -> None:
        self.file.close()


class ScratchRows:
    """Rows of one size in a file without a name; a `RowFile`."""

    def __init__(self, count: int, row_bytes: int, folder: Path) -> None:
        self.row_bytes, self.folder, self.lock = row_bytes, folder, Lock()
        self.file = scratch_file(count * row_bytes, folder)

    def read(self, first: int, rows: Array) -> None:
        view, done = rows.reshape(-1).view(np.uint8).data, 0
        while done < len(view):
            done += self.read_at(first * self.row_bytes + done, view[done:])

    def write(self, first: int, rows: Array) -> None:
        view, done = rows.reshape(-1).view(np.uint8).data, 0
        try:
            while done < len(view):
                done += self.write_at(first * self.row_bytes + done, view[done:])
        except OSError as error:
            raise scratch_error(self.folder, len(view), error) from error

    def read_at(self, offset: int, view: memoryview) -> int:
        """Bytes read into a view; several threads at once where the system has a read with an offset (Windows has none)."""
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [view], offset)
        with self.lock:
            self.file.seek(offset)
            return int(self.file.readinto(view))

    def write_at(self, offset: int, view: memoryview) -> int:
        """Bytes written, likewise."""
        if hasattr(os, "pwritev"):
            return os.pwritev(self.file.fileno(), [view], offset)
        with self.lock:
            self.file.seek(offset)
            return int(self.file.write(view))

    def close(self) -> None:
        self.file.close()


@dataclass
class Fetched:
    """A map on the host that a GPU's stages write to."""

    map: FeatureMap
    device: DeviceMaps

    def read(self, box: Box) -> Array:
        part: Array = self.map.read(box)
        return part

    def write(self, box: Box, part: Any) -> None:
        self.map.write(box, part if isinstance(part, np.ndarray) else self.device.fetch(part))

    def close(self) -> None:
        self.map.close()


def scratch_file(size: int, folder: Path) -> Any:
    """A new file without a name, of so many bytes; raises ScratchError."""
    try:
        file = tempfile.TemporaryFile(dir=folder, prefix="sanrt-", buffering=0)  # noqa: SIM115
        # Taken now, so that a full disk is told before hours of work and not in the middle of them.
        reserve(file.fileno(), size)
    except OSError as error:
        raise scratch_error(folder, size, error) from error
    return file


def scratch_error(folder: Path, size: int, error: OSError) -> ScratchError:
    """A scratch file that cannot be made or written."""
    return ScratchError(
        f"{folder}: no scratch file of {size / 1e9:.1f} GB ({system_reason(error)}); "
        f"free some space, name a folder with more by {option('scratch')}, or raise {option('memory')}"
    )


class FeatureStore:
    """Makes feature maps within `device_memory` bytes of a GPU, and what does not fit or belong there on the host.

    On the host the first `memory` bytes are memory, and the rest scratch files under `folder`. A context manager.
    """

    def __init__(
        self, memory: int, folder: Path | None = None, device: DeviceMaps | None = None, device_memory: int = 0
    ) -> None:
        self.memory, self.device, self.device_memory = memory, device, device_memory
        self.folder = folder or Path(tempfile.gettempdir())
        self.maps: list[FeatureMap | ScratchRows] = []

    def new(
        self, channels: int, height: int, width: int, dtype: npt.DTypeLike = np.float32, on_device: bool = True
    ) -> FeatureMap:
        """A map with undefined content, on the host unless it is float32; raises ScratchError when there is no room."""
        made = self.on_device(channels, height, width) if on_device and np.dtype(dtype) == np.float32 else None
        if made is None:
            made = self.on_host(channels, height, width, dtype)
            made = Fetched(made, self.device) if self.device else made
        self.maps.append(made)
        return made

    def new_rows(self, count: int, row_bytes: int) -> ScratchRows:
        """A scratch file for so many rows of so many bytes; raises ScratchError."""
        made = ScratchRows(count, row_bytes, self.folder)
        self.maps.append(made)
        return made

    def rest(self) -> FeatureStore:
        """A store of what is left of this one's room."""
        return FeatureStore(self.memory, self.folder, self.device, self.device_memory)

    def on_device(self, channels: int, height: int, width: int) -> FeatureMap | None:
        """A map on the GPU, if it fits there."""
        size = channels * height * width * np.dtype(np.float32).itemsize
        if not self.device or size > self.device_memory:
            return None
        try:
            made = self.device.new(channels, height, width)
        except OutOfMemoryError:
            # Others took the GPU's memory meanwhile, or it is in pieces.
            self.device_memory = 0
            return None
        self.device_memory -= size
        return made

    def on_host(self, channels: int, height: int, width: int, dtype: npt.DTypeLike) -> FeatureMap:
        """A map in memory, if it fits there, else in a scratch file."""
        size = channels * height * width * np.dtype(dtype).itemsize
        if size > self.memory:
            return ScratchMap(channels, height, width, dtype, self.folder)
        self.memory -= size
        return MemoryMap(channels, height, width, dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self.maps:
            self.maps.pop().close()
