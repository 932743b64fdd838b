"""3 x 3 convolutions on the CPU by Winograd's minimal filtering F(4 x 4, 3 x 3): 36 products for 16 pixels instead of 144.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4: Y = A^T [(G w G^T) * (B^T d B)] A
for each 6 x 6 input tile d that gives 4 x 4 outputs; the products of all channels of a tile position are one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from sanrt.kernels.llvm import Code, Module, this_processor
from sanrt.kernels.threads import Workers

Array = npt.NDArray[np.float32]

TILE, SIDE = 4, 6
"""Outputs and inputs of a tile, along one axis."""
POINTS = SIDE * SIDE

INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
"""B^T."""
FILTER = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
"""G."""
OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
"""A^T."""

STRIP = 2048
"""Tiles times channels that are transformed before they are multiplied: both stay in a core's own cache."""
WIDEST = 4
"""Vectors of output channels that the product keeps in registers."""


class End(StrEnum):
    """What follows a convolution within the same pass."""

    NOTHING = "nothing"
    RELU = "relu"
    ADD = "add"
    """A map of the output's size is added."""


@dataclass(frozen=True)
class Map:
    """Features as (rows, columns, channels), in whole tiles and vectors with a border; all zero but the pixels."""

    array: Array
    height: int
    width: int

    @classmethod
    def zeros(cls, height: int, width: int, channels: int) -> Map:
        """An all-zero map."""
        sides = (-(-size // TILE) * TILE + 2 for size in (height, width))
        return cls(np.zeros((*sides, whole_vectors(channels)), np.float32), height, width)

    def fits(self, height: int, width: int, channels: int) -> bool:
        """Whether it is as large as `zeros` would make it."""
        return (self.height, self.width, self.array.shape[2]) == (height, width, whole_vectors(channels))

    @property
    def pixels(self) -> Array:
        """The (height, width, channels) that count, as a view."""
        return self.array[1 : self.height + 1, 1 : self.width + 1]


def whole_vectors(channels: int) -> int:
    """Channels rounded up to full vectors."""
    lanes = this_processor().lanes
    return -(-channels // lanes) * lanes


class Convolution:
    """A 3 x 3 convolution with zero padding, and the sub-pixel shuffle that may follow it.

    weight (O, I, 3, 3), bias (O,), float32; with shuffle s, channel c * s * s + i * s + j goes to row i, column j of a
    pixel's s x s block, as in PyTorch's PixelShuffle.
    """

    def __init__(self, weight: Array, bias: Array, shuffle: int = 1) -> None:
        parts = shuffle * shuffle
        outputs, inputs = weight.shape[0] // parts, weight.shape[1]
        self.shuffle, self.inputs, self.outputs = shuffle, whole_vectors(inputs), whole_vectors(outputs)
        self.vectors, self.rows = product_shape(self.outputs)
        padded = np.zeros((parts, self.inputs, self.outputs, 3, 3))
        padded[:, :inputs, :outputs] = weight.reshape(outputs, parts, inputs, 3, 3).transpose(1, 2, 0, 3, 4)
        self.bias = np.zeros((parts, self.outputs), np.float32)
        self.bias[:, :outputs] = bias.reshape(outputs, parts).T
        g = np.array(FILTER)
        spread = np.einsum("ia,jb,qkoab->qijko", g, g, padded, optimize=True)
        block = self.vectors * this_processor().lanes
        spread = spread.reshape(parts, POINTS, self.inputs, self.outputs // block, block)
        self.weight = np.ascontiguousarray(spread.transpose(0, 1, 3, 2, 4), np.float32)
        """[part][point][block of outputs][input][output]: the order in which the product reads it."""
        self.kernels = kernels(self.vectors)

    def __call__(
        self,
        workers: Workers,
        source: Map,
        output: Map,
        *,
        relu: bool = False,
        add: Map | None = None,
        gate: Array | None = None,
    ) -> None:
        """Into `output`, another map `shuffle` times as large.

        relu or add: what follows; `add` is a map of the output's size, and may be the output. gate (I,): factors of the
        source's channels.
        """
        weight = self.weight
        if gate is not None:
            weight = weight * np.pad(gate, (0, self.inputs - len(gate)))[:, None]
        end = End.ADD if add else End.RELU if relu else End.NOTHING
        kernel = self.kernels[f"convolve_{end}"]
        strip = -(-STRIP // max(self.inputs, self.outputs) // self.rows) * self.rows
        columns = -(-source.width // TILE)
        row, target = source.array.shape[1] * self.inputs, output.array.shape[1] * self.outputs
        arrays, counter = (source.array, output.pixels, (add or output).pixels, weight, self.bias), np.zeros(1, np.int64)

        def work() -> None:
            spread = workers.buffer("spread", strip * tile_stride(self.inputs))
            product = workers.buffer("product", strip * tile_stride(self.outputs))
            kernel(
                *(array.ctypes.data for array in arrays),
                *(spread.ctypes.data, product.ctypes.data, counter.ctypes.data),
                *(row, target, self.inputs, self.outputs, self.shuffle, source.height, source.width, columns),
                *(strip, columns * -(-source.height // TILE)),
            )

        workers.run(work)


def tile_stride(channels: int) -> int:
    """Numbers from one transformed tile to the next: not a multiple of the cache's stride."""
    return POINTS * channels + this_processor().lanes


def product_shape(outputs: int) -> tuple[int, int]:
    """(vectors of outputs, rows of tiles) whose sums fit the registers, with the operands of a step."""
    processor = this_processor()
    vectors = max(v for v in range(1, WIDEST + 1) if outputs // processor.lanes % v == 0 and product_rows(v) >= v)
    return vectors, product_rows(vectors)


def product_rows(vectors: int) -> int:
    """Rows of tiles beside so many vectors of outputs."""
    return (this_processor().registers - vectors - 1) // vectors


@cache
def kernels(vectors: int) -> dict[str, Callable[..., None]]:
    """The convolutions with so many vectors of outputs in registers, by what follows them; compiled once per process."""
    module = Module(this_processor())
    spread, product = write_spread(module), write_product(module, vectors)
    for end in End:
        write_convolve(module, end, spread, product, write_collect(module, end))
    return module.compile()


def combine(code: Code, matrix: Sequence[Sequence[float]], values: Sequence[ir.Value]) -> list[ir.Value]:
    """matrix @ values, with nothing to do for a factor of 0 or 1."""
    return [weighted_sum(code, [(f, v) for f, v in zip(row, values, strict=True) if f]) for row in matrix]


def weighted_sum(code: Code, terms: list[tuple[float, ir.Value]]) -> ir.Value:
    """Sum of factor * value."""
    (factor, value), *rest = sorted(terms, key=lambda term: term[0] != 1)
    done = value if factor == 1 else code.fmul(code.constant(factor), value)
    for factor, value in rest:
        if abs(factor) == 1:
            done = code.fadd(done, value) if factor == 1 else code.fsub(done, value)
        else:
            done = code.multiply_add(code.constant(factor), value, done)
    return done


def transformed(code: Code, matrix: Sequence[Sequence[float]], tile: list[list[ir.Value]]) -> list[list[ir.Value]]:
    """matrix @ tile @ matrix^T."""
    columns = [combine(code, matrix, column) for column in zip(*tile, strict=True)]
    return [combine(code, matrix, row) for row in zip(*columns, strict=True)]


def tile_corner(code: Code, tile: ir.Value, columns: ir.Value) -> tuple[ir.Value, ir.Value]:
    """First row and column of a tile."""
    side = code.index(TILE)
    return code.mul(code.sdiv(tile, columns), side), code.mul(code.srem(tile, columns), side)


def write_spread(module: Module) -> ir.Function:
    """B^T d B of tiles first, first + 1, ...: spread[tile][point][channel]."""
    with module.function("spread", 2, 6) as (function, code):
        source, spread, row, channels, columns, first, count, stride = function.args
        with code.loop(count) as (tile, _):
            y, x = tile_corner(code, code.add(first, tile), columns)
            corner = code.at(source, code.mul(y, row), code.mul(x, channels))
            target = code.at(spread, code.mul(tile, stride))
            with code.loop(channels, code.lanes) as (channel, _):
                rows = [code.at(corner, channel, code.mul(row, code.index(i))) for i in range(SIDE)]
                pixels = [[code.read(code.at(r, code.mul(channels, code.index(j)))) for j in range(SIDE)] for r in rows]
                for i, values in enumerate(transformed(code, INPUT, pixels)):
                    for j, value in enumerate(values):
                        code.write(value, code.at(target, channel, code.mul(channels, code.index(i * SIDE + j))))
    return function


def write_product(module: Module, vectors: int) -> ir.Function:
    """product[tile][point] = spread[tile][point] @ weight[point]; up to rows - 1 tiles after the last are done too."""
    rows = product_rows(vectors)
    with module.function("product", 3, 5) as (function, code):
        spread, weight, product, tiles, inputs, outputs, spread_stride, product_stride = function.args
        block = vectors * code.lanes
        with code.loop(code.index(POINTS)) as (point, _):
            a, c = code.at(spread, code.mul(point, inputs)), code.at(product, code.mul(point, outputs))
            panels = code.at(weight, code.mul(point, code.mul(inputs, outputs)))
            with code.loop(outputs, block) as (output, _), code.loop(tiles, rows) as (tile, _):
                panel = code.at(panels, code.mul(output, inputs))
                pixels = [code.at(a, code.mul(code.add(tile, code.index(r)), spread_stride)) for r in range(rows)]
                with code.loop(inputs, carried=[code.constant(0)] * (rows * vectors)) as (k, sums):
                    factors = [
                        code.read(code.at(panel, code.mul(k, code.index(block)), code.index(v * code.lanes)))
                        for v in range(vectors)
                    ]
                    for r, pixel in enumerate(pixels):
                        value = code.spread(code.load(code.at(pixel, k)))
                        for v, factor in enumerate(factors):
                            sums[r * vectors + v] = code.multiply_add(value, factor, sums[r * vectors + v])
                for r in range(rows):
                    target = code.at(c, code.mul(code.add(tile, code.index(r)), product_stride), output)
                    for v in range(vectors):
                        code.write(sums[r * vectors + v], code.at(target, code.index(v * code.lanes)))
    return function


def write_collect(module: Module, end: End) -> ir.Function:
    """A^T m A plus the bias, and what follows, into the output's pixels; the last tiles may reach beyond its edge."""
    with module.function(f"collect_{end}", 4, 9) as (function, code):
        product, output, added, bias, row, pixel, channels, height, width, columns, first, count, stride = function.args
        with code.loop(count) as (tile, _):
            y, x = tile_corner(code, code.add(first, tile), columns)
            corner = code.add(code.mul(y, row), code.mul(x, pixel))
            source = code.at(product, code.mul(tile, stride))
            with code.loop(channels, code.lanes) as (channel, _):
                points = [
                    [code.read(code.at(source, channel, code.mul(channels, code.index(i * SIDE + j)))) for j in range(SIDE)]
                    for i in range(SIDE)
                ]
                shift = code.read(code.at(bias, channel))
                for i, values in enumerate(transformed(code, OUTPUT, points)):
                    below = code.icmp_signed("<", code.add(y, code.index(i)), height)
                    for j, value in enumerate(values):
                        inside = code.and_(below, code.icmp_signed("<", code.add(x, code.index(j)), width))
                        with code.if_then(inside):
                            at = code.total(corner, channel, code.mul(row, code.index(i)), code.mul(pixel, code.index(j)))
                            done = finished(code, end, code.fadd(value, shift), code.at(added, at))
                            code.write(done, code.at(output, at))
    return function


def finished(code: Code, end: End, value: ir.Value, added: ir.Value) -> ir.Value:
    """What is stored."""
    match end:
        case End.RELU:
            return code.largest(value, code.constant(0))
        case End.ADD:
            return code.fadd(value, code.read(added))
    return value


def write_convolve(module: Module, end: End, spread: ir.Function, product: ir.Function, collect: ir.Function) -> None:
    """A convolution's tiles, a strip at a time; its outputs in shuffle x shuffle parts."""
    with module.function(f"convolve_{end}", 8, 10) as (function, code):
        source, output, added, weight, bias, spread_at, product_at, counter = function.args[:8]
        row, target_row, inputs, outputs, shuffle, height, width, columns, strip, tiles = function.args[8:]
        lanes = code.index(code.lanes)
        spread_stride, product_stride = (code.add(code.mul(code.index(POINTS), n), lanes) for n in (inputs, outputs))
        with code.shared_loop(counter, tiles, strip) as begin:
            left = code.sub(tiles, begin)
            count = code.select(code.icmp_signed("<", left, strip), left, strip)
            code.call(spread, [source, spread_at, row, inputs, columns, begin, count, spread_stride])
            with code.loop(shuffle) as (i, _), code.loop(shuffle) as (j, _):
                part = code.add(code.mul(i, shuffle), j)
                factors = code.at(weight, code.mul(code.mul(part, code.index(POINTS)), code.mul(inputs, outputs)))
                code.call(product, [spread_at, factors, product_at, count, inputs, outputs, spread_stride, product_stride])
                corner = code.add(code.mul(i, target_row), code.mul(j, outputs))
                shift = code.at(bias, code.mul(part, outputs))
                steps_out = [code.mul(target_row, shuffle), code.mul(outputs, shuffle)]
                code.call(
                    collect,
                    [
                        *(product_at, code.at(output, corner), code.at(added, corner), shift, *steps_out),
                        *(outputs, height, width, columns, begin, count, product_stride),
                    ],
                )
