"""How a picture goes through the network (whole, streamed exactly, or in overlapped tiles): decided from its size alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt

from sanrt.errors import BackendError, PictureError, UsageError
from sanrt.geometry import padded_side
from sanrt.model.spec import Architecture
from sanrt.runtime.backends.protocol import Backend
from sanrt.runtime.tiling.options import MEMORY_SHARE, Tiling, UpscaleOptions, memory_for
from sanrt.wording import option

log = logging.getLogger(__name__)

PAPER_REGIONS = 2
"""k of the paper and of the official checkpoints."""

MAX_PIXELS_WITH_PAPER_REGIONS = 2**17
"""Above it `--regions auto` takes more of them: the cost of the paper's 2 x 2 grows with the square of the pixels."""

MAX_REGION_PIXELS = 2**14
"""In a region above that: attention then costs about as much as a small network's convolutions, at any size."""

MAX_TILE, MAX_GPU_TILE = 256, 512
"""Sides of the largest tiles that are chosen, on a processor, whose caches they should fit, and on a GPU."""

MIN_TILE = 64
"""Smaller tiles would be mostly halo."""

STRIP_HEIGHTS = (512, 384, 256, 192, 128, 96, 64, 32, 16)
"""Heights of strips that are chosen from: the lower they are, the more rows are moved and the more often threads meet."""

HIGH_STRIP = 128
"""Height above which strips gain little: the memory is then better used for whole maps."""

SOURCE_BYTES = 3 * 2
"""Of a decoded pixel, in 16 bits."""

MIN_RETRY_TILE = 16
"""Side below which tiles are not made smaller after an out-of-memory."""


@dataclass(frozen=True)
class TilingPlan:
    """How one picture goes through the network; decided once, from its header."""

    tiling: Tiling
    """Never AUTO."""
    tile: int
    """Largest side of a tile, the picture's own where it goes whole; input pixels, without halo or overlap."""
    regions: int
    """k of the k x k attention regions (of each tile where they overlap)."""
    overlap: int = 0
    """Pixels that overlapped tiles share."""
    strips: bool = False
    """Whether the tiles are strips of full width and of that height (`Backend.strips`)."""

    def __str__(self) -> str:
        tiles = f" in strips of {self.tile} rows" if self.strips else f" in tiles of {self.tile}"
        tiles = "" if self.tiling is Tiling.WHOLE else tiles
        return f"{self.tiling}{tiles}, {self.regions} x {self.regions} regions"


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that a run may take."""

    host: int
    """Bytes of the machine's memory."""
    device: int | None = None
    """Bytes of a GPU's own memory, which the network then runs in; None where it runs in the machine's."""

    @classmethod
    def of(cls, backend: Backend, options: UpscaleOptions) -> MemoryBudget:
        """The host's by the options; of a GPU's memory the same share of what is free."""
        return cls(options.budget, None if backend.memory is None else int(backend.memory * MEMORY_SHARE))

    @property
    def network(self) -> int:
        """Where the network runs."""
        return self.host if self.device is None else self.device

    def maps(self, arch: Architecture, tile: int) -> tuple[int, int]:
        """What feature maps may take on the host and on the GPU when a tile of this side is in the network."""
        if self.device is None:
            return map_memory(arch, tile, self.host), 0
        return self.host, map_memory(arch, tile, self.device)


def plan_tiling(backend: Backend, height: int, width: int, options: UpscaleOptions) -> TilingPlan:
    """How a picture of this size goes through the network: by the options, its size, the backend's limits and the budget.

    Raises UsageError for options that the backend cannot follow, BackendError for a picture larger than it takes.
    """
    spec, budget = backend.spec, MemoryBudget.of(backend, options)
    arch = spec.architecture
    regions = options.regions or (choose_regions(height, width) if backend.streams else spec.regions)
    if min(height, width) < 2 * regions:  # regions have 2 x 2 pixels or more
        regions = spec.regions
    too_small = min(height, width) < 2 * regions  # nothing could need a tile here; `infer` pads the picture
    tiling = options.tiling
    if tiling is Tiling.AUTO:
        cut = max(height, width) > options.tile if options.tile else not fits_whole(backend, height, width, budget)
        if regions != spec.regions and not backend.infer_with_regions and not cut:
            tiling = Tiling.EXACT  # through the stages in any case, where tiles are the faster way
        else:
            cut = cut or not takes_whole(backend, height, width, options)
            tiling = cut_tiling(backend, options) if cut else Tiling.WHOLE
    if options.regions not in (None, spec.regions) and (tiling is Tiling.OVERLAP or not backend.streams):
        raise UsageError(
            f"{options.regions} x {options.regions} regions: this model has {spec.regions} x {spec.regions} in overlapped "
            f"tiles and on backends without stages, such as {backend.name}; leave {option('regions')} out, or change one "
            "of the two"
        )
    match Tiling.WHOLE if too_small else tiling:
        case Tiling.WHOLE:
            plan = TilingPlan(Tiling.WHOLE, max(height, width), regions)
        case Tiling.OVERLAP:
            tile = options.tile or choose_overlapped_tile(arch, height, width, budget)
            plan = TilingPlan(Tiling.OVERLAP, tile, spec.regions, options.overlap_of(tile))
        case _:
            tile = options.tile or choose_exact_tile(backend, height, width, budget)
            plan = TilingPlan(Tiling.EXACT, tile, regions, strips=backend.strips is not None)
    return within_limits(plan, backend, height, width, options)


