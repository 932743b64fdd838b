"""What a run would do and take: each picture's and video's size, tiling, regions, memory and time."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import psutil

from sanrt.arrays import Array
from sanrt.errors import LargeEnoughError, SanrtError
from sanrt.files import cache_folder, cached_file, source_digest
from sanrt.geometry import TileAxis
from sanrt.model.contract import Needs
from sanrt.model.spec import Architecture
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.sizes import Size
from sanrt.runtime.artifacts.variants import cached_for
from sanrt.runtime.backends.protocol import Backend, RunOptions, StripOptions
from sanrt.runtime.backends.registry import status
from sanrt.runtime.pictures.codec import Encoding, Output, PictureInfo, open_picture, plan_output, write_picture
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.pictures.libvips import vips
from sanrt.runtime.pictures.storage import fetched
from sanrt.runtime.runs.pipeline import picture_notes
from sanrt.runtime.runs.timing import ResidentPeak, peak_memory
from sanrt.runtime.runs.video_sample import frame_bytes, sample_of
from sanrt.runtime.runs.videos import settle
from sanrt.runtime.tiling.featuremaps import FeatureStore
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.runtime.tiling.orientations import ORIENTATIONS
from sanrt.runtime.tiling.plan import MemoryBudget, TilingPlan, by_stages, choose_exact_tile, choose_regions, network_bytes
from sanrt.runtime.tiling.streaming import ArraySource, no_progress
from sanrt.runtime.tiling.upscaling import NetworkRunner
from sanrt.runtime.video.container import VideoInfo

SMALL = (128, 288)
"""Sides of the two pictures that a fixed number of regions is measured on: attention's share is small in one, large in the
other."""
SIDE, FEW, MANY = 256, 2, 4
"""Side of a picture that goes in few regions, as large as those of photographs, and in many: only attention differs."""
LARGE = (896, 448)
"""Side of a third one, which goes as photographs do, its maps larger than the caches. The first that takes no more than
LONGEST, or the last."""
LONGEST = 5.0
"""Seconds."""
OPENED = 64
"""Side of the picture that what is loaded late, or with each picture, is measured on."""
FILED_ROWS = 128
"""Height of the strips in which it goes once more where a backend has strips, with all maps in files."""
MAPS = 3
"""Float32 feature maps that are kept between the stages of a picture."""
LEAST_ROUNDS, MOST_ROUNDS, ENOUGH = 2, 5, 1.5
"""Runs of each of which the fastest counts: more than the least until they took so many seconds."""
ENCODED, STEEPNESS = 1024, 1.5
"""Side of the picture that the encoders' speed is measured on, and how its spectrum falls with the frequency: encoders take
about as long for it as for an enlarged photograph, and up to three times as long for noise."""

CODE = ("sanrt.model", "sanrt.runtime", "sanrt.kernels")
"""The packages whose speed is measured, this one among them."""
ENCODING_CODE = ("sanrt.runtime.pictures", "sanrt.runtime.runs")
"""The same of encoders."""


@dataclass(frozen=True)
class Work:
    """What of a picture goes through the network."""

    pixels: float
    """Input pixels, those that tiles share counted as often as they are computed."""
    pairs: float
    """Of queries and pooled keys in both region attentions."""

    @classmethod
    def of(cls, height: int, width: int, plan: TilingPlan, arch: Architecture) -> Self:
        """Of a picture that goes so."""
        if plan.tiling is Tiling.OVERLAP:
            rows, columns = (TileAxis(side, plan.tile, plan.overlap) for side in (height, width))
            tiles = len(rows.starts) * len(columns.starts)
            return cls(tiles * rows.tile * columns.tile, tiles * pairs(rows.tile, columns.tile, plan.regions))
        halo = 0 if plan.strips else 2 * arch.body_halo
        grown = [side + halo * (-(-side // plan.tile) - 1) for side in (height, width)]
        return cls(grown[0] * grown[1], pairs(height, width, plan.regions))


@dataclass(frozen=True)
class Costs:
    """What a way through a backend takes, by `infer` or by stages: measured once here, conversions included."""

    opening: float
    """Seconds of any picture, as the next two."""
    pixel: float
    """Per input pixel, of all convolutions."""
    pair: float
    """Per pair of a query and a key."""
    memory: float
    """Bytes per input pixel that is in the network at once; by stages the maps between them left out."""
    filed: float = 0.0
    """Seconds per byte of the files that hold maps of a picture in strips."""

    def seconds(self, work: Work) -> float:
        """Of one picture in the network."""
        return self.opening + work.pixels * self.pixel + work.pairs * self.pair


CostsOf = Callable[[bool], Costs]
"""A backend's costs by stages, if true, or else by `infer`."""


