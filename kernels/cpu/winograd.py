"""Convolutions on the CPU by Winograd's minimal filtering F(m x m, r x r): (m + r - 1)^2 products for m^2 pixels.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4: Y = A^T [(G w G^T) * (B^T d B)] A
for each input tile d of (m + r - 1)^2 pixels that gives m x m outputs. w -> G w G^T is the filter transform, done once;
d -> B^T d B is the input transform; A^T [.] A is the output transform. At each of the (m + r - 1)^2 points of a tile, the
products of all channels and many tiles are one matrix product (GEMM).

The arithmetic of the GEMM is fp32, with m + r - 1 = 6, or 16-bit integers, with 8, of which a vector holds twice as many.
There, each tile of B^T d B is rounded in steps of the largest value that it could have over 32760, and the weights of each
output channel in the finest steps with which no sum of 32 bits can overflow: the sums themselves are exact.
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

INT16_LIMIT = 32760.0
"""Largest magnitude of a rounded input; below 2^15 - 1 by what the fp32 transform before may be off by."""
WEIGHT_SUM_LIMIT = 65536
"""Largest sum of the magnitudes of one output channel's weights at a point: times INT16_LIMIT it is below 2^31."""
PEAK_MIN, PEAK_MAX = 1e-30, 1e36
"""Clamp for a tile's largest magnitude. Below PEAK_MIN it counts as PEAK_MIN, so that no step is zero; above PEAK_MAX as
infinity, because B^T d B could overflow."""
ROUNDING_MAGIC = 1.5 * 2.0**23
"""Added to a float32 below 2^22 it leaves the rounded value in the lowest bits, as an integer in two's complement.

So one multiply-add scales and rounds; a conversion to integers would be an instruction more for every value."""

MAX_OUTPUT_VECTORS = 4
"""Most vectors of output channels in the GEMM's microkernel."""


@dataclass(frozen=True)
class WinogradTransform:
    """The matrices of F(tile, taps), interpolated at the points 0, infinity and +-p for each p of `magnitudes`.

    Lavin, "Winograd convolution" (wincnn), and Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd
    Convolution for Deep Neural Networks", 2018, have the general construction. With both signs of a point, the two rows of
    B^T and the two columns of A^T share all their products.
    """

    magnitudes: tuple[float, ...]
    taps: int = 3
    """Side of the filter, r."""

    @property
    def side(self) -> int:
        """Inputs along one axis, m + r - 1: as many as points."""
        return 2 * len(self.magnitudes) + 2

    @property
    def tile(self) -> int:
        """Outputs along one axis, m."""
        return self.side - self.taps + 1

    @property
    def border(self) -> int:
        """Width of the zero padding around a map."""
        return self.taps // 2

    @property
    def points(self) -> int:
        """Points of a two-dimensional tile; at each a product for every pair of channels."""
        return self.side**2

    @property
    def finite_points(self) -> list[float]:
        """The points but infinity, in the order of the rows of G and B^T."""
        return [0.0, *(sign * p for p in self.magnitudes for sign in (1, -1))]

    @cached_property
    def filter(self) -> Matrix:
        """G of the filter transform: (side, taps)."""
        powers = np.arange(self.taps)
        rows = [p**powers / np.prod([p - q for q in self.finite_points if q != p]) for p in self.finite_points]
        return np.array([*rows, powers == powers[-1]])

    @cached_property
    def growth(self) -> Matrix:
        """Sum of the magnitudes in each row of B^T: how many times larger than the inputs its results can be."""
        finite = self.finite_points
        return np.array([np.abs(np.poly([q for q in finite if q != p])).sum() for p in [*finite, np.inf]])

    @cached_property
    def row_scale(self) -> Matrix:
        """Divisors of the rows of growth * G that give all of them one norm, so that 16 bits are as fine for each.

        The output transform multiplies by the same factors again.
        """
        norms: Matrix = np.linalg.norm(self.growth[:, None] * self.filter, axis=1)
        return np.asarray(norms / norms[1])

    def others(self, magnitude: float | None = None) -> list[float]:
        """Coefficients of the product of t - p^2 over all magnitudes p but the given one; the lowest power first."""
        return [float(c) for c in np.poly([p * p for p in self.magnitudes if p != magnitude])[::-1]]

    def input_transform(self, code: Code, d: list[ir.Value]) -> list[ir.Value]:
        """B^T d of one line: row q of B^T has the coefficients of the product of t - p over all finite points p but q."""
        done = [code.weighted_sum(self.others(), d[:-1:2])]
        for p in self.magnitudes:
            even, odd = (code.weighted_sum(self.others(p), d[begin:-1:2]) for begin in (2, 1))
            done += [code.scaled_add(p, odd, even), code.scaled_add(-p, odd, even)]
        return [*done, code.weighted_sum(self.others(), d[1::2])]

    def output_transform(self, code: Code, m: list[ir.Value], factors: Sequence[float]) -> list[ir.Value]:
        """A^T (factors * m) of one line: the columns of A^T are the powers of the points; +-p have one factor."""
        # Even powers of p and -p are the same, odd ones opposite: each pair of points needs one sum and one difference.
        pairs = [(code.fadd(a, b), code.fsub(a, b)) for a, b in zip(m[1:-1:2], m[2:-1:2], strict=True)]
        done = []
        for power in range(self.tile):
            powers = [factor * p**power for p, factor in zip(self.magnitudes, factors[1:-1:2], strict=True)]
            done.append(code.weighted_sum(powers, [pair[power % 2] for pair in pairs]))
        done[0], done[-1] = code.scaled_add(factors[0], m[0], done[0]), code.scaled_add(factors[-1], m[-1], done[-1])
        return done


