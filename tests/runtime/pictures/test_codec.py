"""Picture files in and out: what is read, what survives, what is refused."""

from __future__ import annotations

import errno
import os
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import pyvips

from sanrt.errors import FileError, PictureError, ScratchError
from sanrt.files import locked_file, remove_leftovers
from sanrt.runtime import host
from sanrt.runtime.pictures import formats
from sanrt.runtime.pictures.codec import (
    Encoding,
    Output,
    PictureInfo,
    open_picture,
    plan_output,
    upscale_alpha,
    write_picture,
)
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.scratch import ScratchPicture
from tests import mutate

PROFILE = pyvips.Image.black(1, 1, bands=3).copy(interpretation="srgb").icc_transform("p3", input_profile="srgb")
P3 = bytes(PROFILE.get("icc-profile-data"))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(path: Path, width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b"") -> Path:
    """A PNG made by hand; `rows` has a filter byte before each row, `extra` is chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def filtered(samples: np.ndarray) -> bytes:
    """(H, ...) big-endian samples as PNG rows without filter."""
    return b"".join(b"\0" + row.tobytes() for row in samples)


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def doubled(path: Path, destination: Path, encoding: Encoding | None = None) -> Path:
    """The picture at twice its size, each pixel four times, in place of a network's result."""
    with open_picture(path) as source:
        output = plan_output(source.info, destination, 2, encoding or Encoding())
        rgb = source.rgb().repeat(2, axis=0).repeat(2, axis=1)
        write_picture(output, rgb, source.alpha().repeat(2, axis=0).repeat(2, axis=1))
    return destination


