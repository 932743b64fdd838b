"""PSNR against its definition."""

import numpy as np
import pytest

from sanrt.arrays import psnr


def test_psnr_of_a_known_error():
    assert psnr(np.zeros((4, 4)), np.full((4, 4), 5.1)) == pytest.approx(20 * np.log10(255 / 5.1))
    assert psnr(np.zeros(9), np.full(9, 0.1), peak=1) == pytest.approx(20)


def test_psnr_of_unsigned_pixels_does_not_wrap_around():
    low, high = np.zeros((3, 3), np.uint8), np.full((3, 3), 255, np.uint8)
    assert psnr(low, high) == psnr(high, low) == 0


def test_psnr_of_equal_arrays_is_infinite_and_of_one_with_nan_is_nan():
    assert psnr(np.ones(3), np.ones(3)) == float("inf")
    assert np.isnan(psnr(np.ones(3), np.array([1, 1, np.nan])))
