"""softmax(q k^T) v on the CPU without the matrix of scores: section 3.2 of the paper, formula 4, scores not scaled.

A region of a large picture has tens of thousands of queries and a quarter as many keys, over a few inner channels: the
matrix would be gigabytes. Keys go through in blocks, with a running softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from llvmlite import ir
from numpy.polynomial import Chebyshev, Polynomial

from sanrt.arrays import Array
from sanrt.kernels.cpu.ir import Code, Module, this_processor
from sanrt.kernels.cpu.workers import Workers

GROUP_QUERIES = 3
"""Queries whose scores are computed together, so that each key and value is loaded once for all of them."""
BLOCK_KEYS = 512
"""Keys in a block: the scores of a group of queries with them stay in a core's L1 cache until their maximum is known."""
BATCH_GROUPS = 16
"""Groups of queries that go over a block of keys before the next block, which is thus loaded for all of them at once."""
LOWEST_SCORE = -3e38
"""The running maximum before the first key. Finite, since -inf minus -inf would be NaN."""
MIN_EXPONENT = -125.0
"""Clamp for exponents of 2: with less the result would be no normal float32, and -inf (no key) has no fraction."""
EXP2_DEGREE = 5
"""Degree of the polynomial for 2^x on 0 <= x < 1: the lowest whose error is about that of float32's rounding."""
EXP2_COEFFICIENTS = Chebyshev.interpolate(np.exp2, EXP2_DEGREE, domain=[0, 1]).convert(kind=Polynomial).coef.tolist()


