"""`sanrt run`: upscale picture files."""

from __future__ import annotations

import re
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sanrt.cli.panels import PanelCommand, panel
from sanrt.cli.request import (
    ELSEWHERE,
    LARGE,
    BackendOption,
    DeviceOption,
    EnsembleOption,
    FlattenOption,
    FormatOption,
    KeepHiddenOption,
    LosslessOption,
    MemoryOption,
    ModelChoice,
    ModelOption,
    ModelsOption,
    OverlapOption,
    OverwriteOption,
    Paths,
    PrecisionOption,
    QualityOption,
    RegionsOption,
    Request,
    ScaleOption,
    ScratchOption,
    SuffixOption,
    ThreadsOption,
    TileOption,
    TilingOption,
    Work,
    colour,
    region_count,
)
from sanrt.cli.streams import STREAM, standard_streams
from sanrt.errors import UsageError
from sanrt.model.bundled import SUFFIX as WEIGHTS_SUFFIX
from sanrt.model.spec import Precision
from sanrt.runtime.artifacts.models import MODELS, model_title, other_models
from sanrt.runtime.tiling.options import Tiling

if TYPE_CHECKING:
    from sanrt.cli.console import Reporter
    from sanrt.runtime.backends.protocol import Backend
    from sanrt.runtime.runs.ray_pool import Ready
    from sanrt.runtime.tiling.options import UpscaleOptions

GRAPH_BACKENDS = ("onnxruntime", "openvino", "onnxruntime-cuda")
"""Those that run ONNX graphs, which for weights are written when they are first run."""
ADDRESS = re.compile(r"local|auto|ray://.*|[^/]+:\d+")
"""What `--ray` takes for an address, not for the next argument."""


@dataclass(frozen=True)
class Manner:
    """What a run does with its pictures, and what it tells."""

    overwrite: bool
    dry_run: bool
    explain_tiles: bool
    record: Path | None
    ray: str | None
    """Address of a cluster; None is this process."""
    workers: int | None
    quiet: bool
    verbose: bool

    def __post_init__(self) -> None:
        """Raise UsageError for options that would change nothing."""
        if self.workers and not self.ray:
            raise UsageError(f"--workers {self.workers}: changes nothing without --ray; add it, or leave --workers out")
        if self.quiet and (self.verbose or self.explain_tiles):
            raise UsageError("--quiet: hides what --verbose and --explain-tiles print; leave one out")
        if self.explain_tiles and (self.ray or self.record or self.dry_run):
            raise UsageError("--explain-tiles: writes no results; leave --ray, --record and --dry-run out")


