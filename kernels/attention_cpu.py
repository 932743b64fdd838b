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
LEAST_EXPONENT = -87.0
"""exp of less is hardly a normal float32; it counts as this, also where there is no key."""
LN2_HIGH = 355 / 512
"""ln 2 in so few bits that its multiples are exact; LN2_LOW is the rest."""
LN2_LOW = math.log(2) - LN2_HIGH
DEGREE = 6
"""Of exp's series, exact to float32 within half a power of two of 1."""


def attention(workers: Workers, query: Array, key: Array, value: Array) -> Array:
    """softmax(query key^T) value: query (n, d), key and value (m, d), all float32 -> (n, d)."""
    n, channels = query.shape
    groups = -(-n // TOGETHER)
    padded = np.zeros((groups * TOGETHER, channels), np.float32)
    padded[:n] = query
    lanes = this_processor().lanes
    keys = np.zeros((channels, -(-len(key) // lanes) * lanes), np.float32)
    values, hidden = np.zeros_like(keys), np.zeros(keys.shape[1], np.float32)
    keys[:, : len(key)], values[:, : len(key)] = key.T, value.T
    hidden[len(key) :] = -np.inf
    out = np.empty_like(padded)
    kernel, arrays = kernels(channels)["attend"], (padded, keys, values, hidden, out, np.zeros(1, np.int64))
    workers.run(lambda: kernel(*(array.ctypes.data for array in arrays), keys.shape[1], groups))
    return out[:n]


@cache
def kernels(channels: int) -> dict[str, Callable[..., None]]:
    """The kernel for so many inner channels, compiled once per process."""
    module = Module(this_processor())
    write_attend(module, channels)
    return module.compile()


def write_attend(module: Module, channels: int) -> None:
    """Groups of queries; `hidden` is added to the scores: 0, or -inf where there is no key."""
    with module.function("attend", 6, 2) as (function, code):
        query, key, value, hidden, out, counter, keys, groups = function.args
        with code.shared_loop(counter, groups) as group:
            start = code.mul(group, code.index(TOGETHER * channels))
            queries = [
                [code.spread(code.load(code.at(query, start, code.index(r * channels + c)))) for c in range(channels)]
                for r in range(TOGETHER)
            ]

            def scores(position: ir.Value, queries: list[list[ir.Value]] = queries) -> list[ir.Value]:
                sums = [code.read(code.at(hidden, position))] * TOGETHER
                for c in range(channels):
                    factor = code.read(code.at(key, position, code.mul(keys, code.index(c))))
                    sums = [code.multiply_add(q[c], factor, done) for q, done in zip(queries, sums, strict=True)]
                return sums

            with code.loop(keys, code.lanes, carried=[code.constant(-math.inf)] * TOGETHER) as (position, largest):
                largest[:] = map(code.largest, largest, scores(position))
            shifts = [code.spread(folded(code, code.largest, found)) for found in largest]
            with code.loop(keys, code.lanes, carried=[code.constant(0)] * (TOGETHER * (channels + 1))) as (position, sums):
                weights = [exponential(code, code.fsub(s, top)) for s, top in zip(scores(position), shifts, strict=True)]
                for c in range(channels):
                    factor = code.read(code.at(value, position, code.mul(keys, code.index(c))))
                    for r, weight in enumerate(weights):
                        at = r * (channels + 1) + c
                        sums[at] = code.multiply_add(weight, factor, sums[at])
                for r, weight in enumerate(weights):
                    at = r * (channels + 1) + channels
                    sums[at] = code.fadd(sums[at], weight)
            for r in range(TOGETHER):
                *parts, total = (folded(code, code.fadd, s) for s in sums[r * (channels + 1) : (r + 1) * (channels + 1)])
                for c, part in enumerate(parts):
                    code.store(code.fdiv(part, total), code.at(out, start, code.index(r * channels + c)))


def folded(code: Code, operation: Callable[[ir.Value, ir.Value], ir.Value], vector: ir.Value) -> ir.Value:
    """All lanes of a vector combined into one number, half and half."""
    width = code.lanes
    while width > 1:
        width //= 2
        vector = operation(vector, code.rotated(vector, width))
    return code.extract_element(vector, ir.Constant(ir.IntType(32), 0))


def exponential(code: Code, x: ir.Value) -> ir.Value:
    """exp(x) of x <= 0: 2^n times a short series of what is left."""
    x = code.largest(x, code.constant(LEAST_EXPONENT))
    n = code.call(code.intrinsic("rint", 1), [code.fmul(x, code.constant(1 / math.log(2)))])
    rest = code.multiply_add(n, code.constant(-LN2_HIGH), x)
    rest = code.multiply_add(n, code.constant(-LN2_LOW), rest)
    series = code.constant(1 / math.factorial(DEGREE))
    for degree in reversed(range(DEGREE)):
        series = code.multiply_add(series, rest, code.constant(1 / math.factorial(degree)))
    return code.fmul(series, code.power_of_two(n))
