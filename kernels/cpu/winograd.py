"""Convolutions on the CPU by Winograd's minimal filtering F(m x m, r x r): (m + r - 1)^2 products for m^2 pixels.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4: Y = A^T [(G w G^T) * (B^T d B)] A
for each (m + r - 1)^2 input tile d that gives m x m outputs; the products of all channels of a tile position are one matrix
product.

The products are of fp32, with m + r - 1 = 6, or of 16-bit integers, of which a vector holds twice as many, with 8: each tile
of B^T d B is rounded in steps of the largest value that it could have over 32760, the weights of each output channel in the
finest steps with which no sum of 32 bits can overflow. The sums are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache, cached_property, reduce

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from sanrt.arrays import Array
from sanrt.kernels.cpu.ir import FLOAT, SHORT, WORD, Code, Module, aligned, this_processor

Matrix = npt.NDArray[np.float64]

LARGEST = 32760.0
"""Of a rounded input; a few steps below 2^15, for the rounding of what leads there."""
LARGEST_SUM = 65536
"""Of the magnitudes of the rounded weights of one sum, which then stays below 2^31."""
LEAST, MOST = 1e-30, 1e36
"""A tile whose values are all smaller counts as this large; one with a larger value as infinite, as B^T d B may be."""
MAGIC = 1.5 * 2.0**23
"""Added to a float32 below 2^22, this leaves it rounded in the lowest bits, as an integer in two's complement."""

WIDEST = 4
"""Vectors of output channels that the product keeps in registers."""


@dataclass(frozen=True)
class Method:
    """Winograd's minimal filtering F(tile, taps) by the points 0, infinity, and some with both signs.

    Lavin, "Winograd convolution" (wincnn), and Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd
    Convolution for Deep Neural Networks", 2018, have the general construction.
    """

    magnitudes: tuple[float, ...]
    taps: int = 3

    @property
    def side(self) -> int:
        """Inputs along one axis: one for each point."""
        return 2 * len(self.magnitudes) + 2

    @property
    def tile(self) -> int:
        """Outputs along one axis."""
        return self.side - self.taps + 1

    @property
    def border(self) -> int:
        """Pixels around a map that its convolution reads as zeros."""
        return self.taps // 2

    @property
    def points(self) -> int:
        """Products of a tile."""
        return self.side**2

    @property
    def finite(self) -> list[float]:
        """The points but infinity, in the order of the rows of G and of B^T."""
        return [0.0, *(sign * p for p in self.magnitudes for sign in (1, -1))]

    @cached_property
    def filter(self) -> Matrix:
        """G: (side, taps)."""
        powers = np.arange(self.taps)
        rows = [p**powers / np.prod([p - q for q in self.finite if q != p]) for p in self.finite]
        return np.array([*rows, powers == powers[-1]])

    @cached_property
    def growth(self) -> Matrix:
        """Sums of the magnitudes in each row of B^T: how much larger than the pixels its results can be."""
        finite = self.finite
        return np.array([np.abs(np.poly([q for q in finite if q != p])).sum() for p in [*finite, np.inf]])

    @cached_property
    def even(self) -> Matrix:
        """What divides the rows of growth * G, so that 16 bits serve all of them alike; A^T makes up for it."""
        norms: Matrix = np.linalg.norm(self.growth[:, None] * self.filter, axis=1)
        return np.asarray(norms / norms[1])

    def others(self, magnitude: float | None = None) -> list[float]:
        """Coefficients of the product of t - p^2 of the magnitudes p, one of them left out; the lowest power first."""
        return [float(c) for c in np.poly([p * p for p in self.magnitudes if p != magnitude])[::-1]]

    def spread_line(self, code: Code, d: list[ir.Value]) -> list[ir.Value]:
        """B^T d: its rows hold the coefficients of the product of t - q over the points q but one."""
        done = [code.weighted_sum(self.others(), d[:-1:2])]
        for p in self.magnitudes:
            even, odd = (code.weighted_sum(self.others(p), d[begin:-1:2]) for begin in (2, 1))
            done += [code.scaled_add(p, odd, even), code.scaled_add(-p, odd, even)]
        return [*done, code.weighted_sum(self.others(), d[1::2])]

    def collect_line(self, code: Code, m: list[ir.Value], factors: Sequence[float]) -> list[ir.Value]:
        """A^T (factors * m): the columns of A^T are the powers of the points; both signs of one have the same factor."""
        pairs = [(code.fadd(a, b), code.fsub(a, b)) for a, b in zip(m[1:-1:2], m[2:-1:2], strict=True)]
        done = []
        for power in range(self.tile):
            powers = [factor * p**power for p, factor in zip(self.magnitudes, factors[1:-1:2], strict=True)]
            done.append(code.weighted_sum(powers, [pair[power % 2] for pair in pairs]))
        done[0], done[-1] = code.scaled_add(factors[0], m[0], done[0]), code.scaled_add(factors[-1], m[-1], done[-1])
        return done


