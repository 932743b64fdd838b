"""What picture files say beside their pixels: what of it is kept in a result, and what is told as left out.

`read` finds it in a source, `fitting` decides what a result can say of it, `put` writes what libvips does not.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sanrt.runtime.pictures import jpeg, tiff
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.libvips import vips
from sanrt.runtime.pictures.provenance import insert

ICC, EXIF, XMP, IPTC = "icc-profile-data", "exif-data", "xmp-data", "iptc-data"
BY_LIBVIPS = (ICC, EXIF, XMP, IPTC)
"""Read and written by libvips, under its names."""
TEXT, COMMENT, CICP, SBIT = "text", "comment", "cICP", "sBIT"
PNG_COLOURS = ("gAMA", "cHRM", "mDCV", "cLLI", "sRGB")
"""PNG chunks on what samples mean, kept byte for byte, as are cICP and sBIT."""
TIFF_TAGS = {f"TIFF {name}": tag for tag, name in tiff.TEXTS.items()}

WRITTEN = frozenset(form for form in Format if form.written_as is form)
HOLDERS: Mapping[str, frozenset[Format]] = {
    ICC: WRITTEN,
    EXIF: WRITTEN - {Format.TIFF},
    XMP: WRITTEN,
    IPTC: frozenset({Format.JPEG}),
    CICP: frozenset({Format.PNG}),
    SBIT: frozenset({Format.PNG}),
    **dict.fromkeys(PNG_COLOURS, frozenset({Format.PNG})),
    TEXT: frozenset({Format.PNG}),
    COMMENT: frozenset({Format.JPEG, Format.PNG}),
    **dict.fromkeys(TIFF_TAGS, frozenset({Format.TIFF})),
}
"""The formats whose results hold each kind of metadata."""
LABELS = {ICC: "ICC profile", EXIF: "EXIF", XMP: "XMP", IPTC: "IPTC", TEXT: "PNG text", COMMENT: "JPEG comment"}
USUAL: Mapping[str, Callable[[bytes], bool]] = {
    "gAMA": lambda value: abs(int.from_bytes(value, "big") - 45455) <= 2,
    "cHRM": lambda value: value == struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
    "sRGB": lambda value: True,
    CICP: lambda value: value[0] in (1, 2) and value[1] in (1, 2, 6, 13),
}
"""Whether a value says what every reader takes for granted: its loss is none."""
DISPLAY_P3 = (12, 13)
"""Primaries and transfer of a cICP for which an ICC profile says the same."""
SIZES = {CICP: 4, "gAMA": 4, "cHRM": 32, "sRGB": 1, "mDCV": 24, "cLLI": 8}
"""Bytes of PNG's colour chunks."""
ICC_SPACES = {b"GRAY": "grey", b"RGB ": "RGB", b"CMYK": "CMYK", b"Lab ": "Lab"}
"""Colour spaces of profiles, by the signature at byte 16."""
UNTRUE_XMP = {"an Ultra HDR gain map": (b"hdrgm:",), "a motion photo": (b"MotionPhoto", b"MicroVideo")}
"""What an XMP packet describes that the result lacks."""
PHOTOSHOP = b"Photoshop 3.0\0"
"""What IPTC is wrapped in within a JPEG, and only there; into a TIFF libvips writes a quarter of it."""
C2PA_BOX = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")
MOST_TEXT, MOST_COMMENTS, HEAD_BYTES = 1 << 24, 256, 1 << 18


@dataclass
class Found:
    """What a file says."""

    kept: dict[str, bytes] = field(default_factory=dict)
    """Metadata that results may hold."""
    left_out: list[str] = field(default_factory=list)
    """What no result holds, since it would be untrue or is another picture; one phrase each."""
    frames: int = 1
    says_resolution: bool = False
    """Whether the file says how large its pixels are; libvips takes 72 dpi, or its own default, where it does not."""

    def notes(self) -> Iterator[str]:
        if self.frames > 1:
            yield f"only the first of its {self.frames} frames"
        if self.left_out:
            yield f"left out: {', '.join(dict.fromkeys(self.left_out))}"


def read(path: Path, form: Format, image: Any) -> Found:
    """What a picture file says; `image` is it as libvips opened it. OSError if the file cannot be read."""
    found = Found({name: bytes(image.get(name)) for name in BY_LIBVIPS if image.get_typeof(name)})
    found.frames = image.get("n-pages") if image.get_typeof("n-pages") else 1
    found.says_resolution = bool(image.get_typeof("resolution-unit"))
    if image.interpretation == "cmyk":
        found.kept.pop(ICC, None)  # used up in the conversion
    untrue = [name for name, words in UNTRUE_XMP.items() if any(word in found.kept.get(XMP, b"") for word in words)]
    if untrue:
        found.left_out += [*untrue, "XMP about it"]
        del found.kept[XMP]
    with path.open("rb") as file:
        match form:
            case Format.PNG:
                read_png(file, found)
            case Format.JPEG:
                read_jpeg(file, found)
            case Format.AVIF | Format.HEIC:
                read_avif(file.read(HEAD_BYTES), found)
            case Format.TIFF:
                tags = tiff.first_tags(path)
                found.says_resolution = tiff.X_RESOLUTION in tags and tiff.first(tags, tiff.RESOLUTION_UNIT) != tiff.NO_UNIT
                texts = {name: tags.get(tag) for name, tag in TIFF_TAGS.items()}
                found.kept |= {
                    name: value for name, value in texts.items() if isinstance(value, bytes) and value.strip(b"\0 ")
                }
    return found


