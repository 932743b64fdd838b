"""What is asked of sanrt with picture files, on the command line or by a program: gathered once into frozen options."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sanrt.errors import FileError, PictureError, SanrtError, UsageError
from sanrt.files import require_folder_of, why_no_new_files
from sanrt.model.bundled import PHOTO_QUALITY, WeightsKind, has_bundled
from sanrt.runtime.artifacts.models import (
    DEFAULT_SCALE,
    default_model,
    has_photo_model,
    require_own_weights,
    require_scale,
)
from sanrt.runtime.pictures.formats import Format, ResultFormat, result_format
from sanrt.runtime.pictures.storage import RemotePath, check_buckets, located
from sanrt.runtime.video.formats import Container
from sanrt.wording import option

if TYPE_CHECKING:
    from sanrt.model.spec import ModelSpec
    from sanrt.runtime.backends.protocol import Backend, RunOptions
    from sanrt.runtime.pictures.codec import Encoding
    from sanrt.runtime.pictures.jobs import Job, Naming
    from sanrt.runtime.pictures.resize import ResultSize
    from sanrt.runtime.runs.pipeline import Listener, Outcome
    from sanrt.runtime.runs.ray_pool import Ready
    from sanrt.runtime.runs.results import Findings, Recipe
    from sanrt.runtime.tiling.options import UpscaleOptions


@dataclass(frozen=True)
class ModelChoice:
    """Which model runs, and on what."""

    named: Path | None
    """None is the exported model of the scale in `models`, or the bundled weights."""
    models: Path
    scale: int | None
    """None is the named model's, that which the results' size needs, or DEFAULT_SCALE."""
    backend: str
    options: RunOptions
    weights: WeightsKind | None = None
    """Of what sanrt ships or exported of it; None is what suits each picture."""

    def __post_init__(self) -> None:
        """Raise UsageError for a model and weights besides."""
        require_own_weights(self.named, self.weights)

    @property
    def path(self) -> Path:
        """The model's file; with weights that suit each picture, that for all but some JPEG files."""
        return self.named or default_model(self.models, self.scale, self.weights or WeightsKind.CLEAN)

    def reason(self, jobs: Sequence[Job]) -> str:
        """Why pictures go through this model, where that is not plain, for people; else empty.

        The weights for JPEG photographs are for these alone; an exported model takes them too, even if sanrt has others.
        """
        scale = self.scale or DEFAULT_SCALE
        if self.named or not has_bundled(scale, WeightsKind.PHOTO):
            return ""
        if self.weights is WeightsKind.PHOTO:
            jpeg = f"JPEG of quality {PHOTO_QUALITY} or less"
            kinds = {"compressed video" if job.is_video else jpeg for job in jobs}
            return f"{' or '.join(sorted(kinds))}, through the weights for photographs"
        if has_photo_model(self.models, scale) or not any(Format.of_suffix(job.source) is Format.JPEG for job in jobs):
            return ""
        better = f"`sanrt export --scale {scale} --weights photo` makes a model for these"
        return f"{self.path} was exported, so JPEG photographs go through it too; {better}"

    def absolute(self) -> ModelChoice:
        """The same, wherever the working folder is."""
        return replace(self, named=self.named and self.named.absolute(), models=self.models.absolute())

    def preferred(self) -> ModelChoice:
        """What runs: for `auto` on an exported model, the variant that was measured fastest here, where there is one."""
        from sanrt.runtime.backends.default_variant import preferred

        found = preferred(self.path) if self.backend == "auto" and not self.named else None
        if found is None:
            return self
        options = replace(self.options, precision=self.options.precision or found.precision)
        return replace(self, named=self.path.parent / found.model, weights=None, backend=found.backend, options=options)