@dataclass(frozen=True)
class Run:
    """A picture that was upscaled."""

    work: Work
    seconds: float
    memory: int
    """Bytes that the process grew by meanwhile."""


@dataclass(frozen=True)
class LoadedProcess:
    """Bytes of a process that has loaded a model."""

    resident: int
    peak: int
    """While it loaded."""

    @classmethod
    def this(cls) -> Self:
        """This one."""
        return cls(psutil.Process().memory_info().rss, peak_memory())


@dataclass(frozen=True)
class PictureEstimate:
    """One picture or video: how it, or each of its frames, would go through the network, or why it would not."""

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
    """Bytes that the whole process has at its peak, a GPU's included."""
    scratch: int = 0
    """Bytes of scratch files, the result before it is encoded included; of a video those of its segments."""
    seconds: float = 0.0
    """Of the network and the encoder; of a video all that its frames take."""
    frames: int = 0
    """Of a video, as its header says or by duration and rate; 0 for a picture."""
    rate: Fraction = Fraction(0)
    """Frames that a video shows per second."""
    notes: tuple[str, ...] = ()
    """What would not be taken over from it, one line each."""


def pairs(height: int, width: int, regions: int) -> float:
    """Pairs of queries and pooled keys in both region attentions."""
    return 2 * height * width * (height * width / regions**2 / 4)


def estimates(
    jobs: Sequence[Job], backend: Backend, model: Path, loading: RunOptions, upscaling: UpscaleOptions, encoding: Encoding
) -> Iterator[PictureEstimate]:
    """A plan for every picture and video on a backend with a model loaded so.

    A picture's header alone is read; the first frames of a video are, and encoded, see `sample_of`.
    """
    loaded = LoadedProcess.this()
    costs = cache(partial(costs_of, backend, model, loading))
    for job in jobs:
        of_its_kind = video_estimate if job.is_video else picture_estimate
        try:
            yield of_its_kind(job, backend, costs, upscaling, encoding, loaded)
        except SanrtError as error:
            refusal = str(error) if str(job.source) in str(error) else f"{job.source}: {error}"
            yield PictureEstimate(job.source, refusal, isinstance(error, LargeEnoughError))


def picture_estimate(
    job: Job, backend: Backend, costs: CostsOf, options: UpscaleOptions, encoding: Encoding, loaded: LoadedProcess
) -> PictureEstimate:
    """What becomes of one picture in a process that has loaded the model; raises as a run of it would."""
    with fetched(job.source) as path, open_picture(path) as source:
        output = plan_output(source.info, job.destination, backend.spec.architecture.scale, encoding)
        found = estimate(backend, costs, source.info, options)
        seconds = found.seconds + output.width * output.height * encoding_seconds(output)
        notes = picture_notes(source.info, path, output)
        memory = max(loaded.peak, loaded.resident + found.memory)
        return replace(found, path=job.source, memory=memory, seconds=seconds, notes=notes)


