"""Picture file formats: how each is recognised, named, and what it can hold. Imports no libvips."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Format(StrEnum):
    """A picture file format that sanrt reads; all but GIF are also written."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    TIFF = "tiff"
    AVIF = "avif"
    GIF = "gif"

    @property
    def facts(self) -> Facts:
        """What this format can hold."""
        return _FACTS[self]

    @classmethod
    def of_content(cls, head: bytes) -> Format | None:
        """The format that a file starting with these bytes (256 suffice) has; None if it is no supported picture."""
        if head[4:8] == b"ftyp":
            brands = [head[at : at + 4] for at in range(8, min(len(head), int.from_bytes(head[:4], "big")), 4)]
            return cls.AVIF if {b"avif", b"avis"} & {*brands} else None
        if head[:4] == b"RIFF":
            return cls.WEBP if head[8:12] == b"WEBP" else None
        return next((form for magic, form in _MAGIC.items() if head.startswith(magic)), None)

    @classmethod
    def named(cls, name: str) -> Format | None:
        """The format that a person calls so: by its name or by one of its endings, in capitals too."""
        return cls.of_suffix(Path(f"a.{name.lower()}"))

    @classmethod
    def of_suffix(cls, path: Path) -> Format | None:
        """The format that the file name stands for; None if it stands for none."""
        return next((form for form in cls if path.suffix.lower() in form.facts.suffixes), None)

    @property
    def written_as(self) -> Format:
        """The format for the result of a picture of this one: its own, but PNG for GIF, whose palette cannot hold it."""
        return Format.PNG if self is Format.GIF else self


@dataclass(frozen=True)
class Facts:
    """What a format can hold, as libvips writes it."""

    libvips: str
    """The stem of its loader's and saver's names."""
    suffixes: tuple[str, ...]
    """File name suffixes in lower case, the usual one first."""
    max_side: int
    """Largest width and height in pixels."""
    max_bits: int = 8
    """Bits per sample at most."""
    alpha: bool = True
    """Whether it holds transparency."""
    grey: bool = True
    """Whether it holds one-channel pictures."""
    quality: int | None = None
    """Default quality of a lossy format, 1 to 100."""


_FACTS = {
    Format.PNG: Facts("png", (".png",), max_side=1_000_000, max_bits=16),
    Format.JPEG: Facts("jpeg", (".jpg", ".jpeg", ".jpe", ".jfif"), max_side=65_500, alpha=False, quality=95),
    Format.WEBP: Facts("webp", (".webp",), max_side=16_383, grey=False, quality=95),
    Format.TIFF: Facts("tiff", (".tif", ".tiff"), max_side=10_000_000, max_bits=16),
    Format.AVIF: Facts("heif", (".avif",), max_side=16_384, max_bits=12, grey=False, quality=90),
    Format.GIF: Facts("gif", (".gif",), max_side=65_535),
}

_MAGIC = {
    b"\x89PNG\r\n\x1a\n": Format.PNG,
    b"\xff\xd8\xff": Format.JPEG,
    b"II*\0": Format.TIFF,
    b"MM\0*": Format.TIFF,
    b"II+\0": Format.TIFF,
    b"MM\0+": Format.TIFF,
    b"GIF8": Format.GIF,
}
