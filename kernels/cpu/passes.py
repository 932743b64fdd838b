"""One picture through the network on the CPU: passes from top to bottom, between which SOCA's gates are known.

Convolutions follow each other within a pass, a row of tiles behind one another, whether all rows of their maps are in
memory or some at a time. Tiles, strips and the tail's bands lie where the picture's size puts them, and each is computed
from the same numbers in the same order: the result depends neither on the memory nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from sanrt.arrays import Array
from sanrt.geometry import Box
from sanrt.kernels.cpu.ir import aligned
from sanrt.kernels.cpu.network import Bands, Network, Trunk, compute_lock, pooled
from sanrt.kernels.cpu.schedule import ConvolutionSchedule, Step, moments_of
from sanrt.kernels.cpu.tail import TAPS
from sanrt.kernels.cpu.windows import MapWindow
from sanrt.kernels.cpu.winograd import PaddedMap, whole, whole_vectors, winograd_transform
from sanrt.model.contract import TAIL_HALO, Needs, RowFile

TAIL_BAND_ROWS, TAIL_BAND_PIXELS = 256, 2**20
"""Rows of features that go through the tail at a time, and pixels where that would be more: with 3 s s channels its result
is large. The result depends on them a little, so they depend on the picture's size alone."""
BORDER = 1
"""Padding around the trunk's maps, whose convolutions are all 3 x 3."""
HEAD_ROWS = 512
"""Most rows that go through the head at a time: its shifted input is padded to whole vectors of channels."""
ATTENTION_STEPS = 2
"""Convolutions of the trunk that take about as long as head and attention, or attention and tail."""

Read = Callable[[int, int], Array]
"""Rows of the picture, from one up to another: (1, 3, h, W) float32."""
Progress = Callable[[float], object]
"""Told the share of the work that was just done."""


def upscale(network: Network, picture: Array, regions: int, progress: Progress = lambda share: None) -> Array:
    """(1, 3, H, W) float32 -> (1, 3, sH, sW), not clipped, with attention over regions x regions; all maps in memory."""
    height, width = picture.shape[2:]
    scale = network.arch.scale
    made = np.empty((1, 3, height * scale, width * scale), np.float32)
    with compute_lock(), network.single_threaded_blas():
        trunk = network.trunk
        if trunk is None or trunk.bands or trunk.size != (height, width):
            network.trunk = None  # freed first: both together may exceed the memory
            trunk = network.trunk = new_trunk(network, height, width, None)
        for rows, blocks in Passes(network, trunk, lambda top, bottom: picture[:, :, top:bottom], regions, progress).run():
            network.put_blocks(blocks, made[0, :, rows.top * scale : rows.bottom * scale])
    return made


def stream(
    network: Network,
    read: Read,
    size: tuple[int, int],
    regions: int,
    bands: Bands,
    sink: Callable[[Box, Array], object],
    progress: Progress = lambda share: None,
) -> None:
    """The same for a picture of that height and width, band by band: `sink` takes finished rows (1, 3, h, sW), in order."""
    height, width = size
    scale = network.arch.scale
    with compute_lock(), network.single_threaded_blas():
        network.clear()  # a whole picture's maps
        trunk = new_trunk(network, height, width, bands)
        for rows, blocks in Passes(network, trunk, read, regions, progress).run():
            made = np.empty((1, 3, rows.height * scale, width * scale), np.float32)
            network.put_blocks(blocks, made[0])
            sink(rows.scaled(scale), made)
        network.clear()


def new_trunk(network: Network, height: int, width: int, bands: Bands | None) -> Trunk:
    """Maps and schedules for pictures of a size."""
    trunk = without_memory(network, height, width, bands)
    all_rows, row = trunk.x.map.rows_in_all, trunk.x.map.row_bytes
    plan = plan_memory(network, trunk, bands.memory if bands else 0)
    trunk.moments.allocate(strips_at_once(trunk))
    for each in trunk.windows:
        file = bands.new_file(all_rows, row) if bands and id(each.map) in plan.in_files else None
        each.allocate(plan.rows[id(each.map)], file)
    if plan.first:
        trunk = replace(trunk, first=PaddedMap.zeros(height, width, network.arch.channels, trunk.x.map.transform))
    return trunk