@dataclass(frozen=True)
class Request:
    """Pictures, a model, and how results are made and written."""

    paths: Sequence[str]
    choice: ModelChoice
    upscaling: UpscaleOptions
    encoding: Encoding
    naming: Naming

    def resolve(self, overwrite: bool = False, absolute: bool = False, include_results: bool = False) -> Work:
        """What there is to do, before anything is done.

        `overwrite` replaces whatever is in the results' places; `absolute` makes paths that other processes understand;
        `include_results` enlarges results of sanrt's again that lie in folders.
        Raises UsageError for what cannot be, PictureError and ModelError for what is not there.
        """
        from sanrt.runtime.backends.registry import model_spec, require_known
        from sanrt.runtime.pictures.jobs import find_pictures, output_beside, passed_over
        from sanrt.runtime.runs.results import Recipe, sort_out
        from sanrt.runtime.video.container import ffmpeg

        choice, named = self.choice, [located(path) for path in self.paths]
        if absolute:
            named, choice = [path.absolute() for path in named], choice.absolute()
        require_known(choice.backend)
        check_buckets(named)

        @cache
        def network(scale: int | None, weights: WeightsKind | None = choice.weights) -> tuple[ModelChoice, ModelSpec]:
            """The model that enlarges so many times, and its description."""
            chosen = replace(choice, scale=scale, weights=weights).preferred()
            spec = model_spec(chosen.path)
            require_scale(chosen.path, spec.architecture.scale, scale)
            return chosen, spec

        size = self.encoding.result_size
        label = str(size) or f"x{network(choice.scale)[1].architecture.scale}"
        beside = [] if named[1:] else [output_beside(named[0], label, self.naming)]
        *inputs, output = named + beside
        jobs = find_pictures(inputs, output, self.naming, into_folder=self.paths[-1].endswith(("/", os.sep)))
        require_there(jobs)
        if any(job.needs_ffmpeg for job in jobs):
            ffmpeg()
        require_effect(self.encoding, {result_format(job.destination) or Format.PNG for job in jobs})
        asked: list[tuple[ModelChoice, Part]] = []
        recipes: dict[Job, Recipe] = {}
        for (scale, weights), its_jobs in by_network(jobs, choice, size).items():
            chosen, spec = network(scale, weights)
            require_large_enough(chosen.path, spec.architecture.scale, size)
            recipe = Recipe.of(spec, choice.options.precision, self.upscaling, self.encoding)
            asked.append((replace(choice, scale=scale, weights=weights), Part(chosen, its_jobs, recipe)))
            recipes |= dict.fromkeys(its_jobs, recipe)
        found = sort_out({job: recipes[job] for job in jobs}, overwrite, include_results)
        require_others(inputs, found)
        to_do, parts = {job.source: job for job in found.to_do}, []
        for its_choice, part in asked:
            if its_jobs := [to_do[job.source] for job in part.jobs if job.source in to_do]:
                reason = "" if choice.weights else its_choice.reason(its_jobs)
                parts.append(replace(part, jobs=its_jobs, reason=reason))
        return Work(jobs, parts, found, passed_over(inputs, output) + results_line(found), output)


@dataclass(frozen=True)
class Part:
    """The pictures of a request that one network enlarges."""

    choice: ModelChoice
    """With the preferred variant in place of the exported model, where there is one."""
    jobs: Sequence[Job]
    """Those that are not done."""
    recipe: Recipe
    reason: str = ""
    """Why they go through this network, where that is not plain."""


@dataclass(frozen=True)
class Work:
    """What a request comes to."""

    jobs: Sequence[Job]
    """Every picture once, in the order in which it was named first, those of a folder by name."""
    parts: Sequence[Part]
    """One for each network: several where --size leaves the scale to the pictures, or some are JPEG photographs; none where
    nothing is to do."""
    found: Findings
    """What is done already, and what is in the way."""
    passed_over: Sequence[str]
    """Lines on pictures in folders that sanrt does not read, or has made itself."""
    output: Path
    """The folder of the results, or the file of the only one."""

    @property
    def place(self) -> str:
        """Where the results are, for people: the file of one, the folder of several."""
        jobs = [*self.found.to_do, *self.found.done, *self.found.occupied]
        return str(jobs[0].destination) if len(jobs) == 1 else os.path.join(self.output, "")  # noqa: PTH118

    @property
    def total(self) -> int:
        """How many outcomes there will be."""
        return len(self.found.to_do) + len(self.found.done) + len(self.found.occupied)