class RunCommand(PanelCommand):
    """`sanrt run`, whose `--ray` may stand without an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """A local Ray where no address follows."""
        at = args.index("--ray") + 1 if "--ray" in args else 0
        if at and not ADDRESS.fullmatch(next(iter(args[at:]), "")):
            args = [*args[:at], "local", *args[at:]]
        return super().parse_args(ctx, args)


def run(
    paths: Paths,
    scale: ScaleOption = None,
    model: ModelOption = None,
    format: FormatOption = None,
    suffix: SuffixOption = "",
    quality: QualityOption = None,
    lossless: LosslessOption = False,
    flatten: FlattenOption = None,
    keep_hidden_colours: KeepHiddenOption = False,
    self_ensemble: EnsembleOption = False,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; do nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every picture.")] = False,
    models: ModelsOption = MODELS,
    backend: BackendOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    tiling: TilingOption = Tiling.AUTO,
    tile: TileOption = None,
    overlap: OverlapOption = None,
    memory: MemoryOption = None,
    scratch: ScratchOption = None,
    regions: RegionsOption = "auto",
    explain_tiles: Annotated[
        bool, panel(LARGE)("--explain-tiles", help="Compare the tilings on the first picture; write nothing.")
    ] = False,
    record: Annotated[
        Path | None, panel(ELSEWHERE)(help="Append a line per result to this file, for `sanrt verify`.")
    ] = None,
    ray: Annotated[
        str | None,
        panel(ELSEWHERE)(metavar="[ADDRESS]", help="Run on the Ray cluster there; on a local Ray if left out."),
    ] = None,
    workers: Annotated[int | None, panel(ELSEWHERE)(min=1, help="With --ray, instead of one per GPU (or node).")] = None,
) -> None:
    """Upscale pictures: files, and folders with their tree kept; what is done already is skipped.

    Other files in the results' places are never replaced without --overwrite.
    """
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.runtime.pictures.codec import Encoding
    from sanrt.runtime.pictures.jobs import Naming
    from sanrt.runtime.tiling.options import UpscaleOptions

    loading = RunOptions(threads=threads, precision=precision, device=device or 0)
    manner = Manner(overwrite, dry_run, explain_tiles, record, ray, workers, quiet, verbose)
    request = Request(
        paths,
        ModelChoice(model, models, scale, backend, loading),
        UpscaleOptions(tile, overlap, self_ensemble, tiling, region_count(regions), memory, scratch, keep_hidden_colours),
        Encoding(quality, lossless, colour(flatten) if flatten else None),
        Naming(suffix, format),
    )
    raise typer.Exit(execute(request, manner, device))


def execute(request: Request, manner: Manner, device: int | None) -> int:
    """Do what was asked for; the exit status."""
    from sanrt.cli.console import Reporter

    with standard_streams(request.paths, request.naming) as (paths, hidden):
        if hidden:
            if manner.ray or manner.record:
                raise UsageError("-: is a temporary file here; leave --ray and --record out, or name files")
            manner = replace(manner, quiet=manner.quiet or request.paths[-1] == STREAM)
        work = replace(request, paths=paths).resolve(manner.overwrite or manner.explain_tiles, bool(manner.ray))
        with Reporter(len(work.jobs), manner.quiet, manner.verbose, work.passed_over, hidden) as reporter:
            for line in work.found.reasons:
                reporter.say(line)
            upscale_all(work, request, manner, device, reporter)
            return reporter.status


def upscale_all(work: Work, request: Request, manner: Manner, device: int | None, reporter: Reporter) -> None:
    """Every picture that is not done yet, here or by workers; or only what would be done, or how the tilings differ."""
    from sanrt.runtime.runs import pipeline
    from sanrt.runtime.runs.pipeline import PipelineOptions, Skipped
    from sanrt.runtime.runs.record import Recorder
    from sanrt.runtime.tiling.upscaling import NetworkRunner

    choice, jobs, recorder = work.choice, work.found.to_do, None
    skipped, options = map(Skipped, work.found.done), PipelineOptions(work.recipe, request.encoding)
    if not jobs:
        return reporter.follow(skipped)
    if manner.ray and not manner.dry_run:
        return run_on_ray(work, request, manner, reporter)
    with loaded(choice, device, reporter) as network:
        if manner.explain_tiles:
            return explain(network, choice, work.jobs[0].source, request.upscaling, reporter)
        runner = NetworkRunner(network, request.upscaling)
        if manner.dry_run:
            return reporter.follow(chain(skipped, pipeline.preview(jobs, runner, options)))
        if manner.record:
            loading, upscaling = choice.options, request.upscaling
            recorder = Recorder(manner.record, network, choice.path, loading, upscaling, request.encoding, work.recipe)
        with closing(pipeline.run(jobs, runner, options, reporter.hear)) as outcomes, recorder or nullcontext():
            return reporter.follow(chain(skipped, recorder.follow(outcomes) if recorder else outcomes))


def explain(network: Backend, choice: ModelChoice, picture: Path, options: UpscaleOptions, reporter: Reporter) -> None:
    """Whole, exact and overlapped on a sample of a picture, one line each."""
    from sanrt.runtime.backends.registry import load_backend
    from sanrt.runtime.runs import compare_tilings as samples

    if network.device == "CPU" and network.spec.precision != Precision.FP32:
        reporter.say("all in fp32, so that the tilings alone differ")
        with load_backend(network.name, choice.path, replace(choice.options, precision=Precision.FP32)) as exact:
            explain(exact, choice, picture, options, reporter)
        return
    reporter.say(f"{picture}: its centre, at most {samples.SAMPLE} pixels a side, against the whole")
    reporter.say("tiling    largest difference       PSNR      time   memory")
    for each in samples.explain(network, picture, options):
        difference = f"{each.largest:11.5f} of 255 {each.psnr:10.2f} dB"
        reporter.say(f"{each.tiling:8} {difference} {each.seconds:7.2f} s {each.peak >> 20:4} MiB")


def run_on_ray(work: Work, request: Request, manner: Manner, reporter: Reporter) -> None:
    """The same as on one machine, by workers of a Ray cluster."""
    from sanrt.runtime.runs.pipeline import Skipped
    from sanrt.runtime.runs.ray_pool import LOCAL, Pool, Task, connected, shared_folder_probe

    assert manner.ray
    choice, jobs = work.choice, work.found.to_do
    task = Task(choice.path, choice.backend, choice.options, request.upscaling, work.recipe, request.encoding, manner.record)
    shared = nullcontext() if manner.ray == LOCAL else shared_folder_probe(jobs[0].destination.parent)
    with (
        shared as seen,
        connected(manner.ray, manner.workers, choice.options.threads) as share,
        Pool(task, share, seen, reporter.hear) as pool,
    ):
        tell_model(choice, pool.loaded[0], reporter)
        reporter.say(f"Ray {manner.ray}: {share}")
        with closing(pool.run(jobs)) as outcomes:
            reporter.follow(chain(map(Skipped, work.found.done), outcomes))


def loaded(choice: ModelChoice, device: int | None, reporter: Reporter) -> Backend:
    """The chosen model on the chosen backend."""
    from sanrt.runtime.backends.registry import load_backend

    network = load_backend(choice.backend, choice.path, choice.options)
    tell_model(choice, network, reporter)
    if device is not None and network.device == "CPU":
        reporter.warn(f"--device {device}: changes nothing, {network.name} runs on the CPU")
    return network


def tell_model(choice: ModelChoice, network: Backend | Ready, reporter: Reporter) -> None:
    """What runs, on what, and whether PyTorch has been held against it."""
    spec, path = network.spec, choice.path
    others = other_models(choice.models) if path.suffix == WEIGHTS_SUFFIX and not choice.named else ""
    what = f"{spec.architecture.name}, {spec.computes}, {network.name} on {network.device}"
    reporter.say(f"{model_title(path)}{others}: {what}")
    if path.suffix == WEIGHTS_SUFFIX and network.name in GRAPH_BACKENDS:
        reporter.say("its graph was written here and not compared with PyTorch; `sanrt export` compares")
