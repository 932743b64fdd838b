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
from sanrt.kernels.cpu.winograd import tile_origin
from sanrt.model.contract import MIN_TRACE

MICROKERNEL_ROWS = 4
"""Rows of a matrix product's result that are computed together, their sums in registers."""
MERGED_STRIPS = 256
"""Strips whose moments are merged into one, in maps that have more."""
SCRATCH_MATRICES = 4
"""C x C matrices that the square root needs: Y, Z, (3 I - Z Y) / 2, and one that receives the next Y."""


@dataclass(frozen=True)
class Gate:
    """Channel attention's two layers, sigmoid(W_U relu(W_D z)), float32; channels padded with zeros to whole vectors."""

    channels: int
    """C, without the padding."""
    iterations: int
    """Newton-Schulz steps, at least one."""
    down: Array
    """(hidden, padded C)"""
    down_bias: Array
    up: Array
    """(hidden, padded C): W_U transposed, so that both layers read rows."""
    up_bias: Array

    def __call__(self, moments: Array, out: Array) -> None:
        """Write the gate of a map into out (padded C,), given its moments by strips as in `empty_moments`."""
        padded = out.shape[0]
        scratch = aligned((SCRATCH_MATRICES * padded + 1, padded))
        arrays = moments, self.down, self.down_bias, self.up, self.up_bias, out, scratch
        sizes = len(moments), padded, self.channels, len(self.down), self.iterations
        kernels(padded)["gate"](*(array.ctypes.data for array in arrays), *sizes)


def empty_moments(strips: int, channels: int) -> Array:
    """Moments of strips, to be filled in: (strips, 2 + C, C), float32.

    Row 0 of a strip is its number of pixels (in every channel), row 1 the mean, the others the centred scatter, of which
    only the upper triangle is used: it is symmetric.
    """
    return aligned((strips, 2 + channels, channels))