def halved(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with open_picture(path) as picture:
        rgb, alpha = picture.rgb(), picture.alpha()
    assert (rgb == rgb[::2, ::2].repeat(2, axis=0).repeat(2, axis=1)).all()
    return rgb[::2, ::2], alpha[::2, ::2]


def field(path: Path, name: str) -> object:
    image = pyvips.Image.new_from_file(str(path))
    return image.get(name) if image.get_typeof(name) else None


def test_a_16_bit_rgb_png_keeps_every_bit(tmp_path):
    pixels = noise(5, 9, 3, dtype=np.uint16)
    path = png(tmp_path / "deep.png", 9, 5, 16, 2, filtered(pixels.astype(">u2")))
    with open_picture(path) as picture:
        assert (picture.info.bits, picture.info.grey, picture.info.alpha) == (16, False, False)
        assert picture.rgb().dtype == np.uint16
        assert (picture.rgb() == pixels).all()
        assert (picture.alpha() == 65535).all()
    for name in ("out.png", "out.tif"):
        result = doubled(path, tmp_path / name)
        assert (halved(result)[0] == pixels).all()


def test_a_grey_png_is_seen_as_rgb_and_written_as_grey(tmp_path):
    pixels = noise(6, 4)
    path = png(tmp_path / "grey.png", 4, 6, 8, 0, filtered(pixels))
    with open_picture(path) as picture:
        assert picture.info.grey
        assert (picture.rgb() == pixels[..., None]).all()
    result = doubled(path, tmp_path / "out.png")
    assert pyvips.Image.new_from_file(str(result)).bands == 1
    assert (halved(result)[0] == pixels[..., None]).all()


def test_grey_output_is_the_rounded_mean_of_the_channels(tmp_path):
    write_picture(Output(tmp_path / "a.png", Format.PNG, 1, 1, grey=True), np.array([[[10, 20, 31]]], np.uint8))
    with open_picture(tmp_path / "a.png") as picture:
        assert picture.rgb().tolist() == [[[20, 20, 20]]]


def test_a_palette_png_with_transparency_becomes_rgb_with_alpha(tmp_path):
    palette = noise(4, 3)
    opacity = np.array([0, 128, 255, 7], np.uint8)
    indices = noise(7, 3) % 4
    extra = chunk(b"PLTE", palette.tobytes()) + chunk(b"tRNS", opacity.tobytes())
    path = png(tmp_path / "palette.png", 3, 7, 8, 3, filtered(indices), extra)
    result = doubled(path, tmp_path / "out.png")
    rgb, alpha = halved(result)
    assert (rgb == palette[indices]).all()
    assert (alpha == opacity[indices]).all()
    assert field(result, "palette") is None


def test_a_one_bit_png_is_black_and_white_at_full_range(tmp_path):
    path = png(tmp_path / "one.png", 8, 1, 1, 0, b"\0\xaa")
    with open_picture(path) as picture:
        assert picture.rgb()[0, :, 1].tolist() == [255, 0] * 4
        assert picture.info.bits == 8


def test_a_cmyk_jpeg_becomes_srgb_without_its_profile(tmp_path):
    ink = np.zeros((16, 32, 4), np.uint8)
    ink[:, 16:] = (255, 0, 0, 0)
    image = pyvips.Image.new_from_array(ink).copy(interpretation="cmyk")
    path = tmp_path / "cmyk.jpg"
    image.copy().icc_transform("cmyk", input_profile="cmyk").jpegsave(str(path), Q=95)
    assert field(path, "icc-profile-data") is not None
    with open_picture(path) as picture:
        assert "CMYK converted to sRGB" in picture.info.notes
        rgb = picture.rgb()
    assert rgb.shape == (16, 32, 3)
    assert (rgb[:, :12] > 235).all()
    red, green, blue = rgb[8, 26].astype(int)
    assert red < 60 < green < blue
    result = doubled(path, tmp_path / "out.jpg")
    assert pyvips.Image.new_from_file(str(result)).interpretation == "srgb"
    assert field(result, "icc-profile-data") is None


def rotated_jpeg(path: Path) -> np.ndarray:
    """Written lying on its side, with orientation 6, a P3 profile, a thumbnail, XMP and 300 dpi; the stored pixels."""
    y, x = np.mgrid[:16, :24]
    pixels = np.stack([8 * y, 5 * x, 4 * y + 4 * x], axis=2).astype(np.uint8)
    image = pyvips.Image.new_from_array(pixels).copy(xres=300 / 25.4, yres=300 / 25.4)
    thumbnail = image.resize(0.5).jpegsave_buffer(keep="none")
    for name, value in (("icc-profile-data", P3), ("jpeg-thumbnail-data", thumbnail), ("xmp-data", b"<x:xmpmeta/>")):
        image.set_type(pyvips.GValue.blob_type, name, value)
    image.set_type(pyvips.GValue.gint_type, "orientation", 6)
    image.set_type(pyvips.GValue.gstr_type, "exif-ifd0-Make", "maker")
    image.jpegsave(str(path), Q=100, subsample_mode="off")
    return np.asarray(pyvips.Image.new_from_file(str(path)))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".avif"])
def test_a_rotated_jpeg_stands_upright_and_keeps_its_metadata(tmp_path, suffix):
    path = tmp_path / "rotated.jpg"
    stored = rotated_jpeg(path)
    with open_picture(path) as picture:
        assert (picture.info.width, picture.info.height) == (16, 24)
        assert (picture.rgb() == np.rot90(stored, -1)).all()
    result = doubled(path, tmp_path / f"out{suffix}")
    assert field(result, "icc-profile-data") == P3
    assert field(result, "orientation") in (1, None)
    assert str(field(result, "exif-ifd0-Make")).startswith("maker (")
    assert str(field(result, "exif-ifd2-PixelXDimension")).startswith("32 (")
    assert str(field(result, "exif-ifd2-PixelYDimension")).startswith("48 (")
    assert field(result, "jpeg-thumbnail-data") is None
    assert field(result, "exif-ifd1-Compression") is None
    assert b"<x:xmpmeta/>" in field(result, "xmp-data")
    with open_picture(result) as picture:
        assert (picture.info.width, picture.info.height) == (32, 48)
        assert np.abs(picture.rgb()[::2, ::2].astype(int) - np.rot90(stored, -1)).max() < 25


