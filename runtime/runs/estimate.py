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

from sanrt.arrays import Array
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
from sanrt.runtime.pictures.libvips import vips
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

SMALL = (64, 192)
"""Sides of the two pictures that `infer` is measured on: attention's share is small in one, large in the other."""
SIDE, FEW, MANY = 256, 2, 4
"""Side of a picture that goes in few regions, as large as those of photographs, and in many: only attention differs."""
LARGE = (896, 448)
"""Side of a third one, which goes as photographs do, its maps larger than the caches. The first that takes no more than
LONGEST, or the last."""
LONGEST = 5.0
"""Seconds."""
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
class Pace:
    """Seconds of a picture in the network."""

    opening: float
    """Of any picture."""
    pixel: float
    """Per input pixel, of all convolutions."""
    pair: float
    """Per pair of a query and a key."""

    def seconds(self, pixels: float, pairs: float) -> float:
        """Of one picture."""
        return self.opening + pixels * self.pixel + pairs * self.pair


@dataclass(frozen=True)
class Costs:
    """What a backend takes, measured once on this machine, number formats and conversions included."""

    infer: Pace
    """By `infer`, whole or in overlapped tiles; also in strips."""
    stages: Pace
    """By stages, whole or in exact tiles; their opening is of all of them."""
    memory: float
    """Bytes per input pixel by `infer`."""
    stages_memory: float
    """The same by stages: per pixel that is in the network at once, its maps between the stages left out."""
    filed: float
    """Seconds per byte of the files that hold maps of a picture in strips."""

    def seconds(self, height: int, width: int, plan: TilingPlan, arch: Architecture, by_stages: bool) -> float:
        """What one picture takes in the network, the halos of its tiles and the stages' opening included."""
        halo = 0 if plan.tiling is Tiling.WHOLE or plan.strips else 2 * arch.body_halo
        grown = (1 + halo / plan.tile) ** 2
        pace = self.stages if by_stages else self.infer
        return pace.seconds(height * width * grown, pairs(height, width, plan.regions))


@dataclass(frozen=True)
class Run:
    """A square picture that was upscaled."""

    side: int
    regions: int
    seconds: float
    memory: int
    """Bytes that the process grew by meanwhile."""

    @property
    def pixels(self) -> int:
        return self.side**2

    @property
    def pairs(self) -> float:
        return pairs(self.side, self.side, self.regions)


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
    seconds = costs.seconds(height, width, plan, arch, by_stages(plan, backend) and not plan.strips)
    found = replace(found, seconds=passes * seconds)
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
    return costs.stages_memory if by_stages(plan, backend) else costs.memory


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
    machinery = [machine.cpu_name(), *machine.cpu_features(), str(machine.cores()), backend.device]
    identity = [str(backend.spec.precision), str(status(backend.name).version), *machinery, str(options)]

    def costs() -> bytes:
        return json.dumps(asdict(measured(backend))).encode()

    kept = json.loads(cached_for(model, f"costs-{backend.name}.json", identity, CODE, costs))
    return Costs(**kept | {way: Pace(**kept[way]) for way in ("infer", "stages")})


def measured(backend: Backend) -> Costs:
    """Run square pictures, and solve their times for what a pixel and a pair cost, by `infer` and by stages."""
    arch, own = backend.spec.architecture, backend.spec.regions
    kept = 3 * 5 * (1 + arch.scale**2)
    by_infer = backend.infer_with_regions is not None
    run(backend, SMALL[0], own)  # loads what is loaded late
    if not by_infer:
        small = [fastest(backend, side, own) for side in SMALL]
        infer, memory = solved(small[0], small[1]), max(0.0, small[-1].memory / SMALL[-1] ** 2 - kept)
        if not backend.streams:
            return Costs(infer, infer, memory, memory, filed=0.0)
        run(backend, SMALL[0], FEW, by_stages=True)  # makes the stages
    opening = 0.0 if by_infer else fastest(backend, SMALL[0], FEW, by_stages=True).seconds
    many, few = (fastest(backend, SIDE, regions, not by_infer) for regions in (MANY, FEW))
    pace = solved(many, few, opening)
    sizes = [(side, choose_regions(side, side)) for side in LARGE]
    short = [size for size in sizes if pace.seconds(size[0] ** 2, pairs(size[0], *size)) <= LONGEST]
    large = fastest(backend, *(short or sizes[-1:])[0], not by_infer)
    pace = fitted(pace, large)
    maps = 0 if by_infer else MAPS * 4 * arch.channels
    large_memory = max(0.0, large.memory / large.pixels - kept - maps)
    if by_infer:
        return Costs(pace, pace, large_memory, large_memory, filed_seconds(backend, large))
    return Costs(infer, pace, memory, large_memory, filed=0.0)


def solved(one: Run, other: Run, opening: float = 0.0) -> Pace:
    """The costs that explain both runs; without pairs' where that is too small to be seen beside noise."""
    costs = np.array([[each.pixels, each.pairs] for each in (one, other)], np.float64)
    pixel, pair = np.linalg.solve(costs, [each.seconds - opening for each in (one, other)])
    if pixel < 0 or pair < 0:
        pixel, pair = max(0.0, other.seconds - opening) / other.pixels, 0.0
    return Pace(opening, float(pixel), float(pair))


def fitted(pace: Pace, large: Run) -> Pace:
    """The pace whose pixels take what a large run took beside opening and pairs; all of it where noise leaves nothing."""
    pixels = large.seconds - pace.opening - large.pairs * pace.pair
    return replace(pace, pixel=pixels / large.pixels) if pixels > 0 else Pace(0.0, large.seconds / large.pixels, 0.0)


def filed_seconds(backend: Backend, whole: Run) -> float:
    """Seconds that a byte of maps in files adds to those of a whole picture; 0 for a backend without strips."""
    if not (strips := backend.strips):
        return 0.0
    side = whole.side
    picture = ArraySource(np.zeros((1, 3, side, side), np.float32))
    started = time.perf_counter()
    with FeatureStore(0) as store:
        options = StripOptions(FILED_ROWS, whole.regions, 0, store.new_rows)
        strips.run(picture, lambda box, part: None, options, no_progress)
    files = strips.needed(side, side, FILED_ROWS).files
    return max(0.0, time.perf_counter() - started - whole.seconds) / files if files else 0.0


def fastest(backend: Backend, side: int, regions: int, by_stages: bool = False) -> Run:
    """The fastest of some runs, with the most memory of any."""
    runs: list[Run] = []
    while len(runs) < LEAST_ROUNDS or (len(runs) < MOST_ROUNDS and sum(each.seconds for each in runs) < ENOUGH):
        runs.append(run(backend, side, regions, by_stages))
    return replace(min(runs, key=lambda each: each.seconds), memory=max(each.memory for each in runs))


def run(backend: Backend, side: int, regions: int, by_stages: bool = False) -> Run:
    """Upscale a square picture, as a whole or as a single tile."""
    picture, tiling = np.zeros((side, side, 3), np.uint8), Tiling.EXACT if by_stages else Tiling.WHOLE
    with ResidentPeak() as peak:
        started = time.perf_counter()
        NetworkRunner(backend).run_array(TilingPlan(tiling, side, regions), picture)
        return Run(side, regions, time.perf_counter() - started, peak.bytes - peak.before)


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
