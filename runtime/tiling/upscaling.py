"""One picture through one backend: number formats, tiles, self-ensemble, and memory that does not suffice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from sanrt.arrays import Array
from sanrt.errors import BackendError, OutOfMemoryError
from sanrt.geometry import Box, TileAxis, pad
from sanrt.runtime.backends.protocol import Backend, PixelSink, PixelSource, Progress, ReportsProgress, StripOptions
from sanrt.runtime.pictures.codec import PictureInfo, SourcePicture
from sanrt.runtime.pictures.scratch import ScratchPicture
from sanrt.runtime.tiling.featuremaps import FeatureStore
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.runtime.tiling.orientations import ORIENTATIONS, Orientation, OrientedSource
from sanrt.runtime.tiling.plan import (
    MemoryBudget,
    TilingPlan,
    by_stages,
    check_result_size,
    check_strips,
    plan_tiling,
    result_bytes,
    smaller_plan,
)
from sanrt.runtime.tiling.streaming import STRIP_ROWS, ArraySource, Streaming, decoded, no_progress

log = logging.getLogger(__name__)

INPUT_BYTES = 3 * 4
"""Bytes of a pixel of the network's input."""

Picture = TypeVar("Picture", bound=npt.NDArray[Any])
"""uint8, uint16 or float32, (H, W, 3)."""
Result = TypeVar("Result")
Infer = Callable[[Array], Array]
"""float32 (1, 3, H, W) -> (1, 3, sH, sW), of any size from 1 x 1."""


