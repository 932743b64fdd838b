"""GIF files as far as their blocks: libvips passes over the end of one that is cut off."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from sanrt.errors import PictureError

HEADER = 13
"""Bytes up to the colours."""
EXTENSION, IMAGE, TRAILER = b"\x21", b"\x2c", b"\x3b"
FRAME = b"\x21\xf9\x04"
"""What the control block in front of an animation's frame begins with."""


def check(path: Path, animated: bool = False) -> None:
    """Raise PictureError for a file that ends within a block, and where anything but blocks hides frames of an animation.

    One without the trailer behind the last block may pass.
    """
    with path.open("rb") as file:
        if wrong := fault(file, animated):
            raise PictureError(f"{path}: damaged GIF file ({wrong})")


def fault(file: IO[bytes], animated: bool) -> str:
    """What is wrong with the blocks up to the trailer; empty if nothing is."""
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
            return "truncated: ends within a block"
    if not kind and file.tell() > size:
        return "truncated: ends within its colours"
    if kind in (b"", TRAILER):
        return ""
    at = file.tell() - 1
    return f"no block at byte {at}" if animated or FRAME in file.read() else ""


def skip_colours(file: IO[bytes], flags: bytes) -> None:
    """Pass over the table of colours that flags announce."""
    if flags and flags[0] & 0x80:
        file.seek(3 << (flags[0] % 8 + 1), os.SEEK_CUR)
