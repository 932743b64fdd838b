"""The rule behind validate's tolerances."""

import pytest

from benchmarks.tolerances import round_up
from sanrt.export.parity import TOLERANCES


@pytest.mark.parametrize(
    ("measured", "expected"), [(0.9, 1.0), (1.01, 2.0), (2.6, 5.0), (6.0, 10.0), (116, 200), (-1, 0.001)]
)
def test_figures_are_rounded_up_to_one_two_or_five(measured, expected):
    assert round_up(measured) == expected


def test_every_tolerance_in_the_table_is_one_that_the_rule_can_give():
    for tolerance in TOLERANCES.values():
        for figure in (tolerance.max_abs, tolerance.y_psnr_drop):
            assert round_up(0.9 * figure) == figure
