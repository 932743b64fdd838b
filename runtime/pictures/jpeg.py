"""JPEG files that break the standard in ways that cost no pixel, as phones and cameras write them.

libjpeg warns of these as it warns of missing pixels, and tells only the first warning. So what is harmless is put right
before it decodes, and whatever it warns of then means pixels that it made up.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

FIRST_BLOCK, BLOCK = 1 << 12, 1 << 20
"""Bytes that are searched at once: few at first, as the next marker mostly follows at once."""
MOST_SEGMENTS = 100_000
"""A file of more is not followed further; no camera writes a hundredth of them."""
MARKER = re.compile(rb"\xff[^\x00\xff]")
MARKER_BEHIND_DATA = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""In entropy-coded data FF 00 is a byte of it, and D0 to D7 restart it."""
SOI, EOI, SOS, DQT, APP0, APP14 = 0xD8, 0xD9, 0xDA, 0xDB, 0xE0, 0xEE
STANDALONE = {0x01, *range(0xD0, 0xD9)}
"""Markers without a segment behind them."""
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
SEQUENTIAL = {0xC0, 0xC1, 0xC9}
WHOLE_BLOCK = bytes([0, 63, 0])
"""First and last coefficient and bit position of a sequential scan."""


@dataclass(frozen=True)
class Repair:
    """Bytes to put in place of others."""

    at: int
    length: int
    """How many bytes go."""
    content: bytes
    reason: str
    """What was wrong, for people."""


@dataclass(frozen=True)
class Segment:
    """A marker and what follows it."""

    marker: int
    begin: int
    """Position of the content, behind the length."""
    content: bytes
    after: int
    """Position where the segment before it ends."""
    before: int
    """Bytes between the two; FF just before the marker, which may stand there, do not count."""


LUMA_TABLE = bytes.fromhex(
    "100b0a101828333d0c0c0e131a3a3c370e0d1018283945380e11161d3357503e"
    "12162538446d674d182337405168715c31404e5767797865485c5f6270646763"
)
"""The luminance table of the standard (ITU-T T.81, table K.1), which libjpeg calls quality 50."""


def quality(path: Path) -> int | None:
    """The quality, 1 to 100 by libjpeg's scale, that a JPEG's first quantisation table says; None for any other file.

    Writers with tables of their own are taken for libjpeg at the quality whose table has the nearest sum.
    """
    with path.open("rb") as file:
        if file.read(2) != bytes([0xFF, SOI]):
            return None
        for segment in segments(file):
            if segment is None or segment.marker in (SOS, EOI):
                return None
            if segment.marker == DQT and (found := table_sum(segment.content)):
                return min(range(1, 101), key=lambda quality: abs(libjpeg_sum(quality) - found))
    return None


@cache
def libjpeg_sum(quality: int) -> int:
    """The sum of libjpeg's luminance table of a quality, as 8 bits hold it."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return sum(min(max((value * percent + 50) // 100, 1), 255) for value in LUMA_TABLE)


def table_sum(content: bytes) -> int | None:
    """The sum of the first table in a DQT segment, of 8 or 16 bits; None for a cut one."""
    wide = content[:1] > b"\x0f"
    table = content[1 : 129 if wide else 65]
    if len(table) < (128 if wide else 64):
        return None
    return sum(int.from_bytes(table[i : i + 2], "big") for i in range(0, 128, 2)) if wide else sum(table)


def repairs(path: Path) -> list[Repair]:
    """What puts a JPEG file right without a change to its pixels, in order; empty for a sound or a damaged one."""
    with path.open("rb") as file:
        return sorted(find_repairs(file), key=lambda repair: repair.at)


def repaired(path: Path) -> bytes | None:
    """The whole file put right; None if there is nothing to repair."""
    if not (changes := repairs(path)):
        return None
    content, pieces, at = path.read_bytes(), [], 0
    for change in changes:
        pieces += [content[at : change.at], change.content]
        at = change.at + change.length
    return b"".join([*pieces, content[at:]])


def find_repairs(file: IO[bytes]) -> Iterator[Repair]:
    """The changes, as they are found; it ends silently where the file cannot be followed, which libjpeg will report."""
    behind_scan, frame = False, 0
    components: bytes = b""
    decoded: dict[int, set[int]] = {}
    adobe: Repair | None = None
    for segment in segments(file):
        if segment is None:
            return
        if segment.before and not behind_scan:
            yield Repair(segment.after, segment.before, b"", "bytes before a marker")
        if segment.marker == EOI:
            return
        behind_scan, content = segment.marker == SOS, segment.content
        if segment.marker in FRAMES and len(content) > 5:
            frame, components = segment.marker, content[6::3]
        elif segment.marker == APP0 and content.startswith(b"JFIF\0") and content[5:6] not in (b"\1", b""):
            yield Repair(segment.begin + 5, 1, b"\1", "an unknown JFIF version")
        elif segment.marker == APP14 and content.startswith(b"Adobe") and len(content) >= 12:
            adobe = Repair(segment.begin + 11, 1, b"", "an unknown colour transform")
            transform = content[11]
        elif segment.marker == SOS and len(content) >= 6:
            parameters = content[-3:]
            if frame in SEQUENTIAL and parameters != WHOLE_BLOCK:
                yield Repair(segment.begin + len(content) - 3, 3, WHOLE_BLOCK, "odd scan parameters")
                parameters = WHOLE_BLOCK
            usual = {3: 1, 4: 2}.get(len(components), 0)
            if adobe and transform not in (0, usual):
                yield Repair(adobe.at, 1, bytes([usual]), adobe.reason)
                adobe = None
            if parameters[2] & 15 == 0:
                for component in content[1:-3:2]:
                    decoded.setdefault(component, set()).update(range(parameters[0], parameters[1] + 1))
    if behind_scan and all(len(decoded.get(component, ())) == 64 for component in components):
        yield Repair(file.seek(0, os.SEEK_END), 0, bytes([0xFF, EOI]), "no end marker")


def segments(file: IO[bytes]) -> Iterator[Segment | None]:
    """The segments from the second marker on, MOST_SEGMENTS at most; None, as the last one, for one that leaves the file."""
    at, pattern = 2, MARKER
    for _ in range(MOST_SEGMENTS):
        if not (found := search(file, pattern, at)):
            return
        start, junk_end = found
        file.seek(start + 1)
        marker, begin, length = file.read(1)[0], start + 2, 0
        if marker not in STANDALONE and marker != EOI:
            length = int.from_bytes(file.read(2), "big")
            begin += 2
        content = file.read(max(0, length - 2))
        if begin > start + 2 and (length < 2 or len(content) < length - 2):
            yield None
            return
        yield Segment(marker, begin, content, at, junk_end - at)
        at, pattern = begin + len(content), MARKER_BEHIND_DATA if marker == SOS else MARKER
    yield None


def search(file: IO[bytes], pattern: re.Pattern[bytes], at: int) -> tuple[int, int] | None:
    """Where the pattern of a marker is found first from `at` on, and where the bytes end that are neither it nor fill.

    Each byte is looked at a few times at most, whatever the file holds.
    """
    size, junk_end = FIRST_BLOCK, at
    file.seek(at)
    while len(block := file.read(size)) > 1:
        found = pattern.search(block)
        passed = block[: found.start() if found else -1].rstrip(b"\xff")
        junk_end = at + len(passed) if passed else junk_end
        if found:
            return at + found.start(), junk_end
        at, size = at + len(block) - 1, min(2 * size, BLOCK)
        file.seek(at)
    return None
