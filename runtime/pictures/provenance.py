"""What made a result, as digests inside the picture file: by them a later run knows its own results from other files.

They lie where readers of the format pass over them and where a program that writes the picture anew leaves them out: in a
private chunk of PNG and WebP, an application segment of JPEG, a `uuid` box of AVIF and MP4, an EBML `Void` element of
Matroska, behind the last byte of TIFF. No path, time or host is among them: the same source and options give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any
from uuid import UUID

from sanrt.errors import PictureError
from sanrt.runtime.pictures.formats import Format, ResultFormat, result_format
from sanrt.runtime.pictures.storage import RemotePath, translate_errors
from sanrt.runtime.video.formats import Container

BEGINNING = b"sanrt-result:"
WINDOW = 4096
"""Bytes at a file's edge that hold the mark: the first ones of a JPEG, the last ones of all others."""
BLOCK = 1 << 20
PNG_CHUNK, WEBP_CHUNK, JPEG_SEGMENT = b"saNT", b"SANR", b"\xff\xef"
"""PNG's capital T: a program that changes the picture and does not know the chunk must leave it out."""
BOX = UUID("7d2e3f0c-8a51-4c0b-9b0e-3f6a1d2c5e90").bytes
EBML_VOID = b"\xec"
PNG_END = 12
"""Bytes of the IEND chunk."""


@dataclass(frozen=True)
class SourceIdentity:
    """A picture file's content."""

    sha256: str
    size: int
    """Bytes."""
    etag: str
    """By which an object store tells it without a download: its MD5, or what the store gave in place of that."""


@dataclass(frozen=True)
class Provenance:
    """What a result was made from; two results of equal provenance are the same, up to rounding."""

    source: SourceIdentity
    scale: int
    model: str
    """Digest of architecture, weights and quantisation, whichever file held them."""
    options: str
    """Digest of the options that pixels or encoding depend on, as they were asked for."""


@dataclass(frozen=True)
class Mark:
    """A result's provenance as it stands in the file."""

    provenance: Provenance
    content: str
    """SHA-256 of the file without the mark, and of the provenance: a change of pixels, metadata or mark shows."""

    @property
    def text(self) -> bytes:
        return BEGINNING + json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_text(cls, text: bytes) -> Mark | None:
        """None for anything but what `text` begins with."""
        try:
            facts, _ = json.JSONDecoder().raw_decode(text.removeprefix(BEGINNING).decode("latin-1"))
            made = facts["provenance"]
            provenance = Provenance(**{**made, "source": SourceIdentity(**made["source"])})
            mark = cls(provenance, facts["content"])
        except (ValueError, KeyError, TypeError):
            return None
        return mark if text.startswith(mark.text) else None


def identify(local: Path, origin: Path) -> SourceIdentity:
    """The identity of a picture that lies at `origin` and, the same bytes, in the file `local`.

    PictureError if they cannot be read.
    """
    with translate_errors(origin, "cannot be read"):
        with local.open("rb") as file:
            sha256, md5, size = digests(file)
        etag = origin.etag if isinstance(origin, RemotePath) else None
    return SourceIdentity(sha256, size, etag or md5)


def is_unchanged(source: SourceIdentity, path: Path) -> bool:
    """Whether a picture is still the same; one in an object store is read only where its size and etag do not tell.

    OSError if it cannot be read.
    """
    if path.stat().st_size != source.size:
        return False
    if isinstance(path, RemotePath) and path.etag == source.etag:
        return True
    with path.open("rb") as file:
        return digests(file)[0] == source.sha256


def require_unchanged(source: SourceIdentity, local: Path, origin: Path) -> None:
    """Raise PictureError unless the picture at `origin`, in the file `local`, still is what was identified."""
    with translate_errors(origin, "cannot be read"):
        unchanged = is_unchanged(source, local)
    if not unchanged:
        raise PictureError(f"{origin}: changed while it was read; run again once it is complete")


def digests(file: IO[bytes]) -> tuple[str, str, int]:
    """SHA-256, MD5 and size of what is left of a file."""
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    while block := file.read(BLOCK):
        sha256.update(block)
        md5.update(block)
        size += len(block)
    return sha256.hexdigest(), md5.hexdigest(), size


