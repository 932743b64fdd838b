"""Samples of video frames and RGB: held against H.273 written out for one pixel after the other, and against FFmpeg."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from sanrt.runtime.video.frames import (
    BT709,
    BT2020,
    SMPTE170M,
    SMPTE240M,
    WEIGHTS,
    ColourTags,
    Conversion,
    PixelFormat,
    frame_of,
    guessed_matrix,
    planes_of,
)

av = pytest.importorskip("av")


def samples(rgb, matrix, full, bits) -> list[int]:
    """Y, Cb and Cr of one pixel, in exact arithmetic."""
    most, step = (1 << bits) - 1, 1 << (bits - 8)
    red, blue = (Fraction(str(weight)) for weight in WEIGHTS[matrix])
    r, g, b = (Fraction(int(value), 255 if bits == 8 else 65535) for value in rgb)
    y = red * r + (1 - red - blue) * g + blue * b
    chroma = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    exact = (
        [most * y, *(most * c + 128 * step for c in chroma)]
        if full
        else [16 * step + 219 * step * y, *(128 * step + 224 * step * c for c in chroma)]
    )
    return [min(most, max(0, int(value + Fraction(1, 2)))) for value in exact]


@pytest.mark.parametrize(
    ("matrix", "full", "bits"), [*product((BT709, SMPTE170M, SMPTE240M, BT2020), (False, True), (8, 10, 12))]
)
def test_samples_are_the_nearest_to_the_exact_ones(matrix, full, bits):
    rgb = np.random.default_rng(bits).integers(0, 256 if bits == 8 else 65536, (6, 7, 3))
    rgb = rgb.astype(np.uint8 if bits == 8 else np.uint16)
    planes = Conversion(PixelFormat(bits, (1, 1)), matrix, full).from_picture(rgb)
    wanted = [samples(pixel, matrix, full, bits) for pixel in rgb.reshape(-1, 3)]
    found = np.stack(planes, axis=2).reshape(-1, 3)
    assert np.abs(found.astype(int) - wanted).max() <= 1  # at a half, float32 may round the other way
    assert (found == wanted).mean() > 0.99


@pytest.mark.parametrize(("matrix", "full"), [*product((BT709, SMPTE170M, BT2020), (False, True))])
@pytest.mark.parametrize("bits", [8, 10])
def test_a_picture_comes_back_within_a_step(matrix, full, bits):
    rgb = np.random.default_rng(0).integers(0, 256 if bits == 8 else 65536, (70, 9, 3))
    rgb = rgb.astype(np.uint8 if bits == 8 else np.uint16)
    conversion = Conversion(PixelFormat(bits, (1, 1)), matrix, full)
    back = conversion.to_rgb(conversion.from_picture(rgb)).astype(int)
    step = 1 if bits == 8 else 64
    assert np.abs(back - rgb).max() <= 2.2 * step
    again = conversion.from_picture(back.astype(rgb.dtype))
    assert all((a == b).mean() > 0.85 for a, b in zip(again, conversion.from_picture(rgb), strict=True))


@pytest.mark.parametrize("name", ["yuv420p", "yuv422p", "yuv444p", "yuv411p", "yuv440p", "yuv420p10le", "gray", "gray10le"])
def test_a_plain_colour_survives_any_subsampling(name):
    form = PixelFormat.of(av.VideoFormat(name))
    assert form.name == name
    grey = name.startswith("gray")
    colour = [90] * 3 if grey else [200, 30, 90]
    rgb = np.full((67, 131, 3), colour, np.uint8 if form.bits == 8 else np.uint16) * (1 if form.bits == 8 else 257)
    conversion = Conversion(form, BT709, False)
    planes = conversion.from_picture(rgb)
    frame = frame_of(planes, form, ColourTags())
    assert [plane.shape for plane in planes] == [(plane.height, plane.width) for plane in frame.planes]
    assert all(np.array_equal(a, b) for a, b in zip(planes, planes_of(frame, form), strict=True))
    assert np.abs(conversion.to_rgb(planes).astype(int) - rgb).max() <= (1 if form.bits == 8 else 64)


@pytest.mark.parametrize("name", ["rgb24", "bgr0", "gbrp", "gbrp10le", "gbrp16le"])
def test_rgb_is_kept_as_it_is(name):
    form = PixelFormat.of(av.VideoFormat(name))
    assert form.rgb
    rgb = np.random.default_rng(1).integers(0, 1 << form.bits, (5, 6, 3)).astype(form.dtype)
    wide = rgb if form.bits in (8, 16) else np.rint(rgb * (65535 / 1023)).astype(np.uint16)
    conversion = Conversion(form, BT709, True)
    frame = frame_of(conversion.from_picture(wide), form, ColourTags(0, 2))
    frame = frame if name == form.name else frame.reformat(format=name)
    assert np.array_equal(conversion.to_rgb(planes_of(frame, form)), wide)


def test_chroma_lies_on_the_left_pixels_unless_it_is_centred():
    plane = np.array([[0, 100, 200]], np.uint8)
    planes = [np.full((1, 6), 128, np.uint8), plane, np.full((1, 3), 128, np.uint8)]

    def blue(centred):
        return Conversion(PixelFormat(8, (2, 1)), BT709, True, centred).to_rgb(planes)[0, :, 2].tolist()

    exact = 128 + 1.8556 * (np.array([0, 50, 100, 150, 200, 200]) - 128)
    assert blue(False) == np.clip(np.rint(exact), 0, 255).tolist()
    exact = 128 + 1.8556 * (np.array([0, 25, 75, 125, 175, 200]) - 128)
    assert blue(True) == np.clip(np.rint(exact), 0, 255).tolist()


def test_a_slope_keeps_its_place_through_subsampling():
    form = PixelFormat(8, (2, 2))
    ramp = np.linspace(60, 180, 64)
    rgb = np.stack([ramp + 20, ramp, 255 - ramp], axis=1)[None].repeat(64, 0)
    rgb = np.rint(rgb).astype(np.uint8)
    for centred in (False, True):
        conversion = Conversion(form, BT709, False, centred)
        back = conversion.to_rgb(conversion.from_picture(rgb)).astype(int)
        assert np.abs(back - rgb)[:, 2:-2].max() <= 3  # a place half a pixel off would make it 4 and more


def test_players_guess_the_matrix_by_the_size():
    assert guessed_matrix(720, 576) == SMPTE170M
    assert guessed_matrix(1280, 720) == guessed_matrix(400, 577) == BT709


def test_transparency_and_floats_are_no_formats_of_ours():
    assert PixelFormat.of(av.VideoFormat("yuva420p")) is None
    assert PixelFormat.of(av.VideoFormat("bgra")) is None
    assert PixelFormat.of(av.VideoFormat("gbrpf32le")) is None
    assert PixelFormat.of(av.VideoFormat("nv12")).name == "yuv420p"
    assert PixelFormat.of(av.VideoFormat("p010le")).name == "yuv420p10le"