def without_memory(network: Network, height: int, width: int, bands: Bands | None) -> Trunk:
    """The same before the maps have any memory."""
    arch, transform = network.arch, winograd_transform(network.arithmetic)
    maps = [PaddedMap.without_memory(height, width, arch.channels, transform) for _ in range(4)]
    shared, x, hidden, features = maps
    gates = [aligned((x.array.shape[2],)) for _ in network.blocks]
    moments = moments_of(features, network.arithmetic)
    joins = [
        Step(conv, features, x, added=x, also=shared, gate=gate)
        for conv, gate in zip(network.group_convolutions, gates, strict=True)
    ]
    bodies = [network.body_steps(group, x, hidden, features, moments) for group in range(arch.groups)]
    # Between two gates: a group's last convolution, gated, and the next group's blocks.
    steps = [bodies[0], *([join, *body] for join, body in zip(joins[:-1], bodies[1:], strict=True)), joins[-1:]]
    schedules = [ConvolutionSchedule(each, network.workers, bands.rows if bands else None) for each in steps]
    windows = [MapWindow(each, network.workers.by_rows) for each in maps]
    return Trunk(None, windows[0], windows[1], windows[2], windows[3], gates, moments, schedules, bands)


def least_rows(trunk: Trunk) -> dict[int, int]:
    """By the identity of a map, the rows that have to be in memory at once."""
    all_rows = trunk.x.map.rows_in_all
    least = {id(each.map): trunk.bands.rows + 2 * BORDER if trunk.bands else all_rows for each in trunk.windows}
    held = [schedule.rows() for schedule in trunk.schedules]
    for each, rows in (item for items in held for item in items.items()):
        least[each] = max(least[each], int((rows[:, 1] - rows[:, 0]).max()))
    # As the first attention fills rows of x, it makes the same ones of `shared`.
    shared, filled = id(trunk.shared.map), held[0][id(trunk.x.map)]
    least[shared] = max(least[shared], int(np.diff(filled[:, 1], prepend=0).max()))
    return {each: min(rows, all_rows) for each, rows in least.items()}


@dataclass(frozen=True)
class MemoryPlan:
    """Which maps are whole in memory, and what all of it takes."""

    rows: Mapping[int, int]
    """By the identity of a map, rows in memory."""
    in_files: Collection[int]
    """Maps that are kept in files."""
    first: bool
    """Whether the head's features are kept."""
    needs: Needs


def plan_memory(network: Network, trunk: Trunk, memory: int) -> MemoryPlan:
    """Whole maps where bands are not wanted or the memory suffices, first those that are read and written most."""
    rows, all_rows, row = least_rows(trunk), trunk.x.map.rows_in_all, trunk.x.map.row_bytes
    used, in_files = sum(rows.values()) * row + buffer_bytes(network, trunk), []
    for each in trunk.features, trunk.x, trunk.shared:
        more = (all_rows - rows[id(each.map)]) * row
        if trunk.bands is None or used + more <= memory:
            used, rows[id(each.map)] = used + more, all_rows
        else:
            in_files.append(id(each.map))
    first = trunk.bands is None or used + all_rows * row <= memory
    needs = Needs(used + first * all_rows * row, len(in_files) * all_rows * row)
    return MemoryPlan(rows, in_files, first, needs)


def buffer_bytes(network: Network, trunk: Trunk) -> int:
    """What is in memory beside the trunk's maps, at most."""
    arch, x, (height, width) = network.arch, trunk.x.map, trunk.size
    rows = min(trunk.bands.rows if trunk.bands else height, height) + 2 * x.transform.tile
    tail = min(tail_rows(width), height) + 2 * TAIL_HALO
    per_column = {
        "the head's input, and the same shifted": min(rows, HEAD_ROWS + 2 * x.transform.tile) * (3 + whole_vectors(3)),
        "its features, made again": rows * x.array.shape[2] if trunk.bands else 0,
        "queries, keys, values and what they give": rows * 6 * arch.attention_channels,
        "the tail's input and result": tail * (x.array.shape[2] + whole_vectors(3 * arch.scale**2)),
        "finished rows, in turn as float32 and as the result's type": tail * 3 * 3 * arch.scale**2 if trunk.bands else 0,
    }
    made: int = sum(per_column.values()) * (width + x.transform.tile) * np.dtype(np.float32).itemsize
    return made + trunk.moments.needed(strips_at_once(trunk))


def strips_at_once(trunk: Trunk) -> int:
    """Most strips of which a schedule finds the moments at once."""
    return max(schedule.band_strips or schedule.count for schedule in trunk.schedules)


def needed(network: Network, height: int, width: int, rows: int | None, memory: int = 0) -> Needs:
    """What a picture takes: whole, or in bands of so many rows, the least of them or more within `memory` bytes."""
    trunk = without_memory(network, height, width, Bands(rows, memory, no_files) if rows else None)
    return plan_memory(network, trunk, memory).needs