def test_the_resolution_is_kept(tmp_path):
    path = tmp_path / "rotated.jpg"
    rotated_jpeg(path)
    assert field(doubled(path, tmp_path / "out.tif"), "xres") == pytest.approx(300 / 25.4, rel=1e-4)


def test_exif_that_a_tiff_cannot_keep_is_told(tmp_path):
    rotated_jpeg(tmp_path / "rotated.jpg")
    with open_picture(tmp_path / "rotated.jpg") as picture:
        assert any("EXIF" in note for note in plan_output(picture.info, tmp_path / "out.tif", 2).notes)


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (4000, 20)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_odd_sizes_round_trip(tmp_path, size, suffix):
    width, height = size
    pixels = noise(height, width, 3)
    path = png(tmp_path / "odd.png", width, height, 8, 2, filtered(pixels))
    assert (halved(doubled(path, tmp_path / f"out{suffix}"))[0] == pixels).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".avif"])
def test_black_stays_black_in_every_format(tmp_path, suffix):
    path = png(tmp_path / "black.png", 20, 30, 8, 2, filtered(np.zeros((30, 20, 3), np.uint8)))
    result = doubled(path, tmp_path / f"out{suffix}")
    with open_picture(result) as picture:
        assert picture.info.format is Format.of_suffix(result)
        assert not picture.rgb().any()


@pytest.mark.parametrize("name", sorted(name for name in mutate.originals() if name != "float.tif"))
def test_every_format_and_mode_comes_back_in_its_own(tmp_path, name):
    source_path = tmp_path / name
    source_path.write_bytes(mutate.originals()[name])
    with open_picture(source_path) as source:
        result = doubled(source_path, tmp_path / f"out{source.info.format.written_as.facts.suffixes[0]}")
        with open_picture(result) as again:
            assert again.info.format is source.info.format.written_as
            assert (again.info.bits, again.info.grey, again.info.alpha, again.info.lossless) == (
                source.info.bits,
                source.info.grey,
                source.info.alpha,
                source.info.lossless,
            )
            lossy = source.info.format.facts.quality and not source.info.lossless
            close = 25 * (257 if source.info.bits > 8 else 1) if lossy else 0
            visible = source.alpha() > 0
            difference = np.abs(again.rgb()[::2, ::2].astype(int) - source.rgb()) * visible[..., None]
            assert difference.max() <= close
            assert np.abs(again.alpha()[::2, ::2].astype(int) - source.alpha()).max() <= close


@pytest.mark.parametrize(("height", "step", "overlap"), [(25, 4, 0), (25, 7, 3), (25, 1, 1), (25, 25, 0)])
@pytest.mark.parametrize("name", ["rgba_interlaced.png", "restarts.jpg", "rgba_16.tif", "grey_alpha.png"])
def test_strips_from_top_to_bottom_are_the_whole_picture(tmp_path, name, height, step, overlap):
    path = tmp_path / name
    path.write_bytes(mutate.originals()[name])
    with open_picture(path) as picture, open_picture(path) as whole:
        for top in range(0, height, step):
            first, last = max(0, top - overlap), min(height, top + step + overlap)
            assert (picture.rgb(first, last - first) == whole.rgb()[first:last]).all()
            assert (picture.alpha(first, last - first) == whole.alpha()[first:last]).all()


def test_rows_may_be_skipped_and_asked_for_again(tmp_path):
    path = tmp_path / "rgb.png"
    path.write_bytes(mutate.originals()["rgb.png"])
    with open_picture(path) as picture:
        whole = picture.rgb()
        assert (picture.rgb(20, 3) == whole[20:23]).all()
        assert (picture.rgb(2, 3) == whole[2:5]).all()
        assert (picture.rgb(11, 14) == whole[11:]).all()