@dataclass(frozen=True)
class Conduct:
    """How a request is carried out."""

    preview: bool = False
    """Say what would be done, do nothing."""
    record: Path | None = None
    """Append an entry per result to this file."""
    ray: str | None = None
    """Address of a cluster whose workers do it; None is this process."""
    workers: int | None = None
    """Of the cluster, instead of one per GPU, or per node."""


Loaded = Callable[[ModelChoice, "Backend | Ready", str, float], None]
"""Told each model, what runs it, where on a cluster, and the seconds until then."""


def outcomes(
    work: Work, request: Request, conduct: Conduct, listener: Listener | None = None, loaded: Loaded = lambda *_: None
) -> Generator[Outcome, None, None]:
    """Every picture's outcome as it comes: those that are done first, then what is refused before a model is loaded.

    `listener` is told what happens to the pictures meanwhile. Close the iterator to stop early.
    """
    from sanrt.runtime.backends.registry import load_backend
    from sanrt.runtime.runs import pipeline, videos
    from sanrt.runtime.runs.record import Recorder
    from sanrt.runtime.runs.refusals import refusals
    from sanrt.runtime.tiling.upscaling import NetworkRunner
    from sanrt.runtime.video.segments import remove_others

    listener = listener or pipeline.nobody
    if conduct.record and conduct.ray:
        require_no_videos(work)
    if conduct.ray:
        require_shared_videos(work)
    require_place(work, here=not conduct.ray)
    for job in work.found.done:
        if job.is_video and not conduct.preview:
            remove_others(videos.local_result(job))
    yield from map(pipeline.Skipped, work.found.done)
    yield from (pipeline.Failed(job, line) for job, line in occupied_lines(work.found))
    makable: list[Part] = []
    for part in work.parts:
        refused = refusals(part.jobs, part.recipe.scale, request.encoding, here=not conduct.ray)
        yield from refused.values()
        makable.append(replace(part, jobs=[job for job in part.jobs if job not in refused]))
    for part in filter(lambda part: part.jobs, makable):
        choice, jobs, upscaling, encoding = part.choice, part.jobs, request.upscaling, request.encoding
        if conduct.ray and not conduct.preview:
            yield from ray_outcomes(part, request, conduct.ray, conduct, listener, loaded)
            continue
        started = time.monotonic()
        with load_backend(choice.backend, choice.path, choice.options) as network:
            loaded(choice, network, "", time.monotonic() - started)
            runner = NetworkRunner(network, upscaling)
            options = pipeline.PipelineOptions(part.recipe, encoding, digests=bool(conduct.record))
            if conduct.preview:
                yield from videos.preview(jobs, runner, options)
                continue
            recorder = None
            if conduct.record:
                loading = choice.options
                recorder = Recorder(conduct.record, network, choice.path, loading, upscaling, encoding, part.recipe)
            with closing(videos.run(jobs, runner, options, listener)) as done, recorder or nullcontext():
                yield from recorder.follow(done) if recorder else done


def ray_outcomes(
    part: Part, request: Request, address: str, conduct: Conduct, listener: Listener, loaded: Loaded
) -> Generator[Outcome, None, None]:
    """The same by workers of a Ray cluster."""
    from sanrt.runtime.runs import videos
    from sanrt.runtime.runs.pipeline import PipelineOptions
    from sanrt.runtime.runs.ray_pool import LOCAL, Pool, Task, connected, shared_folder_probe

    choice, jobs = part.choice, part.jobs
    scratch = request.upscaling.scratch
    upscaling = replace(request.upscaling, scratch=scratch and scratch.absolute())
    task = Task(choice.path, choice.backend, choice.options, upscaling, part.recipe, request.encoding, conduct.record)
    started = time.monotonic()
    shared = nullcontext() if address == LOCAL else shared_folder_probe(jobs[0].destination.parent)
    with (
        shared as seen,
        connected(address, conduct.workers, choice.options.threads) as share,
        Pool(task, share, seen, listener) as pool,
    ):
        loaded(choice, pool.loaded[0], f"Ray {address}: {share}", time.monotonic() - started)
        options = PipelineOptions(part.recipe, request.encoding)
        with closing(videos.mixed(jobs, pool.run, pool.make_segments, options, listener)) as done:
            yield from done