def smaller_plan(plan: TilingPlan, backend: Backend, options: UpscaleOptions) -> TilingPlan | None:
    """What takes less memory than `plan` and was not ruled out; None where there is nothing."""
    tile = plan.tile // 2
    if tile < max(MIN_RETRY_TILE, 2 * (options.overlap or 0)) or (plan.tiling is Tiling.WHOLE is options.tiling):
        return None
    tiling = plan.tiling
    if tiling is Tiling.WHOLE:
        tiling = cut_tiling(backend, options)
        tile = min(tile, (backend.limits.tile if tiling is Tiling.EXACT else backend.limits.side) or tile)
    strips = tiling is Tiling.EXACT and backend.strips is not None
    return TilingPlan(tiling, tile, plan.regions, options.overlap_of(tile) if tiling is Tiling.OVERLAP else 0, strips)


def check_result_size(arch: Architecture, height: int, width: int, options: UpscaleOptions) -> None:
    """Raise PictureError where the result of a picture, held in memory as a whole, would exceed the budget."""
    if (needed := height * width * result_bytes(arch)) > options.budget:
        raise PictureError(
            f"its {arch.scale * width} x {arch.scale * height} result takes {needed >> 20} MiB of the allowed "
            f"{options.budget >> 20}; {option('tiling', 'exact')} on a file holds less, {option('memory')} allows more"
        )


def check_strips(backend: Backend, plan: TilingPlan, height: int, width: int, options: UpscaleOptions) -> None:
    """Raise PictureError where even the maps that strips must hold exceed the memory that was asked for.

    Without --memory the budget is a share of what is free, which such a picture then takes more of.
    """
    if not (strips := backend.strips) or not plan.strips or options.memory is None:
        return

    def least(rows: int) -> int:
        sizes = [(height, width), (width, height)] if options.self_ensemble else [(height, width)]
        return max(strips.needed(*size, rows).memory for size in sizes) + height * width * SOURCE_BYTES

    if (needed := least(plan.tile)) > options.budget:
        lowest = least(STRIP_HEIGHTS[-1])
        fits = lowest <= options.budget
        raise PictureError(
            f"{width} x {height} pixels in strips of {plan.tile} rows take {needed >> 20} MiB beside the program, of the "
            f"{options.budget >> 20} that {option('memory')} leaves; "
            + (f"use {option('tile', STRIP_HEIGHTS[-1])}, or " if fits else "")
            + f"allow {option('memory', memory_for(needed if fits else lowest))} bytes"
        )


def takes_whole(backend: Backend, height: int, width: int, options: UpscaleOptions) -> bool:
    """Whether `infer` takes a picture of this size, once it is padded, also rotated where that is asked for."""
    spec = backend.spec
    sides = [padded_side(side, spec.min_side, spec.multiple) for side in (height, width)]
    return backend.limits.take(*sides) and (not options.self_ensemble or backend.limits.take(*sides[::-1]))


