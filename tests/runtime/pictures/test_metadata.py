"""What files say beside their pixels is kept, or told as left out; docs/pictures.md says which."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pyvips

from sanrt.runtime.pictures import metadata
from sanrt.runtime.pictures.codec import Encoding, open_picture, plan_output, write_picture
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.provenance import Provenance, SourceIdentity, is_intact, read_mark
from tests.runtime.pictures.test_codec import P3, chunk

PIXELS = np.dstack(np.broadcast_arrays(*(np.arange(n)[:, None] * 9 if n == 10 else np.arange(n) * 9 for n in (10, 14)), 70))
PIXELS = PIXELS.astype(np.uint8)
MADE = Provenance(SourceIdentity("a" * 64, 1, "b" * 32), 2, "model", "options")
GREY_PROFILE = P3[:16] + b"GRAY" + P3[20:]
EXIF = b"Exif\0\0" + struct.pack("<2sHIHHHI4sI", b"II", 42, 8, 1, 315, 2, 3, b"me\0\0", 0)
IPTC = b"Photoshop 3.0\0" + b"8BIM\4\4\0\0" + struct.pack(">I", 10) + b"\x1c\2\x50\0\5hello"
VALUES = {
    metadata.ICC: P3,
    metadata.EXIF: EXIF,
    metadata.XMP: b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
    metadata.IPTC: IPTC,
    "cICP": bytes([9, 16, 0, 1]),
    "sBIT": bytes([5, 6, 5]),
    "gAMA": struct.pack(">I", 100000),
    "cHRM": struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000),
    "mDCV": struct.pack(">8HII", 35400, 14600, 8500, 39850, 6550, 2300, 15635, 16450, 10000000, 1),
    "cLLI": struct.pack(">II", 10000000, 4000000),
    "sRGB": b"\0",
    "text": chunk(b"tEXt", b"parameters\0steps: 20") + chunk(b"iTXt", b"Title\0\0\0\0\0caf\xc3\xa9"),
    "comment": "a comment, café".encode(),
    **{name: f"the {name}, and more".encode() for name in metadata.TIFF_TAGS},
}
ENDINGS = {form: form.facts.suffixes[0] for form in metadata.WRITTEN}


def png(path: Path, *chunks: tuple[bytes, bytes], pixels: np.ndarray = PIXELS) -> Path:
    content = pyvips.Image.new_from_array(pixels).pngsave_buffer()
    path.write_bytes(content[:33] + b"".join(chunk(*each) for each in chunks) + content[33:])
    return path


def jpeg(path: Path, *segments: tuple[int, bytes]) -> Path:
    content = pyvips.Image.new_from_array(PIXELS).jpegsave_buffer(Q=95)
    added = b"".join(bytes([255, marker]) + struct.pack(">H", len(data) + 2) + data for marker, data in segments)
    path.write_bytes(content[:2] + added + content[2:])
    return path


def result(path: Path, destination: Path, encoding: Encoding | None = None) -> tuple[Path, tuple[str, ...]]:
    """The picture written at twice its size with its mark, and all notes."""
    with open_picture(path) as opened:
        output = replace(plan_output(opened.info, destination, 2, encoding or Encoding()), provenance=MADE)
        write_picture(output, opened.rgb().repeat(2, 0).repeat(2, 1), opened.alpha().repeat(2, 0).repeat(2, 1))
        return destination, opened.info.notes + output.notes


@pytest.mark.parametrize("form", sorted(metadata.WRITTEN))
@pytest.mark.parametrize("name", VALUES)
def test_each_kind_is_in_the_result_or_told_and_the_mark_stays_sound(tmp_path, name, form):
    value = VALUES[name]
    with open_picture(png(tmp_path / "a.png")) as opened:
        info = replace(opened.info, metadata={name: value})
        output = replace(plan_output(info, tmp_path / f"out{ENDINGS[form]}", 2), provenance=MADE)
        write_picture(output, opened.rgb().repeat(2, 0).repeat(2, 1))
    with open_picture(output.path) as written:
        found = written.info.metadata
        assert np.abs(written.rgb().astype(int) - PIXELS.repeat(2, 0).repeat(2, 1)).mean() < 12
    if form in metadata.HOLDERS[name]:
        expected = metadata.TEXT if (name, form) == ("comment", Format.PNG) else name
        assert value.strip(b"\0") in found[expected] if name != metadata.EXIF else b"me" in found[name]
        assert not output.notes
    else:
        assert name not in found
        label = metadata.LABELS.get(name, name)
        assert any(label in note for note in output.notes) or metadata.said_anyway(name, VALUES[name])
    assert is_intact(output.path)
    assert read_mark(output.path).provenance == MADE


def test_the_table_in_the_documentation_is_that_of_the_code():
    page = Path(__file__).parents[3].joinpath("docs", "pictures.md").read_text()
    forms = [Format.PNG, Format.JPEG, Format.WEBP, Format.TIFF, Format.AVIF]
    for name, holders in metadata.HOLDERS.items():
        cells = ["kept" if form in holders else "told" for form in forms]
        label = metadata.LABELS.get(name, name)
        assert f"| {label} | {' | '.join(cells)} |" in page, label


def test_png_chunks_on_colour_and_text_reach_the_result_as_they_are(tmp_path):
    names = ("cICP", "gAMA", "cHRM", "sBIT", "mDCV", "cLLI")
    chunks = [(name.encode(), VALUES[name]) for name in names]
    text = (b"zTXt", b"Comment\0\0x\x9c\x03\0\0\0\0\x01")
    path, notes = result(png(tmp_path / "a.png", *chunks, text), tmp_path / "out.png")
    content = path.read_bytes()
    for name, data in [*chunks, text]:
        assert content.count(chunk(name, data)) == 1
        assert name == b"zTXt" or content.index(name) < content.index(b"IDAT")
    assert not notes


def test_what_samples_mean_is_told_where_the_format_cannot_say_it(tmp_path):
    _, notes = result(png(tmp_path / "a.png", (b"gAMA", VALUES["gAMA"]), (b"cICP", VALUES["cICP"])), tmp_path / "out.jpg")
    assert any("gAMA" in note and "cICP" in note and "JPEG" in note for note in notes)


def test_what_every_reader_takes_for_granted_is_not_told(tmp_path):
    usual = [(b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 45455))]
    _, notes = result(png(tmp_path / "a.png", *usual), tmp_path / "out.jpg")
    assert not notes


def test_significant_bits_of_another_depth_are_not_kept(tmp_path):
    with open_picture(png(tmp_path / "a.png", (b"sBIT", VALUES["sBIT"]))) as picture:
        output = plan_output(picture.info, tmp_path / "out.png", 2, bits=16)
    assert "sBIT" not in output.metadata
    assert any("sBIT" in note for note in output.notes)


@pytest.mark.parametrize(("profile", "bands", "words"), [(GREY_PROFILE, 3, "grey ICC"), (P3, 1, "RGB ICC")])
def test_a_profile_that_does_not_fit_the_pixels_is_told(tmp_path, profile, bands, words):
    image = pyvips.Image.new_from_array(PIXELS[..., :bands])
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
    content = pyvips.Image.new_from_array(PIXELS[..., :bands]).jpegsave_buffer()
    segment = b"ICC_PROFILE\0\1\1" + profile
    path = tmp_path / "a.jpg"
    path.write_bytes(content[:2] + b"\xff\xe2" + struct.pack(">H", len(segment) + 2) + segment + content[2:])
    written, notes = result(path, tmp_path / "out.jpg")
    assert any(words in note for note in notes) or b"ICC_PROFILE" not in path.read_bytes()
    with open_picture(written) as picture:
        assert metadata.ICC not in picture.info.metadata


def test_an_avifs_colour_signal_is_told_or_becomes_a_pngs(tmp_path):
    image = pyvips.Image.new_from_array(PIXELS)
    content = bytearray(image.heifsave_buffer(compression="av1", effort=0, lossless=True, subsample_mode="off"))
    at = content.index(b"colrnclx") + 8
    content[at : at + 4] = struct.pack(">HH", 9, 16)
    path = tmp_path / "a.avif"
    path.write_bytes(content)
    written, notes = result(path, tmp_path / "out.png")
    assert chunk(b"cICP", bytes([9, 16, 0, 1])) in written.read_bytes()
    assert not notes
    _, notes = result(path, tmp_path / "out.jpg")
    assert any("cICP" in note for note in notes)


def test_the_further_frames_of_an_animated_png_are_told(tmp_path):
    _, notes = result(png(tmp_path / "a.png", (b"acTL", struct.pack(">II", 3, 0))), tmp_path / "out.png")
    assert "only the first of its 3 frames" in notes


def mpf(images: int) -> bytes:
    return b"MPF\0" + struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0xB001, 4, 1, images, 0)


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([(0xE2, mpf(2))], "only the first of its 2 frames"),
        ([(0xE2, mpf(2)), (0xE2, b"urn:iso:std:iso:ts:21496:-1\0\0\0")], "Ultra HDR gain map"),
        ([(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x hdrgm:Version='1.0'/>")], "Ultra HDR gain map"),
        ([(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x GCamera:MotionPhoto='1'/>")], "motion photo"),
        ([(0xEB, b"JP\0\1\0\0\0\1\0\0\0\x40jumb\0\0\0\x1ejumdc2pa")], "C2PA claims"),
    ],
)
def test_what_is_untrue_of_a_result_is_left_out_and_told(tmp_path, segments, words):
    written, notes = result(jpeg(tmp_path / "a.jpg", *segments), tmp_path / "out.jpg")
    assert any(words in note for note in notes)
    content = written.read_bytes()
    assert not any(word in content for word in (b"hdrgm", b"MotionPhoto", b"c2pa", b"MPF\0", b"21496"))


def test_a_pngs_claims_are_left_out_and_told(tmp_path):
    written, notes = result(png(tmp_path / "a.png", (b"caBX", b"jumbc2pa")), tmp_path / "out.png")
    assert any("C2PA" in note for note in notes)
    assert b"caBX" not in written.read_bytes()


def test_a_lossless_picture_under_a_lossy_name_is_told(tmp_path):
    path = png(tmp_path / "a.png").rename(tmp_path / "a.jpg")
    _, notes = result(path, tmp_path / "out.jpg")
    assert any("lossless PNG is written as a lossy JPEG" in note for note in notes)
    _, notes = result(png(tmp_path / "b.png"), tmp_path / "out2.jpg")
    assert not notes, "asked for by the output's name"


def test_tags_of_a_tiff_reach_a_tiff_and_are_told_elsewhere(tmp_path):
    path = tmp_path / "a.tif"
    pyvips.Image.new_from_array(PIXELS).tiffsave(str(path))
    with path.open("r+b") as file:
        metadata.put(file, Format.TIFF, {"TIFF artist": b"An Artist", "TIFF date": b"2020:01:02 03:04:05"})
    written, notes = result(path, tmp_path / "out.tif")
    assert not notes
    with open_picture(written) as picture:
        assert picture.info.metadata["TIFF artist"].strip(b"\0") == b"An Artist"
        assert picture.info.metadata["TIFF date"].strip(b"\0") == b"2020:01:02 03:04:05"
    _, notes = result(path, tmp_path / "out.png")
    assert any("TIFF artist" in note for note in notes)


def test_a_big_tiff_takes_tags_too(tmp_path):
    path = tmp_path / "a.tif"
    pyvips.Image.new_from_array(PIXELS).tiffsave(str(path), bigtiff=True)
    with path.open("r+b") as file:
        metadata.put(file, Format.TIFF, {"TIFF artist": b"An Artist", "TIFF maker": b"Me"})
    with open_picture(path) as picture:
        assert (picture.rgb() == PIXELS).all()
        assert picture.info.metadata["TIFF maker"].strip(b"\0") == b"Me"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".avif"])
@pytest.mark.parametrize("source", ["a.png", "a.jpg", "a.webp"])
def test_a_picture_that_does_not_say_its_resolution_gains_neither_one_nor_exif(tmp_path, source, suffix):
    from PIL import Image

    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / source)
    with open_picture(tmp_path / source) as picture:
        rgb = picture.rgb()
        write_picture(plan_output(picture.info, tmp_path / f"b{suffix}", 1), rgb)
    with Image.open(tmp_path / f"b{suffix}") as result:
        result.load()
        assert not dict(result.getexif()) or suffix == ".tif"
        assert result.info.get("dpi") in (None, (1, 1)) or result.info.get("jfif_unit") == 0
    with open_picture(tmp_path / f"b{suffix}") as result:
        assert result.info.resolution is None
        assert result.rgb().shape == rgb.shape


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".tif", ".avif"])
def test_display_p3_that_a_format_cannot_signal_becomes_an_icc_profile(tmp_path, suffix):
    form = Format.of_suffix(Path(f"a{suffix}"))
    kept, notes = metadata.fitting({metadata.CICP: bytes([12, 13, 0, 1])}, form, False, 3, True)
    assert kept == {metadata.ICC: P3}
    assert notes == [f"its cICP (Display P3) becomes an ICC profile, as {form.upper()} results do not hold it"]
    assert metadata.fitting({metadata.CICP: bytes([12, 13, 0, 1]), metadata.ICC: P3}, form, False, 3, True)[0] == {
        metadata.ICC: P3
    }
    kept, notes = metadata.fitting({metadata.CICP: bytes([9, 16, 0, 1])}, form, False, 3, True)
    assert not kept
    assert "cICP" in notes[0]
