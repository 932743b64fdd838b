"""The one comparison."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sanrt.errors import ParityError
from sanrt.export.parity import Tolerance, compare, require, worst


def test_differences_are_measured_on_the_255_scale_whatever_the_value_range():
    zero, one = np.zeros((1, 3, 4, 4), np.float32), np.zeros((1, 3, 4, 4), np.float32)
    one[0, 0, 0, 0] = 1.0
    difference = compare(zero, one, value_range=1.0)
    assert difference.max_abs == 255
    assert difference.mean_abs == pytest.approx(255 / 48)
    assert difference.psnr == pytest.approx(10 * math.log10(48))


def test_equal_outputs_have_infinite_psnr_and_json_without_infinity():
    difference = compare(np.ones((1, 3, 2, 2)), np.ones((1, 3, 2, 2)))
    assert difference.psnr == math.inf
    assert difference.to_json() == {"max_abs": 0.0, "mean_abs": 0.0, "psnr": None}


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_values_are_never_within_a_tolerance(broken):
    fine, bad = np.zeros((1, 3, 2, 2)), np.zeros((1, 3, 2, 2))
    bad[0, 1, 1, 0] = broken
    summary = worst([compare(fine, fine), compare(fine, bad), compare(fine, fine)])
    assert not summary.within(Tolerance(1e30, 0.0, 1.0))
    with pytest.raises(ParityError, match=r"the model: differs .* by (nan|inf) of 255"):
        require(summary, Tolerance(1e30, 0.0, 1.0), "the model", "do something")


def test_outputs_of_different_shapes_are_not_broadcast():
    with pytest.raises(ParityError, match="shapes"):
        compare(np.zeros((1, 3, 2, 2)), np.zeros((1, 1, 2, 2)))