@dataclass(frozen=True)
class NetworkRunner:
    """A backend and how pictures go through it: `decide` once, from a picture's size, then run it so.

    After an out-of-memory a picture is done again in smaller tiles, which is logged; what `run_array` and `run_file` return
    with the result is the plan that really ran.
    """

    backend: Backend
    options: UpscaleOptions = field(default_factory=UpscaleOptions)

    @property
    def scale(self) -> int:
        """Upscaling factor."""
        return self.backend.spec.architecture.scale

    def decide(self, info: PictureInfo) -> TilingPlan:
        """How a picture file goes through the network; an exact plan holds neither it nor its result in memory.

        Raises PictureError for a picture or result that is too large for the memory, and as `plan_tiling` does.
        """
        plan = plan_tiling(self.backend, info.height, info.width, self.options)
        check_strips(self.backend, plan, info.height, info.width, self.options)
        if plan.tiling is not Tiling.EXACT:
            check_result_size(self.backend.spec.architecture, info.height, info.width, self.options)
        return plan

    def decide_array(self, height: int, width: int) -> TilingPlan:
        """The same for a picture in memory, whose result is held there too."""
        check_result_size(self.backend.spec.architecture, height, width, self.options)
        return plan_tiling(self.backend, height, width, self.options)

    def run_array(
        self, plan: TilingPlan, picture: Picture, progress: Progress = no_progress, folder: Path | None = None
    ) -> tuple[Picture, TilingPlan]:
        """RGB (H, W, 3) -> (sH, sW, 3) of the same type, see `upscale`; and the plan that ran.

        folder: where scratch files go unless the options name one; the system's if left out.
        """
        value_range = self.backend.spec.architecture.value_range
        x = network_input(picture, value_range)

        def attempt(plan: TilingPlan, progress: Progress) -> Picture:
            passes = len(ORIENTATIONS) if self.options.self_ensemble else 1
            infer: Infer = partial(self.infer, plan, progress=lambda share: progress(share / passes), folder=folder)
            y = (self_ensembled(infer) if self.options.self_ensemble else infer)(x)
            return network_output(y, picture, value_range)

        return self.retried(plan, attempt, progress)

    def run_file(
        self, plan: TilingPlan, source: SourcePicture, folder: Path, progress: Progress = no_progress
    ) -> tuple[ScratchPicture, TilingPlan]:
        """A picture file upscaled into a scratch file, neither in memory as a whole; and the plan that ran.

        folder: where that file and the maps that exceed the memory go, unless the options name another.
        """
        folder = self.options.scratch or folder
        return self.retried(plan, lambda plan, progress: self.stream_file(plan, source, folder, progress), progress)

    def retried(
        self, plan: TilingPlan, attempt: Callable[[TilingPlan, Progress], Result], progress: Progress
    ) -> tuple[Result, TilingPlan]:
        """The attempt's result and its plan, with smaller tiles for as long as memory does not suffice.

        `progress` is told that a failed attempt's shares are to be done again: all that it is told sums to 1.
        """
        while True:
            shares: list[float] = []

            def counted(share: float, shares: list[float] = shares) -> None:
                shares.append(share)
                progress(share)

            try:
                return attempt(plan, counted), plan
            except OutOfMemoryError as error:
                progress(-sum(shares))
                smaller = smaller_plan(plan, self.backend, self.options)
                if smaller is None:
                    raise
                log.warning("%s going %s; doing this picture again: %s", error, plan, smaller)
                plan = smaller

    def infer(self, plan: TilingPlan, x: Array, progress: Progress, folder: Path | None = None) -> Array:
        """One picture (1, 3, H, W), 0..value_range -> (1, 3, sH, sW), not clipped."""
        if plan.tiling is Tiling.OVERLAP:
            return infer_tiled(partial(infer_padded, self.backend), x, self.scale, plan.tile, plan.overlap, progress)
        if by_stages(plan, self.backend):
            return self.stream_array(plan, x, progress, folder)
        told: list[float] = []

        def tell(share: float) -> None:
            told.append(share)
            progress(share)

        if isinstance(reporting := self.backend, ReportsProgress):
            y = infer_padded(self.backend, x, lambda pictures: reporting.infer_reporting(pictures, plan.regions, tell))
        elif infer := self.backend.infer_with_regions:
            y = infer_padded(self.backend, x, lambda pictures: infer(pictures, plan.regions))
        else:
            y = infer_padded(self.backend, x)
        progress(1 - sum(told))
        return y

    def stream_array(self, plan: TilingPlan, x: Array, progress: Progress, folder: Path | None) -> Array:
        """One picture in memory, stage by stage."""
        y: Array = np.empty((1, 3, self.scale * x.shape[2], self.scale * x.shape[3]), np.float32)

        def sink(box: Box, part: Array) -> None:
            y[:, :, box.top : box.bottom, box.left : box.right] = part

        held = x.shape[2] * x.shape[3] * (result_bytes(self.backend.spec.architecture) + INPUT_BYTES)
        with self.feature_store(plan, folder, held) as store:
            self.stream(plan, ArraySource(x), sink, store, progress)
        return y

    def stream(
        self, plan: TilingPlan, source: PixelSource, sink: PixelSink, store: FeatureStore, progress: Progress
    ) -> None:
        """A picture from a source into a sink; raises BackendError for a result that is not finite."""
        spec = self.backend.spec

        def finite(box: Box, part: Array) -> None:
            if not np.isfinite(part).all():
                raise BackendError(f"streaming gave values that are not finite ({spec.precision}); try fp32")
            sink(box, part)

        with store:
            if strips := self.backend.strips:
                strips.run(source, finite, StripOptions(plan.tile, plan.regions, store.memory, store.new_rows), progress)
            else:
                Streaming(self.backend.stages(), spec, source, store, plan.tile, plan.regions, progress).run(finite)

    def stream_file(self, plan: TilingPlan, source: SourcePicture, folder: Path, progress: Progress) -> ScratchPicture:
        """One attempt at `run_file`."""
        spec, info = self.backend.spec, source.info
        value_range = spec.architecture.value_range
        like: npt.NDArray[Any] = np.empty(0, info.dtype)
        passes = len(ORIENTATIONS) if self.options.self_ensemble else 1
        with ExitStack() as undo:
            result = ScratchPicture(self.scale * info.width, self.scale * info.height, 3, info.dtype.type, folder)
            undo.callback(result.close)

            def finished(box: Box, part: Array) -> None:
                result.put(box.top, box.left, network_output(part, like, value_range))

            with self.feature_store(plan, folder) as store:
                pixels = decoded(source, store, value_range, self.options.keep_hidden)

                def part_done(share: float) -> None:
                    progress(share / passes)

                def run(seen: PixelSource, sink: PixelSink) -> None:
                    self.stream(plan, seen, sink, store.rest(), part_done)

                if self.options.self_ensemble:
                    stream_ensembled(run, pixels, self.scale, store, finished)
                else:
                    run(pixels, finished)
            undo.pop_all()
            return result

    def feature_store(self, plan: TilingPlan, folder: Path | None, held: int = 0) -> FeatureStore:
        """Where a streamed picture's maps go; scratch files to the options' folder, or else to `folder`.

        held: bytes of the host's memory that the picture and its result take.
        """
        budget, scratch = MemoryBudget.of(self.backend, self.options), self.options.scratch or folder
        if plan.strips:
            return FeatureStore(max(0, budget.host - held), scratch)
        host, device = budget.maps(self.backend.spec.architecture, plan.tile)
        return FeatureStore(host, scratch, self.backend.stages().maps, device)