class Arithmetic(StrEnum):
    """Number format of the GEMM's operands."""

    FP32 = "fp32"
    INT16 = "int16"

    @property
    def per_lane(self) -> int:
        """Operands in a 32-bit lane, whose products are added up together."""
        return 1 if self is Arithmetic.FP32 else 2

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """Magnitudes of the interpolation points.

        More points need fewer products per pixel and lose more digits: too many for fp32, few beside a rounding to int16.
        """
        return {Arithmetic.FP32: (1.0, 2.0), Arithmetic.INT16: (1.0, 2.0, 0.5)}[self]

    @property
    def points(self) -> int:
        """Points of a tile, whatever the taps."""
        return WinogradTransform(self.magnitudes).points

    def output_factors(self, transform: WinogradTransform) -> list[float]:
        """What the output transform multiplies the points' sums by along one axis."""
        return [1.0] * transform.side if self is Arithmetic.FP32 else [float(each) for each in transform.row_scale]


@cache
def winograd_transform(arithmetic: Arithmetic, taps: int = 3) -> WinogradTransform:
    """The transform that convolutions of taps x taps use in an arithmetic."""
    return WinogradTransform(arithmetic.magnitudes, taps)


class Epilogue(StrEnum):
    """What the output transform does besides adding the bias, while the values are in registers."""

    NOTHING = "nothing"
    RELU = "relu"
    ADD = "add"
    """Add a map of the output's size."""
    ADD_BOTH = "add_both"
    """Add two such maps."""


@dataclass(eq=False)
class PaddedMap:
    """Features as (rows, columns, channels), padded with zeros to whole tiles and vectors and by a border.

    Kernels read whole tiles and vectors, and rely on the zeros; they write nothing but the pixels.
    """

    array: Array
    """All rows of the padded map, or those from `first_row` on that are in memory now."""
    height: int
    width: int
    transform: WinogradTransform
    """The transform of the convolution that reads the map; its tile and border give the padding."""
    first_row: int = 0

    @classmethod
    def zeros(cls, height: int, width: int, channels: int, transform: WinogradTransform) -> PaddedMap:
        """An all-zero map."""
        made = cls.without_memory(height, width, channels, transform)
        made.array = aligned((made.rows_in_all, *made.array.shape[1:]))
        return made

    @classmethod
    def without_memory(cls, height: int, width: int, channels: int, transform: WinogradTransform) -> PaddedMap:
        """A map of which no row is in memory yet."""
        columns = whole(width, transform.tile) + 2 * transform.border
        return cls(np.zeros((0, columns, whole_vectors(channels)), np.float32), height, width, transform)

    @property
    def rows_in_all(self) -> int:
        """Rows of the padded map, in memory or not."""
        return whole(self.height, self.transform.tile) + 2 * self.transform.border

    @property
    def row_bytes(self) -> int:
        """Bytes of one padded row."""
        return math.prod(self.array.shape[1:]) * self.array.itemsize  # the strides of no rows would be zeros

    def has_room_for(self, height: int, width: int, channels: int) -> bool:
        """Whether a map of this size fits into the same memory: of the same width and channels, and no higher."""
        same = (self.width, self.array.shape[2]) == (width, whole_vectors(channels))
        return same and whole(height, self.transform.tile) + 2 * self.transform.border <= len(self.array)

    def with_height(self, height: int) -> PaddedMap:
        """A map of fewer rows in the same memory; what lies beyond them is zero again."""
        array = self.array[: whole(height, self.transform.tile) + 2 * self.transform.border]
        array[height + self.transform.border :] = 0
        return replace(self, array=array, height=height)

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.height // self.transform.tile), -(-self.width // self.transform.tile)

    @property
    def pixels(self) -> Array:
        """The map without its padding, a view (height, width, channels)."""
        return self.rows(0, self.height)

    def rows(self, top: int, bottom: int) -> Array:
        """Rows of the map without its padding, all of them in memory: a view (rows, width, channels)."""
        border = self.transform.border
        begin = border - self.first_row
        return self.array[begin + top : begin + bottom, border : border + self.width]

    def part(self, top: int, bottom: int) -> PaddedMap:
        """Rows from one on the tiles' grid on as a map of their own to be written, in the same memory."""
        end = whole(bottom - top, self.transform.tile) + 2 * self.transform.border
        return replace(self, array=self.array[top - self.first_row :][:end], height=bottom - top)

    @property
    def address(self) -> int:
        """Where the padded map begins, or would begin if all of its rows were in memory."""
        return self.array.ctypes.data - self.first_row * self.row_bytes

    @property
    def pixels_address(self) -> int:
        """The same for its first pixel."""
        return self.address + self.transform.border * (self.row_bytes + self.array.strides[1])


