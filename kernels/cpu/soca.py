"""SOCA's statistics and gate on the CPU, in fp32: section 3.3 of the paper, formulas 5 to 12."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from llvmlite import ir

from sanrt.arrays import Array
from sanrt.kernels.cpu.attention import power_of_two
from sanrt.kernels.cpu.ir import FLOAT, Code, Module, aligned, this_processor
from sanrt.kernels.cpu.winograd import tile_corner

MIN_TRACE = 1e-10
"""As in `sanrt.model.soca`: below this a covariance counts as zero."""
ROWS = 4
"""Rows of a matrix product whose sums are in registers together."""
MATRICES = 4
"""C x C matrices that the square root needs: itself, its inverse, and two that one step gives to the next."""


@dataclass(frozen=True)
class Gate:
    """The weights of sigmoid(W_U relu(W_D z)), float32; channels padded with zeros to whole vectors."""

    channels: int
    """C without the padding."""
    iterations: int
    """Newton-Schulz steps, at least one."""
    down: Array
    """(hidden, padded C)"""
    down_bias: Array
    up: Array
    """(hidden, padded C): transposed."""
    up_bias: Array

    def __call__(self, moments: Array, out: Array) -> None:
        """The gate of a map with the given `moments_of`, into out (padded C,)."""
        padded = out.shape[0]
        scratch = aligned((MATRICES * padded + 1, padded))
        arrays = moments, self.down, self.down_bias, self.up, self.up_bias, out, scratch
        sizes = len(moments), padded, self.channels, len(self.down), self.iterations
        kernels(padded)["gate"](*(array.ctypes.data for array in arrays), *sizes)


def moments_rows(strips: int, channels: int) -> Array:
    """Room for moments: (strips, 2 + C, C), for each strip the number of pixels, the mean, and the centred scatter.

    Of that, which is symmetric, only what is on the diagonal and to the right of it is used.
    """
    return aligned((strips, 2 + channels, channels))


def product_vectors(channels: int) -> int:
    """Vectors of columns whose sums are in registers together."""
    count = channels // this_processor().lanes
    return max(v for v in (1, 2, 3, 4) if count % v == 0 and (v + 1) * ROWS < this_processor().registers)


@cache
def kernels(channels: int) -> dict[str, Callable[..., None]]:
    """The gate for so many channels, whole vectors of them; compiled once per process."""
    module, vectors = Module(this_processor()), product_vectors(channels)
    write_gate(module, write_covariance(module), *(write_matrices(module, vectors, step) for step in (False, True)))
    return module.compile()


def write_covariance(module: Module) -> ir.Function:
    """Covariance of all strips together: the scatters, and how far the means lie apart, over the number of pixels."""
    with module.function("covariance", 3, 2) as (function, code):
        moments, mean, out, strips, channels = function.args
        stride = code.mul(code.add(channels, code.index(2)), channels)
        with code.loop(strips, carried=[ir.Constant(FLOAT, 0)]) as (strip, total):
            total[0] = code.fadd(total[0], code.load(code.at(moments, code.mul(strip, stride))))
        pixels = code.spread(total[0])
        with code.loop(channels, code.lanes) as (channel, _):
            with code.loop(strips, carried=[code.constant(0)]) as (strip, sums):
                row = code.at(moments, code.mul(strip, stride), channel)
                sums[0] = code.multiply_add(code.read(row), code.read(code.at(row, channels)), sums[0])
            code.write(code.fdiv(sums[0], pixels), code.at(mean, channel))
        with code.loop(code.mul(channels, channels), code.lanes) as (i, _):
            code.write(code.constant(0), code.at(out, i))
        # A strip after the other, as they lie in memory: most of it comes from other threads' caches.
        with code.loop(strips) as (strip, _), code.loop(channels) as (a, _):
            row = code.at(moments, code.mul(strip, stride))
            apart = code.fsub(code.load(code.at(row, channels, a)), code.load(code.at(mean, a)))
            weight = code.spread(code.fmul(apart, code.load(row)))
            scatter = code.at(row, code.mul(channels, code.add(a, code.index(2))))
            line = code.at(out, code.mul(a, channels))
            begin = code.mul(code.sdiv(a, code.index(code.lanes)), code.index(code.lanes))
            with code.loop(code.sub(channels, begin), code.lanes) as (further, _):
                b = code.add(begin, further)
                other = code.fsub(code.read(code.at(row, channels, b)), code.read(code.at(mean, b)))
                added = code.multiply_add(weight, other, code.read(code.at(scatter, b)))
                code.write(code.fadd(code.read(code.at(line, b)), added), code.at(line, b))
        with code.loop(code.mul(channels, channels), code.lanes) as (i, _):
            code.write(code.fdiv(code.read(code.at(out, i)), pixels), code.at(out, i))
        with code.loop(channels) as (a, _), code.loop(a) as (b, _):
            code.store(code.load(code.at(out, a, code.mul(b, channels))), code.at(out, b, code.mul(a, channels)))
    return function


def write_matrices(module: Module, vectors: int, step: bool) -> ir.Function:
    """out = a @ b of C x C matrices; as a Newton-Schulz step 3/2 I - 1/2 a @ b."""
    with module.function("step" if step else "multiply", 3, 1) as (function, code):
        a, b, out, channels = function.args
        with code.loop(channels, ROWS) as (top, _), code.loop(channels, vectors * code.lanes) as (left, _):
            with code.loop(channels, carried=[code.constant(0)] * (ROWS * vectors)) as (k, sums):
                line = code.at(b, code.mul(k, channels), left)
                factors = [code.read(code.at(line, code.index(v * code.lanes))) for v in range(vectors)]
                for r in range(ROWS):
                    value = code.spread(code.load(code.at(a, code.mul(code.add(top, code.index(r)), channels), k)))
                    for v, factor in enumerate(factors):
                        sums[r * vectors + v] = code.multiply_add(value, factor, sums[r * vectors + v])
            for r in range(ROWS):
                line = code.at(out, code.mul(code.add(top, code.index(r)), channels), left)
                for v in range(vectors):
                    done = sums[r * vectors + v]
                    code.write(
                        code.fmul(code.constant(-0.5), done) if step else done, code.at(line, code.index(v * code.lanes))
                    )
        if step:
            with code.loop(channels) as (i, _):
                diagonal = code.at(out, code.mul(i, code.add(channels, code.index(1))))
                code.store(code.fadd(code.load(diagonal), ir.Constant(FLOAT, 1.5)), diagonal)
    return function


def write_gate(module: Module, covariance: ir.Function, multiply: ir.Function, step: ir.Function) -> None:
    """Coupled Newton-Schulz steps from y = Sigma / trace and z = I (formulas 8 to 10), then the two layers."""
    with module.function("gate", 7, 5) as (function, code):
        moments, down, down_bias, up, up_bias, out, scratch, strips, channels, real, hidden, iterations = function.args
        square = code.mul(channels, channels)
        y, z, half, spare = (code.at(scratch, code.mul(square, code.index(i))) for i in range(MATRICES))
        mean = code.at(scratch, code.mul(square, code.index(MATRICES)))
        code.call(covariance, [moments, mean, y, strips, channels])
        with code.loop(channels, carried=[ir.Constant(FLOAT, 0)]) as (i, total):
            total[0] = code.fadd(total[0], code.load(code.at(y, code.mul(i, code.add(channels, code.index(1))))))
        least = ir.Constant(FLOAT, MIN_TRACE)
        trace = code.select(code.fcmp_ordered("<", total[0], least), least, total[0])
        with code.loop(square, code.lanes) as (i, _):
            code.write(code.fdiv(code.read(code.at(y, i)), code.spread(trace)), code.at(y, i))
            code.write(code.constant(0), code.at(z, i))
        with code.loop(channels) as (i, _):
            code.store(ir.Constant(FLOAT, 1), code.at(z, code.mul(i, code.add(channels, code.index(1)))))
        with code.loop(iterations, carried=[y, z, spare]) as (_, matrices):
            y, z, free = matrices
            code.call(step, [z, y, half, channels])
            code.call(multiply, [y, half, free, channels])
            code.call(multiply, [half, z, y, channels])
            matrices[:] = [free, y, z]
        root = matrices[0]
        deviation = code.fdiv(code.square_root(trace), code.sitofp(real, FLOAT))
        with code.loop(channels) as (i, _):
            with code.loop(channels, code.lanes, carried=[code.constant(0)]) as (j, sums):
                sums[0] = code.fadd(sums[0], code.read(code.at(root, code.mul(i, channels), j)))
            code.store(code.fmul(code.folded(code.fadd, sums[0]), deviation), code.at(mean, i))
        with code.loop(channels, code.lanes) as (i, _):
            code.write(code.read(code.at(up_bias, i)), code.at(out, i))
        with code.loop(hidden) as (h, _):
            with code.loop(channels, code.lanes, carried=[code.constant(0)]) as (i, sums):
                weight = code.read(code.at(down, code.mul(h, channels), i))
                sums[0] = code.multiply_add(weight, code.read(code.at(mean, i)), sums[0])
            value = code.fadd(code.folded(code.fadd, sums[0]), code.load(code.at(down_bias, h)))
            value = code.largest(code.spread(value), code.constant(0))
            with code.loop(channels, code.lanes) as (i, _):
                code.write(
                    code.multiply_add(value, code.read(code.at(up, code.mul(h, channels), i)), code.read(code.at(out, i))),
                    code.at(out, i),
                )
        with code.loop(channels, code.lanes) as (i, _):
            code.write(sigmoid(code, code.read(code.at(out, i))), code.at(out, i))


def sigmoid(code: Code, x: ir.Value) -> ir.Value:
    """1 / (1 + exp(-x)), by the exponential of what is not positive."""
    positive = code.fcmp_ordered(">", x, code.constant(0))
    falling = power_of_two(code, code.fmul(code.constant(1 / np.log(2)), code.select(positive, code.fneg(x), x)))
    above = code.fadd(falling, code.constant(1))
    return code.fdiv(code.select(positive, code.constant(1), falling), above)


def write_moments(module: Module, vectors: int, tile_side: int) -> ir.Function:
    """A strip of tiles' number of pixels, mean and centred scatter, as out[strip]; see `moments_rows`."""
    with module.function("moments", 3, 8) as (function, code):
        source, out, held, row, channels, height, width, columns, first, count, strip = function.args
        out = code.at(out, code.mul(strip, code.mul(code.add(channels, code.index(2)), channels)))
        means, scatter = code.at(out, channels), code.at(out, channels, channels)
        with code.loop(count, carried=[code.index(0)]) as (tile, found):
            y, x = tile_corner(code, code.add(first, tile), columns, tile_side)
            rows, across = (code.smallest(code.sub(end, at), code.index(tile_side)) for end, at in ((height, y), (width, x)))
            with code.loop(rows, carried=found) as (i, before):
                with code.loop(across, carried=before) as (j, pixels):
                    pixel = code.at(source, code.mul(code.add(y, i), row), code.mul(code.add(x, j), channels))
                    target = code.at(held, code.mul(pixels[0], channels))
                    with code.loop(channels, code.lanes) as (channel, _):
                        code.write(code.read(code.at(pixel, channel)), code.at(target, channel))
                    pixels[0] = code.add(pixels[0], code.index(1))
                before[:] = pixels
            found[:] = before
        (pixels,) = found
        number = code.spread(code.sitofp(pixels, code.vector.element))
        with code.loop(channels, code.lanes) as (channel, _):
            code.write(number, code.at(out, channel))
            with code.loop(pixels, carried=[code.constant(0)]) as (n, total):
                total[0] = code.fadd(total[0], code.read(code.at(held, channel, code.mul(n, channels))))
            mean = code.fdiv(total[0], number)
            code.write(mean, code.at(means, channel))
            with code.loop(pixels) as (n, _):
                at = code.at(held, channel, code.mul(n, channels))
                code.write(code.fsub(code.read(at), mean), at)
        with code.loop(channels, vectors * code.lanes) as (b, _):
            with code.loop(b, ROWS) as (a, _):
                write_scatter(code, held, scatter, channels, pixels, a, b, ROWS, vectors)
            for v in range(vectors):  # on the diagonal: what is to the left of it is known from above
                rows = max(n for n in (1, 2, 4, 8, 16) if n <= code.lanes and n * (vectors - v) <= ROWS * vectors)
                left = code.add(b, code.index(v * code.lanes))
                with code.loop(code.index(code.lanes), rows) as (a, _):
                    write_scatter(code, held, scatter, channels, pixels, code.add(left, a), left, rows, vectors - v)
    return function


def write_scatter(
    code: Code,
    held: ir.Value,
    scatter: ir.Value,
    channels: ir.Value,
    pixels: ir.Value,
    a: ir.Value,
    b: ir.Value,
    rows: int,
    vectors: int,
) -> None:
    """Products of channels a, a + 1, ... and the vectors of channels from b on, added up over the pixels."""
    with code.loop(pixels, carried=[code.constant(0)] * (rows * vectors)) as (n, sums):
        pixel = code.at(held, code.mul(n, channels))
        right = [code.read(code.at(pixel, b, code.index(v * code.lanes))) for v in range(vectors)]
        for i in range(rows):
            left = code.spread(code.load(code.at(pixel, a, code.index(i))))
            for v in range(vectors):
                sums[i * vectors + v] = code.multiply_add(left, right[v], sums[i * vectors + v])
    for i in range(rows):
        for v in range(vectors):
            at = code.at(scatter, b, code.mul(code.add(a, code.index(i)), channels), code.index(v * code.lanes))
            code.write(sums[i * vectors + v], at)
