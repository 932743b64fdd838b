"""softmax(q k^T) v on the CPU without the matrix of scores: section 3.2 of the paper, formula 4, scores not scaled."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from sanrt.kernels.llvm import Code, Module, this_processor
from sanrt.kernels.threads import Workers

Array = npt.NDArray[np.float32]

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
DEGREE = 6
"""Of the series of 2^x, exact to float32 within half of 0."""
SERIES = [math.log(2) ** n / math.factorial(n) for n in range(DEGREE + 1)]


def attention(workers: Workers, query: Array, key: Array, value: Array) -> Array:
    """softmax(query key^T) value: query (n, d), key and value (m, d), all float32 -> (n, d)."""
    n, channels = query.shape
    groups = -(-n // TOGETHER)
    padded = np.zeros((groups * TOGETHER, channels), np.float32)
    padded[:n] = query * np.float32(1 / math.log(2))
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


def write_attend(module: Module, channels: int) -> None:
    """Groups of queries; `hidden` is added to the scores: 0, or -inf where there is no key.

    Keys are taken in blocks, each lane with a softmax of its own whose shift is the largest score so far (Milakov and
    Gimelshein, "Online normalizer calculation for softmax", 2018); the lanes are joined at the end. Scores are of base 2.
    """
    sums_of = channels + 1  # of a query: each channel's, and the weights'
    state = TOGETHER * (1 + sums_of)
    with module.function("attend", 7, 2) as (function, code):
        query, key, value, hidden, out, counter, held, keys, groups = function.args
        width = code.index(BLOCK)

        def at(array: ir.Value, row: int, position: ir.Value, stride: ir.Value) -> ir.Value:
            return code.at(array, position, code.mul(stride, code.index(row)))

        def state_at(group: ir.Value, number: int) -> ir.Value:
            begin = code.mul(group, code.index(state * code.lanes))
            return code.at(held, begin, code.index(number * code.lanes + TOGETHER * BLOCK))

        with code.shared_loop(counter, groups, BATCH) as batch:
            here = code.smallest(code.sub(groups, batch), code.index(BATCH))
            with code.loop(here) as (group, _):
                for number in range(state):
                    code.write(code.constant(LOWEST if number < TOGETHER else 0), state_at(group, number))
            with code.loop(keys, BLOCK) as (first, _), code.loop(here) as (group, _):
                count = code.smallest(code.sub(keys, first), width)
                before = [code.read(state_at(group, number)) for number in range(TOGETHER)]
                start = code.mul(code.add(batch, group), code.index(TOGETHER * channels))
                queries = [
                    [code.spread(code.load(code.at(query, start, code.index(r * channels + c)))) for c in range(channels)]
                    for r in range(TOGETHER)
                ]
                with code.loop(count, code.lanes, carried=before) as (position, largest):
                    where = code.add(first, position)
                    scores = [code.read(code.at(hidden, where))] * TOGETHER
                    for c in range(channels):
                        factor = code.read(at(key, c, where, keys))
                        scores = [code.multiply_add(q[c], factor, s) for q, s in zip(queries, scores, strict=True)]
                    largest[:] = map(code.largest, largest, scores)
                    for r, score in enumerate(scores):
                        code.write(score, at(held, r, position, width))
                with code.loop(count, code.lanes) as (position, _):
                    for r, shift in enumerate(largest):
                        place = at(held, r, position, width)
                        code.write(power_of_two(code, code.fsub(code.read(place), shift)), place)
                scaled = []
                for r in range(TOGETHER):
                    factor = power_of_two(code, code.fsub(before[r], largest[r]))
                    code.write(largest[r], state_at(group, r))
                    scaled += [
                        code.fmul(factor, code.read(state_at(group, TOGETHER + r * sums_of + c))) for c in range(sums_of)
                    ]
                with code.loop(count, code.lanes, carried=scaled) as (position, sums):
                    weights = [code.read(at(held, r, position, width)) for r in range(TOGETHER)]
                    for c in range(channels):
                        factor = code.read(at(value, c, code.add(first, position), keys))
                        for r, weight in enumerate(weights):
                            sums[r * sums_of + c] = code.multiply_add(weight, factor, sums[r * sums_of + c])
                    for r, weight in enumerate(weights):
                        sums[r * sums_of + channels] = code.fadd(sums[r * sums_of + channels], weight)
                for number, each in enumerate(sums, TOGETHER):
                    code.write(each, state_at(group, number))
            with code.loop(here) as (group, _):
                start = code.mul(code.add(batch, group), code.index(TOGETHER * channels))
                for r in range(TOGETHER):
                    shift = code.read(state_at(group, r))
                    factor = power_of_two(code, code.fsub(shift, code.spread(code.folded(code.largest, shift))))
                    sums = [code.read(state_at(group, TOGETHER + r * sums_of + c)) for c in range(sums_of)]
                    *parts, total = (code.folded(code.fadd, code.fmul(factor, each)) for each in sums)
                    for c, part in enumerate(parts):
                        code.store(code.fdiv(part, total), code.at(out, start, code.index(r * channels + c)))


def power_of_two(code: Code, x: ir.Value) -> ir.Value:
    """2^x of x <= 0: 2^n times a short series of what is left."""
    x = code.largest(x, code.constant(LEAST_EXPONENT))
    n = code.call(code.intrinsic("rint", 1), [x])
    rest = code.fsub(x, n)
    *others, last = map(code.constant, SERIES)
    for factor in reversed(others):
        last = code.multiply_add(last, rest, factor)
    return code.fmul(last, code.power_of_two(n))
