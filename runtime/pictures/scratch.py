"""A picture too large for memory, on disk: tiles go in anywhere, the encoder reads it from top to bottom."""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sanrt.errors import ScratchError, system_reason
from sanrt.runtime.host import reserve

if TYPE_CHECKING:
    import pyvips

_STRIP_ROWS = 16
_SHORT, _LONG, _LONG8 = 3, 4, 16


class ScratchPicture:
    """A nameless file of pixels, gone when closed or when the process dies.

    It is an uncompressed BigTIFF, for a reason: libvips reads a TIFF with read(), so encoding a picture of any size takes a
    few strips of memory; a raw file it would map, and the mapped pages count as the process's resident memory.
    """

    def __init__(self, width: int, height: int, bands: int, dtype: type[np.uint8 | np.uint16], folder: Path) -> None:
        """ScratchError if `folder` has not the space for it, or cannot be written."""
        self.width, self.height, self.bands, self.dtype = width, height, bands, np.dtype(dtype)
        self._row_bytes = width * bands * self.dtype.itemsize
        self._folder = folder
        header = _tiff_header(width, height, bands, self.dtype.itemsize)
        self._pixels_at = len(header)
        size = len(header) + height * self._row_bytes
        with self._disk_errors_told():
            if (free := shutil.disk_usage(folder).free) < size:
                raise ScratchError(
                    f"{folder}: {free / 1e6:.0f} MB free, a scratch file of {size / 1e6:.0f} MB is needed; "
                    "free some space or choose another folder"
                )
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            # Taken now, so that a full disk is told before hours of work and not in the middle of them.
            reserve(self._file.fileno(), size)
            self._file.write(header)

    @contextmanager
    def _disk_errors_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ScratchError(f"{self._folder}: cannot hold a scratch file ({system_reason(error)})") from None

    def put(self, top: int, left: int, tile: NDArray[Any]) -> None:
        """Store a (h, w, bands) tile of the picture's dtype with its first pixel at row `top`, column `left`."""
        height, width, bands = tile.shape
        if bands != self.bands or tile.dtype != self.dtype:
            raise ValueError(f"tile is {bands} x {tile.dtype}, the scratch picture {self.bands} x {self.dtype}")
        if not (0 <= top <= self.height - height and 0 <= left <= self.width - width):
            raise ValueError(f"tile {width} x {height} at {left}, {top} leaves the {self.width} x {self.height} picture")
        rows = [tile] if width == self.width else tile
        with self._disk_errors_told():
            for number, row in enumerate(rows):
                offset = (top + number) * self._row_bytes + left * bands * self.dtype.itemsize
                self._file.seek(self._pixels_at + offset)
                self._file.write(np.ascontiguousarray(row).data)

    def image(self) -> pyvips.Image:
        """The whole picture, to be read once from top to bottom while the scratch picture is open."""
        import pyvips

        with self._disk_errors_told():
            self._file.flush()
        source = pyvips.Source.new_from_descriptor(self._file.fileno())
        return pyvips.Image.tiffload_source(source, access="sequential", fail_on="error")

    def close(self) -> None:
        """Drop the pixels."""
        with suppress(OSError):
            self._file.close()

    def __enter__(self) -> ScratchPicture:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _tiff_header(width: int, height: int, bands: int, sample_bytes: int) -> bytes:
    """Everything of an uncompressed little-endian BigTIFF that comes before its pixels."""
    strips = -(-height // _STRIP_ROWS)
    strip_bytes = _STRIP_ROWS * width * bands * sample_bytes
    extra = bands in (2, 4)
    arrays_at = 16 + 8 + (9 + extra) * 20 + 8
    pixels_at = arrays_at + 2 * 8 * strips
    offsets = [pixels_at + strip * strip_bytes for strip in range(strips)]
    counts = [strip_bytes] * (strips - 1) + [height * width * bands * sample_bytes - (strips - 1) * strip_bytes]
    entries = [
        (256, _LONG, 1, width),
        (257, _LONG, 1, height),
        (258, _SHORT, bands, sum(8 * sample_bytes << 16 * band for band in range(bands))),
        (259, _SHORT, 1, 1),
        (262, _SHORT, 1, 2 if bands >= 3 else 1),
        (273, _LONG8, strips, arrays_at if strips > 1 else offsets[0]),
        (277, _SHORT, 1, bands),
        (278, _LONG, 1, _STRIP_ROWS),
        (279, _LONG8, strips, arrays_at + 8 * strips if strips > 1 else counts[0]),
    ]
    if extra:
        entries.append((338, _SHORT, 1, 2))
    directory = struct.pack("<Q", len(entries)) + b"".join(struct.pack("<HHQQ", *entry) for entry in entries) + bytes(8)
    return struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16) + directory + struct.pack(f"<{2 * strips}Q", *offsets, *counts)