def within_limits(plan: TilingPlan, backend: Backend, height: int, width: int, options: UpscaleOptions) -> TilingPlan:
    """The plan with tiles that the backend takes; raises BackendError for a picture and UsageError for tiles too large."""
    limits = backend.limits
    streams = by_stages(plan, backend)
    if plan.tiling is Tiling.WHOLE and not streams and not takes_whole(backend, height, width, options):
        raise BackendError(
            f"{backend.name}: {width} x {height} pixels as a whole, its engine takes {limits}; "
            f"use {option('tiling', 'auto')}, another {option('backend')}, or rebuild with other {option('min')} and "
            f"{option('max')}"
        )
    keys = -(-height // plan.regions) * -(-width // plan.regions) // 4
    if streams and limits.keys and keys > limits.keys:
        raise UsageError(
            f"{plan.regions} x {plan.regions} regions: {keys} keys each, the stage engines take {limits.keys}; "
            f"use {option('regions', 'auto')}"
        )
    most = limits.tile if streams else limits.side if plan.tiling is Tiling.OVERLAP else None
    if most is None or plan.tile <= most:
        return plan
    if options.tile and plan.tiling is not Tiling.WHOLE:
        raise UsageError(
            f"tiles of {options.tile} pixels: the engines take {most}; use {option('tile', most)}, or rebuild with "
            f"{option('max')}"
        )
    return replace(plan, tile=most, overlap=options.overlap_of(most) if plan.tiling is Tiling.OVERLAP else 0)


def by_stages(plan: TilingPlan, backend: Backend) -> bool:
    """Whether a picture goes through the backend's stages: in exact tiles, or for regions that its `infer` does not have."""
    other = plan.regions != backend.spec.regions and not backend.infer_with_regions
    return plan.tiling is Tiling.EXACT or other


def cut_tiling(backend: Backend, options: UpscaleOptions) -> Tiling:
    """What `auto` does with a picture that cannot go whole: exact streaming, where it is possible and not ruled out."""
    if options.overlap is not None:
        return Tiling.OVERLAP
    if not backend.streams:
        warn_once(f"large pictures go in overlapped tiles, which changes every pixel: {why_not_streaming(backend)}")
        return Tiling.OVERLAP
    return Tiling.EXACT


def why_not_streaming(backend: Backend) -> str:
    """Why a backend cannot stream, in its own words."""
    try:
        backend.stages()
    except BackendError as error:
        return str(error)
    return ""


@cache
def warn_once(text: str) -> None:
    """Warn of something that many pictures of a run have in common."""
    log.warning("%s", text)


def choose_regions(height: int, width: int) -> int:
    """`--regions auto`: the paper's 2 for small pictures, else the smallest k whose regions have MAX_REGION_PIXELS."""
    k = PAPER_REGIONS
    if height * width > MAX_PIXELS_WITH_PAPER_REGIONS:
        while -(-height // k) * -(-width // k) > MAX_REGION_PIXELS and 2 * (k + 1) <= min(height, width):
            k += 1
    return k


def choose_exact_tile(backend: Backend, height: int, width: int, budget: MemoryBudget) -> int:
    """The side of exact tiles, for a quarter of the memory, or the height of strips, for all of it or half for high ones."""
    if strips := backend.strips:
        host = budget.host - height * width * SOURCE_BYTES
        room = {rows: host // (2 if rows > HIGH_STRIP else 1) for rows in STRIP_HEIGHTS}
        heights = (rows for rows, most in room.items() if strips.needed(height, width, rows).memory <= most)
        return next(heights, STRIP_HEIGHTS[-1])
    most = MAX_TILE if budget.device is None else MAX_GPU_TILE
    return min(most, max(MIN_TILE, isqrt(budget.network // 4 // network_bytes(backend.spec.architecture)) // 16 * 16))


def choose_overlapped_tile(arch: Architecture, height: int, width: int, budget: MemoryBudget) -> int:
    """The largest side with which a tile in the network fits beside the result: the fewer tiles, the smaller their error."""
    free = budget.host - height * width * result_bytes(arch) if budget.device is None else budget.device
    return max(MIN_TILE, isqrt(max(0, free) // network_bytes(arch)) // 16 * 16)


def map_memory(arch: Architecture, tile: int, memory: int) -> int:
    """What feature maps may take of the memory when a tile of this side is in the network."""
    return max(0, memory - tile**2 * network_bytes(arch))


def fits_whole(backend: Backend, height: int, width: int, budget: MemoryBudget) -> bool:
    """Whether the network can hold the whole picture, and the host its result."""
    arch = backend.spec.architecture
    network, result = height * width * network_bytes(arch), height * width * result_bytes(arch)
    if strips := backend.strips:
        network = strips.needed(height, width, None).memory
    if budget.device is None:
        return network + result <= budget.host
    return network <= budget.device and result <= budget.host


def result_bytes(arch: Architecture) -> int:
    """Bytes of the float32 result, per input pixel, and of its copy in the picture's own type."""
    return 3 * arch.scale**2 * (4 + 4)


def network_bytes(arch: Architecture) -> int:
    """What the network holds at its peak, per input pixel, as float32.

    That is in the tail: its last convolution's C * s^2 values, their pixel-shuffled copy and another that libraries make to
    reorder memory, beside some ten maps of C channels that the skip connections and blocks keep.
    """
    return 4 * arch.channels * (3 * arch.scale**2 + 10)
