"""A sequence of convolutions as one compiled loop per thread, without a barrier between two of them.

A map's tiles are cut into strips. A thread works through its own strips of all convolutions in a fixed order, and before
each waits for the few strips of the convolution before that this one reads: flags in shared memory say which are done. A
barrier would cost all threads the time of the slowest, dozens of times per picture.
"""

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
from sanrt.kernels.cpu.ir import CACHE_LINE, INT, POINTER, Code, Module, aligned, this_processor
from sanrt.kernels.cpu.soca import StripMoments, write_moments
from sanrt.kernels.cpu.winograd import (
    Arithmetic,
    Convolution,
    Epilogue,
    PaddedMap,
    microkernel_shape,
    tile_stride,
    winograd_transform,
    write_gemm,
    write_input_transform,
    write_output_transform,
    write_prefetch,
)
from sanrt.kernels.cpu.workers import Workers

STRIP_BYTES = 300_000
"""Most bytes of a strip's transformed tiles and products: with a panel of weights they stay in a core's own L2 cache."""
STRIP_COUNT_MULTIPLE = 8
"""A map is cut into a multiple of so many strips, so that 2, 4 or 8 threads get as many each."""
FLAG_STRIDE = CACHE_LINE // 8
"""Integers from one flag to the next: threads that write to one cache line wait for each other (false sharing)."""
SHARED_CACHE_BYTES = 2**24
"""Maps of up to so many bytes are taken to stay in the cores' shared cache; beyond, steps go over parts (`work_items`)."""
PART_STRIPS, MAX_LAG_STRIPS = 24, 30
"""For larger maps: strips that a thread takes of one step before it turns to the next step, and the most strips that the
last of a group of steps may lag behind the first."""

NO_ROWS = (2**62, 0)
"""First and end of no rows at all, for a minimum of the first and a maximum of the end."""

POINTERS = ("source", "output", "added", "also", "weight", "bias", "scale", "gate", "moments")
NUMBERS = (
    *("epilogue", "row", "target_row", "inputs", "outputs", "height", "width", "columns"),
    *("transformed_stride", "product_stride"),
)
STEP_FIELDS = (*POINTERS, *NUMBERS)
"""A row of the table of steps: addresses (0 where there is none), then numbers."""
WORK_ITEM = ("step", "flag", "begin", "tiles", "first_needed", "last_needed", "strip")
"""One strip of one step: its flag, its tiles, and the range of flags to wait for, first_needed up to last_needed."""


@dataclass(frozen=True)
class Step:
    """One convolution of `source` into `output`, a map of the same size.

    added, also: maps of the output's size that are added to the result; either may be the output itself. gate (padded I,):
    factors of the source's channels. moments: receives those of the output's strips (`moments_of`).
    """

    convolution: Convolution
    source: PaddedMap
    output: PaddedMap
    relu: bool = False
    added: PaddedMap | None = None
    also: PaddedMap | None = None
    gate: Array | None = None
    moments: StripMoments | None = None

    def __post_init__(self) -> None:
        conv, source, output = self.convolution, self.source, self.output
        maps = [each for each in (output, self.added, self.also) if each]
        # The kernel checks nothing: sizes that do not fit would write beyond the arrays.
        size = source.height, source.width, conv.outputs
        assert all((each.height, each.width, each.array.shape[2]) == size for each in maps)
        assert (source.array.shape[2], source.transform) == (conv.inputs, conv.transform)
        assert source is not output
        assert self.added or not self.also
        assert not (self.relu and self.added)
        assert self.gate is None or len(self.gate) == conv.inputs

    @property
    def epilogue(self) -> Epilogue:
        if self.also:
            return Epilogue.ADD_BOTH
        return Epilogue.ADD if self.added else Epilogue.RELU if self.relu else Epilogue.NOTHING

    def fields(self) -> list[int]:
        conv = self.convolution
        maps = {"output": self.output, "added": self.added, "also": self.also}
        arrays: dict[str, Any] = {
            "weight": conv.weight,
            "bias": conv.bias,
            "scale": conv.scale,
            "gate": self.gate,
        }
        numbers = {
            "epilogue": list(Epilogue).index(self.epilogue),
            "row": self.source.array.shape[1] * conv.inputs,
            "target_row": self.output.array.shape[1] * conv.outputs,
            "inputs": conv.inputs,
            "outputs": conv.outputs,
            "height": self.source.height,
            "width": self.source.width,
            "columns": self.source.tiles[1],
            "transformed_stride": tile_stride(conv.inputs, conv.arithmetic),
            "product_stride": tile_stride(conv.outputs, conv.arithmetic),
        }
        addresses = {name: 0 if array is None else array.ctypes.data for name, array in arrays.items()}
        addresses |= {name: each.pixels_address if each else 0 for name, each in maps.items()}
        addresses |= {"source": self.source.address, "moments": self.moments.address if self.moments else 0}
        return [{**addresses, **numbers}[name] for name in STEP_FIELDS]

    def rows(self, tile_rows: npt.NDArray[np.int64]) -> dict[int, npt.NDArray[np.int64]]:
        """By the identity of a map, its padded rows that rows of tiles read or write; first and end, as the tiles'."""
        size, border = self.source.transform.tile, self.source.transform.border
        written = size * tile_rows + border
        maps = self.output, self.added, self.also
        return {id(each): written for each in maps if each} | {id(self.source): written + np.array([-border, border])}


