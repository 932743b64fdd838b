"""What a run would do and take: each picture's size, tiling, regions, memory and time on every backend."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from sanrt.errors import BackendError, SanrtError
from sanrt.model.spec import Architecture, Precision
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.engines import SUFFIX
from sanrt.runtime.artifacts.variants import cached_for
from sanrt.runtime.backends.protocol import Backend, RunOptions
from sanrt.runtime.backends.registry import BACKENDS, load_unguarded, status
from sanrt.runtime.pictures.codec import PictureInfo, open_picture, plan_output
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.runtime.tiling.plan import MemoryBudget, TilingPlan, by_stages, network_bytes, plan_tiling, result_bytes

SIDES = (64, 192)
"""Sides of the two pictures that a backend's speed is measured on: attention's share is small in one, large in the other."""

ROUNDS = 3


CODE = ("sanrt.model", "sanrt.runtime", "sanrt.kernels")
"""The packages whose speed is measured."""
BY_STAGES = " by stages"
"""Behind a backend's name: its speed where that is another than of whole pictures."""


@dataclass(frozen=True)
class Speed:
    """How long a backend takes, measured once on this machine."""

    pixel: float
    """Seconds per input pixel, of all convolutions."""
    pair: float
    """Seconds per pair of a query and a key."""

    def seconds(self, height: int, width: int, plan: TilingPlan, arch: Architecture) -> float:
        """An estimate for one picture, the halos of its tiles included."""
        halo = 0 if plan.tiling is Tiling.WHOLE else 2 * arch.body_halo
        grown = (1 + halo / plan.tile) ** 2
        return height * width * self.pixel * grown + pairs(height, width, plan.regions) * self.pair


@dataclass(frozen=True)
class Estimate:
    """One picture on one backend."""

    backend: str
    plan: TilingPlan
    memory: int
    """Bytes beside the process itself, a GPU's included."""
    scratch: int
    """Bytes of scratch files, the result before it is encoded included."""
    seconds: float


@dataclass(frozen=True)
class PicturePlan:
    """One picture: what would become of it."""

    path: Path
    width: int = 0
    height: int = 0
    skipped: str = ""
    """Why it would be left out; empty if it would not."""
    estimates: tuple[Estimate, ...] = ()
    refusals: tuple[str, ...] = ()
    """Why a backend cannot do it, one line each."""


def pairs(height: int, width: int, regions: int) -> float:
    """Pairs of queries and pooled keys in both region attentions."""
    return 2 * height * width * (height * width / regions**2 / 4)


def usable_backends(model: Path, options: RunOptions) -> Iterator[Backend]:
    """Every backend that can run the model here, loaded one after another."""
    for name in ("tensorrt",) if model.suffix == SUFFIX else BACKENDS:
        if status(name).usable:
            with suppress(SanrtError):
                yield load_unguarded(name, model, options)


def plan(jobs: Iterable[Job], model: Path, loading: RunOptions, upscaling: UpscaleOptions) -> Iterator[PicturePlan]:
    """A plan for every picture; its header alone is read. Raises SanrtError when no backend can load the model."""
    loaded = list(usable_backends(model, loading)) or [load_unguarded("auto", model, loading)]  # which says why none can
    speeds = {backend.name: speed_of(backend, model, loading) for backend in loaded}
    fp32 = replace(loading, precision=Precision.FP32)
    for backend in loaded:
        if backend.spec.precision is Precision.INT16:  # whole pictures only: its stages are fp32
            with load_unguarded(backend.name, model, fp32) as exact:
                speeds[backend.name + BY_STAGES] = speed_of(exact, model, fp32)
    for job in jobs:
        yield picture_plan(job, loaded, speeds, upscaling)


def picture_plan(job: Job, loaded: list[Backend], speeds: Mapping[str, Speed], options: UpscaleOptions) -> PicturePlan:
    """One picture on each of the loaded backends."""
    try:
        with open_picture(job.source) as source:
            info = source.info
            for scale in {backend.spec.architecture.scale for backend in loaded}:
                plan_output(info, job.destination, scale)
    except SanrtError as error:
        return PicturePlan(job.source, skipped=str(error))
    estimates, refusals = [], []
    for backend in loaded:
        try:
            estimates.append(estimate(backend, speeds, info, options))
        except BackendError as error:
            refusals.append(str(error))
    return PicturePlan(job.source, info.width, info.height, "", tuple(estimates), tuple(refusals))


def estimate(backend: Backend, speeds: Mapping[str, Speed], info: PictureInfo, options: UpscaleOptions) -> Estimate:
    """What one picture takes on one backend."""
    arch, height, width = backend.spec.architecture, info.height, info.width
    plan = plan_tiling(backend, height, width, options)
    speed = speeds[backend.name]
    if by_stages(plan, backend):
        speed = speeds.get(backend.name + BY_STAGES, speed)
    tile = min(height, plan.tile) * min(width, plan.tile) * network_bytes(arch)
    seconds = speed.seconds(height, width, plan, arch)
    if plan.tiling is not Tiling.EXACT:
        return Estimate(backend.name, plan, tile + height * width * result_bytes(arch), 0, seconds)
    colours = 3 * info.dtype.itemsize
    maps = height * width * (3 * 4 * arch.channels + colours)
    beyond = max(0, maps - sum(MemoryBudget.of(backend, options).maps(arch, plan.tile)))
    result = height * width * arch.scale**2 * colours
    return Estimate(backend.name, plan, tile + maps - beyond, beyond + result, seconds)


def speed_of(backend: Backend, model: Path, options: RunOptions) -> Speed:
    """The kept measurement of this backend, model and machine, or a new one."""
    machinery = [str(status(backend.name).version), machine.cpu_name(), str(machine.cores())]
    identity = [str(backend.spec.precision), *machinery, str(options)]

    def speed() -> bytes:
        return json.dumps(asdict(measured(backend))).encode()

    return Speed(**json.loads(cached_for(model, f"speed-{backend.name}.json", identity, CODE, speed)))


def measured(backend: Backend) -> Speed:
    """Solve the times of two square pictures for the cost of a pixel and of a pair."""
    k = backend.spec.regions
    times = [best_time(backend, side) for side in SIDES]
    costs = np.array([[side**2, pairs(side, side, k)] for side in SIDES], np.float64)
    pixel, pair = np.linalg.solve(costs, times)
    if pair < 0 or pixel < 0:  # noise: one of the two is too small to be seen here
        pixel, pair = times[1] / costs[1, 0], 0.0
    return Speed(float(pixel), float(pair))


def best_time(backend: Backend, side: int) -> float:
    """Seconds of the fastest of a few runs, after one that is not counted."""
    picture = np.zeros((1, 3, side, side), np.float32)
    backend.infer(picture)
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        backend.infer(picture)
        times.append(time.perf_counter() - started)
    return min(times)