def upscale(
    backend: Backend, picture: Picture, options: UpscaleOptions | None = None, progress: Progress = no_progress
) -> Picture:
    """RGB (H, W, 3), uint8, uint16 or float32 in 0..1 -> (sH, sW, 3) of the same type, rounded and clipped.

    Raises OutOfMemoryError when the smallest tiles do not fit either, and as `NetworkRunner.decide_array` does.
    """
    runner = NetworkRunner(backend, options or UpscaleOptions())
    result, _ = runner.run_array(runner.decide_array(*picture.shape[:2]), picture, progress)
    return result


def stream_ensembled(
    run: Callable[[PixelSource, PixelSink], None], pixels: PixelSource, scale: int, store: FeatureStore, sink: PixelSink
) -> None:
    """The self-ensemble of a streamed picture: one pass after another, their sum in a map of the store."""
    picture = Box(0, 0, *pixels.size).scaled(scale)
    total = store.new(3, picture.height, picture.width, on_device=False)
    for orientation in ORIENTATIONS:
        seen = OrientedSource(pixels, orientation)
        size = [scale * side for side in seen.size]

        def add(box: Box, part: Array, orientation: Orientation = orientation, size: list[int] = size) -> None:
            place = orientation.origin(box, *size)
            y = orientation.inverse(part)
            total.write(place, y if orientation is ORIENTATIONS[0] else total.read(place) + y)

        run(seen, add)
    for rows in picture.grid(-(-picture.height // STRIP_ROWS), 1):
        sink(rows, total.read(rows) / np.float32(len(ORIENTATIONS)))


def full_scale(dtype: np.dtype[Any]) -> float:
    """The largest value of a picture's number format; 1 for floats."""
    return float(np.iinfo(dtype).max) if dtype.kind == "u" else 1.0


def network_input(picture: Picture, value_range: float) -> Array:
    """(H, W, 3) of any supported type -> contiguous float32 (1, 3, H, W) in 0..value_range."""
    x = np.array(picture.transpose(2, 0, 1)[None], np.float32, order="C")
    x *= np.float32(value_range / full_scale(picture.dtype))
    return x


def network_output(y: Array, like: Picture, value_range: float) -> Picture:
    """(1, 3, H, W) -> (H, W, 3) of the same type as `like`, clipped to its range and rounded to the nearest integer."""
    made = np.empty((*y.shape[2:], 3), like.dtype)
    for rows in Box(0, 0, *y.shape[2:]).grid(-(-y.shape[2] // STRIP_ROWS), 1):  # what is in between stays small
        part = np.clip(y[0, :, rows.top : rows.bottom], 0, value_range)
        part *= np.float32(full_scale(like.dtype) / value_range)
        if like.dtype.kind == "u":
            np.rint(part, out=part)
        made[rows.top : rows.bottom] = part.transpose(1, 2, 0)
    return cast(Picture, made)


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
        for orientation in ORIENTATIONS:
            y = orientation.inverse(infer(orientation.apply(x)))
            total = y.copy() if total is None else np.add(total, y, out=total)
        assert total is not None
        return total / np.float32(len(ORIENTATIONS))

    return ensemble


def infer_tiled(infer: Infer, x: Array, scale: int, tile: int, overlap: int, progress: Progress = no_progress) -> Array:
    """Overlapped tiles of one size, blended; a picture no larger than a tile goes through untouched."""
    rows, columns = TileAxis(x.shape[2], tile, overlap), TileAxis(x.shape[3], tile, overlap)
    if len(rows.starts) == len(columns.starts) == 1:
        y = infer(x)
        progress(1.0)
        return y
    result = np.zeros((1, 3, scale * rows.side, scale * columns.side), np.float32)
    for top, row_weights in zip(rows.starts, rows.weights(scale), strict=True):
        for left, column_weights in zip(columns.starts, columns.weights(scale), strict=True):
            y = infer(np.ascontiguousarray(x[..., top : top + rows.tile, left : left + columns.tile]))
            place = result[..., scale * top :, scale * left :][..., : y.shape[2], : y.shape[3]]
            place += y * row_weights[:, None] * column_weights
            progress(1 / (len(rows.starts) * len(columns.starts)))
    return result
