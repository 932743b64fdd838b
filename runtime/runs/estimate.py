"""What a run would do and take: each picture's size, tiling, regions, memory and time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from sanrt.errors import LargeEnoughError, SanrtError
from sanrt.model.spec import Architecture
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.sizes import Size
from sanrt.runtime.artifacts.variants import cached_for
from sanrt.runtime.backends.protocol import Backend, RunOptions
from sanrt.runtime.backends.registry import status
from sanrt.runtime.pictures.codec import Encoding, PictureInfo, open_picture, plan_output
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.pictures.storage import fetched
from sanrt.runtime.runs.pipeline import picture_notes
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.runtime.tiling.orientations import ORIENTATIONS
from sanrt.runtime.tiling.plan import MemoryBudget, TilingPlan, choose_regions, network_bytes, result_bytes
from sanrt.runtime.tiling.upscaling import NetworkRunner

SIDES = (64, 192)
"""Sides of the two pictures that a backend's speed is measured on: attention's share is small in one, large in the other."""
LARGE = 448
"""Side of a third one, whose maps exceed the caches as those of photographs do."""
ROUNDS = 3
"""Runs of the small ones, after one that is not counted."""

CODE = ("sanrt.model", "sanrt.runtime", "sanrt.kernels")
"""The packages whose speed is measured."""


@dataclass(frozen=True)
class Speed:
    """How long a backend takes, measured once on this machine."""

    pixel: float
    """Seconds per input pixel of a small picture, of all convolutions."""
    large: float
    """The same of a large one."""
    pair: float
    """Seconds per pair of a query and a key."""

    def seconds(self, height: int, width: int, plan: TilingPlan, arch: Architecture) -> float:
        """An estimate for one picture, the halos of its tiles included."""
        halo = 0 if plan.tiling is Tiling.WHOLE or plan.strips else 2 * arch.body_halo
        grown = (1 + halo / plan.tile) ** 2
        pixel = float(np.interp(height * width, [SIDES[1] ** 2, LARGE**2], [self.pixel, self.large]))
        return height * width * pixel * grown + pairs(height, width, plan.regions) * self.pair


@dataclass(frozen=True)
class PictureEstimate:
    """One picture: how it would go through the network, or why it would not."""

    path: Path
    refusal: str = ""
    """Why nothing would come of it; the other fields are then empty."""
    needless: bool = False
    """Whether that is since the picture is as large already as was asked for."""
    width: int = 0
    height: int = 0
    backend: str = ""
    plan: TilingPlan | None = None
    memory: int = 0
    """Bytes beside the process itself, a GPU's included."""
    scratch: int = 0
    """Bytes of scratch files, the result before it is encoded included."""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    """What would not be taken over from it, one line each."""


def pairs(height: int, width: int, regions: int) -> float:
    """Pairs of queries and pooled keys in both region attentions."""
    return 2 * height * width * (height * width / regions**2 / 4)


def estimates(
    jobs: Sequence[Job], backend: Backend, model: Path, loading: RunOptions, upscaling: UpscaleOptions, encoding: Encoding
) -> Iterator[PictureEstimate]:
    """A plan for every picture on a backend with a model loaded so; a picture's header alone is read."""
    speed = speed_of(backend, model, loading)
    for job in jobs:
        yield picture_estimate(job, backend, speed, upscaling, encoding)


def picture_estimate(
    job: Job, backend: Backend, speed: Speed, options: UpscaleOptions, encoding: Encoding
) -> PictureEstimate:
    """What becomes of one picture."""
    try:
        with fetched(job.source) as path, open_picture(path) as source:
            output = plan_output(source.info, job.destination, backend.spec.architecture.scale, encoding)
            found = estimate(backend, speed, source.info, options)
            return replace(found, path=job.source, notes=picture_notes(source.info, path, output))
    except SanrtError as error:
        refusal = str(error) if str(job.source) in str(error) else f"{job.source}: {error}"
        return PictureEstimate(job.source, refusal, isinstance(error, LargeEnoughError))


def estimate(backend: Backend, speed: Speed, info: PictureInfo, options: UpscaleOptions) -> PictureEstimate:
    """What a picture takes, by its header; raises as `NetworkRunner.decide` does."""
    arch, height, width = backend.spec.architecture, info.height, info.width
    plan = NetworkRunner(backend, options).decide(info)
    passes = len(ORIENTATIONS) if options.self_ensemble else 1
    found = PictureEstimate(info.path, "", False, width, height, backend.name, plan)
    found = replace(found, seconds=passes * speed.seconds(height, width, plan, arch))
    tile = min(height, plan.tile) * min(width, plan.tile) * network_bytes(arch)
    if plan.tiling is Tiling.WHOLE and backend.limits.activations:
        tile = backend.limits.activations(Size(1, height, width))
    if plan.tiling is Tiling.WHOLE and backend.strips:
        tile = backend.strips.needed(height, width, None).memory
    if plan.tiling is not Tiling.EXACT:
        return replace(found, memory=tile + height * width * result_bytes(arch))
    colours, budget = 3 * info.dtype.itemsize, MemoryBudget.of(backend, options)
    pixels, result = height * width * colours, height * width * arch.scale**2 * colours
    if strips := backend.strips:
        needs = strips.needed(height, width, plan.tile, budget.host - pixels)
        return replace(found, memory=needs.memory + pixels, scratch=needs.files + result)
    maps = height * width * 3 * 4 * arch.channels + pixels
    beyond = max(0, maps - sum(budget.maps(arch, plan.tile)))
    return replace(found, memory=tile + maps - beyond, scratch=beyond + result)


def speed_of(backend: Backend, model: Path, options: RunOptions) -> Speed:
    """The kept measurement of this backend, model and machine, or a new one."""
    machinery = [str(status(backend.name).version), machine.cpu_name(), str(machine.cores())]
    identity = [str(backend.spec.precision), *machinery, str(options)]

    def speed() -> bytes:
        return json.dumps(asdict(measured(backend))).encode()

    return Speed(**json.loads(cached_for(model, f"speed-{backend.name}.json", identity, CODE, speed)))


def measured(backend: Backend) -> Speed:
    """Solve the times of two square pictures for the cost of a pixel and of a pair; a third one tells that of large ones."""
    k = backend.spec.regions
    times = [best_time(backend, side) for side in SIDES]
    costs = np.array([[side**2, pairs(side, side, k)] for side in SIDES], np.float64)
    pixel, pair = np.linalg.solve(costs, times)
    if pair < 0 or pixel < 0:  # noise: one of the two is too small to be seen here
        pixel, pair = times[1] / costs[1, 0], 0.0
    large = (seconds(backend, LARGE) - pairs(LARGE, LARGE, regions_of(backend)) * pair) / LARGE**2
    return Speed(float(pixel), float(max(large, pixel)), float(pair))


def regions_of(backend: Backend) -> int:
    """k for the large picture: that of `--regions auto`, where the backend can; attention is then not most of its time."""
    return choose_regions(LARGE, LARGE) if backend.infer_with_regions else backend.spec.regions


def best_time(backend: Backend, side: int) -> float:
    """Seconds of the fastest of a few runs, after one that is not counted."""
    return min([seconds(backend, side) for _ in range(ROUNDS + 1)][1:])


def seconds(backend: Backend, side: int) -> float:
    """What a square picture takes."""
    picture = np.zeros((1, 3, side, side), np.float32)
    infer, started = backend.infer_with_regions, time.perf_counter()
    if side == LARGE and infer:
        infer(picture, regions_of(backend))
    else:
        backend.infer(picture)
    return time.perf_counter() - started