def video_estimate(
    job: Job, backend: Backend, costs: CostsOf, options: UpscaleOptions, encoding: Encoding, loaded: LoadedProcess
) -> PictureEstimate:
    """The same for a video, as if no frame were equal to the one before.

    On the CPU network, decoder and encoder share its cores; beside a GPU the slowest of them sets the pace.
    """
    with fetched(job.source) as path:
        video = settle(job, path, backend.spec.architecture.scale, encoding)
        info = video.info
        plan = NetworkRunner(backend, options).decide_array(info.height, info.width)
        sample = sample_of(video)
    found = network_estimate(backend, costs, info, plan, options)
    steps = found.seconds, sample.reading, sample.encoding
    per_frame = sum(steps) if backend.device == "CPU" else max(steps)
    return replace(
        found,
        path=job.source,
        memory=max(loaded.peak, loaded.resident + found.memory + frame_bytes(video)),
        scratch=found.scratch + round(info.frames * sample.bytes),
        seconds=info.frames * per_frame,
        frames=info.frames,
        rate=info.rate,
        notes=video.notes,
    )


def estimate(backend: Backend, costs: CostsOf, info: PictureInfo, options: UpscaleOptions) -> PictureEstimate:
    """What the network and its process beside itself take for a picture, by its header; raises as `NetworkRunner.decide`."""
    return network_estimate(backend, costs, info, NetworkRunner(backend, options).decide(info), options)


def network_estimate(
    backend: Backend, costs: CostsOf, info: PictureInfo | VideoInfo, plan: TilingPlan, options: UpscaleOptions
) -> PictureEstimate:
    """The same for a picture, or one frame of a video, that goes through the network so."""
    arch, height, width = backend.spec.architecture, info.height, info.width
    passes = len(ORIENTATIONS) if options.self_ensemble else 1
    way = costs(by_stages(plan, backend) and not plan.strips)
    seconds = passes * way.seconds(Work.of(height, width, plan, arch))
    found = PictureEstimate(info.path, "", False, width, height, backend.name, plan, seconds=seconds)
    if plan.tiling is Tiling.EXACT:
        needs = streamed_bytes(backend, way, info, plan, options)
        seconds += passes * plan.strips * needs.files * way.filed
        result = height * width * arch.scale**2 * 3 * info.dtype.itemsize
        return replace(found, memory=needs.memory, scratch=needs.files + result, seconds=seconds)
    kept = 3 * (4 + info.dtype.itemsize) * (1 + arch.scale**2)  # picture and result, as float32 and in the picture's type
    kept += 3 * arch.scale**2 * 4 * (2 if options.self_ensemble else 0)
    return replace(found, memory=network_memory(backend, way, height, width, plan) + height * width * kept)


def network_memory(backend: Backend, costs: Costs, height: int, width: int, plan: TilingPlan) -> int:
    """Bytes of the network for a whole picture or an overlapped tile, its input and output left out."""
    arch = backend.spec.architecture
    height, width = min(height, plan.tile), min(width, plan.tile)
    if plan.tiling is Tiling.WHOLE and backend.limits.activations:
        return backend.limits.activations(Size(1, height, width))
    if plan.tiling is Tiling.WHOLE and backend.strips:
        return backend.strips.needed(height, width, None).memory
    maps = MAPS * 4 * arch.channels if by_stages(plan, backend) else 0
    return int(height * width * (per_pixel(backend, costs) + maps))


def per_pixel(backend: Backend, costs: Costs) -> float:
    """Bytes for each pixel that is in the network at once: as measured, or by arithmetic where a GPU holds them."""
    return costs.memory if backend.memory is None else network_bytes(backend.spec.architecture)


def streamed_bytes(
    backend: Backend, costs: Costs, info: PictureInfo | VideoInfo, plan: TilingPlan, options: UpscaleOptions
) -> Needs:
    """Bytes of a picture that is streamed from its file."""
    arch, budget = backend.spec.architecture, MemoryBudget.of(backend, options)
    pixels = info.height * info.width
    source = pixels * 3 * info.dtype.itemsize
    total = pixels * arch.scale**2 * 3 * 4 if options.self_ensemble else 0  # in a map, before those of the network
    if strips := backend.strips:
        left = budget.host - source
        held = total if total <= left else 0
        needs = strips.needed(info.height, info.width, plan.tile, left - held)
        return Needs(needs.memory + source + held, needs.files + total - held)
    grown = [min(side, plan.tile + 2 * arch.body_halo) for side in (info.height, info.width)]
    tile = int(grown[0] * grown[1] * per_pixel(backend, costs))
    maps = pixels * MAPS * 4 * arch.channels + source + total
    beyond = max(0, maps - sum(budget.maps(arch, plan.tile)))
    return Needs(tile + maps - beyond, beyond)


