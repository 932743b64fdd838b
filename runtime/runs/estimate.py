"""What a run would do and take: each picture's and video's size, tiling, regions, memory and time."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import psutil

from sanrt.errors import LargeEnoughError, SanrtError
from sanrt.files import cache_folder, cached_file, source_digest
from sanrt.model.contract import Needs
from sanrt.model.spec import Architecture
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.sizes import Size
from sanrt.runtime.artifacts.variants import cached_for
from sanrt.runtime.backends.protocol import Backend, RunOptions, StripOptions
from sanrt.runtime.backends.registry import status
from sanrt.runtime.pictures.codec import Encoding, Output, PictureInfo, open_picture, plan_output, write_picture
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.pictures.storage import fetched
from sanrt.runtime.runs.pipeline import picture_notes
from sanrt.runtime.runs.timing import ResidentPeak, peak_memory
from sanrt.runtime.runs.video_sample import frame_bytes, sample_of
from sanrt.runtime.runs.videos import settle
from sanrt.runtime.tiling.featuremaps import FeatureStore
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.runtime.tiling.orientations import ORIENTATIONS
from sanrt.runtime.tiling.plan import MemoryBudget, TilingPlan, by_stages, choose_regions, network_bytes
from sanrt.runtime.tiling.streaming import ArraySource, no_progress
from sanrt.runtime.tiling.upscaling import NetworkRunner
from sanrt.runtime.video.container import VideoInfo

SIDES = (64, 192)
"""Sides of the two pictures that a backend's speed is measured on: attention's share is small in one, large in the other."""
LARGE = (896, 448)
"""Side of a third one, whose maps exceed the caches as those of photographs do, and that goes as those go: in more regions
than the paper's, on some backends by stages. The first that takes no more than LONGEST, or the last."""
LONGEST = 5.0
"""Seconds."""
FILED_ROWS = 128
"""Height of the strips in which it goes once more where a backend has strips, with all maps in files."""
MAPS = 3
"""Float32 feature maps that are kept between the stages of a picture."""
ROUNDS = 3
"""Runs of the small ones, after one that is not counted."""
ENCODED = 1024
"""Side of the picture that the encoders' speed is measured on."""

CODE = ("sanrt.model", "sanrt.runtime", "sanrt.kernels")
"""The packages whose speed is measured."""


@dataclass(frozen=True)
class Costs:
    """What a backend takes, measured once on this machine, number formats and conversions included."""

    pixel: float
    """Seconds per input pixel of a small picture, of all convolutions."""
    large: float
    """The same of a large one."""
    pair: float
    """Seconds per pair of a query and a key."""
    memory: float
    """Bytes per input pixel of a small picture."""
    large_memory: float
    """The same of a large one: per pixel that is in the network at once, its maps between the stages left out."""
    opening: float
    """Seconds to open the stages, where a picture goes by stages."""
    filed: float
    """Seconds per byte of the files that hold maps of a picture in strips."""
    side: int
    """Of the large picture."""

    def seconds(self, height: int, width: int, plan: TilingPlan, arch: Architecture, staged: bool) -> float:
        """What one picture takes in the network, the halos of its tiles and the stages' opening included."""
        halo = 0 if plan.tiling is Tiling.WHOLE or plan.strips else 2 * arch.body_halo
        grown = (1 + halo / plan.tile) ** 2
        pixel = float(np.interp(height * width, [SIDES[1] ** 2, self.side**2], [self.pixel, self.large]))
        return height * width * pixel * grown + pairs(height, width, plan.regions) * self.pair + staged * self.opening


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
    costs = costs_of(backend, model, loading)
    for job in jobs:
        of_its_kind = video_estimate if job.is_video else picture_estimate
        try:
            yield of_its_kind(job, backend, costs, upscaling, encoding, loaded)
        except SanrtError as error:
            refusal = str(error) if str(job.source) in str(error) else f"{job.source}: {error}"
            yield PictureEstimate(job.source, refusal, isinstance(error, LargeEnoughError))