class StripMoments:
    """Moments of a map's strips, as a schedule finds them, and of fixed groups of them where there are many.

    Groups are merged as soon as their strips are known: all strips of a large picture's map would take as much memory as a
    tenth of the map or more. The groups are the same however the map is cut into bands, and so is what is merged from them.
    """

    def __init__(self, strips: int, channels: int) -> None:
        """For a map with so many strips; `allocate` makes the room."""
        self.strips, self.channels, self.first = strips, channels, 0
        self.array = empty_moments(0, channels)
        """Those of the strips from `first` on."""
        self.merged = empty_moments(-(-strips // MERGED_STRIPS), channels) if strips > MERGED_STRIPS else None

    def allocate(self, strips: int) -> None:
        """Make room for so many strips beside those of a group that is not complete."""
        self.array = empty_moments(min(strips + MERGED_STRIPS, self.strips), self.channels)

    def needed(self, strips: int) -> int:
        """Bytes in all with that room."""
        return (min(strips + MERGED_STRIPS, self.strips) + self.strips // MERGED_STRIPS) * self.strip_bytes

    @property
    def address(self) -> int:
        """Where the first strip's would be."""
        return self.array.ctypes.data - self.first * self.strip_bytes

    @property
    def strip_bytes(self) -> int:
        """Bytes of one strip's."""
        return (2 + self.channels) * self.channels * self.array.itemsize

    @property
    def found(self) -> Array:
        """What the gate takes, once all strips are known."""
        return self.array if self.merged is None else self.merged

    def rewind(self) -> None:
        """Begin with the first strip again."""
        self.first = 0

    def merge(self, end: int) -> None:
        """Merge the groups whose strips all lie before `end`; those strips are known."""
        if self.merged is None:
            return
        done = self.first
        while done < end and (following := min(done + MERGED_STRIPS, self.strips)) <= end:
            self.merged[done // MERGED_STRIPS] = merged_moments(self.array[done - self.first : following - self.first])
            done = following
        rest = self.array[done - self.first : end - self.first].copy()
        self.array[: len(rest)], self.first = rest, done


def merged_moments(moments: Array) -> Array:
    """Moments of some strips together, laid out like those of one (Chan's formula, as in the gate's covariance)."""
    counts, means = moments[:, 0, :1], moments[:, 1]
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    apart = means - mean
    scatter = moments[:, 2:].sum(0) + (counts * apart).T @ apart
    return np.concatenate([np.full((1, len(mean)), total), mean[None], scatter]).astype(np.float32)


def product_vectors(channels: int) -> int:
    """Vectors of columns of a matrix product that are computed together: the most that divide C and fit the registers."""
    count = channels // this_processor().lanes
    return max(v for v in (1, 2, 3, 4) if count % v == 0 and (v + 1) * MICROKERNEL_ROWS < this_processor().registers)


@cache
def kernels(channels: int) -> dict[str, Callable[..., None]]:
    """The gate's kernel for a number of channels (whole vectors), compiled once per process."""
    module, vectors = Module(this_processor()), product_vectors(channels)
    write_gate(module, write_covariance(module), *(write_matrices(module, vectors, step) for step in (False, True)))
    return module.compile()


def write_covariance(module: Module) -> ir.Function:
    """Merge the moments of all strips into the covariance of the map (Chan's formula).

    The sum of the strips' scatters, plus count * (mean - overall mean)(mean - overall mean)^T of each, over all pixels.
    Centred sums of short strips lose fewer digits than sum(x x^T) - n mean mean^T over the whole picture would.
    """
    with module.function("covariance", 3, 2) as (function, code):
        moments, mean, out, strips, channels = function.args
        stride = code.mul(code.add(channels, code.index(2)), channels)
        with code.loop(strips, carried=[ir.Constant(FLOAT, 0)]) as (strip, total):
            total[0] = code.fadd(total[0], code.load(code.at(moments, code.mul(strip, stride))))
        pixels = code.broadcast(total[0])
        with code.loop(channels, code.lanes) as (channel, _):
            with code.loop(strips, carried=[code.constant(0)]) as (strip, sums):
                row = code.at(moments, code.mul(strip, stride), channel)
                sums[0] = code.multiply_add(code.read(row), code.read(code.at(row, channels)), sums[0])
            code.write(code.fdiv(sums[0], pixels), code.at(mean, channel))
        with code.loop(code.mul(channels, channels), code.lanes) as (i, _):
            code.write(code.constant(0), code.at(out, i))
        # Strip by strip, in the order of memory, although the result is then read and written for each: most of the moments
        # lie in other cores' caches, and a sequential read can be prefetched by the processor.
        with code.loop(strips) as (strip, _), code.loop(channels) as (a, _):
            row = code.at(moments, code.mul(strip, stride))
            apart = code.fsub(code.load(code.at(row, channels, a)), code.load(code.at(mean, a)))
            weight = code.broadcast(code.fmul(apart, code.load(row)))
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
    """out = a @ b for C x C matrices, or with `step` 3/2 I - 1/2 a @ b, the factor of a Newton-Schulz step."""
    with module.function("step" if step else "multiply", 3, 1) as (function, code):
        a, b, out, channels = function.args
        with code.loop(channels, MICROKERNEL_ROWS) as (top, _), code.loop(channels, vectors * code.lanes) as (left, _):
            with code.loop(channels, carried=[code.constant(0)] * (MICROKERNEL_ROWS * vectors)) as (k, sums):
                line = code.at(b, code.mul(k, channels), left)
                factors = [code.read(code.at(line, code.index(v * code.lanes))) for v in range(vectors)]
                for r in range(MICROKERNEL_ROWS):
                    value = code.broadcast(code.load(code.at(a, code.mul(code.add(top, code.index(r)), channels), k)))
                    for v, factor in enumerate(factors):
                        sums[r * vectors + v] = code.multiply_add(value, factor, sums[r * vectors + v])
            for r in range(MICROKERNEL_ROWS):
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
    """Coupled Newton-Schulz steps from Y = Sigma / trace and Z = I (formulas 8 to 10), then the two layers.

    The padding channels are zero in Sigma, in Y and in the weights, so they come out as 1/2 and gate channels that are zero.
    """
    with module.function("gate", 7, 5) as (function, code):
        moments, down, down_bias, up, up_bias, out, scratch, strips, channels, real, hidden, iterations = function.args
        square = code.mul(channels, channels)
        y, z, half, spare = (code.at(scratch, code.mul(square, code.index(i))) for i in range(SCRATCH_MATRICES))
        mean = code.at(scratch, code.mul(square, code.index(SCRATCH_MATRICES)))
        code.call(covariance, [moments, mean, y, strips, channels])
        with code.loop(channels, carried=[ir.Constant(FLOAT, 0)]) as (i, total):
            total[0] = code.fadd(total[0], code.load(code.at(y, code.mul(i, code.add(channels, code.index(1))))))
        # A constant map has no variance; without the clamp it would be divided by zero.
        least = ir.Constant(FLOAT, MIN_TRACE)
        trace = code.select(code.fcmp_ordered("<", total[0], least), least, total[0])
        with code.loop(square, code.lanes) as (i, _):
            code.write(code.fdiv(code.read(code.at(y, i)), code.broadcast(trace)), code.at(y, i))
            code.write(code.constant(0), code.at(z, i))
        with code.loop(channels) as (i, _):
            code.store(ir.Constant(FLOAT, 1), code.at(z, code.mul(i, code.add(channels, code.index(1)))))
        # Three of the four matrices change places each round, so that nothing is copied and no product overwrites its
        # factors.
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
            code.store(code.fmul(code.reduced(code.fadd, sums[0]), deviation), code.at(mean, i))
        with code.loop(channels, code.lanes) as (i, _):
            code.write(code.read(code.at(up_bias, i)), code.at(out, i))
        with code.loop(hidden) as (h, _):
            with code.loop(channels, code.lanes, carried=[code.constant(0)]) as (i, sums):
                weight = code.read(code.at(down, code.mul(h, channels), i))
                sums[0] = code.multiply_add(weight, code.read(code.at(mean, i)), sums[0])
            value = code.fadd(code.reduced(code.fadd, sums[0]), code.load(code.at(down_bias, h)))
            value = code.maximum(code.broadcast(value), code.constant(0))
            with code.loop(channels, code.lanes) as (i, _):
                code.write(
                    code.multiply_add(value, code.read(code.at(up, code.mul(h, channels), i)), code.read(code.at(out, i))),
                    code.at(out, i),
                )
        with code.loop(channels, code.lanes) as (i, _):
            code.write(sigmoid(code, code.read(code.at(out, i))), code.at(out, i))


def sigmoid(code: Code, x: ir.Value) -> ir.Value:
    """1 / (1 + exp(-x)), by exp(-|x|), which cannot overflow."""
    positive = code.fcmp_ordered(">", x, code.constant(0))
    falling = power_of_two(code, code.fmul(code.constant(1 / np.log(2)), code.select(positive, code.fneg(x), x)))
    above = code.fadd(falling, code.constant(1))
    return code.fdiv(code.select(positive, code.constant(1), falling), above)


def write_moments(module: Module, vectors: int, tile_side: int) -> ir.Function:
    """Write the number of pixels, mean and centred scatter of a strip of tiles into out[strip]; see `empty_moments`.

    Called right after the strip was written, while its pixels are in the core's cache.
    """
    with module.function("moments", 3, 8) as (function, code):
        source, out, scratch, row, channels, height, width, columns, first, count, strip = function.args
        out = code.at(out, code.mul(strip, code.mul(code.add(channels, code.index(2)), channels)))
        means, scatter = code.at(out, channels), code.at(out, channels, channels)
        # The pixels are copied together first: tiles are scattered rows of the map, and each pixel is read C times.
        with code.loop(count, carried=[code.index(0)]) as (tile, found):
            y, x = tile_origin(code, code.add(first, tile), columns, tile_side)
            rows, across = (code.minimum(code.sub(end, at), code.index(tile_side)) for end, at in ((height, y), (width, x)))
            with code.loop(rows, carried=found) as (i, before):
                with code.loop(across, carried=before) as (j, pixels):
                    pixel = code.at(source, code.mul(code.add(y, i), row), code.mul(code.add(x, j), channels))
                    target = code.at(scratch, code.mul(pixels[0], channels))
                    with code.loop(channels, code.lanes) as (channel, _):
                        code.write(code.read(code.at(pixel, channel)), code.at(target, channel))
                    pixels[0] = code.add(pixels[0], code.index(1))
                before[:] = pixels
            found[:] = before
        (pixels,) = found
        number = code.broadcast(code.sitofp(pixels, code.vector.element))
        with code.loop(channels, code.lanes) as (channel, _):
            code.write(number, code.at(out, channel))
            with code.loop(pixels, carried=[code.constant(0)]) as (n, total):
                total[0] = code.fadd(total[0], code.read(code.at(scratch, channel, code.mul(n, channels))))
            mean = code.fdiv(total[0], number)
            code.write(mean, code.at(means, channel))
            with code.loop(pixels) as (n, _):
                at = code.at(scratch, channel, code.mul(n, channels))
                code.write(code.fsub(code.read(at), mean), at)
        with code.loop(channels, vectors * code.lanes) as (b, _):
            with code.loop(b, MICROKERNEL_ROWS) as (a, _):
                write_scatter(code, scratch, scatter, channels, pixels, a, b, MICROKERNEL_ROWS, vectors)
            # On the diagonal, vector by vector: what lies to the left of it is known from the upper triangle. Fewer columns
            # leave registers for more rows.
            for v in range(vectors):
                rows = max(
                    n for n in (1, 2, 4, 8, 16) if n <= code.lanes and n * (vectors - v) <= MICROKERNEL_ROWS * vectors
                )
                left = code.add(b, code.index(v * code.lanes))
                with code.loop(code.index(code.lanes), rows) as (a, _):
                    write_scatter(code, scratch, scatter, channels, pixels, code.add(left, a), left, rows, vectors - v)
    return function


def write_scatter(
    code: Code,
    scratch: ir.Value,
    scatter: ir.Value,
    channels: ir.Value,
    pixels: ir.Value,
    a: ir.Value,
    b: ir.Value,
    rows: int,
    vectors: int,
) -> None:
    """Sums over the pixels of channel i times channel j: `rows` channels i from a on, `vectors` of channels j from b on."""
    with code.loop(pixels, carried=[code.constant(0)] * (rows * vectors)) as (n, sums):
        pixel = code.at(scratch, code.mul(n, channels))
        right = [code.read(code.at(pixel, b, code.index(v * code.lanes))) for v in range(vectors)]
        for i in range(rows):
            left = code.broadcast(code.load(code.at(pixel, a, code.index(i))))
            for v in range(vectors):
                sums[i * vectors + v] = code.multiply_add(left, right[v], sums[i * vectors + v])
    for i in range(rows):
        for v in range(vectors):
            at = code.at(scatter, b, code.mul(code.add(a, code.index(i)), channels), code.index(v * code.lanes))
            code.write(sums[i * vectors + v], at)
