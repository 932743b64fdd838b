"""softmax(q k^T) v on the CPU without the matrix of scores: section 3.2 of the paper, formula 4, scores not scaled."""

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

TOGETHER = 3
"""Queries that share each read of the keys and values."""
BLOCK = 512
"""Keys whose scores are kept, in a core's first cache, until their largest is known."""
BATCH = 16
"""Groups of queries to which a block of keys is shown before the next one."""
LOWEST = -3e38
"""Below every score that is a number."""
LEAST_EXPONENT = -125.0
"""2 to the power of less is hardly a normal float32; it counts as this, also where there is no key."""
DEGREE = 5
"""Of the polynomial for 2^x, 0 <= x < 1: its error is that of float32's own rounding."""
SERIES = Chebyshev.interpolate(np.exp2, DEGREE, domain=[0, 1]).convert(kind=Polynomial).coef.tolist()


def attention(workers: Workers, query: Array, key: Array, value: Array) -> Array:
    """softmax(query key^T) value: query (n, d), key and value (m, d), all float32 -> (n, d)."""
    n, channels = query.shape
    groups = -(-n // TOGETHER)
    padded = np.zeros((groups * TOGETHER, channels), np.float32)
    padded[:n] = query * np.float32(1 / np.log(2))
    lanes = this_processor().lanes
    keys = np.zeros((channels, -(-len(key) // lanes) * lanes), np.float32)
    values, hidden = np.zeros_like(keys), np.zeros(keys.shape[1], np.float32)
    keys[:, : len(key)], values[:, : len(key)] = key.T, value.T
    hidden[len(key) :] = -np.inf
    out = np.empty_like(padded)
    kernel, arrays = kernels(channels)["attend"], (padded, keys, values, hidden, out, np.zeros(1, np.int64))

    def work(_: int) -> None:
        held = workers.buffer("scores", TOGETHER * (BLOCK + BATCH * (2 + channels) * this_processor().lanes))
        kernel(*(array.ctypes.data for array in (*arrays, held)), keys.shape[1], groups)

    workers.run(work)
    return out[:n]


@cache
def kernels(channels: int) -> dict[str, Callable[..., None]]:
    """The kernel for so many inner channels, compiled once per process."""
    module = Module(this_processor())
    write_attend(module, channels)
    return module.compile()


@dataclass(frozen=True)
class Scratch:
    """A thread's memory: the scores of a block of keys, then the shifts and sums of each group of queries."""

    code: Code
    start: ir.Value
    channels: int

    @property
    def sums(self) -> int:
        """Of a query: each channel's, and the weights'."""
        return self.channels + 1

    @property
    def state(self) -> int:
        """Vectors of a group: its queries' shifts, then their sums."""
        return TOGETHER * (1 + self.sums)

    def score(self, r: int, position: ir.Value) -> ir.Value:
        """Where a query's scores, and then its weights, are kept."""
        return self.code.at(self.start, position, self.code.mul(self.code.index(BLOCK), self.code.index(r)))

    def kept(self, group: ir.Value, number: int) -> ir.Value:
        """Where a vector of a group's state is kept."""
        begin = self.code.mul(group, self.code.index(self.state * self.code.lanes))
        return self.code.at(self.start, begin, self.code.index(number * self.code.lanes + TOGETHER * BLOCK))


def write_attend(module: Module, channels: int) -> None:
    """Groups of queries; `hidden` is added to the scores: 0, or -inf where there is no key.

    Keys are taken in blocks, each lane with a softmax of its own whose shift is the largest score so far (Milakov and
    Gimelshein, "Online normalizer calculation for softmax", 2018); the lanes are joined at the end. Scores are of base 2.
    """
    with module.function("attend", 7, 2) as (function, code):
        query, key, value, hidden, out, counter, held, keys, groups = function.args
        scratch = Scratch(code, held, channels)
        with code.shared_loop(counter, groups, BATCH) as batch:
            here = code.smallest(code.sub(groups, batch), code.index(BATCH))
            with code.loop(here) as (group, _):
                for number in range(scratch.state):
                    code.write(code.constant(LOWEST if number < TOGETHER else 0), scratch.kept(group, number))
            with code.loop(keys, BLOCK) as (first, _), code.loop(here) as (group, _):
                count = code.smallest(code.sub(keys, first), code.index(BLOCK))
                queries = code.at(query, code.mul(code.add(batch, group), code.index(TOGETHER * channels)))
                before = [code.read(scratch.kept(group, r)) for r in range(TOGETHER)]
                largest = keep_scores(scratch, queries, key, hidden, before, first, count, keys)
                keep_weights(scratch, largest, count)
                add_values(scratch, group, value, before, largest, first, count, keys)
            with code.loop(here) as (group, _):
                start = code.mul(code.add(batch, group), code.index(TOGETHER * channels))
                join_lanes(scratch, group, code.at(out, start))


def keep_scores(
    scratch: Scratch,
    query: ir.Value,
    key: ir.Value,
    hidden: ir.Value,
    before: list[ir.Value],
    first: ir.Value,
    count: ir.Value,
    keys: ir.Value,
) -> list[ir.Value]:
    """The scores of a block; the largest so far, lane by lane."""
    code, channels = scratch.code, scratch.channels
    queries = [
        [code.spread(code.load(code.at(query, code.index(r * channels + c)))) for c in range(channels)]
        for r in range(TOGETHER)
    ]
    with code.loop(count, code.lanes, carried=before) as (position, largest):
        where = code.add(first, position)
        scores = [code.read(code.at(hidden, where))] * TOGETHER
        for c in range(channels):
            factor = code.read(code.at(key, where, code.mul(keys, code.index(c))))
            scores = [code.multiply_add(q[c], factor, s) for q, s in zip(queries, scores, strict=True)]
        largest[:] = map(code.largest, largest, scores)
        for r, score in enumerate(scores):
            code.write(score, scratch.score(r, position))
    found: list[ir.Value] = largest
    return found


def keep_weights(scratch: Scratch, shifts: list[ir.Value], count: ir.Value) -> None:
    """Scores become weights."""
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
    """The block's weighted values onto the sums, which are scaled from the shifts before to those now."""
    code, channels, each = scratch.code, scratch.channels, scratch.sums
    scaled = []
    for r in range(TOGETHER):
        factor = power_of_two(code, code.fsub(before[r], shifts[r]))
        code.write(shifts[r], scratch.kept(group, r))
        scaled += [code.fmul(factor, code.read(scratch.kept(group, TOGETHER + r * each + c))) for c in range(each)]
    with code.loop(count, code.lanes, carried=scaled) as (position, sums):
        weights = [code.read(scratch.score(r, position)) for r in range(TOGETHER)]
        for c in range(channels):
            factor = code.read(code.at(value, code.add(first, position), code.mul(keys, code.index(c))))
            for r, weight in enumerate(weights):
                sums[r * each + c] = code.multiply_add(weight, factor, sums[r * each + c])
        for r, weight in enumerate(weights):
            sums[r * each + channels] = code.fadd(sums[r * each + channels], weight)
    for number, done in enumerate(sums, TOGETHER):
        code.write(done, scratch.kept(group, number))


def join_lanes(scratch: Scratch, group: ir.Value, out: ir.Value) -> None:
    """Each query's result: its lanes brought to one shift, added up, and divided by the sum of the weights."""
    code, each = scratch.code, scratch.sums
    for r in range(TOGETHER):
        shift = code.read(scratch.kept(group, r))
        factor = power_of_two(code, code.fsub(shift, code.spread(code.folded(code.largest, shift))))
        sums = [code.read(scratch.kept(group, TOGETHER + r * each + c)) for c in range(each)]
        *parts, total = (code.folded(code.fadd, code.fmul(factor, lanes)) for lanes in sums)
        for c, part in enumerate(parts):
            code.store(code.fdiv(part, total), code.at(out, code.index(r * scratch.channels + c)))


def power_of_two(code: Code, x: ir.Value) -> ir.Value:
    """2^x of x <= 0: a short polynomial of x - floor(x), times 2^floor(x)."""
    x = code.largest(x, code.constant(LEAST_EXPONENT))
    rest, (*others, last) = code.fraction(x), map(code.constant, SERIES)
    for factor in reversed(others):
        last = code.multiply_add(last, rest, factor)
    return code.scaled_by_power_of_two(last, x)