def picture_estimate(
    job: Job, backend: Backend, costs: Costs, options: UpscaleOptions, encoding: Encoding, loaded: LoadedProcess
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
    job: Job, backend: Backend, costs: Costs, options: UpscaleOptions, encoding: Encoding, loaded: LoadedProcess
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


def estimate(backend: Backend, costs: Costs, info: PictureInfo, options: UpscaleOptions) -> PictureEstimate:
    """What the network and its process beside itself take for a picture, by its header; raises as `NetworkRunner.decide`."""
    return network_estimate(backend, costs, info, NetworkRunner(backend, options).decide(info), options)


def network_estimate(
    backend: Backend, costs: Costs, info: PictureInfo | VideoInfo, plan: TilingPlan, options: UpscaleOptions
) -> PictureEstimate:
    """The same for a picture, or one frame of a video, that goes through the network so."""
    arch, height, width = backend.spec.architecture, info.height, info.width
    passes = len(ORIENTATIONS) if options.self_ensemble else 1
    found = PictureEstimate(info.path, "", False, width, height, backend.name, plan)
    found = replace(
        found, seconds=passes * costs.seconds(height, width, plan, arch, by_stages(plan, backend) and not plan.strips)
    )
    if plan.tiling is Tiling.EXACT:
        needs = streamed_bytes(backend, costs, info, plan, options)
        seconds = found.seconds + passes * plan.strips * needs.files * costs.filed
        result = height * width * arch.scale**2 * 3 * info.dtype.itemsize
        return replace(found, memory=needs.memory, scratch=needs.files + result, seconds=seconds)
    kept = 3 * (4 + info.dtype.itemsize) * (1 + arch.scale**2)  # picture and result, as float32 and in the picture's type
    kept += 3 * arch.scale**2 * 4 * (2 if options.self_ensemble else 0)
    return replace(found, memory=network_memory(backend, costs, height, width, plan) + height * width * kept)


def network_memory(backend: Backend, costs: Costs, height: int, width: int, plan: TilingPlan) -> int:
    """Bytes of the network for a whole picture or an overlapped tile, its input and output left out."""
    arch = backend.spec.architecture
    height, width = min(height, plan.tile), min(width, plan.tile)
    if plan.tiling is Tiling.WHOLE and backend.limits.activations:
        return backend.limits.activations(Size(1, height, width))
    if plan.tiling is Tiling.WHOLE and backend.strips:
        return backend.strips.needed(height, width, None).memory
    maps = MAPS * 4 * arch.channels if by_stages(plan, backend) else 0
    return int(height * width * (per_pixel(backend, costs, plan) + maps))


def per_pixel(backend: Backend, costs: Costs, plan: TilingPlan) -> float:
    """Bytes for each pixel that is in the network at once: as measured, or by arithmetic where a GPU holds them."""
    if backend.memory is not None:
        return network_bytes(backend.spec.architecture)
    return costs.large_memory if by_stages(plan, backend) else costs.memory


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
    tile = int(grown[0] * grown[1] * per_pixel(backend, costs, plan))
    maps = pixels * MAPS * 4 * arch.channels + source + total
    beyond = max(0, maps - sum(budget.maps(arch, plan.tile)))
    return Needs(tile + maps - beyond, beyond)


def costs_of(backend: Backend, model: Path, options: RunOptions) -> Costs:
    """The kept measurement of this backend, model and machine, or a new one."""
    machinery = [str(status(backend.name).version), machine.cpu_name(), str(machine.cores())]
    identity = [str(backend.spec.precision), *machinery, str(options)]

    def costs() -> bytes:
        return json.dumps(asdict(measured(backend))).encode()

    return Costs(**json.loads(cached_for(model, f"costs-{backend.name}.json", identity, CODE, costs)))


def measured(backend: Backend) -> Costs:
    """Solve the times of two square pictures for the cost of a pixel and of a pair; a third one tells that of large ones."""
    arch, times, sizes = backend.spec.architecture, [], []
    for side in SIDES:
        runs = [run(backend, side, backend.spec.regions) for _ in range(ROUNDS + 1)]
        times.append(min(seconds for seconds, _ in runs[1:]))
        sizes.append(max(size for _, size in runs))
    costs = np.array([[side**2, pairs(side, side, backend.spec.regions)] for side in SIDES], np.float64)
    pixel, pair = np.linalg.solve(costs, times)
    if pair < 0 or pixel < 0:  # noise: one of the two is too small to be seen here
        pixel, pair = times[1] / costs[1, 0], 0.0
    side = next((side for side in LARGE if side**2 * pixel <= LONGEST), LARGE[-1])
    regions = choose_regions(side, side) if backend.streams else backend.spec.regions
    staged = by_stages(TilingPlan(Tiling.WHOLE, side, regions), backend)
    opening = min(run(backend, SIDES[0], regions)[0] for _ in range(2)) if staged else 0.0  # the first also makes them
    seconds, size = run(backend, side, regions)
    filed = filed_seconds(backend, side, regions, seconds)
    large = (seconds - opening - pairs(side, side, regions) * pair) / side**2
    kept = 3 * 5 * (1 + arch.scale**2)
    large_memory = size / side**2 - kept - (MAPS * 4 * arch.channels if staged else 0)
    memory = sizes[1] / SIDES[1] ** 2 - kept
    return Costs(
        pixel=float(pixel),
        large=float(max(large, pixel)),
        pair=float(pair),
        memory=max(memory, 0.0),
        large_memory=max(large_memory, 0.0),
        opening=opening,
        filed=filed,
        side=side,
    )


def filed_seconds(backend: Backend, side: int, regions: int, whole: float) -> float:
    """Seconds that a byte of maps in files adds to those of a whole picture; 0 for a backend without strips."""
    if not (strips := backend.strips):
        return 0.0
    picture = ArraySource(np.zeros((1, 3, side, side), np.float32))
    started = time.perf_counter()
    with FeatureStore(0) as store:
        strips.run(picture, lambda box, part: None, StripOptions(FILED_ROWS, regions, 0, store.new_rows), no_progress)
    files = strips.needed(side, side, FILED_ROWS).files
    return max(0.0, time.perf_counter() - started - whole) / files if files else 0.0


def run(backend: Backend, side: int, regions: int) -> tuple[float, int]:
    """Seconds that a square picture takes, and bytes that the process grew by meanwhile."""
    picture, plan = np.zeros((side, side, 3), np.uint8), TilingPlan(Tiling.WHOLE, side, regions)
    with ResidentPeak() as peak:
        started = time.perf_counter()
        NetworkRunner(backend).run_array(plan, picture)
        return time.perf_counter() - started, peak.bytes - peak.before


def encoding_seconds(output: Output) -> float:
    """Seconds per pixel of a result in its format, measured once on this machine."""
    facts = [output.format, str(output.bits), str(output.lossless), str(output.quality), machine.cpu_name()]
    name = hashlib.sha256("\n".join([*facts, source_digest("sanrt.runtime.pictures")]).encode()).hexdigest()[:16]

    def encode() -> bytes:
        random = np.random.default_rng(0)
        squares = np.kron(random.random((ENCODED // 8, ENCODED // 8, 3)), np.ones((8, 8, 1)))
        shades = 0.95 * squares + 0.05 * random.random(squares.shape)
        pixels = (255 * shades).astype(np.uint8) if output.bits == 8 else (65535 * shades).astype(np.uint16)
        with TemporaryDirectory() as folder:
            path = (Path(folder) / "a").with_suffix(output.path.suffix)
            made = replace(output, path=path, width=ENCODED, height=ENCODED, alpha=False, background=None, metadata={})
            started = time.perf_counter()
            write_picture(made, pixels)
            return json.dumps((time.perf_counter() - started) / ENCODED**2).encode()

    return float(json.loads(cached_file([cache_folder() / "encoders"], f"{output.format}-{name}.json", encode)))
