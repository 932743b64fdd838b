"""GIF files as far as their blocks: libvips passes over the end of one that is cut off."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from sanrt.errors import PictureError

HEADER = 13
"""Bytes up to the colours."""
EXTENSION, IMAGE, TRAILER = b"\x21", b"\x2c", b"\x3b"


def check(path: Path) -> None:
    """Raise PictureError for a file that ends within a block; one without the trailer behind the last block may pass."""
    with path.open("rb") as file:
        if not is_whole(file):
            raise PictureError(f"{path}: damaged GIF file (truncated: ends within a block)")


def is_whole(file: IO[bytes]) -> bool:
    """Whether every block up to the trailer, to the end, or to what is no block, is there."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    skip_colours(file, file.read(HEADER)[10:11])
    while (kind := file.read(1)) in (EXTENSION, IMAGE):
        if kind == IMAGE:
            skip_colours(file, file.read(9)[8:9])
        file.read(1)  # of an extension its label, of an image the width of its codes
        while (length := file.read(1)) not in (b"\0", b""):
            file.seek(length[0], os.SEEK_CUR)
        if not length:
            return False
    return bool(kind) or file.tell() <= size


def skip_colours(file: IO[bytes], flags: bytes) -> None:
    """Pass over the table of colours that flags announce."""
    if flags and flags[0] & 0x80:
        file.seek(3 << (flags[0] % 8 + 1), os.SEEK_CUR)