def bad_files(folder: Path) -> dict[str, Path]:
    good = png(folder / "good.png", 200, 200, 8, 2, filtered(noise(200, 200, 3)))
    files = {name: folder / f"{name}.png" for name in ("truncated", "empty", "text", "folder", "dangling", "fifo")}
    files["truncated"].write_bytes(good.read_bytes()[:60_000])
    files["empty"].touch()
    files["text"].write_text("Dear diary,\nnothing happened today.\n")
    files["folder"].mkdir()
    files["dangling"].symlink_to(folder / "nowhere.png")
    os.mkfifo(files["fifo"])
    files["bomb"] = png(folder / "bomb.png", 100_000, 100_000, 8, 2, b"")
    files["float"] = folder / "float.tif"
    files["float"].write_bytes(mutate.originals()["float.tif"])
    files["truncated_jpeg"] = folder / "cut.jpg"
    files["truncated_jpeg"].write_bytes(mutate.originals()["rgb.jpg"][:-60])
    return files


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("truncated", "damaged"),
        ("empty", "empty file"),
        ("text", "unknown content"),
        ("folder", "not a regular file"),
        ("dangling", "No such file"),
        ("fifo", "not a regular file"),
        ("bomb", "100000 x 100000"),
        ("float", "8 or 16 bit"),
        ("truncated_jpeg", "damaged"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, name, told, capfd):
    path = bad_files(tmp_path)[name]
    with pytest.raises(PictureError) as raised, open_picture(path) as picture:
        picture.rgb()
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert told in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_a_file_without_permission_is_one_clear_line(tmp_path):
    path = png(tmp_path / "a.png", 1, 1, 8, 0, b"\0\0")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user (root) may read everything")
    with pytest.raises(PictureError, match="Permission denied"):
        open_picture(path)


def test_the_pixel_limit_is_the_callers(tmp_path):
    path = png(tmp_path / "a.png", 10, 10, 8, 2, filtered(noise(10, 10, 3)))
    assert open_picture(path, max_pixels=100).rgb().shape == (10, 10, 3)
    with pytest.raises(PictureError, match="10 x 10"):
        open_picture(path, max_pixels=99)


def test_a_side_of_millions_is_refused_however_few_the_pixels(tmp_path):
    path = png(tmp_path / "a.png", 1, 2_000_000, 8, 0, b"")
    with pytest.raises(PictureError, match="1 x 2000000"):
        open_picture(path)


def test_the_format_is_by_content_whatever_the_name(tmp_path):
    path = tmp_path / "really_a.jpg"
    path.write_bytes(mutate.originals()["rgb.png"])
    assert open_picture(path).info.format is Format.PNG


