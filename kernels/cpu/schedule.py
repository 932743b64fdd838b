"""Convolutions one after the other, shared by threads: each takes its next strip of tiles when what that reads is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from sanrt.arrays import Array
from sanrt.kernels.cpu.ir import INT, LINE, POINTER, Code, Module, aligned, this_processor
from sanrt.kernels.cpu.soca import moments_rows, write_moments
from sanrt.kernels.cpu.winograd import (
    Convolution,
    End,
    Map,
    Products,
    method_of,
    product_shape,
    tile_stride,
    write_collect,
    write_fetch,
    write_product,
    write_spread,
)
from sanrt.kernels.cpu.workers import Workers

STRIP = 300_000
"""Bytes of a strip, transformed, and of its products: with the weights they stay in a core's own cache."""
EVEN_PARTS = 8
"""There is a multiple of so many strips, so that threads share them evenly."""
FLAG = LINE // 8
"""Integers from one flag to the next: threads that write to the same line of the cache wait for each other."""
NEAR = 2**24
"""Bytes of maps that a shared cache holds."""
PART, MOST_LAG = 24, 30
"""In larger maps, strips that a thread takes of a step before it takes the next step's, and by how many these lag in all."""

POINTERS = ("source", "output", "added", "also", "weight", "bias", "scale", "gate", "moments")
NUMBERS = (
    *("end", "row", "target_row", "inputs", "outputs", "height", "width", "columns"),
    *("spread_stride", "product_stride"),
)
FIELDS = (*POINTERS, *NUMBERS)
"""Of a step, as the kernel reads them."""
TICKET = ("step", "flag", "begin", "tiles", "first_needed", "last_needed", "strip")
"""Of a strip in a step; the flags of the strips that it needs lie side by side."""


@dataclass(frozen=True)
class Step:
    """One convolution: into `output`, a map of `source`'s size.

    added, also: maps of the output's size that are added; either may be the output. gate (padded I,): factors of the
    source's channels. moments: where to put those of the output (`moments_of`).
    """

    convolution: Convolution
    source: Map
    output: Map
    relu: bool = False
    added: Map | None = None
    also: Map | None = None
    gate: Array | None = None
    moments: Array | None = None

    def __post_init__(self) -> None:
        conv, source, output = self.convolution, self.source, self.output
        maps = [each for each in (output, self.added, self.also) if each]
        # What is wrong here would be written beyond the arrays.
        size = source.height, source.width, conv.outputs
        assert all((each.height, each.width, each.array.shape[2]) == size for each in maps)
        assert (source.array.shape[2], source.method) == (conv.inputs, conv.method)
        assert source is not output
        assert self.added or not self.also
        assert not (self.relu and self.added)
        assert self.gate is None or len(self.gate) == conv.inputs

    @property
    def end(self) -> End:
        if self.also:
            return End.ADD_BOTH
        return End.ADD if self.added else End.RELU if self.relu else End.NOTHING

    def fields(self) -> list[int]:
        conv = self.convolution
        arrays: dict[str, Any] = {
            "source": self.source.array,
            "output": self.output.pixels,
            "added": self.added.pixels if self.added else None,
            "also": self.also.pixels if self.also else None,
            "weight": conv.weight,
            "bias": conv.bias,
            "scale": conv.scale,
            "gate": self.gate,
            "moments": self.moments,
        }
        numbers = {
            "end": list(End).index(self.end),
            "row": self.source.array.shape[1] * conv.inputs,
            "target_row": self.output.array.shape[1] * conv.outputs,
            "inputs": conv.inputs,
            "outputs": conv.outputs,
            "height": self.source.height,
            "width": self.source.width,
            "columns": self.source.tiles[1],
            "spread_stride": tile_stride(conv.inputs, conv.products),
            "product_stride": tile_stride(conv.outputs, conv.products),
        }
        addresses = {name: 0 if array is None else array.ctypes.data for name, array in arrays.items()}
        return [{**addresses, **numbers}[name] for name in FIELDS]