def stream_model(request: Request, width: int, height: int) -> ModelChoice:
    """The model for frames of this size, with the preferred variant where there is one; raises as `Request.resolve`."""
    from sanrt.runtime.backends.registry import model_spec, require_known

    choice, size = request.choice, request.encoding.result_size
    require_known(choice.backend)
    scale = choice.scale
    if not choice.named and not scale:
        scale = size.outscale_network or (size.least_scale(width, height) if size.size else None)
    chosen = replace(choice, scale=scale).preferred()
    makes = model_spec(chosen.path).architecture.scale
    require_scale(chosen.path, makes, scale)
    require_large_enough(chosen.path, makes, size)
    return chosen


def by_network(
    jobs: Sequence[Job], choice: ModelChoice, size: ResultSize
) -> dict[tuple[int | None, WeightsKind | None], list[Job]]:
    """The pictures that networks of each scale and kind of weights enlarge; `by_scale` says which scale.

    Without a kind that was asked for, JPEG files go through the weights for photographs where these are better.
    """
    found: dict[tuple[int | None, WeightsKind | None], list[Job]] = {}
    for scale, its_jobs in by_scale(jobs, choice, size).items():
        free = not (choice.named or choice.weights) and has_photo_model(choice.models, scale)
        photos = photographs(its_jobs) if free else set()
        for job in its_jobs:
            found.setdefault((scale, WeightsKind.PHOTO if job in photos else choice.weights), []).append(job)
    return found


def photographs(jobs: Sequence[Job]) -> set[Job]:
    """The pictures for which the weights for JPEG photographs are better."""
    from sanrt.runtime.runs.results import together
    from sanrt.runtime.runs.suitable_weights import suits_photo

    return {job for job, suits in together(lambda job: suits_photo(job.source, job.needs_ffmpeg), jobs).items() if suits}


def occupied_lines(found: Findings) -> Iterator[tuple[Job, str]]:
    """Pictures of folders that have no result while the others have theirs, and why."""
    for job, what in found.occupied.items():
        yield job, f"{job.destination}: already there and {what}; left as it is, replace it with {option('overwrite', True)}"


def results_line(found: Findings) -> list[str]:
    """What is told of results that were not enlarged again, as a list of one line or none."""
    from sanrt.runtime.pictures.jobs import some_of

    if not (sources := [job.source for job in found.results]):
        return []
    results = f"{len(sources)} result{'s' * (len(sources) > 1)} of sanrt"
    return [
        f"passed over: {results} ({some_of(sources)}); to enlarge them again, name them or add "
        f"{option('include-results', True)}"
    ]


def require_others(inputs: Sequence[Path], found: Findings) -> None:
    """Raise PictureError where the only pictures in the folders are results."""
    if found.results and not (found.to_do or found.done or found.occupied):
        raise PictureError(f"{', '.join(map(str, inputs))}: nothing to enlarge; {results_line(found)[0]}")


def require_there(jobs: Sequence[Job]) -> None:
    """Raise PictureError where no picture exists, which needs no model; one missing among others fails in its turn."""
    from sanrt.runtime.pictures.jobs import some_of

    if not any(isinstance(job.source, RemotePath) or os.path.exists(job.source) for job in jobs):  # noqa: PTH110
        raise PictureError(f"{some_of([job.source for job in jobs])}: cannot be read (No such file or directory)")


