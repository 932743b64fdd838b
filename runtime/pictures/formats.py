"""Picture file formats: how each is recognised, named, and what it can hold. Imports no libvips."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from sanrt.runtime.video.formats import Container


class Format(StrEnum):
    """A picture file format that sanrt reads, the last four with the `formats` extra; the first five are also written."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    TIFF = "tiff"
    AVIF = "avif"
    GIF = "gif"
    HEIC = "heic"
    BMP = "bmp"
    TGA = "tga"
    JP2 = "jp2"

    @property
    def facts(self) -> Facts:
        """What this format can hold."""
        return _FACTS[self]

    @classmethod
    def of_content(cls, head: bytes) -> Format | None:
        """The format that a file starting with these bytes (256 suffice) has; None if it is no supported picture."""
        if head[4:8] == b"ftyp":
            brands = [head[at : at + 4] for at in range(8, min(len(head), int.from_bytes(head[:4], "big")), 4)]
            if {b"avif", b"avis"} & {*brands}:
                return cls.AVIF
            return cls.HEIC if _HEIC_BRANDS & {*brands} else None
        if head[:4] == b"RIFF":
            return cls.WEBP if head[8:12] == b"WEBP" else None
        if head[:2] == b"BM" and head[6:10] == bytes(4):
            return cls.BMP
        return next((form for magic, form in _MAGIC.items() if head.startswith(magic)), None)

    @classmethod
    def of_file(cls, head: bytes, path: Path) -> Format | None:
        """The same of a file of this name: TGA has no mark at its beginning, so its ending and header count together."""
        tga = cls.of_suffix(path) is cls.TGA and head[1:2] in (b"\0", b"\1") and head[2:3] in b"\1\2\3\x09\x0a\x0b"
        return cls.of_content(head) or (cls.TGA if tga else None)

    @property
    def is_readable(self) -> bool:
        """Whether what reads it is installed."""
        return all(find_spec(package) for package in self.facts.packages)

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
        """The format for the result of a picture of this one: its own if it is written, else PNG, which holds any."""
        return self if self in _WRITTEN else Format.PNG


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
    packages: tuple[str, ...] = ()
    """Modules of the `formats` extra that read it, where libvips does not."""


_FACTS = {
    Format.PNG: Facts("png", (".png",), max_side=1_000_000, max_bits=16),
    Format.JPEG: Facts("jpeg", (".jpg", ".jpeg", ".jpe", ".jfif"), max_side=65_500, alpha=False, quality=95),
    Format.WEBP: Facts("webp", (".webp",), max_side=16_383, grey=False, quality=95),
    Format.TIFF: Facts("tiff", (".tif", ".tiff"), max_side=10_000_000, max_bits=16),
    Format.AVIF: Facts("heif", (".avif",), max_side=16_384, max_bits=12, grey=False, quality=90),
    Format.GIF: Facts("gif", (".gif",), max_side=65_535),
    Format.HEIC: Facts("", (".heic", ".heif", ".hif"), max_side=65_535, packages=("PIL", "pillow_heif")),
    Format.BMP: Facts("", (".bmp",), max_side=65_535, packages=("PIL",)),
    Format.TGA: Facts("", (".tga",), max_side=65_535, packages=("PIL",)),
    Format.JP2: Facts("", (".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".jpf"), max_side=65_535, packages=("PIL",)),
}
ANIMATED = (Format.GIF, Format.WEBP)
"""Formats whose files may have several frames, which are read and written."""
_WRITTEN = (Format.PNG, Format.JPEG, Format.WEBP, Format.TIFF, Format.AVIF)
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}

_MAGIC = {
    b"\x89PNG\r\n\x1a\n": Format.PNG,
    b"\xff\xd8\xff": Format.JPEG,
    b"II*\0": Format.TIFF,
    b"MM\0*": Format.TIFF,
    b"II+\0": Format.TIFF,
    b"MM\0+": Format.TIFF,
    b"GIF8": Format.GIF,
    b"\0\0\0\x0cjP  ": Format.JP2,
    b"\xff\x4f\xff\x51": Format.JP2,
}

ResultFormat = Format | Container
"""What a result can be: a picture or a video."""


def result_format(path: Path) -> ResultFormat | None:
    """What a result of this name is; None for a name that stands for none."""
    return Container.of_suffix(path) or Format.of_suffix(path)