def no_files(rows: int, row_bytes: int) -> RowFile:
    """For a trunk without memory."""
    raise AssertionError


def tail_rows(width: int) -> int:
    """Rows of features that go through the tail at a time."""
    return max(1, min(TAIL_BAND_ROWS, TAIL_BAND_PIXELS // width))


@dataclass
class Passes:
    """A picture on its way through the network."""

    network: Network
    trunk: Trunk
    read: Read
    regions: int
    progress: Progress

    def __post_init__(self) -> None:
        self.height, self.width = self.trunk.size
        self.picture = Box(0, 0, self.height, self.width)
        steps = sum(len(schedule.steps) for schedule in self.trunk.schedules)
        self.work = 1 / (steps + 2 * ATTENTION_STEPS)
        """Share of the work of one convolution."""

    def run(self) -> Iterator[tuple[Box, Array]]:
        """Finished rows, in order: where they are, and blocks of pixels (h, W, 3 s s), good until the next ones."""
        network, trunk = self.network, self.trunk
        if trunk.first:
            for top in range(0, self.height, step := whole(min(self.step, HEAD_ROWS), trunk.first.transform.tile)):
                self.head(top, trunk.first.part(top, min(top + step, self.height)))
        attention = RegionAttention(self, self.first_rows)
        for group, schedule in enumerate(trunk.schedules):
            if group:
                self.run_pass(schedule, loaded=(trunk.features, trunk.x, trunk.shared))
            else:
                self.run_pass(schedule, fill=partial(self.attend_first, attention))
            if group < len(trunk.gates):
                network.gates[group](trunk.moments.found, trunk.gates[group])
        yield from self.tail()

    def run_pass(
        self,
        schedule: ConvolutionSchedule,
        loaded: Sequence[MapWindow] = (),
        fill: Callable[[int, int], object] = lambda top, bottom: None,
    ) -> None:
        """Run a schedule over the picture. loaded: maps whose content before is read. fill: makes rows of x that come in."""
        trunk, held = self.trunk, schedule.rows()
        windows = [each for each in trunk.windows if id(each.map) in held]
        written = [trunk.x] + [each for each in windows if any(each.map is step.output for step in schedule.steps)]
        for each in windows:
            each.rewind()

        def before(band: int) -> None:
            for each in windows:
                first, end = each.move(*map(int, held[id(each.map)][band]))
                if each in loaded:
                    each.load(first, end)
                if each is trunk.x and first < end:
                    fill(first - BORDER, end - BORDER)

        def after(band: int) -> None:
            for each in dict.fromkeys(written):
                rows = held[id(each.map)]
                each.save(int(rows[band, 0]), int(rows[band + 1, 0] if band + 1 < len(rows) else rows[band, 1]))
            self.progress(self.work * (len(schedule.steps) + (0 if loaded else ATTENTION_STEPS)) / schedule.bands)

        schedule.run(before, after)

    # --- attention --------------------------------------------------------------------------------------------------

    def first_rows(self, top: int, bottom: int) -> Array:
        """The head's features of some rows, (rows, W, C), good until the next call: kept, or made again, which is cheap."""
        if self.trunk.first:
            return self.trunk.first.rows(top, bottom)
        tile = self.trunk.x.map.transform.tile
        begin, end = top // tile * tile, min(whole(bottom, tile), self.height)
        made = self.network.map("first", end - begin, self.width)
        self.head(begin, made)
        return made.rows(top - begin, bottom - begin)

    def head(self, top: int, out: PaddedMap) -> None:
        """Write the head's features into a map of some rows, the first of them on the tiles' grid."""
        picture = self.read(max(top - BORDER, 0), min(top + out.height + BORDER, self.height))
        self.network.head_features(picture, out, top, self.height)

    def attend_first(self, attention: RegionAttention, top: int, bottom: int) -> None:
        """Make the first attention's result the first group's input; scale it by gamma for the groups' skip connections."""
        x, shared, gamma = self.trunk.x.map.rows(top, bottom), self.trunk.shared, self.network.weights["gamma"]
        attention(top, bottom, x)
        x[..., self.network.arch.channels :] = 0  # padding, where a picture that is not finite leaves NaN
        shared.rewind()
        first, end = shared.move(top + BORDER, bottom + BORDER)
        kept = shared.map.rows(top, bottom)
        self.network.workers.by_rows(len(x), lambda rows: np.multiply(x[rows], gamma, out=kept[rows]))
        shared.save(first, end)

    # --- the tail ---------------------------------------------------------------------------------------------------

    def tail(self) -> Iterator[tuple[Box, Array]]:
        """Attention of the last group's result, plus the head's features, through the tail, band by band."""
        network, attention = self.network, RegionAttention(self, self.trunk.x.read)
        done, held = 0, np.empty((0, self.width, 1), np.float32)
        for band in self.picture.grid(-(-self.height // tail_rows(self.width)), 1):
            halo = band.grown(TAIL_HALO, self.picture)
            kept = held[len(held) - (done - halo.top) :].copy()  # the band before had this one's first rows
            x = network.map("band", halo.height, self.width, taps=TAPS)
            held = x.pixels
            held[: len(kept)] = kept
            for top in range(done, halo.bottom, self.step):
                bottom = min(top + self.step, halo.bottom)
                part = held[top - halo.top : bottom - halo.top]
                attention(top, bottom, part)
                part, first = (each[..., : network.arch.channels] for each in (part, self.first_rows(top, bottom)))
                network.workers.by_rows(len(part), partial(add, first, part))
            done = halo.bottom
            crop = band.inside(halo)
            yield band, network.tail_blocks(x)[crop.top : crop.bottom]
            self.progress(self.work * ATTENTION_STEPS * band.height / self.height)

    @property
    def step(self) -> int:
        """Most rows that are looked at together."""
        return self.trunk.bands.rows if self.trunk.bands else self.height


class RegionAttention:
    """Region-level non-local attention with its skip connection over a picture's rows: every pixel attends to its region."""

    def __init__(self, passes: Passes, x: Callable[[int, int], Array]) -> None:
        """x: gives rows of its input, (rows, W, C or more channels)."""
        self.network, self.step, channels = passes.network, passes.step, passes.network.arch.channels
        self.x: Callable[[int, int], Array] = lambda top, bottom: x(top, bottom)[..., :channels]
        grid = list(passes.picture.grid(passes.regions, passes.regions))
        self.rows = [grid[i : i + passes.regions] for i in range(0, len(grid), passes.regions)]
        """The regions, row by row."""
        self.keys_of: tuple[Sequence[Box], list[tuple[Array, Array]]] = (), []
        """The row of regions seen last, and the keys and values of each."""

    def __call__(self, top: int, bottom: int, out: Array) -> None:
        """Write rows of the result into out (rows, W, C or more channels)."""
        out = out[..., : self.network.arch.channels]
        for regions in self.rows:
            first, end = max(top, regions[0].top), min(bottom, regions[0].bottom)
            for begin in range(first, end, self.step):
                self.attend(regions, begin, min(begin + self.step, end), out[begin - top : end - top])

    def attend(self, regions: Sequence[Box], top: int, bottom: int, out: Array) -> None:
        """The same for rows of one row of regions."""
        keys = self.keys_values(regions)
        pixels = self.x(top, bottom)
        query = self.network.queries(pixels)
        y = np.empty_like(query)
        for region, (key, value) in zip(regions, keys, strict=True):
            columns = slice(region.left, region.right)
            y[:, columns] = self.network.attended(query[:, columns], key, value)
        self.network.attention_output(y, pixels, out[: bottom - top])

    def keys_values(self, regions: Sequence[Box]) -> list[tuple[Array, Array]]:
        """Pooled keys and values (h / 2, w / 2, C / 8) of a row of regions."""
        if self.keys_of[0] is not regions:
            self.keys_of = (), []
            top, bottom = regions[0].top, regions[0].bottom
            step = max(2, self.step // 2 * 2)
            parts = [list(self.projected(regions, at, min(at + step, bottom))) for at in range(top, bottom, step)]
            self.keys_of = regions, [stacked(each) for each in zip(*parts, strict=True)]
        return self.keys_of[1]

    def projected(self, regions: Sequence[Box], top: int, bottom: int) -> Iterator[tuple[Array, Array]]:
        """Pooled keys and values of some rows of a row of regions, region by region."""
        key, value = self.network.keys_values(self.x(top, bottom))
        columns = (slice(each.left, each.right) for each in regions)
        return ((pooled(key[:, each]), pooled(value[:, each])) for each in columns)


def stacked(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Keys and values of rows below one another, put together."""
    keys, values = zip(*parts, strict=True)
    return np.concatenate(keys), np.concatenate(values)


def add(source: Array, target: Array, rows: slice) -> None:
    """Add some rows of `source` to the same rows of `target`."""
    np.add(target[rows], source[rows], out=target[rows])


BORDER = 1