def costs_of(backend: Backend, model: Path, options: RunOptions, through_stages: bool) -> Costs:
    """The kept measurement of this backend, model and machine, or a new one; by `infer` or by stages."""
    machinery = [machine.cpu_name(), *machine.cpu_features(), str(machine.cores()), backend.device]
    identity = [str(backend.spec.precision), str(status(backend.name).version), *machinery, str(options)]

    def costs() -> bytes:
        return json.dumps(asdict((stages_costs if through_stages else infer_costs)(backend))).encode()

    name = f"costs-{backend.name}{'-stages' * through_stages}.json"
    return Costs(**json.loads(cached_for(model, name, identity, CODE, costs)))


def infer_costs(backend: Backend) -> Costs:
    """By square pictures that go whole, solved for what a pixel and a pair cost."""
    own, whole = backend.spec.regions, partial(TilingPlan, Tiling.WHOLE)
    run(backend, OPENED, whole(OPENED, own))  # loads what is loaded late
    if backend.infer_with_regions is None:
        small, large = (fastest(backend, side, whole(side, own)) for side in SMALL)
        return replace(solved(small, large), memory=network_share(backend, SMALL[-1], large))
    many, few = (fastest(backend, SIDE, whole(SIDE, regions)) for regions in (MANY, FEW))
    costs = solved(many, few)
    side, plan = large_plan(backend, costs, whole)
    large = fastest(backend, side, plan)
    costs = replace(fitted(costs, large), memory=network_share(backend, side, large))
    return replace(costs, filed=filed_seconds(backend, side, plan.regions, large.seconds))


def stages_costs(backend: Backend) -> Costs:
    """By square pictures in tiles as photographs' are."""
    arch, tile = (
        backend.spec.architecture,
        choose_exact_tile(backend, SIDE, SIDE, MemoryBudget.of(backend, UpscaleOptions())),
    )

    def tiled(_: int, regions: int) -> TilingPlan:
        return TilingPlan(Tiling.EXACT, tile, regions)

    run(backend, OPENED, tiled(OPENED, FEW))
    opening = fastest(backend, OPENED, tiled(OPENED, FEW)).seconds
    many, few = (fastest(backend, SIDE, tiled(SIDE, regions)) for regions in (MANY, FEW))
    costs = solved(many, few, opening)
    side, plan = large_plan(backend, costs, tiled)
    large = fastest(backend, side, plan)
    at_once = min(side, tile + 2 * arch.body_halo) ** 2
    memory = network_share(backend, side, large, MAPS * 4 * arch.channels) * side**2 / at_once
    return replace(fitted(costs, large), memory=memory)


def large_plan(backend: Backend, costs: Costs, plan_of: Callable[[int, int], TilingPlan]) -> tuple[int, TilingPlan]:
    """The side of the largest picture to be measured, and how it goes."""
    plans = {side: plan_of(side, choose_regions(side, side)) for side in LARGE}
    work = {side: Work.of(side, side, plan, backend.spec.architecture) for side, plan in plans.items()}
    side = next((side for side in LARGE if costs.seconds(work[side]) <= LONGEST), LARGE[-1])
    return side, plans[side]


def network_share(backend: Backend, side: int, run: Run, maps: int = 0) -> float:
    """Bytes of a run per pixel of the square picture, beside its input, its output and such maps."""
    kept = 3 * 5 * (1 + backend.spec.architecture.scale**2)
    return max(0.0, run.memory / side**2 - kept - maps)


def solved(one: Run, other: Run, opening: float = 0.0) -> Costs:
    """The costs that explain the seconds of both; without pairs' where that is too small to be seen beside noise."""
    costs = np.array([astuple(each.work) for each in (one, other)], np.float64)
    pixel, pair = np.linalg.solve(costs, [each.seconds - opening for each in (one, other)])
    if pixel < 0 or pair < 0:
        pixel, pair = max(0.0, other.seconds - opening) / other.work.pixels, 0.0
    return Costs(opening, float(pixel), float(pair), memory=0.0)


