"""Tile arithmetic: cover everything, one size, weights that sum to one."""

import itertools

import numpy as np
import pytest

from sanrt.geometry import Box, TileAxis, pad, padded_side


@pytest.mark.parametrize("side", [1, 5, 8, 15, 16, 17, 63, 64, 65, 100, 127, 1000])
@pytest.mark.parametrize(("limit", "overlap"), [(16, 0), (16, 8), (64, 5), (64, 32)])
def test_tiles_of_one_size_cover_a_side_and_share_the_overlap(side, limit, overlap):
    axis = TileAxis(side, limit, overlap)
    starts = axis.starts
    assert starts[0] == 0
    assert starts[-1] + axis.tile == side
    assert axis.tile == min(limit, side)
    for before, after in itertools.pairwise(starts):
        assert 0 < after - before <= axis.tile - overlap


def test_no_tile_is_superfluous():
    assert TileAxis(100, 64, 28).starts == [0, 36]
    assert TileAxis(101, 64, 28).starts == [0, 36, 37]
    assert TileAxis(64, 64, 28).starts == [0]


@pytest.mark.parametrize("side", [16, 17, 40, 129])
@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("overlap", [0, 1, 8])
def test_weights_sum_to_one_everywhere_and_are_never_negative(side, scale, overlap):
    axis = TileAxis(side, 16, overlap)
    total = np.zeros(scale * side)
    for start, weights in zip(axis.starts, axis.weights(scale), strict=True):
        assert weights.shape == (scale * axis.tile,)
        assert (weights >= 0).all()
        total[scale * start :][: len(weights)] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_weights_fade_over_the_overlap_and_are_one_where_a_tile_is_alone():
    first, second = TileAxis(24, 16, 8).weights(2)
    assert (first[:16] == 1).all()
    assert (np.diff(first[16:]) < 0).all()
    np.testing.assert_allclose(first[16:], second[:16][::-1], atol=1e-6)
    assert first[16] > 0.98
    assert first[-1] < 0.02


@pytest.mark.parametrize(("side", "expected"), [(1, 8), (7, 8), (8, 8), (9, 12), (12, 12)])
def test_sides_grow_to_the_minimum_and_the_multiple(side, expected):
    assert padded_side(side, min_side=5, multiple=4) == expected


def test_padding_repeats_the_last_row_and_column():
    x = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
    y = pad(x, min_side=5, multiple=1)
    assert y.shape == (1, 1, 5, 5)
    assert np.array_equal(y[..., :3, :4], x)
    assert np.array_equal(y[0, 0, 3:, :4], np.stack([x[0, 0, 2]] * 2))
    assert np.array_equal(y[0, 0, :3, 4], x[0, 0, :, 3])


@pytest.mark.parametrize(
    ("box", "middle"),
    [(Box(0, 0, 10, 7), Box(3, 1, 7, 5)), (Box(2, 3, 5, 30), Box(2, 14, 5, 18)), (Box(1, 1, 3, 3), Box(1, 1, 3, 3))],
)
def test_the_middle_of_a_box_is_cut_only_where_it_is_too_large(box, middle):
    assert box.middle(4) == middle