def attention(workers: Workers, query: Array, key: Array, value: Array) -> Array:
    """softmax(query key^T) value: query (n, d), key and value (m, d), all float32 -> (n, d)."""
    n, channels = query.shape
    groups = -(-n // GROUP_QUERIES)
    padded = np.zeros((groups * GROUP_QUERIES, channels), np.float32)
    # exp(s) is 2^(s / log 2), and a power of 2 is the cheaper one: scaled here, it costs nothing per score.
    padded[:n] = query * np.float32(1 / np.log(2))
    lanes = this_processor().lanes
    # Transposed: a vector holds one channel of many keys, so that no score is a sum across lanes.
    keys = np.zeros((channels, -(-len(key) // lanes) * lanes), np.float32)
    values, mask = np.zeros_like(keys), np.zeros(keys.shape[1], np.float32)
    keys[:, : len(key)], values[:, : len(key)] = key.T, value.T
    mask[len(key) :] = -np.inf  # padding to whole vectors: zeros would be keys like any other
    out = np.empty_like(padded)
    kernel, arrays = kernels(channels)["attend"], (padded, keys, values, mask, out, np.zeros(1, np.int64))

    def work(_: int) -> None:
        memory = workers.buffer(
            "scores", GROUP_QUERIES * (BLOCK_KEYS + BATCH_GROUPS * (2 + channels) * this_processor().lanes)
        )
        kernel(*(array.ctypes.data for array in (*arrays, memory)), keys.shape[1], groups)

    workers.run(work)
    return out[:n]


@cache
def kernels(channels: int) -> dict[str, Callable[..., None]]:
    """The kernel for a number of inner channels, compiled once per process."""
    module = Module(this_processor())
    write_attend(module, channels)
    return module.compile()


@dataclass(frozen=True)
class Scratch:
    """Layout of a thread's scratch memory: a group's scores with a block of keys, then the running state of each group."""

    code: Code
    start: ir.Value
    channels: int

    @property
    def sums(self) -> int:
        """Running sums of a query: weighted values by channel, then the weights."""
        return self.channels + 1

    @property
    def state(self) -> int:
        """Vectors in the state of a group: each query's shift (its largest score so far), then each query's sums."""
        return GROUP_QUERIES * (1 + self.sums)

    def score(self, r: int, position: ir.Value) -> ir.Value:
        """Address of query r's score with the key at a position in the block; its weight replaces it later."""
        return self.code.at(self.start, position, self.code.mul(self.code.index(BLOCK_KEYS), self.code.index(r)))

    def state_vector(self, group: ir.Value, number: int) -> ir.Value:
        """Address of a vector of a group's state."""
        begin = self.code.mul(group, self.code.index(self.state * self.code.lanes))
        return self.code.at(self.start, begin, self.code.index(number * self.code.lanes + GROUP_QUERIES * BLOCK_KEYS))


def write_attend(module: Module, channels: int) -> None:
    """The kernel of one thread, which takes batches of groups of queries; `mask` (0, -inf for padding) is added to scores.

    Keys are taken in blocks, each lane with a running softmax of its own whose shift is the largest score so far (Milakov
    and Gimelshein, "Online normalizer calculation for softmax", 2018). Lanes are merged once at the end: a maximum across
    the lanes for each block would cost more than its arithmetic. Scores are in units of log 2.
    """
    with module.function("attend", 7, 2) as (function, code):
        query, key, value, mask, out, counter, memory, keys, groups = function.args
        scratch = Scratch(code, memory, channels)
        with code.shared_loop(counter, groups, BATCH_GROUPS) as batch:
            here = code.minimum(code.sub(groups, batch), code.index(BATCH_GROUPS))
            with code.loop(here) as (group, _):
                for number in range(scratch.state):
                    code.write(
                        code.constant(LOWEST_SCORE if number < GROUP_QUERIES else 0), scratch.state_vector(group, number)
                    )
            with code.loop(keys, BLOCK_KEYS) as (first, _), code.loop(here) as (group, _):
                count = code.minimum(code.sub(keys, first), code.index(BLOCK_KEYS))
                queries = code.at(query, code.mul(code.add(batch, group), code.index(GROUP_QUERIES * channels)))
                before = [code.read(scratch.state_vector(group, r)) for r in range(GROUP_QUERIES)]
                largest = keep_scores(scratch, queries, key, mask, before, first, count, keys)
                keep_weights(scratch, largest, count)
                add_values(scratch, group, value, before, largest, first, count, keys)
            with code.loop(here) as (group, _):
                start = code.mul(code.add(batch, group), code.index(GROUP_QUERIES * channels))
                merge_lanes(scratch, group, code.at(out, start))


def keep_scores(
    scratch: Scratch,
    query: ir.Value,
    key: ir.Value,
    mask: ir.Value,
    before: list[ir.Value],
    first: ir.Value,
    count: ir.Value,
    keys: ir.Value,
) -> list[ir.Value]:
    """Store a group's scores with a block of keys; returns each query's largest score so far, lane by lane."""
    code, channels = scratch.code, scratch.channels
    # Broadcast before the loop, to stay in registers where there are enough; a vector of keys is loaded once for all
    # queries.
    queries = [
        [code.broadcast(code.load(code.at(query, code.index(r * channels + c)))) for c in range(channels)]
        for r in range(GROUP_QUERIES)
    ]
    with code.loop(count, code.lanes, carried=before) as (position, largest):
        where = code.add(first, position)
        scores = [code.read(code.at(mask, where))] * GROUP_QUERIES
        for c in range(channels):
            factor = code.read(code.at(key, where, code.mul(keys, code.index(c))))
            scores = [code.multiply_add(q[c], factor, s) for q, s in zip(queries, scores, strict=True)]
        largest[:] = map(code.maximum, largest, scores)
        for r, score in enumerate(scores):
            code.write(score, scratch.score(r, position))
    found: list[ir.Value] = largest
    return found


def keep_weights(scratch: Scratch, shifts: list[ir.Value], count: ir.Value) -> None:
    """Replace the scores of a block by weights 2^(score - shift)."""
    code = scratch.code
    with code.loop(count, code.lanes) as (position, _):
        for r, shift in enumerate(shifts):
            place = scratch.score(r, position)
            code.write(power_of_two(code, code.fsub(code.read(place), shift)), place)


def add_values(
    scratch: Scratch,
    group: ir.Value,
    value: ir.Value,
    before: list[ir.Value],
    shifts: list[ir.Value],
    first: ir.Value,
    count: ir.Value,
    keys: ir.Value,
) -> None:
    """Rescale the running sums from the shifts before to the present ones, and add a block's weighted values."""
    code, channels, each = scratch.code, scratch.channels, scratch.sums
    # Before the first block the shift is LOWEST_SCORE, so the factor is tiny, and the sums that it scales are zero.
    scaled = []
    for r in range(GROUP_QUERIES):
        factor = power_of_two(code, code.fsub(before[r], shifts[r]))
        code.write(shifts[r], scratch.state_vector(group, r))
        scaled += [
            code.fmul(factor, code.read(scratch.state_vector(group, GROUP_QUERIES + r * each + c))) for c in range(each)
        ]
    with code.loop(count, code.lanes, carried=scaled) as (position, sums):
        weights = [code.read(scratch.score(r, position)) for r in range(GROUP_QUERIES)]
        for c in range(channels):
            factor = code.read(code.at(value, code.add(first, position), code.mul(keys, code.index(c))))
            for r, weight in enumerate(weights):
                sums[r * each + c] = code.multiply_add(weight, factor, sums[r * each + c])
        for r, weight in enumerate(weights):
            sums[r * each + channels] = code.fadd(sums[r * each + channels], weight)
    for number, done in enumerate(sums, GROUP_QUERIES):
        code.write(done, scratch.state_vector(group, number))


def merge_lanes(scratch: Scratch, group: ir.Value, out: ir.Value) -> None:
    """Write a group's results: lanes brought to one shift, added up, and divided by the sum of the weights."""
    code, each = scratch.code, scratch.sums
    for r in range(GROUP_QUERIES):
        shift = code.read(scratch.state_vector(group, r))
        factor = power_of_two(code, code.fsub(shift, code.broadcast(code.reduced(code.maximum, shift))))
        sums = [code.read(scratch.state_vector(group, GROUP_QUERIES + r * each + c)) for c in range(each)]
        *parts, total = (code.reduced(code.fadd, code.fmul(factor, lanes)) for lanes in sums)
        for c, part in enumerate(parts):
            code.store(code.fdiv(part, total), code.at(out, code.index(r * scratch.channels + c)))


def power_of_two(code: Code, x: ir.Value) -> ir.Value:
    """2^x for x <= 0: a polynomial of x - floor(x), times 2^floor(x)."""
    # x is the first operand, so NaN passes the clamp: a picture's NaN shows in its result.
    x = code.maximum(x, code.constant(MIN_EXPONENT))
    rest, (*others, last) = code.fraction(x), map(code.constant, EXP2_COEFFICIENTS)
    for factor in reversed(others):
        last = code.multiply_add(last, rest, factor)
    return code.scaled_by_power_of_two(last, x)
