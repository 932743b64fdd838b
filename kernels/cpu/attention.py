"""softmax(q k^T) v on the CPU without the matrix of scores: section 3.2 of the paper, formula 4, scores not scaled.

A region of a large picture has tens of thousands of queries and a quarter as many keys, over a few inner channels: the
matrix would be gigabytes. Here every lane of a vector has a query of its own, and the keys go by one after the other: the
queries and their sums stay in registers, and a key's numbers are read once for all lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from llvmlite import ir
from numpy.polynomial import Chebyshev, Polynomial

from sanrt.arrays import Array
from sanrt.kernels.cpu.ir import FLOAT, Code, Module, Processor, this_processor
from sanrt.kernels.cpu.workers import Workers

BLOCK_KEYS = 768
"""Keys in a block, which has sums of its own: float32 sums over many more would lose digits."""
BATCH_VECTORS = 4
"""Vectors of queries that go over a block of keys before the next block, which is thus loaded for all of them at once."""
LARGEST_BOUND = 80.0
"""Scores that cannot be beyond plus and minus this are taken as exponents of 2 as they are: 2^80 and 2^-80 leave room for
sums over a million keys, and for values, before float32 ends."""
LOWEST_SCORE = -3e38
"""The largest score before the first key."""
MIN_EXPONENT = -100.0
"""Clamp for exponents of 2: beside a weight of 1, 2^-100 is nothing, while its products would be below the least normal
float32 if it were much smaller, and x86 takes a hundred times as long for those."""
EXP2_DEGREE = 5
"""Degree of the polynomial for 2^x on 0 <= x < 1: the lowest whose error is about that of float32's rounding."""
EXP2_COEFFICIENTS = Chebyshev.interpolate(np.exp2, EXP2_DEGREE, domain=[0, 1]).convert(kind=Polynomial).coef.tolist()


def attention(workers: Workers, query: Array, key: Array, value: Array) -> Array:
    """softmax(query key^T) value: query (n, d), key and value (m, d), all float32 -> (n, d)."""
    channels = query.shape[1]
    query, pairs = np.ascontiguousarray(query), np.empty((len(key), 2 * channels), np.float32)
    pairs[:, :channels], pairs[:, channels:] = key, value
    longest = np.einsum("md,md->m", pairs[:, :channels], pairs[:, :channels]).max(keepdims=True)
    out, counter = np.empty_like(query), np.zeros(1, np.int64)
    size = BATCH_VECTORS * State.rows(channels) * vector_processor().lanes
    kernel = kernels(channels)["attend"]

    def work(_: int) -> None:
        arrays = query, pairs, longest, out, counter, workers.buffer("attention", size)
        kernel(*(array.ctypes.data for array in arrays), len(query), len(key))

    workers.run(work)
    return out


@cache
def kernels(channels: int) -> dict[str, Callable[..., None]]:
    """The kernel for a number of inner channels, compiled once per process."""
    module = Module(vector_processor())
    write_attend(module, channels)
    return module.compile()


def vector_processor() -> Processor:
    """This processor, with as many lanes as there are queries in a vector: its own, or those of two registers."""
    processor = this_processor()
    # SSE has no multiplication by a number in memory for all lanes: it copies it first, here for two registers at once.
    return replace(processor, lanes=8) if processor.lanes == 4 and processor.registers == 16 else processor


def keys_together(processor: Processor) -> int:
    """Keys that are computed beside each other: each is a long chain of operations that wait for one another."""
    return 12 if processor.lanes > 4 else 6  # with four lanes 12 take a sixth more instructions, to keep what does not fit


@dataclass(frozen=True)
class State:
    """What a thread remembers of each vector of queries of a batch; rows have a number for each lane."""

    code: Code
    start: ir.Value
    channels: int

    @staticmethod
    def rows(channels: int) -> int:
        """Rows of a vector of queries: the queries, their offset, the sums of weighted values and of weights."""
        return 2 * channels + 2

    def row(self, vector: ir.Value, number: int, lane: ir.Value | None = None) -> ir.Value:
        """Address of a row, or of a lane in it."""
        code = self.code
        begin = code.mul(vector, code.index(self.rows(self.channels) * code.lanes))
        return code.at(self.start, begin, code.index(number * code.lanes), lane or code.index(0))

    def queries(self, vector: ir.Value) -> list[ir.Value]:
        """The queries by channel, divided by log 2: exp(s) is 2^(s / log 2), and a power of 2 is the cheaper one."""
        return [self.code.read(self.row(vector, c)) for c in range(self.channels)]

    def offset(self, vector: ir.Value) -> ir.Value:
        """Address of what is added to every score of a query."""
        return self.row(vector, self.channels)

    def sums(self, vector: ir.Value) -> list[ir.Value]:
        """Addresses of the sums of weighted values by channel, then of the weights."""
        return [self.row(vector, self.channels + 1 + c) for c in range(self.channels + 1)]


