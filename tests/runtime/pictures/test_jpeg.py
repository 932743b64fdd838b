"""JPEG files as phones and cameras write them: what costs no pixel is read, what costs one is refused."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import pyvips

from sanrt.errors import PictureError
from sanrt.runtime.pictures.codec import Output, open_picture, write_picture
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.jpeg import MOST_SEGMENTS, find_repairs, repairs, segments

ENCODINGS = {
    "plain": {"subsample_mode": "off"},
    "halved_colours": {"subsample_mode": "on"},
    "restarting": {"restart_interval": 4},
    "progressive": {"interlace": True},
}
APP1 = b"\xff\xe1\0\x0eExif\0\0II*\0\0\0"
SCAN, TABLES, FRAME = b"\xff\xda", b"\xff\xc4", b"\xff\xc0"


def encoded(name: str, bands: int = 3) -> bytes:
    y, x = np.mgrid[:80, :96]
    noise = np.random.default_rng(0).integers(0, 40, (80, 96))
    pixels = np.dstack([2 * x + noise, 2 * y + noise, x + y]).clip(0, 255).astype(np.uint8)[..., :bands]
    return pyvips.Image.new_from_array(pixels).jpegsave_buffer(Q=95, **ENCODINGS[name])


def before(content: bytes, marker: bytes, junk: bytes) -> bytes:
    at = content.index(marker)
    return content[:at] + junk + content[at:]


def with_scan_parameters(content: bytes, parameters: bytes) -> bytes:
    """With other bytes at the end of the first scan's header, except in a progressive file, where they mean something."""
    at = content.index(SCAN)
    end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return content if b"\xff\xc2" in content else content[: end - 3] + parameters + content[end:]


ODDITIES = {
    "zero_to_zero": lambda content: with_scan_parameters(content, bytes(3)),
    "bits_shifted": lambda content: with_scan_parameters(content, bytes([0, 63, 1])),
    "zeros_before_the_scan": lambda content: before(content, SCAN, bytes(3)),
    "bytes_before_the_tables": lambda content: before(content, TABLES, b"\x12\x34\xff\0"),
    "no_end_marker": lambda content: content[:-2],
    "half_an_end_marker": lambda content: content[:-1],
    "jfif_2": lambda content: content.replace(b"JFIF\0\1", b"JFIF\0\2", 1),
    "everything_at_once": lambda content: before(content[:-2].replace(b"JFIF\0\1", b"JFIF\0\3", 1), SCAN, b"\0\0"),
}


@pytest.mark.parametrize(("encoding", "oddity"), list(product(ENCODINGS, ODDITIES)))
@pytest.mark.parametrize("bands", [1, 3])
def test_what_libjpeg_only_warns_of_is_read_with_its_right_pixels(tmp_path, encoding, oddity, bands):
    sound, odd = tmp_path / "sound.jpg", tmp_path / "odd.jpg"
    sound.write_bytes(encoded(encoding, bands))
    odd.write_bytes(ODDITIES[oddity](sound.read_bytes()))
    with open_picture(sound) as expected, open_picture(odd) as picture:
        assert (picture.rgb() == expected.rgb()).all()
        changed = odd.read_bytes() != sound.read_bytes()
        assert any("read only if no pixel is missing" in note for note in picture.info.notes) == changed
        assert not expected.info.notes


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, -30, -8])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_a_jpeg_that_lacks_pixels_is_refused_with_and_without_an_end_marker(tmp_path, encoding, kept, end):
    path = tmp_path / "cut.jpg"
    content = encoded(encoding)
    path.write_bytes(content[: int(kept * len(content)) if kept > 0 else kept] + end)
    with pytest.raises(PictureError, match="damaged"), open_picture(path) as picture:
        picture.rgb()


def test_a_progressive_jpeg_cut_between_two_scans_is_refused(tmp_path):
    path = tmp_path / "cut.jpg"
    content = encoded("progressive")
    path.write_bytes(content[: content.rindex(TABLES)])
    with pytest.raises(PictureError, match="damaged"), open_picture(path) as picture:
        picture.rgb()


@pytest.mark.parametrize("junk", [b"\xff\xd9", b"\xff\x88", b"\xff\xda"])
def test_a_marker_within_the_pixels_is_refused(tmp_path, junk):
    path = tmp_path / "damaged.jpg"
    content = encoded("plain")
    middle = len(content) // 2
    path.write_bytes(content[:middle] + junk + content[middle + 2 :])
    with pytest.raises(PictureError, match="damaged"), open_picture(path) as picture:
        picture.rgb()


def test_more_rows_claimed_than_there_are_is_refused(tmp_path):
    content = bytearray(encoded("plain"))
    at = content.index(FRAME) + 5
    content[at : at + 2] = (160).to_bytes(2, "big")
    path = tmp_path / "taller.jpg"
    path.write_bytes(content)
    with pytest.raises(PictureError, match="damaged"), open_picture(path) as picture:
        picture.rgb()