def fitted(costs: Costs, large: Run) -> Costs:
    """With pixels that take what a large run took beside opening and pairs; all of it where noise leaves nothing."""
    left = large.seconds - costs.opening - large.work.pairs * costs.pair
    if left > 0:
        return replace(costs, pixel=left / large.work.pixels)
    return replace(costs, opening=0.0, pixel=large.seconds / large.work.pixels, pair=0.0)


def filed_seconds(backend: Backend, side: int, regions: int, whole: float) -> float:
    """Seconds that a byte of maps in files adds to those of a whole picture; 0 for a backend without strips."""
    if not (strips := backend.strips):
        return 0.0
    picture = ArraySource(np.zeros((1, 3, side, side), np.float32))
    started = time.perf_counter()
    with FeatureStore(0) as store:
        options = StripOptions(FILED_ROWS, regions, 0, store.new_rows)
        strips.run(picture, lambda box, part: None, options, no_progress)
    files = strips.needed(side, side, FILED_ROWS).files
    return max(0.0, time.perf_counter() - started - whole) / files if files else 0.0


def fastest(backend: Backend, side: int, plan: TilingPlan) -> Run:
    """The fastest of some runs, with the most memory of any."""
    runs: list[Run] = []
    while len(runs) < LEAST_ROUNDS or (len(runs) < MOST_ROUNDS and sum(each.seconds for each in runs) < ENOUGH):
        runs.append(run(backend, side, plan))
    return replace(min(runs, key=lambda each: each.seconds), memory=max(each.memory for each in runs))


def run(backend: Backend, side: int, plan: TilingPlan) -> Run:
    """Upscale a square picture."""
    picture, work = np.zeros((side, side, 3), np.uint8), Work.of(side, side, plan, backend.spec.architecture)
    with ResidentPeak() as peak:
        started = time.perf_counter()
        NetworkRunner(backend).run_array(plan, picture)
        return Run(work, time.perf_counter() - started, peak.bytes - peak.before)


def encoding_seconds(output: Output) -> float:
    """Seconds per pixel of a result in its format, measured once on this machine."""
    facts = [output.format, str(output.bits), str(output.lossless), str(output.quality)]
    facts += [
        machine.cpu_name(),
        str(machine.cores()),
        *(str(vips().version(part)) for part in range(3)),
        source_digest(*ENCODING_CODE),
    ]
    name = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]

    def encode() -> bytes:
        shades = smooth_picture(ENCODED)
        pixels = (255 * shades).astype(np.uint8) if output.bits == 8 else (65535 * shades).astype(np.uint16)
        with TemporaryDirectory() as folder:
            path = (Path(folder) / "a").with_suffix(output.path.suffix)
            made = replace(output, path=path, width=ENCODED, height=ENCODED, alpha=False, background=None, metadata={})
            started = time.perf_counter()
            write_picture(made, pixels)
            return json.dumps((time.perf_counter() - started) / ENCODED**2).encode()

    return float(json.loads(cached_file([cache_folder() / "encoders"], f"{output.format}-{name}.json", encode)))


def smooth_picture(side: int) -> Array:
    """Noise (H, W, 3) in 0..1 that has the spectrum of enlarged photographs."""
    rows, columns = np.fft.fftfreq(side)[:, None, None], np.fft.rfftfreq(side)[:, None]
    frequency = np.maximum(np.hypot(rows, columns), 1 / side)
    spectrum = np.fft.rfft2(np.random.default_rng(0).random((side, side, 3)), axes=(0, 1)) / frequency**STEEPNESS
    shades = np.fft.irfft2(spectrum, axes=(0, 1))
    shades = 0.5 + 0.2 * (shades - shades.mean()) / shades.std()
    clipped: Array = np.clip(shades, 0, 1).astype(np.float32)
    return clipped
