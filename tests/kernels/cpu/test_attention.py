"""Attention without its matrix against its formula in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from sanrt.kernels.cpu import attention
from sanrt.kernels.cpu.workers import Workers
from tests.kernels.cpu.references import NARROW, random


@pytest.mark.parametrize(("queries", "keys", "channels"), [(1, 1, 2), (7, 5, 4), (50, 33, 8), (12, 64, 3), (60, 1300, 4)])
@pytest.mark.parametrize("factor", [1, 30])
def test_attention_gives_what_its_formula_gives(processor, queries, keys, channels, factor):
    query, key, value = (random(n, channels, seed=n + s) for n, s in ((queries, 0), (keys, 1), (keys, 2)))
    query *= np.float32(factor)
    for threads in (1, 3):
        got = attention.attention(Workers(threads), query, key, value)
        np.testing.assert_allclose(got, expected(query, key, value), atol=2e-6 * factor)


def expected(query, key, value):
    scores = query.astype(np.float64) @ key.T.astype(np.float64)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ value


def test_attention_gives_it_in_128_bit_vectors_of_which_there_are_32(monkeypatch):
    monkeypatch.setattr(attention, "this_processor", lambda: replace(NARROW, registers=32))
    monkeypatch.setattr(attention, "kernels", attention.kernels.__wrapped__)
    query, key, value = random(13, 4), random(1000, 4, seed=1), random(1000, 4, seed=2)
    got = attention.attention(Workers(1), query, key, value)
    np.testing.assert_allclose(got, expected(query, key, value), atol=2e-6)


def test_a_query_gets_the_same_bits_whatever_queries_are_beside_it(processor):
    factors = np.where(np.arange(37) % 5, 1, 60).astype(np.float32)[:, None]  # a few have scores that are offset
    query, key, value = random(37, 8) * factors, random(900, 8, seed=1), random(900, 8, seed=2)
    alone = [attention.attention(Workers(1), query[i : i + 1], key, value) for i in range(len(query))]
    np.testing.assert_array_equal(attention.attention(Workers(2), query, key, value), np.concatenate(alone))


def test_attention_takes_arrays_of_any_order_of_their_axes():
    arrays = random(7, 4), random(33, 4, seed=1), random(33, 4, seed=2)
    got = attention.attention(Workers(1), *map(np.asfortranarray, arrays))
    np.testing.assert_array_equal(got, attention.attention(Workers(1), *arrays))


@pytest.mark.parametrize("order", [1, -1])
def test_the_largest_score_may_come_in_any_block(order):
    query, value = np.ones((5, 2), np.float32), random(1300, 2)
    key = np.repeat(np.linspace(0, 60, 1300, dtype=np.float32)[::order, None], 2, axis=1)
    got = attention.attention(Workers(2), query, key, value)
    np.testing.assert_allclose(got, expected(query, key, value), atol=1e-4)


def test_attention_with_a_score_that_is_no_number_gives_none():
    query, key = random(4, 4), random(9, 4)
    key[5, 0] = np.nan
    assert np.isnan(attention.attention(Workers(1), query, key, random(9, 4))).all()