def require_place(work: Work, here: bool) -> None:
    """Raise FileError where nothing can be written at the place of the results, before any work; `here`: by this process."""
    if not work.found.to_do or isinstance(work.output, RemotePath):
        return
    require_folder_of(work.output)
    folder = work.found.to_do[0].destination.parent if work.total == 1 else work.output
    if here and (why := why_no_new_files(folder)):
        raise FileError(f"{work.place}: cannot be written, {why}; nothing was done; name another OUTPUT (the last argument)")


def by_scale(jobs: Sequence[Job], choice: ModelChoice, size: ResultSize) -> dict[int | None, list[Job]]:
    """The pictures that networks of each scale enlarge: the scale asked for, or the smallest that makes the results' size.

    A picture's size is in its header. One that cannot be read, or that no network enlarges enough, fails in its turn.
    Raises UsageError for pictures in an object store whose size is needed.
    """
    if choice.scale or choice.named:
        return {choice.scale: list(jobs)}
    if not size.size:
        return {size.outscale_network: list(jobs)}
    found: dict[int | None, list[Job]] = {}
    for job in jobs:
        if isinstance(job.source, RemotePath):
            raise UsageError(
                f"{job.source}: its size is not known before it is fetched; say {option('scale')} beside "
                f"{option('size', size.size)}"
            )
        found.setdefault(scale_for(job, size), []).append(job)
    return found


def scale_for(job: Job, size: ResultSize) -> int:
    """The smallest scale by which a picture gets so large; the default one where that is not known."""
    from sanrt.runtime.pictures.codec import open_picture
    from sanrt.runtime.video.container import look

    try:
        info = look(job.source) if job.needs_ffmpeg else open_picture(job.source).info
    except SanrtError:
        return DEFAULT_SCALE
    return size.least_scale(info.width, info.height) or DEFAULT_SCALE


def require_no_videos(work: Work) -> None:
    """Raise UsageError where a cluster's run of videos is to be recorded: what made each segment is not told."""
    if video := next((job.source for job in work.found.to_do if job.is_video), None):
        raise UsageError(
            f"{option('record')}: with {option('ray')} is for pictures, {video} is a video; leave one of the two out"
        )


def require_shared_videos(work: Work) -> None:
    """Raise UsageError for videos in object stores, which workers do not share while they are made."""
    for job in work.found.to_do:
        if job.is_video and (isinstance(job.source, RemotePath) or isinstance(job.destination, RemotePath)):
            raise UsageError(
                f"{option('ray')}: {job.source} is a video in an object store, or becomes one; copy it to a folder that "
                f"every node has, or leave {option('ray')} out"
            )


def require_large_enough(model: Path, scale: int, size: ResultSize) -> None:
    """Raise UsageError where a model enlarges less than --outscale asks for."""
    if size.outscale and size.outscale > scale:
        raise UsageError(
            f"{model}: enlarges x{scale}, less than {option('outscale', size.outscale)}; take "
            f"{option('scale', size.outscale_network)}"
        )


def require_effect(encoding: Encoding, formats: set[ResultFormat]) -> None:
    """Raise UsageError for an option of files that changes nothing in any of the results' formats."""
    names = ", ".join(sorted(formats))
    pictures = [form for form in formats if isinstance(form, Format)]
    if encoding.lossless and not any(form in (Format.WEBP, Format.AVIF) for form in pictures):
        raise UsageError(
            f"{option('lossless')}: changes nothing in {names} files; leave it out, or choose {option('format', 'webp')} "
            "or avif"
        )
    if encoding.quality is not None and all(form.facts.quality is None for form in pictures):
        raise UsageError(
            f"{option('quality')}: changes nothing in {names} files; leave it out, or choose {option('format', 'jpeg')}, "
            "webp or avif"
        )
    of_videos = {"codec": encoding.codec, "crf": encoding.crf, "preset": encoding.preset}
    for name, value in of_videos.items():
        if value is not None and not any(isinstance(form, Container) for form in formats):
            raise UsageError(f"{option(name)}: changes nothing in {names} files, it is for videos; leave it out")