def test_an_unknown_colour_transform_is_taken_as_the_usual_one(tmp_path):
    sound, odd = tmp_path / "sound.jpg", tmp_path / "odd.jpg"
    content = encoded("plain")
    sound.write_bytes(content)
    jfif_end = 4 + int.from_bytes(content[4:6], "big")
    odd.write_bytes(content[:2] + b"\xff\xee\0\x0eAdobe\0d\0\0\0\0\5" + content[jfif_end:])
    with open_picture(sound) as expected, open_picture(odd) as picture:
        assert (picture.rgb() == expected.rgb()).all()


@pytest.mark.parametrize("size", list(range(2, 700, 7)))
def test_files_cut_anywhere_in_the_header_are_followed_to_their_end(tmp_path, size):
    path = tmp_path / "cut.jpg"
    path.write_bytes(encoded("plain")[:size])
    assert all(repair.reason != "no end marker" or size > 600 for repair in repairs(path))


def test_threads_on_damaged_files_each_blame_their_own(tmp_path):
    image = pyvips.Image.gaussnoise(64, 64, seed=1).cast("uchar").bandjoin([100, 50])
    said = {}
    for name, saver in (("jpg", "jpegsave"), ("png", "pngsave"), ("webp", "webpsave"), ("gif", "gifsave")):
        content = getattr(image, f"{saver}_buffer")()
        path = tmp_path / f"cut.{name}"
        path.write_bytes(content[: len(content) // 2])
        said[path] = reason(path)
    assert len(set(said.values())) == 4
    paths = list(said) * 40
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reason, paths)) == [said[path] for path in paths]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_pixels_missing_in_the_last_rows_are_noticed_whoever_empties_libvips_error_buffer(
    tmp_path, monkeypatch, orientation, bands
):
    image = pyvips.Image.new_from_array(np.random.default_rng(0).integers(0, 255, (64, 64, bands), np.uint8))
    image = image.copy(interpretation={1: "b-w", 3: "srgb", 4: "cmyk"}[bands])
    image.set_type(pyvips.GValue.gint_type, "orientation", orientation)
    path = tmp_path / "cut.jpg"
    path.write_bytes(image.jpegsave_buffer(subsample_mode="off")[:-4] + b"\xff\xd9")
    fetch = pyvips.Region.fetch

    def fetch_while_a_writer_fails(*arguments):
        pixels = fetch(*arguments)
        pyvips.vips_lib.vips_error_clear()
        return pixels

    monkeypatch.setattr(pyvips.Region, "fetch", fetch_while_a_writer_fails)
    assert reason(path).startswith(f"{path}: damaged JPEG file (")


def test_a_writer_that_fails_is_not_told_what_libvips_said_of_a_picture_that_was_read(tmp_path, monkeypatch):
    def fail(image, *arguments, **options):
        raise pyvips.Error("unable to call pngsave_target", "VipsJpeg: premature end\ntarget: write error\n")

    monkeypatch.setattr(pyvips.Image, "pngsave_target", fail, raising=False)
    output = Output(tmp_path / "a.png", Format.PNG, 1, 1)
    with pytest.raises(PictureError, match=r"a\.png: cannot be written \(target: write error\)$"):
        write_picture(output, np.zeros((1, 1, 3), np.uint8))


class CountedBytes(io.BytesIO):
    """A file in memory that counts what is read of it."""

    count = 0

    def read(self, size=-1):
        data = super().read(size)
        self.count += len(data)
        return data


HOSTILE = {
    "small segments": b"\xff\xe5\0\2" * 50_000,
    "more segments than are followed": b"\xff\xe5\0\2" * (MOST_SEGMENTS + 1),
    "fill bytes": b"\xff" * (1 << 22) + b"\0",
    "fill bytes between markers": (b"\xff" * 1000 + b"\xe5\0\2") * 1000,
    "junk between markers": (b"\0" * 1000 + b"\xff\xe5\0\2") * 1000,
    "scans": b"\xff\xda\0\2" * 50_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_jpeg_of_many_segments_is_followed_in_time_proportional_to_its_size(name):
    file = CountedBytes(b"\xff\xd8" + HOSTILE[name])
    assert len(list(segments(file))) <= MOST_SEGMENTS + 1
    assert len(list(find_repairs(file))) <= 1000
    assert file.count < 2 * (8 * len(HOSTILE[name]) + 5000 * MOST_SEGMENTS)


def reason(path: Path) -> str:
    """Why a damaged picture is refused."""
    with pytest.raises(PictureError) as raised, open_picture(path) as picture:
        picture.rgb()
    return str(raised.value)
