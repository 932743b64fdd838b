"""The tags of a TIFF file's first picture: what its samples mean, which libvips does not always tell."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from sanrt.errors import PictureError

Tags = Mapping[int, tuple[int, ...] | bytes]
"""Numbers of integer tags, bytes of text and other ones, by tag."""

SUBFILE_TYPE, COMPRESSION, PHOTOMETRIC, SUB_IFDS, EXTRA_SAMPLES, DNG_VERSION = 254, 259, 262, 330, 338, 50706
X_RESOLUTION, RESOLUTION_UNIT, NO_UNIT = 282, 296, 1
"""Tags, and the unit's value where the resolution only tells the shape of pixels."""
TEXTS = {270: "description", 271: "maker", 272: "camera", 305: "software", 306: "date", 315: "artist", 33432: "copyright"}
"""Tags that say something to people."""
GREY, YCBCR = (0, 1), 6
READ = (*GREY, 2, 3, 5)
"""Photometric interpretations that libvips' samples are right for: grey, RGB, palette and CMYK."""
UNREAD = {4: "a mask", YCBCR: "YCbCr", 8: "Lab", 9: "Lab", 10: "Lab", 32844: "LogL", 32845: "LogLuv"}
RAW = (32803, 34892)
"""Sensor samples."""
JPEG_COMPRESSED = (6, 7)
REDUCED = 1
OPACITY = (1, 2)
MOST_ENTRIES, MOST_BYTES, FARTHEST = 4096, 1 << 16, 1 << 40
INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def first_tags(path: Path) -> Tags:
    """The tags of the first picture; those that cannot be followed are left out."""
    with path.open("rb") as file:
        order, big = layout(file)
        file.seek(8 if big else 4)
        (at,) = unpacked(file, order, "Q" if big else "I") or (0,)
        return tags_at(file, at, order, big)


def check(path: Path) -> None:
    """PictureError unless the samples of the first picture are ones that libvips reads as grey, RGB or CMYK."""
    tags = first_tags(path)
    if is_raw(path, tags):
        raise PictureError(
            f"{path}: a raw photograph, whose first picture is a preview; expected a developed one, such as a 16-bit TIFF"
        )
    if first(tags, SUBFILE_TYPE) & REDUCED and SUB_IFDS in tags:
        raise PictureError(f"{path}: its first picture is a preview of another one; expected the picture itself first")
    photometric = first(tags, PHOTOMETRIC, 1)
    if photometric == YCBCR and first(tags, COMPRESSION) in JPEG_COMPRESSED:
        return
    if photometric not in READ:
        what = UNREAD.get(photometric, f"of an unknown kind ({photometric})")
        raise PictureError(f"{path}: samples are {what}; expected grey, RGB, palette or CMYK, convert it to RGB first")


def is_raw(path: Path, tags: Tags) -> bool:
    """Whether it is a camera's file of sensor samples, or holds them beside a preview."""
    if DNG_VERSION in tags or first(tags, PHOTOMETRIC) in RAW:
        return True
    with path.open("rb") as file:
        order, big = layout(file)
        below = [tags_at(file, at, order, big) for at in numbers(tags, SUB_IFDS)[:16]]
    return any(first(each, PHOTOMETRIC) in RAW for each in below)


def first_extra_is_opacity(path: Path) -> bool:
    """Whether the first channel beyond the colours is one that the file calls opacity."""
    return first(first_tags(path), EXTRA_SAMPLES) in OPACITY


def other_channels(path: Path) -> int:
    """How many channels are neither colours nor the opacity."""
    extra = numbers(first_tags(path), EXTRA_SAMPLES)
    return len(extra) - (bool(extra) and extra[0] in OPACITY)


def first(tags: Tags, tag: int, otherwise: int = 0) -> int:
    """The first number of a tag."""
    return next(iter(numbers(tags, tag)), otherwise)


def numbers(tags: Tags, tag: int) -> tuple[int, ...]:
    """The numbers of a tag, none if it is missing."""
    value = tags.get(tag, ())
    return value if isinstance(value, tuple) else ()


def layout(file: IO[bytes]) -> tuple[str, bool]:
    """Byte order for `struct`, and whether it is a BigTIFF."""
    file.seek(0)
    head = file.read(4)
    order = "<" if head[:2] == b"II" else ">"
    return order, b"+" in head


def tags_at(file: IO[bytes], at: int, order: str, big: bool) -> Tags:
    """The tags of the directory at a position."""
    file.seek(min(at, FARTHEST))
    (count,) = unpacked(file, order, "Q" if big else "H") or (0,)
    size = 20 if big else 12
    entries = file.read(min(count, MOST_ENTRIES) * size)
    tags: dict[int, tuple[int, ...] | bytes] = {}
    for start in range(0, len(entries) - size + 1, size):
        tag, kind, length = struct.unpack_from(order + ("HHQ" if big else "HHI"), entries, start)
        inline = entries[start + size - (8 if big else 4) : start + size]
        wanted = TYPE_BYTES.get(kind, 0) * length
        if not 0 < wanted <= MOST_BYTES:
            continue
        if wanted > len(inline):
            file.seek(min(struct.unpack(order + ("Q" if big else "I"), inline)[0], FARTHEST))
            inline = file.read(wanted)
        if len(inline) >= wanted:
            code = INTEGERS.get(kind)
            tags[tag] = struct.unpack(f"{order}{length}{code}", inline[:wanted]) if code else inline[:wanted]
    return tags


def unpacked(file: IO[bytes], order: str, code: str) -> tuple[int, ...]:
    """Numbers at the file's position; none at its end."""
    size = struct.calcsize(order + code)
    data = file.read(size)
    return struct.unpack(order + code, data) if len(data) == size else ()
