"""TIFF samples that are no RGB, and files that are called what they are."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import pyvips

from sanrt.errors import PictureError
from sanrt.runtime.pictures.codec import open_picture

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 5), np.uint8)
RGB, SHORT, LONG = 2, 3, 4


def tiff(path: Path, bands: int = 3, order: str = "<", **tags: tuple[int, ...]) -> Path:
    """An uncompressed TIFF of PIXELS' first bands; tags by `tNUMBER` replace and add to the usual ones."""
    given = {int(name[1:]): value for name, value in tags.items()}
    height, width = PIXELS.shape[:2]
    data = PIXELS[..., :bands].tobytes()
    usual = {256: (width,), 257: (height,), 258: (8,) * bands, 259: (1,), 262: (RGB,), 273: (0,), 277: (bands,)}
    entries = {**usual, 278: (height,), 279: (len(data),), **given}
    arrays_at = 8 + 2 + 12 * len(entries) + 4
    arrays, directory = b"", b""
    pixels_at = arrays_at + sum(4 * len(value) for value in entries.values() if len(value) > 1)
    for tag, value in sorted(entries.items()):
        numbers = (pixels_at,) if tag == 273 else value
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            arrays, packed = arrays + packed, struct.pack(f"{order}I", arrays_at + len(arrays))
        directory += struct.pack(f"{order}HHI", tag, LONG, len(numbers)) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    path.write_bytes(head + struct.pack(f"{order}H", len(entries)) + directory + bytes(4) + arrays + data)
    return path


@pytest.mark.parametrize("order", ["<", ">"])
def test_rgb_is_read_in_either_byte_order(tmp_path, order):
    with open_picture(tiff(tmp_path / "a.tif", order=order)) as picture:
        assert (picture.rgb() == PIXELS[..., :3]).all()
        assert not picture.info.notes


@pytest.mark.parametrize(
    ("photometric", "name"),
    [(6, "YCbCr"), (8, "Lab"), (9, "Lab"), (4, "a mask"), (32844, "LogL"), (99, r"unknown kind \(99\)")],
)
def test_samples_that_are_no_rgb_are_refused_by_their_name(tmp_path, photometric, name):
    with pytest.raises(PictureError, match=f"samples are .*{name}.*convert it to RGB") as raised:
        open_picture(tiff(tmp_path / "a.tif", t262=(photometric,)))
    assert "damaged" not in str(raised.value)


def test_ycbcr_compressed_as_jpeg_is_read(tmp_path):
    path = tmp_path / "a.tif"
    pyvips.Image.new_from_array(PIXELS[..., :3]).tiffsave(str(path), compression="jpeg", Q=75)
    with open_picture(path) as picture:
        assert np.abs(picture.rgb().mean((0, 1)) - PIXELS[..., :3].mean((0, 1))).max() < 8


@pytest.mark.parametrize(
    "tags",
    [
        {"t50706": (0x0401,)},
        {"t262": (32803,), "t258": (8,), "t277": (1,), "bands": 1},
        {"t254": (1,), "t330": (8,)},
    ],
    ids=["dng", "sensor samples", "a preview first"],
)
def test_a_raw_photographs_preview_is_not_taken_for_the_picture(tmp_path, tags):
    with pytest.raises(PictureError, match="preview"):
        open_picture(tiff(tmp_path / "a.tif", **tags))


@pytest.mark.parametrize(
    ("kinds", "alpha", "note"),
    [((0,), False, True), ((2,), True, False), ((2, 0), True, True), ((0, 0), False, True)],
)
def test_only_a_channel_that_the_file_calls_opacity_becomes_transparency(tmp_path, kinds, alpha, note):
    with open_picture(tiff(tmp_path / "a.tif", bands=3 + len(kinds), t338=kinds)) as picture:
        assert picture.info.alpha == alpha
        assert (picture.rgb() == PIXELS[..., :3]).all()
        assert any("neither colours nor transparency" in line for line in picture.info.notes) == note
        if alpha:
            assert (picture.alpha() == PIXELS[..., 3]).all()


@pytest.mark.parametrize("size", range(4, 160, 3))
def test_a_tiff_cut_within_its_tags_is_refused_in_one_line(tmp_path, size):
    path = tiff(tmp_path / "a.tif", t338=(0, 0), bands=5)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(PictureError):
        open_picture(path)


@pytest.mark.parametrize("big", [False, True])
def test_tags_that_point_nowhere_are_passed_over(tmp_path, big):
    path = tmp_path / "a.tif"
    path.write_bytes(b"II+\0\x08\0\0\0" + b"\xff" * 8 if big else b"II*\0" + b"\xff" * 4)
    with pytest.raises(PictureError):
        open_picture(path)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1miaf", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0mp41avc1", "video"),
        (b"\0\0\0\x18ftypqt  \0\0\0\0qt  qt  ", "video"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "raw photograph"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"8BPS\0\1", "Photoshop"),
        (b"%PDF-1.7", "PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'>", "SVG"),
    ],
)
def test_what_is_not_read_is_called_what_it_is(tmp_path, head, name):
    path = tmp_path / "a.jpg"
    path.write_bytes(head + bytes(500))
    with pytest.raises(PictureError, match=name) as raised:
        open_picture(path)
    assert "damaged" not in str(raised.value)


def test_an_avif_that_names_its_brand_second_is_read(tmp_path):
    path = tmp_path / "a.avif"
    content = pyvips.Image.new_from_array(PIXELS[..., :3]).heifsave_buffer(compression="av1", effort=0)
    assert content[8:12] == b"avif"
    path.write_bytes(content[:8] + b"mif1" + content[12:])
    with open_picture(path) as picture:
        assert (picture.info.width, picture.info.height) == (16, 12)