class Program:
    """Steps over maps of one size, each reading what the one before it wrote; in place where a step adds to its output.

    Every thread has its own part of the picture, so that its maps stay in its own caches. At the borders it waits for what
    its neighbours have not done yet.
    """

    def __init__(self, steps: list[Step], workers: Workers) -> None:
        self.steps, self.workers = steps, workers  # the table points to the steps' arrays
        convolutions = [step.convolution for step in steps]
        (outputs,) = {conv.outputs for conv in convolutions}  # so that one set of kernels serves all
        inputs = max(conv.inputs for conv in convolutions)
        ((products, taps),) = {(conv.products, conv.method.taps) for conv in convolutions}
        vectors, rows = product_shape(outputs)
        self.kernel = kernels(products, vectors, taps)["run"]
        self.table = np.array([step.fields() for step in steps], np.int64)
        strip = strip_tiles(max(inputs, outputs), rows, products)
        (tiles,) = {step.source.tiles for step in steps}
        maps = {id(each.array): each.array.nbytes for step in steps for each in (step.source, step.output)}
        self.far = sum(maps.values()) > NEAR
        self.tickets = tickets(*tiles, rows, strip, len(steps), workers.count, self.far)
        self.flags = sum(len(each[:-1]) for each in self.tickets)
        assert all(len(step.moments) * len(steps) == self.flags for step in steps if step.moments is not None)
        self.sizes = {
            "spread": strip * tile_stride(inputs, products),
            "product": strip * tile_stride(outputs, products),
            "tile": products.points * this_processor().lanes + strip,
        }

    def run(self) -> None:
        """All steps."""
        assert len(self.tickets) == self.workers.count
        flags = aligned((self.flags, FLAG), np.int64)

        def work(thread: int) -> None:
            mine, buffer = self.tickets[thread], self.workers.buffer
            try:
                buffers = [buffer(name, size) for name, size in self.sizes.items()]
                arrays: list[npt.NDArray[Any]] = [self.table, mine, flags, *buffers]
                self.kernel(*(array.ctypes.data for array in arrays), len(mine[:-1]), self.far)
            except BaseException:
                flags.fill(1)  # nobody shall wait for this thread
                raise

        self.workers.run(work, release=partial(flags.fill, 1))