def seal(file: IO[bytes], form: ResultFormat, made: Provenance) -> None:
    """Put the mark of a result into its encoded file, which is open for reading and writing."""
    size = file.seek(0, os.SEEK_END)
    at = place(file, form, size)
    length = len(envelope(form, Mark(made, "0" * 64).text))
    if form is Format.WEBP:
        file.seek(4)
        file.write((size + length - 8).to_bytes(4, "little"))
    insert(file, at, envelope(form, Mark(made, content_digest(file, at, at, made)).text))


def read_mark(path: Path) -> Mark | None:
    """The mark of a result of sanrt's, from a few kilobytes of the file; None for any other file.

    OSError if it cannot be read, or is not there.
    """
    with path.open("rb") as file:
        found = find_mark(file, path)
    return found[0] if found else None


def is_result(path: Path) -> bool:
    """Whether sanrt made a picture, edited since or not; no for one that cannot be read."""
    with suppress(PictureError), translate_errors(path, "cannot be read"):
        # to open a pipe would wait for its writer
        return (isinstance(path, RemotePath) or path.is_file()) and read_mark(path) is not None
    return False


def is_intact(path: Path) -> bool:
    """Whether a file is, byte for byte, what sanrt wrote; PictureError if it cannot be read."""
    form = result_format(path)
    with translate_errors(path, "cannot be read"), path.open("rb") as file:
        if form is None or not (found := find_mark(file, path)):
            return False
        mark, text_at = found
        whole = envelope(form, mark.text)
        at = text_at - whole.index(mark.text)
        file.seek(max(0, at))
        return file.read(len(whole)) == whole and content_digest(file, at, at + len(whole), mark.provenance) == mark.content


def find_mark(file: IO[bytes], path: Path) -> tuple[Mark, int] | None:
    """The mark, and the position of its text."""
    size = file.seek(0, os.SEEK_END)
    start = 0 if Format.of_suffix(path) is Format.JPEG else max(0, size - WINDOW)
    file.seek(start)
    window = bytes(file.read(min(size, WINDOW)))
    at = window.rfind(BEGINNING)
    mark = Mark.from_text(window[at:]) if at >= 0 else None
    return (mark, start + at) if mark else None


def place(file: IO[bytes], form: ResultFormat, size: int) -> int:
    """Where in an encoded file the mark goes."""
    if form is Format.PNG:
        return size - PNG_END
    if form is Format.JPEG:  # behind the first segment, which JFIF and EXIF want to be the first
        file.seek(4)
        return 4 + int.from_bytes(file.read(2), "big")
    return size


def envelope(form: ResultFormat, text: bytes) -> bytes:
    """The text as the format holds it."""
    length = len(text)
    match form:
        case Format.PNG:
            chunk = PNG_CHUNK + text
            return length.to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        case Format.JPEG:
            return JPEG_SEGMENT + (length + 2).to_bytes(2, "big") + text
        case Format.WEBP:
            return WEBP_CHUNK + length.to_bytes(4, "little") + text + bytes(length % 2)
        case Format.AVIF | Container.MP4 | Container.MOV:
            return (length + 24).to_bytes(4, "big") + b"uuid" + BOX + text
        case Container.MKV | Container.WEBM:
            return EBML_VOID + (length | 1 << 28).to_bytes(4, "big") + text
        case _:
            return text


def insert(file: IO[bytes], at: int, data: bytes) -> None:
    """Put bytes into the middle of a file, moving the rest from its end on."""
    end = file.seek(0, os.SEEK_END)
    while end > at:
        start = max(at, end - BLOCK)
        file.seek(start)
        block = file.read(end - start)
        file.seek(start + len(data))
        file.write(block)
        end = start
    file.seek(at)
    file.write(data)


def content_digest(file: IO[bytes], start: int, end: int, made: Provenance) -> str:
    """SHA-256 of a file without the bytes from `start` to `end`, and of what it was made from."""
    digest = hashlib.sha256()
    file.seek(0)
    while start and (block := file.read(min(BLOCK, start))):
        digest.update(block)
        start -= len(block)
    file.seek(end)
    while block := file.read(BLOCK):
        digest.update(block)
    digest.update(digest_of(asdict(made)).encode())
    return digest.hexdigest()


def digest_of(facts: Any) -> str:
    """SHA-256 of facts that JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
