"""One picture through one backend: number formats, tiles, self-ensemble, and memory that does not suffice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sanrt.arrays import Array
from sanrt.errors import BackendError, OutOfMemoryError, PictureError, UsageError
from sanrt.geometry import Box, TileAxis, pad, padded_side
from sanrt.runtime.backends.protocol import Backend, Stages
from sanrt.runtime.host import free_host_memory
from sanrt.runtime.pictures.codec import SourcePicture
from sanrt.runtime.pictures.scratch import ScratchPicture
from sanrt.runtime.tiling.featuremaps import FeatureStore
from sanrt.runtime.tiling.orientations import TURNS, Turn, TurnedSource
from sanrt.runtime.tiling.plan import (
    Room,
    Tiling,
    Way,
    choose_overlapped_tile,
    choose_regions,
    choose_tile,
    fits_whole,
    result_bytes,
)
from sanrt.runtime.tiling.streaming import STRIP, ArraySource, PixelSink, PixelSource, Streaming, decoded

log = logging.getLogger(__name__)

Picture = TypeVar("Picture", npt.NDArray[np.uint8], npt.NDArray[np.uint16], npt.NDArray[np.float32])
Infer = Callable[[Array], Array]
"""float32 (1, 3, H, W) -> (1, 3, sH, sW), of any size from 1 x 1."""

DEFAULT_OVERLAP = 32
MIN_SMALLER = 16
"""Side below which tiles are not made smaller after an out-of-memory."""
PROCESS_MEMORY = 400 * 2**20
"""Interpreter, libraries, picture buffers: what a run holds beside the budget."""
MEMORY_SHARE = 0.6
"""Of the free memory: the rest is for decoding, encoding and everybody else."""


@dataclass(frozen=True)
class UpscaleOptions:
    """How pictures go through the network."""

    tile: int | None = None
    """Cut larger pictures into tiles of at most this side; None cuts only what does not fit the memory."""
    overlap: int | None = None
    """Pixels that overlapped tiles share; None is 32, or a quarter of a smaller tile. Given, it asks for such tiles."""
    self_ensemble: bool = False
    """Average over the 8 flips and rotations (SAN+, section 4 of the paper)."""
    tiling: Tiling = Tiling.AUTO
    regions: int | None = None
    """k of the k x k attention regions; None is by the picture's size (`choose_regions`)."""
    memory: int | None = None
    """Bytes of the host's memory that the process should stay below; None leaves it a share of what is free."""
    scratch: Path | None = None
    """Folder of the scratch files; None is the system's (TMPDIR)."""

    def __post_init__(self) -> None:
        if self.tile is not None and self.tile < 16:
            raise UsageError(f"tiles of {self.tile} pixels; expected at least 16")
        if self.overlap is not None and self.tiling in (Tiling.WHOLE, Tiling.EXACT):
            raise UsageError(f"overlap {self.overlap} with {self.tiling} tiling, which overlaps nothing; leave one out")
        if self.overlap is not None and not 0 <= self.overlap <= (self.tile or 2 * self.overlap) // 2:
            raise UsageError(f"overlap {self.overlap} with tiles of {self.tile}; expected 0 to half a tile")

    @cached_property
    def budget(self) -> int:
        """Bytes of the host's memory for maps, tiles and results; looked up once: a run treats all pictures alike."""
        if self.memory is None:
            return int(free_host_memory() * MEMORY_SHARE)
        return max(self.memory - PROCESS_MEMORY, self.memory // 4)

    def overlap_of(self, tile: int) -> int:
        """The overlap that tiles of this side get."""
        return min(
            DEFAULT_OVERLAP if self.overlap is None else self.overlap, tile // 4 if self.overlap is None else tile // 2
        )


def choose_way(backend: Backend, height: int, width: int, options: UpscaleOptions) -> Way:
    """How a picture of this size goes through the network: by the options, its size, the backend's limits and the budget.

    Raises UsageError for options that the backend cannot follow, BackendError for a picture larger than it takes.
    """
    spec, longest, room = backend.spec, max(height, width), room_of(backend, options)
    arch = spec.architecture
    regions = options.regions or (choose_regions(height, width) if backend.streams else spec.regions)
    wanted = options.regions not in (None, spec.regions)
    if min(height, width) < 2 * regions:  # regions of at least 2 x 2 pixels; the whole-picture graph pads smaller pictures
        regions = spec.regions
    tiling = options.tiling
    if tiling is Tiling.AUTO:
        cut = longest > options.tile if options.tile else not fits_whole(arch, height, width, room)
        whole = not cut and (takes_whole(backend, height, width, options) or (backend.streams and regions != spec.regions))
        tiling = Tiling.WHOLE if whole else cut_tiling(backend, options)
    if wanted and (tiling is Tiling.OVERLAP or not backend.streams):
        raise UsageError(
            f"{options.regions} x {options.regions} regions: this model has {spec.regions} x {spec.regions} in overlapped "
            f"tiles and on backends without stages, such as {backend.name}; leave --regions out, or change one of the two"
        )
    if min(height, width) < 2 * regions:
        tiling = Tiling.WHOLE  # too small to be cut into regions, so padded; nothing could need a tile here
    match tiling:
        case Tiling.WHOLE:
            way = Way(tiling, longest, regions)
        case Tiling.OVERLAP:
            way = Way(tiling, options.tile or choose_overlapped_tile(arch, height, width, room), spec.regions)
        case _:
            way = Way(tiling, options.tile or choose_tile(arch, room.network), regions)
    return within_limits(way, backend, height, width, options)


def takes_whole(backend: Backend, height: int, width: int, options: UpscaleOptions) -> bool:
    """Whether `infer` takes a picture of this size, once it is padded, also turned where that is asked for."""
    spec = backend.spec
    sides = [padded_side(side, spec.min_side, spec.multiple) for side in (height, width)]
    return backend.limits.take(*sides) and (not options.self_ensemble or backend.limits.take(*sides[::-1]))


def within_limits(way: Way, backend: Backend, height: int, width: int, options: UpscaleOptions) -> Way:
    """The way with tiles that the backend takes; raises BackendError for a picture and UsageError for tiles too large."""
    limits = backend.limits
    streams = by_stages(way, backend)
    if way.tiling is Tiling.WHOLE and not streams and not takes_whole(backend, height, width, options):
        raise BackendError(
            f"{backend.name}: {width} x {height} pixels as a whole, its engine takes {limits}; "
            "use --tiling auto, another --backend, or rebuild with other --min and --max"
        )
    keys = -(-height // way.regions) * -(-width // way.regions) // 4
    if streams and limits.keys and keys > limits.keys:
        raise UsageError(
            f"{way.regions} x {way.regions} regions: {keys} keys each, the stage engines take {limits.keys}; "
            "use --regions auto"
        )
    most = limits.tile if streams else limits.side if way.tiling is Tiling.OVERLAP else None
    if most is None or way.tile <= most:
        return way
    if options.tile and way.tiling is not Tiling.WHOLE:
        raise UsageError(
            f"tiles of {options.tile} pixels: the engines take {most}; use --tile {most}, or rebuild with --max"
        )
    return replace(way, tile=most)


def by_stages(way: Way, backend: Backend) -> bool:
    """Whether a picture goes through the backend's stages: in exact tiles, or for regions that its `infer` does not have."""
    other = way.regions != backend.spec.regions and not backend.infer_with_regions
    return way.tiling is Tiling.EXACT or other


def room_of(backend: Backend, options: UpscaleOptions) -> Room:
    """What a run may take of the host's memory, and of a GPU's: there the same share of what is free."""
    return Room(options.budget, None if backend.memory is None else int(backend.memory * MEMORY_SHARE))


def feature_store(stages: Stages, backend: Backend, tile: int, options: UpscaleOptions) -> FeatureStore:
    """Where a streamed picture's maps go."""
    host, device = room_of(backend, options).maps(backend.spec.architecture, tile)
    return FeatureStore(host, options.scratch, stages.maps, device)


def cut_tiling(backend: Backend, options: UpscaleOptions) -> Tiling:
    """What `auto` does with a picture that cannot go whole: exact streaming, where it is possible and not ruled out."""
    if options.overlap is not None:
        return Tiling.OVERLAP
    if not backend.streams:
        tell_once(f"large pictures go in overlapped tiles, which changes every pixel: {unstreamed(backend)}")
        return Tiling.OVERLAP
    return Tiling.EXACT


def unstreamed(backend: Backend) -> str:
    """Why a backend cannot stream, in its own words."""
    try:
        backend.stages()
    except BackendError as error:
        return str(error)
    return ""


@cache
def tell_once(text: str) -> None:
    """Warn of something that many pictures of a run have in common."""
    log.warning("%s", text)


def upscale(backend: Backend, picture: Picture, options: UpscaleOptions | None = None) -> Picture:
    """RGB (H, W, 3), uint8, uint16 or float32 in 0..1 -> (sH, sW, 3) of the same type, rounded and clipped.

    Whole, exactly streamed or in overlapped tiles, as `choose_way` says; after an out-of-memory the picture is done again
    in tiles half as large, which is logged. OutOfMemoryError when the smallest tiles do not fit either, PictureError when
    the result alone exceeds the memory.
    """
    options = options or UpscaleOptions()
    arch = backend.spec.architecture
    height, width = picture.shape[:2]
    if (needed := height * width * result_bytes(arch)) > options.budget:
        raise PictureError(
            f"its {arch.scale * width} x {arch.scale * height} result takes {needed >> 20} MiB of the allowed "
            f"{options.budget >> 20}; --tiling exact on a file holds less, --memory allows more"
        )
    x = network_input(picture, arch.value_range)
    way = choose_way(backend, height, width, options)
    while True:
        infer: Infer = partial(infer_by, backend, way, options)
        try:
            y = (self_ensembled(infer) if options.self_ensemble else infer)(x)
            return network_output(y, picture, arch.value_range)
        except OutOfMemoryError as error:
            tried, way = way, smaller_way(way, options, backend, error)
            log.warning("%s going %s; doing this picture again: %s", error, tried, way)


def smaller_way(way: Way, options: UpscaleOptions, backend: Backend, error: OutOfMemoryError) -> Way:
    """What takes less memory and was not ruled out; raises the error where there is nothing."""
    tile = way.tile // 2
    if tile < max(MIN_SMALLER, 2 * (options.overlap or 0)) or (way.tiling is Tiling.WHOLE is options.tiling):
        raise error
    if way.tiling is not Tiling.WHOLE:
        return replace(way, tile=tile)
    tiling = cut_tiling(backend, options)
    most = backend.limits.tile if tiling is Tiling.EXACT else backend.limits.side
    return replace(way, tiling=tiling, tile=min(tile, most or tile))


def infer_by(backend: Backend, way: Way, options: UpscaleOptions, x: Array) -> Array:
    """One picture (1, 3, H, W) the given way."""
    spec = backend.spec
    if way.tiling is Tiling.OVERLAP:
        tiles: Infer = partial(infer_padded, backend)
        return infer_tiled(tiles, x, spec.architecture.scale, way.tile, options.overlap_of(way.tile))
    if by_stages(way, backend):
        return stream_array(backend, way, options, x)
    if infer := backend.infer_with_regions:
        return infer_padded(backend, x, lambda pictures: infer(pictures, way.regions))
    return infer_padded(backend, x)


def stream_array(backend: Backend, way: Way, options: UpscaleOptions, x: Array) -> Array:
    """One picture in memory, stage by stage."""
    arch = backend.spec.architecture
    y: Array = np.empty((1, 3, arch.scale * x.shape[2], arch.scale * x.shape[3]), np.float32)

    def sink(box: Box, part: Array) -> None:
        y[:, :, box.top : box.bottom, box.left : box.right] = part

    stages = backend.stages()
    with feature_store(stages, backend, way.tile, options) as store:
        Streaming(stages, backend.spec, ArraySource(x), store, way.tile, way.regions).run(sink)
    return y


@dataclass(frozen=True)
class Streamer:
    """Upscales picture files that are too large for memory."""

    backend: Backend
    options: UpscaleOptions

    def way(self, height: int, width: int) -> Way:
        """How a picture of this size goes through the network."""
        return choose_way(self.backend, height, width, self.options)

    def stream(self, source: SourcePicture, result: ScratchPicture) -> None:
        """Upscale `source` into `result`; neither is ever in memory as a whole."""
        spec, info = self.backend.spec, source.info
        way = choose_way(self.backend, info.height, info.width, self.options)
        like: npt.NDArray[Any] = np.empty(0, result.dtype)

        def finished(box: Box, part: Array) -> None:
            result.put(box.top, box.left, network_output(part, like, spec.architecture.value_range))

        stages = self.backend.stages()
        with feature_store(stages, self.backend, way.tile, self.options) as store:
            pixels = decoded(source, store, spec.architecture.value_range)

            def run(seen: PixelSource, sink: PixelSink) -> None:
                Streaming(stages, spec, seen, store.rest(), way.tile, way.regions).run(sink)

            if self.options.self_ensemble:
                stream_ensembled(run, pixels, spec.architecture.scale, store, finished)
            else:
                run(pixels, finished)


def stream_ensembled(
    run: Callable[[PixelSource, PixelSink], None], pixels: PixelSource, scale: int, store: FeatureStore, sink: PixelSink
) -> None:
    """As `self_ensembled`, one pass after another, their sum in a map of the store."""
    picture = Box(0, 0, *pixels.size).scaled(scale)
    total = store.new(3, picture.height, picture.width, on_device=False)
    for turn in TURNS:
        seen = TurnedSource(pixels, turn)
        size = [scale * side for side in seen.size]

        def add(box: Box, part: Array, turn: Turn = turn, size: list[int] = size) -> None:
            place = turn.origin(box, *size)
            y = turn.undone(part)
            total.write(place, y if turn is TURNS[0] else total.read(place) + y)

        run(seen, add)
    for rows in picture.grid(-(-picture.height // STRIP), 1):
        sink(rows, total.read(rows) / np.float32(len(TURNS)))


def full_scale(dtype: np.dtype[Any]) -> float:
    """The largest value of a picture's number format; 1 for floats."""
    return float(np.iinfo(dtype).max) if dtype.kind == "u" else 1.0


def network_input(picture: Picture, value_range: float) -> Array:
    """(H, W, 3) of any supported type -> contiguous float32 (1, 3, H, W) in 0..value_range."""
    factor = np.float32(value_range / full_scale(picture.dtype))
    return np.ascontiguousarray(picture.transpose(2, 0, 1)[None], np.float32) * factor


def network_output(y: Array, like: Picture, value_range: float) -> Picture:
    """(1, 3, H, W) -> (H, W, 3) of the same type as `like`, clipped to its range and rounded to the nearest integer."""
    y = np.clip(y[0], 0, value_range) * np.float32(full_scale(like.dtype) / value_range)
    if like.dtype.kind == "u":
        np.rint(y, out=y)
    return np.ascontiguousarray(y.astype(like.dtype).transpose(1, 2, 0))


def infer_padded(backend: Backend, x: Array, infer: Infer | None = None) -> Array:
    """Run a picture of any size, padded to what the graph takes, and crop the result; BackendError if it is not finite.

    infer: what runs it, the backend's own if left out.
    """
    spec = backend.spec
    height, width = (spec.architecture.scale * side for side in x.shape[2:])
    y = (infer or backend.infer)(pad(x, spec.min_side, spec.multiple))[..., :height, :width]
    if not np.isfinite(y).all():
        raise BackendError(f"backend {backend.name} gave values that are not finite ({spec.precision}); try fp32")
    return y


def self_ensembled(infer: Infer) -> Infer:
    """The mean over the 8 flips and rotations of the input, each undone on its output (SAN+, section 4 of the paper)."""

    def ensemble(x: Array) -> Array:
        total: Array | None = None
        for turn in TURNS:
            y = turn.undone(infer(turn.of(x)))
            total = y.copy() if total is None else np.add(total, y, out=total)
        assert total is not None
        return total / np.float32(len(TURNS))

    return ensemble


def infer_tiled(infer: Infer, x: Array, scale: int, tile: int, overlap: int) -> Array:
    """Overlapped tiles of one size, blended; a picture no larger than a tile goes through untouched."""
    rows, columns = TileAxis(x.shape[2], tile, overlap), TileAxis(x.shape[3], tile, overlap)
    if len(rows.starts) == len(columns.starts) == 1:
        return infer(x)
    result = np.zeros((1, 3, scale * rows.side, scale * columns.side), np.float32)
    for top, row_weights in zip(rows.starts, rows.weights(scale), strict=True):
        for left, column_weights in zip(columns.starts, columns.weights(scale), strict=True):
            y = infer(np.ascontiguousarray(x[..., top : top + rows.tile, left : left + columns.tile]))
            place = result[..., scale * top :, scale * left :][..., : y.shape[2], : y.shape[3]]
            place += y * row_weights[:, None] * column_weights
    return result