def read_png(file: IO[bytes], found: Found) -> None:
    """Text, colour and animation chunks."""
    at, text = 8, bytearray()
    file.seek(at)
    while len(head := file.read(8)) == 8:
        length, name = int.from_bytes(head[:4], "big"), head[4:].decode("latin-1")
        if name in ("tEXt", "zTXt", "iTXt", CICP, SBIT, *PNG_COLOURS, "acTL", "caBX", "pHYs") and length < MOST_TEXT:
            data = file.read(length)
            if name in (CICP, SBIT, *PNG_COLOURS):
                if len(data) == SIZES.get(name, len(data)):  # any other is damaged, and says nothing
                    found.kept.setdefault(name, data)
            elif name == "pHYs":
                found.says_resolution |= data[8:9] == b"\1"  # metres
            elif name == "acTL":
                found.frames = max(found.frames, int.from_bytes(data[:4], "big"))
            elif name == "caBX":
                found.left_out.append("C2PA claims")
            elif not data.startswith((b"XML:com.adobe.xmp\0", b"Raw profile type ")):  # libvips takes those
                text.extend(png_chunk(name, data) if len(text) < MOST_TEXT else b"")
        elif name == "IEND":
            break
        at += 12 + length
        file.seek(at)
    if text:
        found.kept[TEXT] = bytes(text)


def read_jpeg(file: IO[bytes], found: Found) -> None:
    """Comments, and segments on other pictures in the file, up to the scan."""
    images, gain_map = 1, any("gain map" in each for each in found.left_out)
    comments: list[bytes] = []
    for segment in jpeg.segments(file):
        if segment is None or segment.marker in (jpeg.SOS, jpeg.EOI):
            break
        content = segment.content
        if segment.marker == 0xFE and content.strip(b"\0 "):
            comments += [content] if len(comments) < MOST_COMMENTS else []
        elif segment.marker == 0xE2 and content.startswith(b"MPF\0"):
            index = io.BytesIO(content[4:])
            order, _ = tiff.layout(index)
            index.seek(4)
            tags = tiff.tags_at(index, (tiff.unpacked(index, order, "I") or (0,))[0], order, big=False)
            images = tiff.first(tags, 0xB001, 1)
        elif segment.marker == 0xE2 and content.startswith(b"urn:iso:std:iso:ts:21496"):
            gain_map = True
        elif segment.marker == 0xEB and b"c2pa" in content[:256]:
            found.left_out.append("C2PA claims")
    if comments:
        found.kept[COMMENT] = b"\n".join(comments)
    if gain_map:
        found.left_out.append("an Ultra HDR gain map")
    else:
        found.frames = max(found.frames, images)


def read_avif(head: bytes, found: Found) -> None:
    """The colour signal of the meta box, and boxes on what results do not hold."""
    if (at := head.find(b"colrnclx") + 8) > 8:
        primaries, transfer = struct.unpack_from(">HH", head.ljust(at + 4, b"\0"), at)
        if max(primaries, transfer) < 256:
            found.kept[CICP] = bytes([primaries, transfer, 0, 1])
    boxes = {b"mdcv": "mastering data", b"clli": "light levels", b"tmap": "a gain map", C2PA_BOX: "C2PA claims"}
    found.left_out += [name for box, name in boxes.items() if box in head]


def fitting(
    metadata: Mapping[str, bytes], form: Format, grey: bool, channels: int, same_depth: bool
) -> tuple[dict[str, bytes], list[str]]:
    """What of a source's metadata a result holds, and notes on what it does not hold.

    grey, channels: those of the result. same_depth: whether its samples have as many bits as the source's.
    """
    kept = {name: value for name, value in metadata.items() if form in HOLDERS[name]}
    notes = []
    profile = kept.get(ICC)
    if profile is not None and profile[16:20] != (b"GRAY" if grey else b"RGB "):
        del kept[ICC]
        space = ICC_SPACES.get(profile[16:20], "damaged")
        notes.append(f"the {space} ICC profile is not kept: the result is {'grey' if grey else 'RGB'}")
    if not kept.get(IPTC, b"").startswith(PHOTOSHOP):
        kept.pop(IPTC, None)
    said_by_profile = set[str]()
    if CICP in metadata and CICP not in kept and ICC not in kept and not grey and tuple(metadata[CICP][:2]) == DISPLAY_P3:
        kept[ICC] = bytes(vips().Operation.call("profile_load", "p3"))
        said_by_profile = {CICP}
        notes.append(f"its cICP (Display P3) becomes an ICC profile, as {form.upper()} results do not hold it")
    if SBIT in kept and not (same_depth and len(kept[SBIT]) == channels):
        del kept[SBIT]
    lost = [
        name for name in metadata if name not in {*kept, *said_by_profile, ICC} and not said_anyway(name, metadata[name])
    ]
    if lost:
        notes.append(
            f"not kept, as {form.upper()} results do not hold it: {', '.join(LABELS.get(name, name) for name in lost)}"
        )
    return kept, notes


