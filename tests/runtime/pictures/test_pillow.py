"""Pictures that the `formats` extra reads: orientation, profile and depth as for the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sanrt.errors import MissingPackageError, PictureError
from sanrt.extras import install_command
from sanrt.runtime.pictures import formats
from sanrt.runtime.pictures.codec import open_picture, plan_output, write_picture
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.jobs import find_pictures, passed_over
from tests.runtime.pictures.test_codec import P3

Image = pytest.importorskip("PIL.Image")
Y, X = np.mgrid[:20, :28]
PIXELS = np.dstack([X * 8, Y * 9, X + Y]).astype(np.uint8)


def saved(path: Path, mode: str = "RGB", **options: object) -> np.ndarray:
    """A picture in a mode of Pillow's; its RGB or grey pixels."""
    picture = Image.fromarray(PIXELS).convert(mode)
    picture.save(path, **options)
    return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.bmp", "RGB", {}),
        ("a.bmp", "P", {}),
        ("a.bmp", "L", {}),
        ("a.bmp", "1", {}),
        ("a.tga", "RGB", {}),
        ("a.tga", "RGBA", {}),
        ("a.tga", "RGB", {"compression": "tga_rle"}),
        ("a.jp2", "RGB", {}),
        ("a.jp2", "LA", {}),
        ("a.j2k", "RGB", {}),
    ],
)
def test_their_pixels_are_read_and_written_as_png(tmp_path, name, mode, options):
    expected = saved(tmp_path / name, mode, **options)
    with open_picture(tmp_path / name) as picture:
        assert (picture.rgb() == expected).all()
        assert picture.info.alpha == mode.endswith("A")
        assert picture.info.grey == (mode in ("1", "L", "LA"))
        output = plan_output(picture.info, tmp_path / "out.png", 1)
        write_picture(output, picture.rgb(), picture.alpha())
    with open_picture(output.path) as written:
        assert (written.rgb() == expected).all()


def test_a_bmp_is_known_by_its_content_and_a_tga_by_its_name(tmp_path):
    saved(tmp_path / "a.bmp")
    with open_picture((tmp_path / "a.bmp").rename(tmp_path / "b.png")) as picture:
        assert picture.info.format is Format.BMP
    saved(tmp_path / "a.tga")
    with pytest.raises(PictureError, match="unknown content"):
        open_picture((tmp_path / "a.tga").rename(tmp_path / "c.png"))


def test_grey_of_16_bits_stays_so_and_colours_that_would_lose_theirs_are_refused(tmp_path):
    deep = PIXELS[..., 0].astype(np.uint16) * 200
    Image.fromarray(deep).save(tmp_path / "a.jp2")
    with open_picture(tmp_path / "a.jp2") as picture:
        assert picture.info.bits == 16
        assert (picture.rgb()[..., 0] == deep).all()
    saved(tmp_path / "b.jp2")
    content = bytearray((tmp_path / "b.jp2").read_bytes())
    at = content.index(b"\xff\x51") + 40
    assert content[at] == 7
    content[at : at + 9 : 3] = b"\x0f\x0f\x0f"
    (tmp_path / "b.jp2").write_bytes(content)
    with pytest.raises(PictureError, match="JPEG 2000 of 16 bits"):
        open_picture(tmp_path / "b.jp2")


@pytest.mark.parametrize("name", ["a.bmp", "a.tga", "a.jp2", "a.heic"])
def test_a_cut_one_is_damaged_in_one_line(tmp_path, name):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    saved(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(PictureError, match="damaged") as raised, open_picture(tmp_path / name) as picture:
        picture.rgb()
    assert "\n" not in str(raised.value)


def test_a_turned_heic_stands_upright_with_its_profile_and_exif(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    exif = Image.Exif()
    exif[274], exif[315] = 6, "me"
    saved(tmp_path / "a.heic", quality=-1, exif=exif.tobytes(), icc_profile=P3)
    with open_picture(tmp_path / "a.heic") as picture:
        assert (picture.info.width, picture.info.height) == (20, 28)
        assert np.abs(picture.rgb().astype(int) - np.rot90(PIXELS, -1)).max() <= 40  # halved colours
        assert picture.info.metadata["icc-profile-data"] == P3
        write_picture(plan_output(picture.info, tmp_path / "out.jpg", 1), picture.rgb())
    with open_picture(tmp_path / "out.jpg") as written:
        assert (written.info.width, written.info.height) == (20, 28)
        assert b"me" in written.info.metadata["exif-data"]


def test_a_heic_of_10_bits_fills_the_range(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    white = np.full((16, 16, 3), 65535, np.uint16)
    heif.from_bytes(mode="RGB;16", size=(16, 16), data=white.tobytes()).save(tmp_path / "a.heic", quality=-1)
    with open_picture(tmp_path / "a.heic") as picture:
        assert picture.info.bits == 10
        assert picture.rgb().min() >= 65535 - 128


def test_without_the_extra_they_are_counted_in_folders_and_told_where_named(tmp_path, monkeypatch):
    saved(tmp_path / "a.bmp")
    Image.fromarray(PIXELS).save(tmp_path / "b.png")
    assert len(find_pictures([tmp_path], tmp_path / "out")) == 2
    assert passed_over([tmp_path], tmp_path / "out") == []
    monkeypatch.setattr(formats, "find_spec", lambda package: None)
    assert len(find_pictures([tmp_path], tmp_path / "out")) == 1
    (line,) = passed_over([tmp_path], tmp_path / "out")
    assert line == f"passed over: 1 BMP ({tmp_path}/a.bmp); to read them: {install_command('formats')}"
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(MissingPackageError, match=r"\[formats\]"):
        open_picture(tmp_path / "a.bmp")