def write_attend(module: Module, channels: int) -> None:
    """The kernel of one thread, which takes batches of vectors of queries.

    `pairs` are keys, each followed by its value; `longest` is the largest square of a key's length. Lanes beyond the last
    query repeat that one.
    """
    with module.function("attend", 6, 2) as (function, code):
        query, pairs, longest, out, counter, memory, queries, keys = function.args
        state, lanes = State(code, memory, channels), code.index(code.lanes)
        vectors = code.sdiv(code.add(queries, code.index(code.lanes - 1)), lanes)
        with code.shared_loop(counter, vectors, BATCH_VECTORS) as batch:
            here = code.minimum(code.sub(vectors, batch), code.index(BATCH_VECTORS))

            def place(array: ir.Value, vector: ir.Value, lane: ir.Value) -> ir.Value:
                number = code.add(code.mul(code.add(batch, vector), lanes), lane)
                number = code.minimum(number, code.sub(queries, code.index(1)))
                return code.at(array, code.mul(number, code.index(channels)))

            with code.loop(here) as (vector, _):
                with code.loop(lanes) as (lane, _):
                    for c in range(channels):
                        number = code.load(code.at(place(query, vector, lane), code.index(c)))
                        code.store(code.fmul(number, ir.Constant(FLOAT, 1 / np.log(2))), state.row(vector, c, lane))
                keep_offset(state, vector, pairs, longest, keys)
                for sum_ in state.sums(vector):
                    code.write(code.constant(0), sum_)
            with code.loop(keys, BLOCK_KEYS) as (first, _), code.loop(here) as (vector, _):
                block = code.at(pairs, code.mul(first, code.index(2 * channels)))
                add_keys(state, vector, block, code.minimum(code.sub(keys, first), code.index(BLOCK_KEYS)))
            with code.loop(here) as (vector, _):
                *parts, total = state.sums(vector)
                for part in parts:
                    code.write(code.fdiv(code.read(part), code.read(total)), part)
                with code.loop(lanes) as (lane, _):
                    for c in range(channels):
                        number = code.load(state.row(vector, channels + 1 + c, lane))
                        code.store(number, code.at(place(out, vector, lane), code.index(c)))


def keep_offset(state: State, vector: ir.Value, pairs: ir.Value, longest: ir.Value, keys: ir.Value) -> None:
    """Store what is added to each query's scores: nothing where none can be large, else minus the largest of them.

    A softmax is the same with any offset with which its weights fit in float32, and no score is larger than the product of
    the lengths of query and key (Cauchy and Schwarz). With trained weights that is seldom too large; where it is for one
    query, the scores of its vector are computed once more, before, to find the largest.
    """
    code, queries = state.code, state.queries(vector)
    bound = scores(code, queries, [queries], code.constant(0))[0]
    bound = code.fmul(bound, code.broadcast(code.load(longest)))
    large = code.fcmp_ordered(">", bound, code.constant(LARGEST_BOUND**2))
    code.write(code.constant(0), state.offset(vector))
    mask = ir.IntType(code.lanes)
    with code.if_then(code.icmp_unsigned("!=", code.bitcast(large, mask), ir.Constant(mask, 0)), likely=False):
        with code.loop(keys, carried=[code.constant(LOWEST_SCORE)]) as (number, largest):
            key = code.at(pairs, code.mul(number, code.index(2 * state.channels)))
            (score,) = scores(code, queries, [broadcasts(code, key, state.channels)], code.constant(0))
            largest[0] = code.maximum(largest[0], score)
        code.write(code.select(large, code.fneg(largest[0]), code.constant(0)), state.offset(vector))


def add_keys(state: State, vector: ir.Value, pairs: ir.Value, count: ir.Value) -> None:
    """Add a block's weights, and values times weights, to the sums of a vector of queries."""
    code, channels, together = state.code, state.channels, keys_together(state.code.processor)
    queries, offset = state.queries(vector), code.read(state.offset(vector))
    sums = [code.constant(0)] * (channels + 1)
    whole = code.sub(count, code.srem(count, code.index(together)))
    for begin, end, step in (code.index(0), whole, together), (whole, count, 1):
        with code.loop(code.sub(end, begin), step, carried=sums) as (number, done):
            first = code.mul(code.add(begin, number), code.index(2 * channels))
            at = [code.at(pairs, first, code.index(2 * channels * i)) for i in range(step)]
            weights = powers_of_two(code, scores(code, queries, [broadcasts(code, key, channels) for key in at], offset))
            for key, weight in zip(at, weights, strict=True):
                for c, value in enumerate(broadcasts(code, code.at(key, code.index(channels)), channels)):
                    done[c] = code.multiply_add(weight, value, done[c])
                done[channels] = code.fadd(done[channels], weight)
        sums = done
    for place, part in zip(state.sums(vector), sums, strict=True):
        code.write(code.fadd(code.read(place), part), place)


def broadcasts(code: Code, numbers: ir.Value, count: int) -> list[ir.Value]:
    """So many numbers, each in every lane of a vector."""
    return [code.broadcast(code.load(code.at(numbers, code.index(i)))) for i in range(count)]


def scores(code: Code, queries: Sequence[ir.Value], keys: Sequence[Sequence[ir.Value]], offset: ir.Value) -> list[ir.Value]:
    """The queries' scores with each key, plus an offset."""
    made = [offset] * len(keys)
    for query, *channel in zip(queries, *keys, strict=True):
        made = [code.multiply_add(query, key, score) for key, score in zip(channel, made, strict=True)]
    return made


def power_of_two(code: Code, x: ir.Value) -> ir.Value:
    """2^x for x < 127, at least 2^MIN_EXPONENT."""
    (power,) = powers_of_two(code, [x])
    return power


def powers_of_two(code: Code, exponents: Sequence[ir.Value]) -> list[ir.Value]:
    """The same of several x: a polynomial of x - floor(x), times 2^floor(x)."""
    # x is the first operand, so NaN passes the clamp: a picture's NaN shows in its result.
    exponents = [code.maximum(x, code.constant(MIN_EXPONENT)) for x in exponents]
    rests, (*others, last) = [code.fraction(x) for x in exponents], map(code.constant, EXP2_COEFFICIENTS)
    made = [last] * len(exponents)
    for factor in reversed(others):
        made = [code.multiply_add(power, rest, factor) for power, rest in zip(made, rests, strict=True)]
    return [code.scaled_by_power_of_two(power, x) for power, x in zip(made, exponents, strict=True)]