def test_alpha_into_jpeg_is_refused_unless_laid_onto_a_background(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    path = png(tmp_path / "clear.png", 4, 4, 8, 6, filtered(pixels))
    with pytest.raises(PictureError, match="transparency"):
        doubled(path, tmp_path / "out.jpg")
    result = doubled(path, tmp_path / "out.jpg", Encoding(background=(255, 255, 255)))
    with open_picture(result) as picture:
        assert (picture.rgb() == 255).all()


def test_a_grey_profile_that_an_rgb_format_cannot_keep_is_told(tmp_path):
    grey = pyvips.Image.black(4, 4).copy(interpretation="b-w").icc_transform("sgrey", input_profile="sgrey")
    grey.pngsave(str(tmp_path / "grey.png"))
    with open_picture(tmp_path / "grey.png") as picture:
        assert plan_output(picture.info, tmp_path / "out.jpg", 2).notes == ()
        assert "grey ICC profile" in plan_output(picture.info, tmp_path / "out.webp", 2).notes[0]


def test_depth_that_the_asked_format_cannot_hold_is_rounded_and_told(tmp_path):
    values = np.array([0, 128, 129, 257, 65535, 65407, 32896, 1], np.uint16)
    path = png(tmp_path / "deep.png", 8, 1, 16, 0, filtered(values[None].astype(">u2")))
    with open_picture(path) as picture:
        output = plan_output(picture.info, tmp_path / "out.webp", 1, Encoding(lossless=True))
        assert output.notes == ("16-bit samples become 8-bit: WEBP holds no more",)
        write_picture(output, picture.rgb())
    with open_picture(output.path) as picture:
        assert picture.rgb()[0, :, 0].tolist() == [0, 0, 1, 1, 255, 255, 128, 0]


def test_8_bit_pixels_fill_the_range_of_a_16_bit_output(tmp_path):
    output = Output(tmp_path / "a.png", Format.PNG, 2, 1, bits=16)
    write_picture(output, np.array([[[0, 128, 255]] * 2], np.uint8))
    with open_picture(output.path) as picture:
        assert picture.rgb()[0, 0].tolist() == [0, 32896, 65535]


def test_a_side_that_the_format_cannot_hold_is_refused_before_any_work(tmp_path):
    path = png(tmp_path / "wide.png", 9000, 1, 8, 0, b"\0" + bytes(9000))
    with open_picture(path) as picture, pytest.raises(PictureError, match=r"16383.*18000 x 2"):
        plan_output(picture.info, tmp_path / "wide.webp", 2)


def test_what_is_expected_of_unknown_content_is_what_can_be_read_here(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("no picture")
    monkeypatch.setattr(formats, "find_spec", lambda package: None)
    with pytest.raises(PictureError, match=r"expected PNG, JPEG, WEBP, TIFF, AVIF, GIF$"):
        open_picture(tmp_path / "a.png")


def test_transparency_that_a_format_does_not_hold_is_told_with_the_options_that_help(tmp_path):
    info = PictureInfo(tmp_path / "a.png", Format.PNG, 8, 8, alpha=True)
    with pytest.raises(PictureError, match=r"lay it onto a colour with background=.*, or write a PNG \(format='png'"):
        plan_output(info, tmp_path / "out.jpg", 2)


@pytest.mark.parametrize("name", ["out.gif", "out.bmp", "out"])
def test_a_name_that_cannot_be_written_is_refused(tmp_path, name):
    path = png(tmp_path / "a.png", 1, 1, 8, 0, b"\0\0")
    with open_picture(path) as picture, pytest.raises(PictureError, match="cannot be written as"):
        plan_output(picture.info, tmp_path / name, 2)


def test_jpeg_quality_changes_the_size(tmp_path):
    path = png(tmp_path / "a.png", 64, 64, 8, 2, filtered(noise(64, 64, 3)))
    low = doubled(path, tmp_path / "low.jpg", Encoding(quality=30)).stat().st_size
    assert low < doubled(path, tmp_path / "high.jpg").stat().st_size / 2


def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    interrupted(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        write_picture(Output(tmp_path / "a.png", Format.PNG, 1, 1), np.zeros((1, 1, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    (tmp_path / "a.png").write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(FileError, match=r"a\.png: cannot be written") as raised:
            write_picture(Output(tmp_path / "a.png", Format.PNG, 99, 99), noise(99, 99, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.strerror(errno.EFBIG) in str(raised.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot be written"):
        write_picture(Output(tmp_path / "file" / "a.png", Format.PNG, 1, 1), np.zeros((1, 1, 3), np.uint8))


def test_missing_folders_are_made_and_long_names_written(tmp_path):
    path = tmp_path / "a" / "b" / f"{'名' * 80}.png"
    write_picture(Output(path, Format.PNG, 1, 1), np.zeros((1, 1, 3), np.uint8))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_only_leftovers_of_dead_writers_are_removed(tmp_path):
    dead, (alive, writer) = tmp_path / ".dead.png.sanrt-0123abcd.partial", locked_file(tmp_path / "alive.png")
    others = [tmp_path / name for name in ("a.png", ".other.partial", ".a.sanrt-notes.partial")]
    for path in (dead, *others):
        path.touch()
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    with writer:
        assert remove_leftovers(tmp_path) == [dead]
    assert sorted(tmp_path.iterdir()) == sorted([alive, *others])


def test_what_only_has_a_leftovers_name_is_left_alone(tmp_path):
    pipe, link, target = tmp_path / ".a.sanrt-0123abcd.partial", tmp_path / ".b.sanrt-0123abcd.partial", tmp_path / "a.png"
    os.mkfifo(pipe)
    target.touch()
    link.symlink_to(target)
    assert remove_leftovers(tmp_path) == []
    assert sorted(tmp_path.iterdir()) == sorted([pipe, link, target])


def test_a_file_that_may_not_be_replaced_is_not(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"somebody's")

    def refuse():
        assert [other.name.endswith(".partial") for other in tmp_path.iterdir() if other != path] == [True]
        raise PictureError("it appeared")

    with pytest.raises(PictureError, match="it appeared"):
        write_picture(Output(path, Format.PNG, 1, 1), np.zeros((1, 1, 3), np.uint8), None, refuse)
    assert path.read_bytes() == b"somebody's"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (33, 16), (30, 75)])
def test_tiles_of_a_scratch_picture_come_back_in_place(tmp_path, dtype, bands, size):
    width, height = size
    pixels = noise(height, width, bands, dtype=dtype)
    with ScratchPicture(width, height, bands, dtype, tmp_path) as scratch:
        assert list(tmp_path.iterdir()) == []
        for left in range(0, width, 20):
            for top in reversed(range(0, height, 20)):
                scratch.put(top, left, pixels[top : top + 20, left : left + 20])
        assert (np.asarray(scratch.image()).reshape(pixels.shape) == pixels).all()


def test_a_scratch_picture_is_written_like_an_array(tmp_path):
    rgb, alpha = noise(40, 30, 3, dtype=np.uint16), noise(40, 30, dtype=np.uint16)
    output = Output(tmp_path / "a.png", Format.PNG, 30, 40, bits=16, alpha=True)
    with (
        ScratchPicture(30, 40, 3, np.uint16, tmp_path) as scratch,
        ScratchPicture(30, 40, 1, np.uint16, tmp_path) as opacity,
    ):
        scratch.put(0, 0, rgb)
        opacity.put(0, 0, alpha[..., None])
        write_picture(output, scratch, opacity)
    with open_picture(output.path) as picture:
        assert (picture.rgb() == rgb).all()
        assert (picture.alpha() == alpha).all()


def test_tiles_that_do_not_fit_are_refused(tmp_path):
    with ScratchPicture(8, 8, 3, np.uint8, tmp_path) as scratch:
        with pytest.raises(ValueError, match="leaves"):
            scratch.put(4, 4, noise(5, 4, 3))
        with pytest.raises(ValueError, match="uint16"):
            scratch.put(0, 0, noise(4, 4, 3, dtype=np.uint16))


def test_a_scratch_picture_that_the_disk_cannot_hold_is_refused_at_once(tmp_path):
    with pytest.raises(ScratchError, match="MB free"):
        ScratchPicture(1_000_000_000, 1_000, 3, np.uint16, tmp_path)


@pytest.mark.skipif(not hasattr(host.os, "posix_fallocate"), reason="this system takes a file's space as it is written")
def test_a_scratch_picture_takes_its_space_before_the_first_tile(tmp_path):
    with ScratchPicture(8_000, 1_000, 3, np.uint8, tmp_path) as scratch:
        facts = os.fstat(scratch._file.fileno())
        assert facts.st_size > 24_000_000
        assert facts.st_blocks * 512 >= 24_000_000


def test_a_scratch_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ScratchError, match="No such file"):
        ScratchPicture(8, 8, 3, np.uint8, tmp_path / "nowhere")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (20, 400)])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_opaque_alpha_stays_exactly_opaque(dtype, shape, scale):
    opaque = np.iinfo(dtype).max
    upscaled = upscale_alpha(np.full(shape, opaque, dtype), scale)
    assert upscaled.shape == (shape[0] * scale, shape[1] * scale)
    assert upscaled.dtype == dtype
    assert (upscaled == opaque).all()


def test_alpha_edges_are_smooth_clipped_and_centred():
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:, 4:] = 255
    upscaled = upscale_alpha(alpha, 4)
    assert not upscaled[:, :6].any()
    assert (upscaled[:, -6:] == 255).all()
    row = upscaled[16].astype(int)
    assert (np.diff(row) >= 0).all()
    assert np.abs(row + row[::-1] - 255).max() <= 1
    assert len(set(row)) > 3


def refusal(path: Path, destination: Path) -> str | None:
    """Why the picture could not be read, doubled, written and read again; None if it could."""
    try:
        with open_picture(path, max_pixels=100_000) as picture:
            result = doubled(path, destination.with_suffix(picture.info.format.written_as.facts.suffixes[0]))
        with open_picture(result) as again:
            assert again.rgb().shape == (2 * picture.info.height, 2 * picture.info.width, 3)
    except PictureError as error:
        return str(error)
    return None


def test_mutated_pictures_are_read_or_refused_and_nothing_else(tmp_path, capfd):
    refusals = {}
    for name, data in mutate.mutated(300, seed=1):
        (tmp_path / name).write_bytes(data)
        refusals[name] = refusal(tmp_path / name, tmp_path / "out")
    refused = {name: told for name, told in refusals.items() if told}
    assert 10 < len(refused) < 250
    assert not any("\n" in told for told in refused.values())
    assert not [name for name in refused if "_intact_" in name and not name.endswith("float.tif")]
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("transparent", [False, True])
def test_a_gif_is_transparent_where_a_pixel_is(tmp_path, transparent):
    image = pytest.importorskip("PIL.Image", reason="needs the formats extra")
    indices = np.arange(48, dtype=np.uint8).reshape(6, 8)  # of 256 colours
    picture = image.fromarray(indices).convert("P")
    picture.putpalette(np.random.default_rng(0).integers(0, 255, 768, np.uint8).tobytes())
    picture.save(tmp_path / "a.gif", transparency=3 if transparent else 200, optimize=False)
    with open_picture(tmp_path / "a.gif") as source:
        assert source.info.alpha is transparent
        assert source.rgb().shape == (6, 8, 3)
        assert (source.alpha() == np.where(transparent & (indices == 3), 0, 255)).all()


def test_an_opaque_png_keeps_its_channel_for_transparency(tmp_path):
    rgba = np.full((6, 8, 4), 255, np.uint8)
    pyvips.Image.new_from_array(rgba).write_to_file(str(tmp_path / "a.png"))
    assert open_picture(tmp_path / "a.png").info.alpha


def test_a_video_with_a_pictures_name_is_called_one(tmp_path):
    (tmp_path / "clip.gif").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    with pytest.raises(PictureError, match=r"clip\.gif: a video with a picture's name; rename it, such as clip\.mp4$"):
        open_picture(tmp_path / "clip.gif")


@pytest.mark.parametrize(("ending", "told"), [("png", True), ("jpg", False)])
def test_a_change_of_format_is_told_only_where_it_comes_about(tmp_path, ending, told):
    pyvips.Image.black(30, 20, bands=3).copy(interpretation="srgb").write_to_file(str(tmp_path / "a.gif"))
    with open_picture(tmp_path / "a.gif") as picture:
        notes = plan_output(picture.info, tmp_path / f"a.{ending}", 2).notes
    assert ("GIF is written as PNG" in notes) == told