def said_anyway(name: str, value: bytes) -> bool:
    """Whether every reader takes for granted what it says."""
    return name in USUAL and bool(value) and USUAL[name](value)


def put(file: IO[bytes], form: Format, metadata: Mapping[str, bytes]) -> None:
    """Write what libvips does not write into an encoded file, which is open for reading and writing."""
    own = {name: value for name, value in metadata.items() if name not in BY_LIBVIPS}
    if not own:
        return
    match form:
        case Format.PNG:
            chunks = [png_chunk(name, own[name]) for name in (CICP, *PNG_COLOURS, SBIT) if name in own]
            if COMMENT in own:
                text = as_text(own[COMMENT]).encode()
                chunks.append(png_chunk("iTXt", b"Comment\0\0\0\0\0" + text))
            insert(file, PNG_HEADER, b"".join([*chunks, own.get(TEXT, b"")]))
        case Format.JPEG:
            file.seek(4)
            at = 4 + int.from_bytes(file.read(2), "big")
            comment = own[COMMENT][: (1 << 16) - 3]
            insert(file, at, b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment)
        case Format.TIFF:
            put_tiff(file, {TIFF_TAGS[name]: value for name, value in own.items()})


def forget_resolution(file: IO[bytes], form: Format) -> None:
    """Take back the resolution that libvips wrote for want of one; what is left is that pixels are square."""
    if form is Format.PNG:
        file.seek(at := PNG_HEADER)
        while (head := file.read(8))[4:] not in (b"pHYs", b"IDAT", b""):
            at += 12 + int.from_bytes(head[:4], "big")
            file.seek(at)
        if head[4:] == b"pHYs":
            file.seek(at)
            file.write(png_chunk("pHYs", struct.pack(">IIB", 1, 1, 0)))
    elif form is Format.TIFF:
        order, big = tiff.layout(file)
        file.seek(8 if big else 4)
        file.seek(tiff.unpacked(file, order, "Q" if big else "I")[0])
        (count,), size = tiff.unpacked(file, order, "Q" if big else "H"), 20 if big else 12
        for at in range(file.tell(), file.tell() + count * size, size):
            file.seek(at)
            if tiff.unpacked(file, order, "H") == (tiff.RESOLUTION_UNIT,):
                file.seek(at + (12 if big else 8))
                file.write(struct.pack(order + "H", tiff.NO_UNIT))


PNG_HEADER = 33
"""Bytes of the signature and the IHDR chunk."""


def png_chunk(name: str, data: bytes) -> bytes:
    """A chunk with its length and check sum."""
    body = name.encode() + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def as_text(comment: bytes) -> str:
    """A comment whose encoding no one told: UTF-8 if it is that."""
    try:
        return comment.decode()
    except UnicodeDecodeError:
        return comment.decode("latin-1")


def put_tiff(file: IO[bytes], texts: Mapping[int, bytes]) -> None:
    """Add text tags to the only directory of a TIFF: a new one is written behind the file."""
    order, big = tiff.layout(file)
    count_code, entry_code, place_code = ("Q", "HHQ", "Q") if big else ("H", "HHI", "I")
    pointer, size = (8, 20) if big else (4, 12)
    file.seek(pointer)
    (at,) = tiff.unpacked(file, order, place_code)
    file.seek(at)
    (count,) = tiff.unpacked(file, order, count_code)
    raw = file.read(count * size)
    entries = {
        struct.unpack_from(order + "H", raw, start)[0]: raw[start : start + size] for start in range(0, len(raw), size)
    }
    end = file.seek(0, os.SEEK_END)
    file.write(bytes(end % 2))
    for tag, text in texts.items():
        value = text.rstrip(b"\0") + b"\0"
        place = file.tell()
        inline = size - struct.calcsize(order + entry_code)
        if len(value) > inline:
            file.write(value + bytes(len(value) % 2))
            packed = struct.pack(order + place_code, place)
        else:
            packed = value.ljust(inline, b"\0")
        entries[tag] = struct.pack(order + entry_code, tag, 2, len(value)) + packed
    directory = file.tell()
    file.write(struct.pack(order + count_code, len(entries)))
    file.write(b"".join(entries[tag] for tag in sorted(entries)) + bytes(struct.calcsize(order + place_code)))
    file.seek(pointer)
    file.write(struct.pack(order + place_code, directory))
