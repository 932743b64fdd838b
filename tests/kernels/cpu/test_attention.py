"""Attention without its matrix against its formula in float64."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from sanrt.kernels.cpu import attention
from sanrt.kernels.cpu.workers import Workers
from tests.kernels.cpu.references import random


@pytest.mark.parametrize(("queries", "keys", "channels"), [(1, 1, 2), (7, 5, 4), (50, 33, 8), (12, 64, 3), (60, 1300, 4)])
@pytest.mark.parametrize("factor", [1, 30])
def test_attention_gives_what_its_formula_gives(processor, queries, keys, channels, factor):
    query, key, value = (random(n, channels, seed=n + s) for n, s in ((queries, 0), (keys, 1), (keys, 2)))
    scores = (query * np.float32(factor)).astype(np.float64) @ key.T.astype(np.float64)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    want = weights / weights.sum(1, keepdims=True) @ value
    for threads in (1, 3):
        got = attention.attention(Workers(threads), query * np.float32(factor), key, value)
        np.testing.assert_allclose(got, want, atol=2e-6 * factor)


@pytest.mark.parametrize("order", [1, -1])
def test_the_largest_score_may_come_in_any_block(order):
    query, value = np.ones((5, 2), np.float32), random(1300, 2)
    key = np.repeat(np.linspace(0, 60, 1300, dtype=np.float32)[::order, None], 2, axis=1)
    weights = np.exp((query.astype(np.float64) @ key.T) - 120)
    want = weights / weights.sum(1, keepdims=True) @ value
    np.testing.assert_allclose(attention.attention(Workers(2), query, key, value), want, atol=1e-4)


def test_attention_with_a_score_that_is_no_number_gives_none():
    query, key = random(4, 4), random(9, 4)
    key[5, 0] = np.nan
    assert np.isnan(attention.attention(Workers(1), query, key, random(9, 4))).all()