def whole(size: int, part: int) -> int:
    """`size` rounded up to a multiple of `part`."""
    return -(-size // part) * part


def whole_vectors(channels: int) -> int:
    """Channels rounded up to whole vectors."""
    return whole(channels, this_processor().lanes)


class Convolution:
    """A convolution with zero padding, its filters transformed: weight (O, I, r, r), r odd, and bias (O,), float32."""

    def __init__(self, weight: Array, bias: Array, arithmetic: Arithmetic = Arithmetic.FP32) -> None:
        outputs, inputs, taps = weight.shape[:3]
        self.arithmetic, self.transform = arithmetic, winograd_transform(arithmetic, taps)
        self.inputs, self.outputs = whole_vectors(inputs), whole_vectors(outputs)
        # Transformed in float64 and rounded once: G's fractions would cost fp32 weights digits.
        padded = np.zeros((self.inputs, self.outputs, taps, taps))
        padded[:inputs, :outputs] = weight.transpose(1, 0, 2, 3)
        self.bias = np.zeros(self.outputs, np.float32)
        self.bias[:outputs] = bias
        transform = self.transform
        if arithmetic is Arithmetic.FP32:
            transformed, self.scale = transform_filter(transform.filter, padded), np.ones_like(self.bias)
        else:
            transformed, step = rounded(
                transform_filter(transform.filter * (transform.growth / transform.row_scale)[:, None], padded)
            )
            # The output transform multiplies sums by this and by the tile's largest magnitude, which undoes both roundings.
            self.scale = (step / INT16_LIMIT).astype(np.float32)
        block, pair = microkernel_shape(self.outputs)[0] * this_processor().lanes, arithmetic.per_lane
        transformed = transformed.reshape(transform.points, self.inputs // pair, pair, self.outputs // block, block)
        transformed = transformed.transpose(0, 3, 1, 4, 2)
        self.weight = aligned(transformed.shape, np.float32 if arithmetic is Arithmetic.FP32 else np.int16)
        self.weight[:] = transformed
        """[point][block of outputs][inputs][output][input of a pair]: the order in which the GEMM reads it."""


def transform_filter(g: Matrix, weight: Matrix) -> Matrix:
    """The filter transform G w G^T: (inputs, outputs, taps, taps) -> (points, inputs, outputs)."""
    transformed: Matrix = np.einsum("ia,jb,koab->ijko", g, g, weight, optimize=True)
    return transformed.reshape(len(g) ** 2, *weight.shape[:2])


def rounded(transformed: Matrix) -> tuple[Matrix, Matrix]:
    """Transformed weights as whole numbers of 16 bits, and the size of a step for each output channel.

    The step is the finest with which neither a weight exceeds INT16_LIMIT nor a sum of magnitudes WEIGHT_SUM_LIMIT; rounding
    can add half a step to each of the summands.
    """
    magnitudes = np.abs(transformed)
    for_sums = magnitudes.sum(1).max(0) / (WEIGHT_SUM_LIMIT - transformed.shape[1])
    step = np.maximum(np.maximum(for_sums, magnitudes.max((0, 1)) / INT16_LIMIT), PEAK_MIN)
    return np.rint(transformed / step), step


def tile_stride(channels: int, arithmetic: Arithmetic) -> int:
    """Elements from one transformed tile to the next.

    One point more than there are, and two vectors: at a stride of a large power of two, the tiles' values at one point would
    fall into a few sets of the cache and evict each other.
    """
    return (arithmetic.points + 1) * channels + 2 * this_processor().lanes


def microkernel_shape(outputs: int) -> tuple[int, int]:
    """(vectors of outputs, rows of tiles) of the GEMM's microkernel: its sums and operands fit the vector registers.

    Of the widths that divide the outputs it takes the widest that leaves as many rows as vectors, since rows + vectors loads
    serve rows * vectors products.
    """
    processor = this_processor()
    vectors = max(
        v for v in range(1, MAX_OUTPUT_VECTORS + 1) if outputs // processor.lanes % v == 0 and microkernel_rows(v) >= v
    )
    return vectors, microkernel_rows(vectors)


def microkernel_rows(vectors: int) -> int:
    """Rows of tiles that fit beside so many vectors of outputs: sums, the vectors of weights, and one broadcast input."""
    return (this_processor().registers - vectors - 1) // vectors


def tile_origin(code: Code, tile: ir.Value, columns: ir.Value, size: int) -> tuple[ir.Value, ir.Value]:
    """First row and column of a tile's outputs; tiles are numbered in reading order."""
    return code.mul(code.sdiv(tile, columns), code.index(size)), code.mul(code.srem(tile, columns), code.index(size))


def write_input_transform(module: Module, arithmetic: Arithmetic, transform: WinogradTransform, gated: bool) -> ir.Function:
    """The input transform B^T d B of `count` tiles from `first` on, into transformed[tile][point][channel].

    INT16 results are rounded to the tile's own steps, and the tile's largest magnitude is put into peaks[tile]. `gated`
    multiplies the source's channels by the gate as they are read: the gated map is never written.
    """
    with module.function("input_transform_gated" if gated else "input_transform", 5, 6) as (function, code):
        source, gate, transformed, peaks, scratch, row, channels, columns, first, count, stride = function.args
        side = transform.side
        if arithmetic is Arithmetic.INT16:
            transformed = code.bitcast(transformed, SHORT.as_pointer())
        with code.loop(count) as (tile, _):
            y, x = tile_origin(code, code.add(first, tile), columns, transform.tile)
            corner = code.at(source, code.mul(y, row), code.mul(x, channels))
            target = code.at(transformed, code.mul(tile, stride))

            def column(channel: ir.Value, j: ir.Value, corner: ir.Value = corner) -> list[ir.Value]:
                top = code.at(corner, channel, code.mul(channels, j))
                values = [code.read(code.at(top, code.mul(row, code.index(i)))) for i in range(side)]
                return [code.fmul(code.read(code.at(gate, channel)), value) for value in values] if gated else values

            factors = (
                write_peak(code, transform, channels, column, code.at(peaks, tile)) if arithmetic is Arithmetic.INT16 else {}
            )
            with code.loop(channels, code.lanes) as (channel, _):
                # First the columns, then the rows, by way of memory: a tile of 6 x 6 or 8 x 8 vectors exceeds the registers.
                with code.loop(code.index(side)) as (j, _):
                    for i, value in enumerate(transform.input_transform(code, column(channel, j))):
                        code.write(value, scratch_at(code, scratch, i * side, j))
                for i in range(side):
                    line = [code.read(scratch_at(code, scratch, i * side, code.index(j))) for j in range(side)]
                    for j, value in enumerate(transform.input_transform(code, line)):
                        at = code.at(target, channel, code.mul(channels, code.index(i * side + j)))
                        if arithmetic is Arithmetic.INT16:
                            factor = factors[transform.growth[i] * transform.growth[j]]
                            code.write_int16(code.multiply_add(value, factor, code.constant(ROUNDING_MAGIC)), at)
                        else:
                            code.write(value, at)
    return function


def scratch_at(code: Code, scratch: ir.Value, row: int, j: ir.Value) -> ir.Value:
    """Address of vector row + j in scratch memory, where a tile lies between the passes over columns and rows."""
    return code.at(scratch, code.mul(code.add(j, code.index(row)), code.index(code.lanes)))


def write_peak(
    code: Code,
    transform: WinogradTransform,
    channels: ir.Value,
    column: Callable[[ir.Value, ir.Value], list[ir.Value]],
    peak: ir.Value,
) -> dict[float, ir.Value]:
    """Store a tile's largest magnitude; returns what scales the transformed points to 16 bits, by their growth.

    A point of growth a * b is at most so many times larger than the tile's peak: scaled by the bound, not by the values
    found, it needs no second pass over the transformed tile.
    """
    nothing = ir.Constant(code.integers, [0] * code.lanes)
    with code.loop(channels, code.lanes, carried=[nothing] * transform.side) as (channel, largest):
        for j in range(transform.side):
            for i, value in enumerate(column(channel, code.index(j))):
                # Compared as integers, infinity exceeds every number and NaN exceeds infinity, so neither gets lost.
                largest[i] = code.unsigned_maximum(largest[i], code.magnitude_bits(value))
    found = code.bitcast(code.reduced(code.unsigned_maximum, reduce(code.unsigned_maximum, largest)), FLOAT)
    # An ordered comparison with NaN is false, so both selects let NaN pass, and the tile's pixels come out as NaN.
    least = ir.Constant(FLOAT, PEAK_MIN)
    found = code.select(code.fcmp_ordered("<", found, least), least, found)
    found = code.select(code.fcmp_ordered(">", found, ir.Constant(FLOAT, PEAK_MAX)), ir.Constant(FLOAT, math.inf), found)
    code.store(found, peak)
    step = code.fdiv(ir.Constant(FLOAT, INT16_LIMIT), found)
    growths = sorted({float(a * b) for a in transform.growth for b in transform.growth})
    return {growth: code.broadcast(code.fmul(step, ir.Constant(FLOAT, 1 / growth))) for growth in growths}


def write_gemm(module: Module, arithmetic: Arithmetic, vectors: int, prefetch: ir.Function) -> ir.Function:
    """For each point a matrix product: product[tile][block of lanes][point] = transformed[tile][point] @ weight[point].

    The last microkernel may run over up to rows - 1 tiles beyond the strip, which are computed from leftovers and ignored;
    buffers have room for them. Each microkernel is preceded by a call of `prefetch` with the other arguments: a little of
    what the output transform and the next input transform will touch is fetched while the GEMM computes.
    """
    rows, pair, points = microkernel_rows(vectors), arithmetic.per_lane, arithmetic.points
    with module.function("gemm", 6, 10) as (function, code):
        transformed, weight, product, *maps = function.args[:6]
        tiles, inputs, outputs, transformed_stride, product_stride, row, source_row, *where = function.args[6:]
        block, zero, add = vectors * code.lanes, code.constant(0), code.multiply_add
        if arithmetic is Arithmetic.INT16:
            transformed, weight = (code.bitcast(each, SHORT.as_pointer()) for each in (transformed, weight))
            product = code.bitcast(product, WORD.as_pointer())
            zero, add = ir.Constant(code.integers, [0] * code.lanes), code.multiply_add_pairs
        with code.loop(code.index(points)) as (point, _):
            panels = code.at(weight, code.mul(point, code.mul(inputs, outputs)))
            # Outputs outside, tiles inside: a panel of weights is read from L2 once and stays in L1 while the tiles pass.
            with code.loop(outputs, block) as (output, _), code.loop(tiles, rows) as (tile, _):
                code.call(prefetch, [*maps, row, outputs, source_row, inputs, *where, point, tile, output])
                panel, numbers = (
                    code.at(panels, code.mul(output, inputs)),
                    [code.add(tile, code.index(r)) for r in range(rows)],
                )
                pixels = [code.at(transformed, code.mul(n, transformed_stride), code.mul(point, inputs)) for n in numbers]
                following = code.at(panel, code.mul(inputs, code.index(block)))
                with code.loop(inputs, pair, carried=[zero] * (rows * vectors)) as (k, sums):
                    offsets = [
                        code.add(code.mul(k, code.index(block)), code.index(v * code.lanes * pair)) for v in range(vectors)
                    ]
                    factors = [code.read_as(zero.type, code.at(panel, offset)) for offset in offsets]
                    # A panel of weights is read once per strip, from a further cache: ask for the next one meanwhile.
                    for offset in offsets:
                        code.prefetch(code.at(following, offset), write=False)
                    for r, pixel in enumerate(pixels):
                        value = code.broadcast(code.read_as(zero.type.element, code.at(pixel, k)))
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


def write_prefetch(module: Module, vectors: int, tile_side: int) -> ir.Function:
    """Prefetch one pixel of each of a microkernel's tiles: in the maps of the output transform, and in the next source.

    The pixel is the one at the GEMM's current point, so that a strip's GEMM asks for every pixel of its tiles once. Nothing
    is asked of a map whose pointer is null.
    """
    rows = microkernel_rows(vectors)
    with module.function("prefetch", 3, 10) as (function, code):
        output, added, source, row, pixel, source_row, source_pixel = function.args[:7]
        columns, first, next_first, point, tile, channel = function.args[7:]
        # The number of the point counts the pixels of a tile, row by row; beyond a map's last row it asks for nothing.
        i, j = code.sdiv(point, code.index(tile_side)), code.srem(point, code.index(tile_side))

        def ask(array: ir.Value, first: ir.Value, row: ir.Value, pixel: ir.Value, lines: int, *, write: bool) -> None:
            there = code.and_(code.not_(code.is_null(array)), code.icmp_signed("<", i, code.index(lines)))
            with code.if_then(there):
                y, x = tile_origin(code, code.add(first, tile), columns, tile_side)
                corner = code.at(array, channel, code.mul(code.add(y, i), row), code.mul(code.add(x, j), pixel))
                for r in range(
                    rows
                ):  # the next tiles to the right; beyond the map's edge the address is of no use, and does no harm
                    for v in range(vectors):
                        at = code.at(corner, code.mul(pixel, code.index(r * tile_side)), code.index(v * code.lanes))
                        code.prefetch(at, write=write)

        ask(output, first, row, pixel, tile_side, write=True)
        ask(added, first, row, pixel, tile_side, write=False)
        ask(source, next_first, source_row, source_pixel, tile_side + 2, write=False)
    return function


def write_output_transform(
    module: Module, arithmetic: Arithmetic, transform: WinogradTransform, epilogue: Epilogue
) -> ir.Function:
    """The output transform A^T m A of `count` tiles from `first` on, plus bias and epilogue, into the output's pixels.

    Tiles at the right and bottom may reach beyond the picture; what they would write there must stay zero, as the padding of
    the next convolution.
    """
    with module.function(f"output_transform_{epilogue}", 8, 8) as (function, code):
        product, output, added, also, bias, scale, peaks, scratch = function.args[:8]
        row, channels, height, width, columns, first, count, stride = function.args[8:]
        size, side, factors = transform.tile, transform.side, arithmetic.output_factors(transform)
        with code.loop(count) as (tile, _):
            y, x = tile_origin(code, code.add(first, tile), columns, size)
            corner = code.add(code.mul(y, row), code.mul(x, channels))
            fits = [code.icmp_signed("<=", code.add(at, code.index(size)), limit) for at, limit in ((y, height), (x, width))]
            with code.loop(channels, code.lanes) as (channel, _):
                points = code.at(product, code.mul(tile, stride), code.mul(channel, code.index(transform.points + 1)))
                shift, factor = code.read(code.at(bias, channel)), code.constant(1)
                if arithmetic is Arithmetic.INT16:
                    factor = code.fmul(code.broadcast(code.load(code.at(peaks, tile))), code.read(code.at(scale, channel)))
                # Columns, then rows, as in the input transform. Sums are still integers here; bias and scale wait for
                # `finish`, where there are m x m values left of (m + r - 1)^2.
                with code.loop(code.index(side)) as (j, _):
                    places = [scratch_at(code, points, i * side, j) for i in range(side)]
                    if arithmetic is Arithmetic.INT16:
                        column = [code.sitofp(code.read_as(code.integers, at), code.vector) for at in places]
                    else:
                        column = [code.read(at) for at in places]
                    for i, value in enumerate(transform.output_transform(code, column, factors)):
                        code.write(value, scratch_at(code, scratch, i * side, j))

                def line(i: int) -> list[ir.Value]:
                    kept = [code.read(scratch_at(code, scratch, i * side, code.index(j))) for j in range(side)]
                    return transform.output_transform(code, kept, factors)

                def finish(i: int, j: int, value: ir.Value) -> None:
                    at = code.total(corner, channel, code.mul(row, code.index(i)), code.mul(channels, code.index(j)))
                    done = code.multiply_add(value, factor, shift)
                    if epilogue == Epilogue.RELU:
                        done = code.maximum(done, code.constant(0))
                    for array in {Epilogue.ADD: [added], Epilogue.ADD_BOTH: [added, also]}.get(epilogue, []):
                        done = code.fadd(done, code.read(code.at(array, at)))
                    code.write(done, code.at(output, at))

                # Nearly all tiles fit: only the others pay for a comparison at each pixel.
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