class ConvolutionSchedule:
    """Steps over maps of one size, each of which reads what the one before it wrote, ready to run any number of times.

    All at once, every thread has its own part of the picture in all steps, so that what it wrote is still in its core's
    cache when it reads it again. Only at the borders between two parts does a thread wait for another. Or in bands from top
    to bottom, with maps of which only some rows are in memory; either way gives the same numbers.

    Steps may write over maps that the step before them read (the blocks of a group use two maps in turn). That is safe
    because needing is symmetric: the strips that still read a strip's old pixels are those that the new one waits for.
    """

    def __init__(self, steps: list[Step], workers: Workers, rows: int | None = None) -> None:
        """rows: height of the bands, about; all at once if left out."""
        self.steps, self.workers = steps, workers  # kept alive: the table holds addresses of the steps' arrays
        convolutions = [step.convolution for step in steps]
        (outputs,) = {conv.outputs for conv in convolutions}  # one set of kernels, one cut into strips serves all steps
        inputs = max(conv.inputs for conv in convolutions)
        ((arithmetic, taps),) = {(conv.arithmetic, conv.transform.taps) for conv in convolutions}
        vectors, unit = microkernel_shape(outputs)
        self.kernel = kernels(arithmetic, vectors, taps)["run"]
        most = strip_tiles(max(inputs, outputs), unit, arithmetic)
        (tiles,) = {step.source.tiles for step in steps}
        self.strips = strips_of(*tiles, unit, most)
        self.count = count = len(self.strips.begin)
        assert all(step.moments.strips == count for step in steps if step.moments)
        maps = {id(each): each.rows_in_all * each.row_bytes for step in steps for each in (step.source, step.output)}
        self.far = sum(maps.values()) > SHARED_CACHE_BYTES
        height = steps[0].source.height
        self.band_strips = max(1, count * rows // height) if rows is not None and rows < height else None
        self.bands = 1
        if self.band_strips:
            self.bands = -(-(count + self.strips.lag * (len(steps) - 1)) // self.band_strips)
        self.table: npt.NDArray[np.int64] | None = None
        self.sizes = {
            "transformed": most * tile_stride(inputs, arithmetic),
            "products": most * tile_stride(outputs, arithmetic),
            "scratch": arithmetic.points * this_processor().lanes + most,
        }

    def work_items(self, band: int) -> list[npt.NDArray[np.int64]]:
        """For each thread its work items of a band."""
        if self.band_strips is None:
            return work_items(self.strips, len(self.steps), self.workers.count, self.far)
        return band_items(self.strips, len(self.steps), self.workers.count, self.band_strips, band)

    def rows(self) -> dict[int, npt.NDArray[np.int64]]:
        """By the identity of a map, for each band the padded rows to hold while it runs: first and end, (bands, 2).

        What lies before them no later band touches.
        """
        found: dict[int, npt.NDArray[np.int64]] = {}
        for number, step in enumerate(self.steps):
            tile_rows = np.array([self.tile_rows(number, band) for band in range(self.bands)])
            for each, rows in step.rows(tile_rows).items():
                rows[tile_rows[:, 0] == tile_rows[:, 1]] = NO_ROWS
                before = found.get(each, rows)
                found[each] = np.stack([np.minimum(before[:, 0], rows[:, 0]), np.maximum(before[:, 1], rows[:, 1])], axis=1)
        for rows in found.values():
            rows[:, 0] = np.minimum.accumulate(rows[::-1, 0])[::-1]
            rows[:, 1] = np.maximum.accumulate(rows[:, 1])
            rows[:, 0] = np.minimum(rows[:, 0], rows[:, 1])
        return found

    def tile_rows(self, step: int, band: int) -> tuple[int, int]:
        """First row of tiles of a step's strips in a band, and the one after the last; the same where it has none."""
        begin, end = self.strips_in(step, band)
        if begin == end:
            return 0, 0
        columns = self.strips.columns
        return int(self.strips.begin[begin] // columns), int(-(-self.strips.end[end - 1] // columns))

    def strips_in(self, step: int, band: int) -> tuple[int, int]:
        """First strip of a step in a band, and the one after the last."""
        return self.strips.in_band(step, self.band_strips, band) if self.band_strips else (0, len(self.strips.begin))

    def run(
        self, before: Callable[[int], object] = lambda band: None, after: Callable[[int], object] = lambda band: None
    ) -> None:
        """Run all steps on all threads, band by band; returns when all are done. before, after: called with each band."""
        for step in self.steps:
            if step.moments:
                step.moments.rewind()
        for band in range(self.bands):
            before(band)
            self.run_band(self.work_items(band))
            for number, step in enumerate(self.steps):
                if step.moments:
                    step.moments.merge(self.strips_in(number, band)[1])
            after(band)

    def run_band(self, items: list[npt.NDArray[np.int64]]) -> None:
        """Run a band's work items."""
        assert len(items) == self.workers.count
        if self.table is None or self.bands > 1:  # maps of which only some rows are in memory lie elsewhere in each band
            self.table = np.array([step.fields() for step in self.steps], np.int64)
        flags, table = aligned((sum(len(each[:-1]) for each in items), FLAG_STRIDE), np.int64), self.table

        def work(thread: int) -> None:
            mine, buffer = items[thread], self.workers.buffer
            try:
                buffers = [buffer(name, size) for name, size in self.sizes.items()]
                arrays: list[npt.NDArray[Any]] = [table, mine, flags, *buffers]
                self.kernel(*(array.ctypes.data for array in arrays), len(mine[:-1]), self.far)
            except BaseException:
                # The others would wait for this thread's strips for ever. What they compute from garbage is thrown away.
                flags.fill(1)
                raise

        self.workers.run(work, release=partial(flags.fill, 1))


@dataclass(frozen=True, eq=False)
class Strips:
    """How the tiles of a map are cut into strips, and which of them read each other's pixels; arrays by strip."""

    columns: int
    """Tiles in a row."""
    begin: npt.NDArray[np.int64]
    """First tile."""
    end: npt.NDArray[np.int64]
    first_needed: npt.NDArray[np.int64]
    """First strip whose pixels it reads."""
    last_needed: npt.NDArray[np.int64]
    """The strip after the last one."""
    lag: int
    """Strips by which a step may lag behind the one before it, at least, and find all that it reads done."""

    def in_band(self, step: int, band_strips: int, band: int) -> tuple[int, int]:
        """First strip of a step in a band, and the one after the last: each step lags behind the one before it."""
        begin, count = band * band_strips - step * self.lag, len(self.begin)
        return min(max(begin, 0), count), min(max(begin + band_strips, 0), count)


def strip_tiles(channels: int, rows: int, arithmetic: Arithmetic) -> int:
    """Most tiles in a strip: a multiple of the microkernel's `rows`, within STRIP_BYTES where possible."""
    tile_bytes = tile_stride(channels, arithmetic) * (4 // arithmetic.per_lane + 4)
    return max(1, STRIP_BYTES // tile_bytes // rows) * rows


def strips(tiles: int, unit: int, most: int) -> npt.NDArray[np.int64]:
    """First tile of each strip: strips have at most `most` tiles, and whole units of tiles but for the last one."""
    units = -(-tiles // unit)
    count = min(units, -(-tiles // (most * STRIP_COUNT_MULTIPLE)) * STRIP_COUNT_MULTIPLE)
    return np.linspace(0, units, count, endpoint=False).round().astype(np.int64) * unit


def moments_of(output: PaddedMap, arithmetic: Arithmetic) -> StripMoments:
    """For the moments of a map's strips."""
    channels = output.array.shape[2]
    _, rows = microkernel_shape(channels)
    return StripMoments(len(strips(prod(output.tiles), rows, strip_tiles(channels, rows, arithmetic))), channels)


@lru_cache(maxsize=8)
def strips_of(rows: int, columns: int, unit: int, most: int) -> Strips:
    """The strips of a map of rows x columns tiles: of at most `most` tiles, in multiples of `unit`."""
    begin = strips(rows * columns, unit, most)
    end = np.append(begin[1:], rows * columns)
    # A tile reads pixels of its eight neighbours, so a strip needs all strips with a tile from columns + 1 before its first
    # one to columns + 1 after its last one. They are consecutive.
    first = np.maximum(np.searchsorted(begin, begin - columns - 1, side="right") - 1, 0)
    last = np.searchsorted(begin, end + columns, side="right")
    lag = -(-(columns + 1) // int(np.diff(begin).min(initial=rows * columns)))
    return Strips(columns, begin, end, first, last, lag)


@lru_cache(maxsize=64)
def work_items(strips: Strips, steps: int, threads: int, far: bool) -> list[npt.NDArray[np.int64]]:
    """For each thread its work items in the order in which it takes them: (n + 1, len(WORK_ITEM)), the last one twice.

    far: whether the maps exceed the shared cache. The last item stands twice because the kernel looks one item ahead, to
    prefetch its pixels.
    """
    begin, count = strips.begin, len(strips.begin)
    number = np.arange(count)
    thread = number * threads // count
    # Each thread begins at the borders of its part: the strips that others wait for are done first, and by the time that it
    # comes back to a border in the next step, its neighbour has long done the same.
    borders = np.flatnonzero(np.diff(thread)) + 0.5
    place = np.abs(number[:, None] - borders).min(1) if len(borders) else number
    step, number = np.indices((steps, count))
    before = (step - 1) * count
    values = {
        "step": step,
        "flag": step * count + number,
        "begin": begin[number],
        "tiles": (strips.end - begin)[number],
        "first_needed": np.where(step, before + strips.first_needed, 0),
        "last_needed": np.where(step, before + strips.last_needed, 0),
        "strip": number,
    }
    made = np.stack([values[name] for name in WORK_ITEM], axis=-1).reshape(-1, len(WORK_ITEM))
    depth, part = 1, np.zeros_like(step)
    if far and count > 1:
        # Groups of `depth` steps go over a part of the picture before they go over the next part, so that each step finds
        # in a cache what the step before it wrote. A step lags behind the one before it by as many strips as it needs of it
        # beyond its own place: then whatever an item waits for is in the same part of an earlier step, or in an earlier
        # part, and so earlier in every thread's order. Otherwise threads could wait for each other in a circle.
        depth = max(2, MAX_LAG_STRIPS // strips.lag)
        part = (place[number] + step % depth * strips.lag) // PART_STRIPS
    made = made[np.lexsort([each.ravel() for each in (place[number], step, part, step // depth)])]
    by_thread = (made[thread[made[:, WORK_ITEM.index("strip")]] == t] for t in range(threads))
    return [np.concatenate([items, items[-1:]]) for items in by_thread]


def band_items(strips: Strips, steps: int, threads: int, band_strips: int, band: int) -> list[npt.NDArray[np.int64]]:
    """The same for one band: step after step, each step's strips dealt out to the threads in turn.

    Flags count from the band's first strip: what earlier bands did is done. Within a band all that a strip waits for comes
    before it in the order of all threads together, so threads never wait in a circle.
    """
    made, before, flags_before, flag = [], (0, 0), 0, 0
    for step in range(steps):
        first, end = strips.in_band(step, band_strips, band)
        number = np.arange(first, end)
        values = {
            "step": np.full_like(number, step),
            "flag": flag + number - first,
            "begin": strips.begin[number],
            "tiles": (strips.end - strips.begin)[number],
            "first_needed": flags_before + np.maximum(strips.first_needed[number] - before[0], 0),
            "last_needed": flags_before + np.maximum(strips.last_needed[number] - before[0], 0),
            "strip": number,
        }
        if not step:
            values["first_needed"] = values["last_needed"] = np.zeros_like(number)
        made.append(np.stack([values[name] for name in WORK_ITEM], axis=-1))
        before, flags_before, flag = (first, end), flag, flag + len(number)
    items = np.concatenate(made)
    by_thread = (items[items[:, WORK_ITEM.index("strip")] % threads == t] for t in range(threads))
    return [np.concatenate([mine, mine[-1:]]) for mine in by_thread]


@cache
def kernels(arithmetic: Arithmetic, vectors: int, taps: int) -> dict[str, Callable[..., None]]:
    """The kernels whose microkernel has so many vectors of outputs; compiled once per process."""
    module, transform = Module(this_processor()), winograd_transform(arithmetic, taps)
    input_transforms = {gated: write_input_transform(module, arithmetic, transform, gated) for gated in (False, True)}
    gemm = write_gemm(module, arithmetic, vectors, write_prefetch(module, vectors, transform.tile))
    output_transforms = [write_output_transform(module, arithmetic, transform, end) for end in Epilogue]
    write_run(module, arithmetic, input_transforms, gemm, output_transforms, write_moments(module, vectors, transform.tile))
    return module.compile()


def write_run(
    module: Module,
    arithmetic: Arithmetic,
    input_transforms: dict[bool, ir.Function],
    gemm: ir.Function,
    output_transforms: list[ir.Function],
    moments: ir.Function,
) -> None:
    """The loop of one thread over its work items: wait, input transform, GEMM, output transform, moments, done.

    far: 1 where the maps exceed the shared cache, else 0.
    """
    with module.function("run", 6, 2) as (function, code):
        table, work_items, flags, transformed, products, scratch, count, far = function.args
        table, work_items, flags = (code.bitcast(each, INT.as_pointer()) for each in (table, work_items, flags))
        with code.loop(count) as (taken, _):
            entry = code.at(work_items, code.mul(taken, code.index(len(WORK_ITEM))))
            item, following = (
                {name: code.field(entry, at + i) for i, name in enumerate(WORK_ITEM)} for at in (0, len(WORK_ITEM))
            )
            step, then = (read_step(code, table, each["step"]) for each in (item, following))
            with code.loop(code.sub(item["last_needed"], item["first_needed"])) as (i, _):
                flag = code.add(item["first_needed"], i)
                code.wait(code.at(flags, code.mul(flag, code.index(FLAG_STRIDE))))
            peaks = code.at(scratch, code.index(arithmetic.points * code.lanes))
            tiles = [step["columns"], item["begin"], item["tiles"]]
            source = [step["source"], step["gate"], transformed, peaks, scratch, step["row"], step["inputs"]]
            with code.if_else(code.is_null(step["gate"])) as (plain, gated):
                for block, function in (plain, input_transforms[False]), (gated, input_transforms[True]):
                    with block:
                        code.call(function, [*source, *tiles, step["transformed_stride"]])
            ahead = [step["row"], step["columns"], item["begin"], following["begin"]]
            buffers = transformed, products, peaks, scratch
            write_strip_products(
                code, arithmetic, step, tiles, buffers, [then["source"], far, *ahead], gemm, output_transforms
            )
            with code.if_then(code.not_(code.is_null(step["moments"]))):
                shape = [step["outputs"], step["height"], step["width"], *tiles, item["strip"]]
                code.call(moments, [step["output"], step["moments"], products, step["target_row"], *shape])
            # Released last: a thread that sees the flag sees all that this one wrote before.
            done = code.at(flags, code.mul(item["flag"], code.index(FLAG_STRIDE)))
            code.store_atomic(code.index(1), done, "release", 8)


def read_step(code: Code, table: ir.Value, number: ir.Value) -> dict[str, ir.Value]:
    """Load a row of the table of steps, by the names of its fields."""
    row = code.at(table, code.mul(number, code.index(len(STEP_FIELDS))))
    values = {name: code.field(row, i) for i, name in enumerate(STEP_FIELDS)}
    return {name: code.inttoptr(value, POINTER) if name in POINTERS else value for name, value in values.items()}


def write_strip_products(
    code: Code,
    arithmetic: Arithmetic,
    step: dict[str, ir.Value],
    tiles: list[ir.Value],
    buffers: tuple[ir.Value, ...],
    ahead: list[ir.Value],
    gemm: ir.Function,
    output_transforms: list[ir.Function],
) -> None:
    """The GEMM of a strip, with prefetches of what comes next, and the output transform that the step asks for."""
    transformed, products, peaks, scratch = buffers
    next_source, far, *where = ahead
    output, added, null = step["output"], step["added"], ir.Constant(POINTER, None)
    # Where maps stay in the shared cache, an output that is only written needs no prefetch. Beyond it, `added` is not asked
    # for a second time where it is the output.
    near = code.icmp_signed("==", far, code.index(0))
    same = code.icmp_signed("==", code.ptrtoint(added, INT), code.ptrtoint(output, INT))
    twice = code.and_(same, code.not_(near))
    fetched = code.select(near, null, output), code.select(twice, null, added), next_source
    sizes = [tiles[-1], step["inputs"], step["outputs"], step["transformed_stride"], step["product_stride"]]
    code.call(gemm, [transformed, step["weight"], products, *fetched, *sizes, step["target_row"], *where])
    read = output, added, step["also"], step["bias"], step["scale"], peaks, scratch
    shape = [step["target_row"], step["outputs"], step["height"], step["width"], *tiles, step["product_stride"]]
    for number, output_transform in enumerate(output_transforms):
        with code.if_then(code.icmp_signed("==", step["epilogue"], code.index(number))):
            code.call(output_transform, [products, *read, *shape])