class Products(StrEnum):
    """What is multiplied."""

    FP32 = "fp32"
    INT16 = "int16"

    @property
    def per_float(self) -> int:
        """Of them in the place of one float32, which are multiplied and added up together."""
        return 1 if self is Products.FP32 else 2

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """Of the points: more of them need fewer products and are coarser, which is for 16 bits, that round anyway."""
        return {Products.FP32: (1.0, 2.0), Products.INT16: (1.0, 2.0, 0.5)}[self]

    @property
    def points(self) -> int:
        """Products of a tile, whatever the taps."""
        return Method(self.magnitudes).points

    def point_factors(self, method: Method) -> list[float]:
        """What A^T multiplies the points' sums by."""
        return [1.0] * method.side if self is Products.FP32 else [float(each) for each in method.even]


@cache
def method_of(products: Products, taps: int = 3) -> Method:
    """How convolutions of taps x taps are computed by such products."""
    return Method(products.magnitudes, taps)


class End(StrEnum):
    """What follows a convolution within the same pass."""

    NOTHING = "nothing"
    RELU = "relu"
    ADD = "add"
    """A map of the output's size is added."""
    ADD_BOTH = "add_both"
    """Two of them."""


@dataclass(frozen=True)
class Map:
    """Features as (rows, columns, channels), in whole tiles and vectors with a border; all zero but the pixels."""

    array: Array
    height: int
    width: int
    method: Method
    """Of the convolution that reads it."""

    @classmethod
    def zeros(cls, height: int, width: int, channels: int, method: Method) -> Map:
        """An all-zero map."""
        sides = (whole(size, method.tile) + 2 * method.border for size in (height, width))
        return cls(aligned((*sides, whole_vectors(channels))), height, width, method)

    def holds(self, height: int, width: int, channels: int) -> bool:
        """Whether there is room for another map of the same width."""
        same = (self.width, self.array.shape[2]) == (width, whole_vectors(channels))
        return same and whole(height, self.method.tile) + 2 * self.method.border <= len(self.array)

    def shortened(self, height: int) -> Map:
        """The rows of a lower map, in the same memory; beyond them it is zero again."""
        array = self.array[: whole(height, self.method.tile) + 2 * self.method.border]
        array[height + self.method.border :] = 0
        return replace(self, array=array, height=height)

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.height // self.method.tile), -(-self.width // self.method.tile)

    @property
    def pixels(self) -> Array:
        """The (height, width, channels) that count, as a view."""
        border = self.method.border
        return self.array[border : border + self.height, border : border + self.width]