def strip_tiles(channels: int, rows: int, products: Products) -> int:
    """Most tiles of a strip, a multiple of `rows`."""
    tile_bytes = tile_stride(channels, products) * (4 // products.per_float + 4)
    return max(1, STRIP // tile_bytes // rows) * rows


def strips(tiles: int, unit: int, most: int) -> npt.NDArray[np.int64]:
    """First tiles of the strips: of at most `most` tiles, whole units but for the last one."""
    units = -(-tiles // unit)
    count = min(units, -(-tiles // (most * EVEN_PARTS)) * EVEN_PARTS)
    return np.linspace(0, units, count, endpoint=False).round().astype(np.int64) * unit


def moments_of(output: Map, products: Products) -> Array:
    """Room for the moments of a map's strips, see `moments_rows`."""
    channels = output.array.shape[2]
    _, rows = product_shape(channels)
    return moments_rows(len(strips(prod(output.tiles), rows, strip_tiles(channels, rows, products))), channels)


@lru_cache(maxsize=64)
def tickets(
    rows: int, columns: int, unit: int, most: int, steps: int, threads: int, far: bool
) -> list[npt.NDArray[np.int64]]:
    """Every strip of every step, for each thread in the order in which it takes them, the last one twice; (n, TICKET)."""
    tiles = rows * columns
    begin = strips(tiles, unit, most)
    end, count = np.append(begin[1:], tiles), len(begin)
    number = np.arange(count)
    thread = number * threads // count
    # Strips at the border of two threads' parts come first, so that neither waits for the other.
    borders = np.flatnonzero(np.diff(thread)) + 0.5
    place = np.abs(number[:, None] - borders).min(1) if len(borders) else number
    # A tile reads the pixels of its eight neighbours.
    first = np.maximum(np.searchsorted(begin, begin - columns - 1, side="right") - 1, 0)
    last = np.searchsorted(begin, end + columns, side="right")
    step, number = np.indices((steps, count))
    before = (step - 1) * count
    values = {
        "step": step,
        "flag": step * count + number,
        "begin": begin[number],
        "tiles": (end - begin)[number],
        "first_needed": np.where(step, before + first, 0),
        "last_needed": np.where(step, before + last, 0),
        "strip": number,
    }
    made = np.stack([values[name] for name in TICKET], axis=-1).reshape(-1, len(TICKET))
    depth, turn = 1, np.zeros_like(step)
    if far and count > 1:
        # A few steps go over a part of the picture before they go over the next one, each behind the one before it by what
        # it needs of that: so it finds in a cache what was written last, and no strip waits for one that comes after it.
        lag = -(-(columns + 1) // int(np.diff(begin).min()))
        depth = max(2, MOST_LAG // lag)
        turn = (place[number] + step % depth * lag) // PART
    made = made[np.lexsort([each.ravel() for each in (place[number], step, turn, step // depth)])]
    parts = (made[thread[made[:, TICKET.index("strip")]] == t] for t in range(threads))
    return [np.concatenate([part, part[-1:]]) for part in parts]


@cache
def kernels(products: Products, vectors: int, taps: int) -> dict[str, Callable[..., None]]:
    """The kernels with so many vectors of outputs in registers; compiled once per process."""
    module, method = Module(this_processor()), method_of(products, taps)
    spreads = {gated: write_spread(module, products, method, gated) for gated in (False, True)}
    product = write_product(module, products, vectors, write_fetch(module, vectors, method.tile))
    collects = [write_collect(module, products, method, end) for end in End]
    write_run(module, products, spreads, product, collects, write_moments(module, vectors, method.tile))
    return module.compile()


def write_run(
    module: Module,
    products: Products,
    spreads: dict[bool, ir.Function],
    product: ir.Function,
    collects: list[ir.Function],
    moments: ir.Function,
) -> None:
    """A thread's tickets, one after the other; `far` is whether maps lie beyond the caches."""
    with module.function("run", 6, 2) as (function, code):
        table, tickets, flags, spread, products_at, held, count, far = function.args
        table, tickets, flags = (code.bitcast(each, INT.as_pointer()) for each in (table, tickets, flags))
        with code.loop(count) as (taken, _):
            entry = code.at(tickets, code.mul(taken, code.index(len(TICKET))))
            ticket, following = (
                {name: code.field(entry, at + i) for i, name in enumerate(TICKET)} for at in (0, len(TICKET))
            )
            step, then = (read_step(code, table, each["step"]) for each in (ticket, following))
            with code.loop(code.sub(ticket["last_needed"], ticket["first_needed"])) as (i, _):
                flag = code.add(ticket["first_needed"], i)
                code.wait(code.at(flags, code.mul(flag, code.index(FLAG))))
            peaks = code.at(held, code.index(products.points * code.lanes))
            tiles = [step["columns"], ticket["begin"], ticket["tiles"]]
            source = [step["source"], step["gate"], spread, peaks, held, step["row"], step["inputs"]]
            with code.if_else(code.is_null(step["gate"])) as (plain, gated):
                for block, function in (plain, spreads[False]), (gated, spreads[True]):
                    with block:
                        code.call(function, [*source, *tiles, step["spread_stride"]])
            ahead = [step["row"], step["columns"], ticket["begin"], following["begin"]]
            buffers = spread, products_at, peaks, held
            write_products(code, products, step, tiles, buffers, [then["source"], far, *ahead], product, collects)
            with code.if_then(code.not_(code.is_null(step["moments"]))):
                shape = [step["outputs"], step["height"], step["width"], *tiles, ticket["strip"]]
                code.call(moments, [step["output"], step["moments"], products_at, step["target_row"], *shape])
            done = code.at(flags, code.mul(ticket["flag"], code.index(FLAG)))
            code.store_atomic(code.index(1), done, "release", 8)


def read_step(code: Code, table: ir.Value, number: ir.Value) -> dict[str, ir.Value]:
    """A row of the table by its names."""
    row = code.at(table, code.mul(number, code.index(len(FIELDS))))
    values = {name: code.field(row, i) for i, name in enumerate(FIELDS)}
    return {name: code.inttoptr(value, POINTER) if name in POINTERS else value for name, value in values.items()}


def write_products(
    code: Code,
    products: Products,
    step: dict[str, ir.Value],
    tiles: list[ir.Value],
    buffers: tuple[ir.Value, ...],
    ahead: list[ir.Value],
    product: ir.Function,
    collects: list[ir.Function],
) -> None:
    """A strip's products and what is collected from them."""
    spread, products_at, peaks, held = buffers
    next_source, far, *where = ahead
    output, added, null = step["output"], step["added"], ir.Constant(POINTER, None)
    near = code.icmp_signed("==", far, code.index(0))
    same = code.icmp_signed("==", code.ptrtoint(added, INT), code.ptrtoint(output, INT))
    twice = code.and_(same, code.not_(near))
    fetched = code.select(near, null, output), code.select(twice, null, added), next_source
    sizes = [tiles[-1], step["inputs"], step["outputs"], step["spread_stride"], step["product_stride"]]
    code.call(product, [spread, step["weight"], products_at, *fetched, *sizes, step["target_row"], *where])
    read = output, added, step["also"], step["bias"], step["scale"], peaks, held
    shape = [step["target_row"], step["outputs"], step["height"], step["width"], *tiles, step["product_stride"]]
    for number, collect in enumerate(collects):
        with code.if_then(code.icmp_signed("==", step["end"], code.index(number))):
            code.call(collect, [products_at, *read, *shape])
