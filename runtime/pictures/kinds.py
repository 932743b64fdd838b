"""Picture files that sanrt does not read itself, called what they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.video.formats import VIDEO_SUFFIXES


@dataclass(frozen=True)
class Kind:
    """A kind of file that people take for a picture."""

    name: str
    suffixes: tuple[str, ...]
    """File name endings, in lower case."""
    magic: bytes | None = None
    """Regular expression of the first bytes; None if they do not tell."""
    remedy: str = "convert them to PNG, TIFF or JPEG"
    """What makes pictures of them that sanrt reads."""


VIDEO = "video"
DEVELOP = "develop them, to 16-bit TIFFs"


KINDS = (
    Kind("HEIC", (".heic", ".heif", ".hif"), rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)"),
    Kind("raw photograph", (".cr3",), rb".{4}ftypcrx |FUJIFILMCCD-RAW|IIU\0|II(RO|RS)|.{8}CR\x02\0", DEVELOP),
    Kind("raw photograph", (".dng", ".cr2", ".nef", ".arw", ".orf", ".rw2", ".raf"), None, DEVELOP),
    Kind("raw photograph", (".pef", ".srw", ".3fr", ".raw"), None, DEVELOP),
    Kind(VIDEO, VIDEO_SUFFIXES, rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI "),
    Kind("JPEG 2000", (".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".jpf"), rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    Kind("JPEG XL", (".jxl",), rb"\xff\x0a|\0\0\0\x0cJXL "),
    Kind("JPEG XR", (".jxr", ".wdp", ".hdp"), rb"II\xbc\x01"),
    Kind("BMP", (".bmp", ".dib"), rb"BM.{4}\0\0\0\0"),
    Kind("TGA", (".tga",)),
    Kind("Photoshop file", (".psd", ".psb"), rb"8BPS"),
    Kind("OpenEXR", (".exr",), rb"\x76\x2f\x31\x01"),
    Kind("Radiance HDR", (".hdr",), rb"#\?(RADIANCE|RGBE)"),
    Kind("PNM", (".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".pfm"), rb"P[1-7Ff]\s"),
    Kind("QOI", (".qoi",), rb"qoif"),
    Kind("DDS", (".dds",), rb"DDS "),
    Kind("icon", (".ico", ".cur"), rb"\0\0\x01\0"),
    Kind("SVG", (".svg", ".svgz"), rb"\s*(<\?xml|<svg)"),
    Kind("PDF", (), rb"%PDF-"),
)


def kind_of_content(head: bytes) -> Kind | None:
    """The kind of a file that begins so."""
    return next((kind for kind in KINDS if kind.magic and re.match(kind.magic, head, re.DOTALL)), None)


def is_video_content(path: Path) -> bool:
    """Whether a file begins as a video does; False for one that cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        head = file.read(256)
        kind = kind_of_content(head) if Format.of_content(head) is None else None
        return kind is not None and kind.name == VIDEO
    return False


def kind_of_suffix(path: Path) -> Kind | None:
    """The kind that a file name stands for."""
    return next((kind for kind in KINDS if path.suffix.lower() in kind.suffixes), None)


def by_kind(paths: Iterable[Path]) -> Mapping[str, list[Path]]:
    """The files whose names stand for a kind, by its name, the most frequent first."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        if kind := kind_of_suffix(path):
            found.setdefault(kind.name, []).append(path)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
