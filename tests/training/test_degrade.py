"""The BI degradation against the official test pictures and against what a resampler must do."""

import numpy as np
import pytest

from training.data import picture_files, read_rgb
from training.degrade import bicubic, degrade, resize_matrix


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["Set5", "Set14"])
def test_every_official_low_resolution_picture_is_reproduced_to_the_bit(shared, name, scale):
    folder = shared / "data" / "eval" / name / f"x{scale}"
    lows = picture_files(folder / "LR")
    assert len(lows) == {"Set5": 5, "Set14": 14}[name]
    for path in lows:
        np.testing.assert_array_equal(degrade(read_rgb(folder / "HR" / path.name), scale), read_rgb(path), path.name)


@pytest.mark.parametrize("factor", [1 / 8, 1 / 4, 1 / 3, 1 / 2, 2, 3, 4, 8])
def test_weights_of_every_output_pixel_sum_to_one(factor):
    matrix = resize_matrix(24, factor)
    assert matrix.shape == (round(24 * factor), 24)
    np.testing.assert_allclose(matrix.sum(1), 1)


def test_halving_weighs_the_textbook_taps():
    taps = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
    np.testing.assert_allclose(resize_matrix(32, 0.5)[8, 13:21], taps)
    assert np.count_nonzero(resize_matrix(32, 0.5)[8]) == 8


def test_pixels_beyond_the_border_are_mirrored_edge_included():
    inner = resize_matrix(32, 0.5)[8]
    expected = np.zeros(32)
    np.add.at(expected, [2, 1, 0, 0, 1, 2, 3, 4], inner[13:21])
    np.testing.assert_allclose(resize_matrix(32, 0.5)[0], expected)


@pytest.mark.parametrize("factor", [0.25, 3])
def test_mirroring_and_transposing_commute_with_resizing(factor):
    picture = np.random.default_rng(0).integers(64, 193, (24, 36, 3), np.uint8)
    resized = bicubic(picture, factor)
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(bicubic(picture[::-1, ::-1], factor), resized[::-1, ::-1])
    # Each axis is rounded by itself, so the order of the axes may show in the last grey level.
    assert np.abs(bicubic(picture.swapaxes(0, 1), factor).swapaxes(0, 1).astype(int) - resized).max() <= 1


def test_overshoot_is_clipped_not_wrapped():
    edge = np.zeros((16, 16, 1), np.uint8)
    edge[:, 8:] = 255
    enlarged = bicubic(edge, 2)
    assert enlarged[:, :14].max() == 0
    assert enlarged[:, 18:].min() == 255