def whole(size: int, part: int) -> int:
    """Rounded up to full parts."""
    return -(-size // part) * part


def whole_vectors(channels: int) -> int:
    """Channels rounded up to full vectors."""
    return whole(channels, this_processor().lanes)


class Convolution:
    """The transformed weights of a convolution with zero padding: weight (O, I, r, r), r odd, and bias (O,), float32."""

    def __init__(self, weight: Array, bias: Array, products: Products = Products.FP32) -> None:
        outputs, inputs, taps = weight.shape[:3]
        self.products, self.method = products, method_of(products, taps)
        self.inputs, self.outputs = whole_vectors(inputs), whole_vectors(outputs)
        padded = np.zeros((self.inputs, self.outputs, taps, taps))
        padded[:inputs, :outputs] = weight.transpose(1, 0, 2, 3)
        self.bias = np.zeros(self.outputs, np.float32)
        self.bias[:outputs] = bias
        method = self.method
        if products is Products.FP32:
            spread, self.scale = filtered(method.filter, padded), np.ones_like(self.bias)
        else:
            spread, step = rounded(filtered(method.filter * (method.growth / method.even)[:, None], padded))
            self.scale = (step / LARGEST).astype(np.float32)
        block, together = product_shape(self.outputs)[0] * this_processor().lanes, products.per_float
        spread = spread.reshape(method.points, self.inputs // together, together, self.outputs // block, block)
        spread = spread.transpose(0, 3, 1, 4, 2)
        self.weight = aligned(spread.shape, np.float32 if products is Products.FP32 else np.int16)
        self.weight[:] = spread
        """[point][block of outputs][inputs][output][input of a pair]: the order in which the product reads it."""


def filtered(g: Matrix, weight: Matrix) -> Matrix:
    """G w G^T: (inputs, outputs, taps, taps) -> (points, inputs, outputs)."""
    spread: Matrix = np.einsum("ia,jb,koab->ijko", g, g, weight, optimize=True)
    return spread.reshape(len(g) ** 2, *weight.shape[:2])


def rounded(spread: Matrix) -> tuple[Matrix, Matrix]:
    """Whole numbers, and their steps for each output channel."""
    magnitudes = np.abs(spread)
    for_sums = magnitudes.sum(1).max(0) / (LARGEST_SUM - spread.shape[1])
    step = np.maximum(np.maximum(for_sums, magnitudes.max((0, 1)) / LARGEST), LEAST)
    return np.rint(spread / step), step


def tile_stride(channels: int, products: Products) -> int:
    """Numbers from one transformed tile to the next: not a multiple of the cache's stride."""
    return (products.points + 1) * channels + 2 * this_processor().lanes


def product_shape(outputs: int) -> tuple[int, int]:
    """(vectors of outputs, rows of tiles) whose sums fit the registers, with the operands of a step."""
    processor = this_processor()
    vectors = max(v for v in range(1, WIDEST + 1) if outputs // processor.lanes % v == 0 and product_rows(v) >= v)
    return vectors, product_rows(vectors)


def product_rows(vectors: int) -> int:
    """Rows of tiles beside so many vectors of outputs."""
    return (this_processor().registers - vectors - 1) // vectors


def tile_corner(code: Code, tile: ir.Value, columns: ir.Value, size: int) -> tuple[ir.Value, ir.Value]:
    """First row and column of a tile."""
    return code.mul(code.sdiv(tile, columns), code.index(size)), code.mul(code.srem(tile, columns), code.index(size))


def write_spread(module: Module, products: Products, method: Method, gated: bool) -> ir.Function:
    """B^T d B of tiles first, first + 1, ...: spread[tile][point][channel]; for INT16 rounded, and peaks[tile]."""
    with module.function("spread_gated" if gated else "spread", 5, 6) as (function, code):
        source, gate, spread, peaks, held, row, channels, columns, first, count, stride = function.args
        side = method.side
        if products is Products.INT16:
            spread = code.bitcast(spread, SHORT.as_pointer())
        with code.loop(count) as (tile, _):
            y, x = tile_corner(code, code.add(first, tile), columns, method.tile)
            corner = code.at(source, code.mul(y, row), code.mul(x, channels))
            target = code.at(spread, code.mul(tile, stride))

            def column(channel: ir.Value, j: ir.Value, corner: ir.Value = corner) -> list[ir.Value]:
                top = code.at(corner, channel, code.mul(channels, j))
                values = [code.read(code.at(top, code.mul(row, code.index(i)))) for i in range(side)]
                return [code.fmul(code.read(code.at(gate, channel)), value) for value in values] if gated else values

            factors = write_peak(code, method, channels, column, code.at(peaks, tile)) if products is Products.INT16 else {}
            with code.loop(channels, code.lanes) as (channel, _):
                # By way of memory: the registers do not hold a tile.
                with code.loop(code.index(side)) as (j, _):
                    for i, value in enumerate(method.spread_line(code, column(channel, j))):
                        code.write(value, held_at(code, held, i * side, j))
                for i in range(side):
                    line = [code.read(held_at(code, held, i * side, code.index(j))) for j in range(side)]
                    for j, value in enumerate(method.spread_line(code, line)):
                        at = code.at(target, channel, code.mul(channels, code.index(i * side + j)))
                        if products is Products.INT16:
                            factor = factors[method.growth[i] * method.growth[j]]
                            code.write_short(code.multiply_add(value, factor, code.constant(MAGIC)), at)
                        else:
                            code.write(value, at)
    return function


def held_at(code: Code, held: ir.Value, row: int, j: ir.Value) -> ir.Value:
    """Where the vector of a tile's point row + j is kept."""
    return code.at(held, code.mul(code.add(j, code.index(row)), code.index(code.lanes)))


def write_peak(
    code: Code,
    method: Method,
    channels: ir.Value,
    column: Callable[[ir.Value, ir.Value], list[ir.Value]],
    peak: ir.Value,
) -> dict[float, ir.Value]:
    """A tile's largest magnitude, and what scales its points to 16 bits, by their growth."""
    nothing = ir.Constant(code.integers, [0] * code.lanes)
    with code.loop(channels, code.lanes, carried=[nothing] * method.side) as (channel, largest):
        for j in range(method.side):
            for i, value in enumerate(column(channel, code.index(j))):
                # As integers: infinity counts as more than any number, and what is no number as more still.
                largest[i] = code.largest_word(largest[i], code.magnitude_bits(value))
    found = code.bitcast(code.folded(code.largest_word, reduce(code.largest_word, largest)), FLOAT)
    least = ir.Constant(FLOAT, LEAST)
    found = code.select(code.fcmp_ordered("<", found, least), least, found)
    found = code.select(code.fcmp_ordered(">", found, ir.Constant(FLOAT, MOST)), ir.Constant(FLOAT, math.inf), found)
    code.store(found, peak)
    step = code.fdiv(ir.Constant(FLOAT, LARGEST), found)
    growths = sorted({float(a * b) for a in method.growth for b in method.growth})
    return {growth: code.spread(code.fmul(step, ir.Constant(FLOAT, 1 / growth))) for growth in growths}


def write_product(module: Module, products: Products, vectors: int, fetch: ir.Function) -> ir.Function:
    """product[tile][block of lanes][point] = spread[tile][point] @ weight[point]; up to rows - 1 tiles more are done too.

    Between the products `fetch` is called with the other arguments, so that what comes after them is in the caches in time.
    """
    rows, together, points = product_rows(vectors), products.per_float, products.points
    with module.function("product", 6, 10) as (function, code):
        spread, weight, product, *maps = function.args[:6]
        tiles, inputs, outputs, spread_stride, product_stride, row, source_row, *where = function.args[6:]
        block, zero, add = vectors * code.lanes, code.constant(0), code.multiply_add
        if products is Products.INT16:
            spread, weight = (code.bitcast(each, SHORT.as_pointer()) for each in (spread, weight))
            product = code.bitcast(product, WORD.as_pointer())
            zero, add = ir.Constant(code.integers, [0] * code.lanes), code.add_pairs
        with code.loop(code.index(points)) as (point, _):
            panels = code.at(weight, code.mul(point, code.mul(inputs, outputs)))
            with code.loop(outputs, block) as (output, _), code.loop(tiles, rows) as (tile, _):
                code.call(fetch, [*maps, row, outputs, source_row, inputs, *where, point, tile, output])
                panel, numbers = (
                    code.at(panels, code.mul(output, inputs)),
                    [code.add(tile, code.index(r)) for r in range(rows)],
                )
                pixels = [code.at(spread, code.mul(n, spread_stride), code.mul(point, inputs)) for n in numbers]
                following = code.at(panel, code.mul(inputs, code.index(block)))
                with code.loop(inputs, together, carried=[zero] * (rows * vectors)) as (k, sums):
                    offsets = [
                        code.add(code.mul(k, code.index(block)), code.index(v * code.lanes * together))
                        for v in range(vectors)
                    ]
                    factors = [code.read_as(zero.type, code.at(panel, offset)) for offset in offsets]
                    for offset in offsets:
                        code.prefetch(code.at(following, offset), write=False)
                    for r, pixel in enumerate(pixels):
                        value = code.spread(code.read_as(zero.type.element, code.at(pixel, k)))
                        for v, factor in enumerate(factors):
                            sums[r * vectors + v] = add(value, factor, sums[r * vectors + v])
                channels = code.mul(output, code.index(points + 1))
                for r, number in enumerate(numbers):
                    target = code.at(
                        product, code.mul(number, product_stride), channels, code.mul(point, code.index(code.lanes))
                    )
                    for v in range(vectors):
                        code.write(sums[r * vectors + v], code.at(target, code.index(v * (points + 1) * code.lanes)))
    return function


def write_fetch(module: Module, vectors: int, tile_side: int) -> ir.Function:
    """Asks for one pixel of some tiles that are collected next, and spread next; nothing where a map is null."""
    rows = product_rows(vectors)
    with module.function("fetch", 3, 10) as (function, code):
        output, added, source, row, pixel, source_row, source_pixel = function.args[:7]
        columns, first, next_first, point, tile, channel = function.args[7:]
        i, j = code.sdiv(point, code.index(tile_side)), code.srem(point, code.index(tile_side))

        def ask(array: ir.Value, first: ir.Value, row: ir.Value, pixel: ir.Value, lines: int, *, write: bool) -> None:
            there = code.and_(code.not_(code.is_null(array)), code.icmp_signed("<", i, code.index(lines)))
            with code.if_then(there):
                y, x = tile_corner(code, code.add(first, tile), columns, tile_side)
                corner = code.at(array, channel, code.mul(code.add(y, i), row), code.mul(code.add(x, j), pixel))
                for r in range(rows):  # those to the right; beyond the edge, something that is not needed
                    for v in range(vectors):
                        at = code.at(corner, code.mul(pixel, code.index(r * tile_side)), code.index(v * code.lanes))
                        code.prefetch(at, write=write)

        ask(output, first, row, pixel, tile_side, write=True)
        ask(added, first, row, pixel, tile_side, write=False)
        ask(source, next_first, source_row, source_pixel, tile_side + 2, write=False)
    return function


def write_collect(module: Module, products: Products, method: Method, end: End) -> ir.Function:
    """A^T m A plus the bias, and what follows, into the output's pixels; the last tiles may reach beyond its edge."""
    with module.function(f"collect_{end}", 8, 8) as (function, code):
        product, output, added, also, bias, scale, peaks, held = function.args[:8]
        row, channels, height, width, columns, first, count, stride = function.args[8:]
        size, side, factors = method.tile, method.side, products.point_factors(method)
        with code.loop(count) as (tile, _):
            y, x = tile_corner(code, code.add(first, tile), columns, size)
            corner = code.add(code.mul(y, row), code.mul(x, channels))
            fits = [code.icmp_signed("<=", code.add(at, code.index(size)), limit) for at, limit in ((y, height), (x, width))]
            with code.loop(channels, code.lanes) as (channel, _):
                points = code.at(product, code.mul(tile, stride), code.mul(channel, code.index(method.points + 1)))
                shift, factor = code.read(code.at(bias, channel)), code.constant(1)
                if products is Products.INT16:
                    factor = code.fmul(code.spread(code.load(code.at(peaks, tile))), code.read(code.at(scale, channel)))
                with code.loop(code.index(side)) as (j, _):
                    places = [held_at(code, points, i * side, j) for i in range(side)]
                    if products is Products.INT16:
                        column = [code.sitofp(code.read_as(code.integers, at), code.vector) for at in places]
                    else:
                        column = [code.read(at) for at in places]
                    for i, value in enumerate(method.collect_line(code, column, factors)):
                        code.write(value, held_at(code, held, i * side, j))

                def line(i: int) -> list[ir.Value]:
                    kept = [code.read(held_at(code, held, i * side, code.index(j))) for j in range(side)]
                    return method.collect_line(code, kept, factors)

                def finish(i: int, j: int, value: ir.Value) -> None:
                    at = code.total(corner, channel, code.mul(row, code.index(i)), code.mul(channels, code.index(j)))
                    done = code.multiply_add(value, factor, shift)
                    if end == End.RELU:
                        done = code.largest(done, code.constant(0))
                    for array in {End.ADD: [added], End.ADD_BOTH: [added, also]}.get(end, []):
                        done = code.fadd(done, code.read(code.at(array, at)))
                    code.write(done, code.at(output, at))

                with code.if_else(code.and_(*fits)) as (inside, edge):
                    with inside:
                        for i in range(size):
                            for j, value in enumerate(line(i)):
                                finish(i, j, value)
                    with edge:
                        for i in range(size):
                            with code.if_then(code.icmp_signed("<", code.add(y, code.index(i)), height)):
                                for j, value in enumerate(line(i)):
                                    with code.if_then(code.icmp_signed("<", code.add(x, code.index(j)), width)):
                                        finish(i, j, value)
    return function
