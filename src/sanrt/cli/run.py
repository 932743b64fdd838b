"""`sanrt run`: upscale picture files."""

from __future__ import annotations

import re
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sanrt.cli.panels import PanelCommand, panel
from sanrt.cli.request import (
    ELSEWHERE,
    LARGE,
    VIDEO,
    BackendOption,
    CodecOption,
    CrfOption,
    DeviceOption,
    EnsembleOption,
    FlattenOption,
    FormatOption,
    IncludeResultsOption,
    KeepHiddenOption,
    LosslessOption,
    MemoryOption,
    ModelOption,
    ModelsOption,
    OutscaleOption,
    OverlapOption,
    OverwriteOption,
    Paths,
    PrecisionOption,
    PresetOption,
    QualityOption,
    RegionsOption,
    ScaleOption,
    ScratchOption,
    SizeOption,
    SuffixOption,
    ThreadsOption,
    TileOption,
    TilingOption,
    WeightsOption,
    bounding_size,
    colour,
    region_count,
)
from sanrt.cli.streams import STREAM, standard_streams
from sanrt.cli.y4m import stream_frames
from sanrt.errors import UsageError
from sanrt.model.bundled import SUFFIX as WEIGHTS_SUFFIX
from sanrt.model.spec import Precision
from sanrt.request import Conduct, ModelChoice, Part, Request, Work, outcomes
from sanrt.runtime.artifacts.models import MODELS, model_title, other_models
from sanrt.runtime.pictures.jobs import called
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
FLAGS = {"background": "flatten"}
"""Options that the options objects call otherwise."""


@dataclass(frozen=True)
class Manner:
    """What a run does with its pictures, and what it tells."""

    overwrite: bool
    include_results: bool
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
        if self.dry_run and self.record:
            raise UsageError("--record: a dry run has no results to record; leave one of them out")


class RunCommand(PanelCommand):
    """`sanrt run` and `sanrt serve`, whose `--ray` may stand without an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """A local Ray where no address follows."""
        at = args.index("--ray") + 1 if "--ray" in args else 0
        if at and not ADDRESS.fullmatch(next(iter(args[at:]), "")):
            args = [*args[:at], "local", *args[at:]]
        return super().parse_args(ctx, args)


def run(
    paths: Paths,
    scale: ScaleOption = None,
    outscale: OutscaleOption = None,
    size: SizeOption = None,
    weights: WeightsOption = None,
    model: ModelOption = None,
    format: FormatOption = None,
    suffix: SuffixOption = "",
    quality: QualityOption = None,
    lossless: LosslessOption = False,
    flatten: FlattenOption = None,
    keep_hidden_colours: KeepHiddenOption = False,
    self_ensemble: EnsembleOption = False,
    overwrite: OverwriteOption = False,
    include_results: IncludeResultsOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; do nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every picture.")] = False,
    codec: CodecOption = None,
    crf: CrfOption = None,
    preset: PresetOption = None,
    y4m: Annotated[
        bool, panel(VIDEO)("--y4m", help="Raw frames from standard input to standard output: as in docs/video.md.")
    ] = False,
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
    """Upscale pictures and videos: files, and folders with their tree kept; what is done already is skipped.

    Other files in the results' places are never replaced without --overwrite.
    """
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.runtime.pictures.codec import Encoding
    from sanrt.runtime.pictures.jobs import Naming
    from sanrt.runtime.tiling.options import UpscaleOptions

    loading = RunOptions(threads=threads, precision=precision, device=device or 0)
    manner = Manner(overwrite, include_results, dry_run, explain_tiles, record, ray, workers, quiet, verbose)
    background, within = colour(flatten) if flatten else None, bounding_size(size) if size else None
    request = Request(
        paths,
        ModelChoice(model, models, scale, backend, loading, weights),
        UpscaleOptions(tile, overlap, self_ensemble, tiling, region_count(regions), memory, scratch, keep_hidden_colours),
        Encoding(quality, lossless, background, outscale, within, codec, crf, preset),
        Naming(suffix, format),
    )
    if y4m:
        require_streamed(request, manner)
        stream_frames(request, quiet)
        raise typer.Exit(0)
    raise typer.Exit(execute(request, manner, device))


def require_streamed(request: Request, manner: Manner) -> None:
    """Raise UsageError for options that are about files, or about more than one process."""
    given = asdict(request.naming) | asdict(request.encoding) | asdict(manner)
    for name in ("outscale", "size", "quiet"):
        del given[name]
    for name, value in given.items():
        if value:
            raise UsageError(
                f"--{FLAGS.get(name, name.replace('_', '-'))}: changes nothing in raw frames; leave it or --y4m out"
            )


def execute(request: Request, manner: Manner, device: int | None) -> int:
    """Do what was asked for; the exit status."""
    from sanrt.cli.console import Reporter

    with standard_streams(request.paths, request.naming) as (paths, hidden):
        if hidden:
            if manner.ray or manner.record:
                raise UsageError("-: is a temporary file here; leave --ray and --record out, or name files")
            manner = replace(manner, quiet=manner.quiet or request.paths[-1] == STREAM)
        overwrite = manner.overwrite or manner.explain_tiles
        work = replace(request, paths=paths).resolve(overwrite, bool(manner.ray), manner.include_results)
        told = work.passed_over, work.found.again
        with Reporter(work.total, manner.quiet, manner.verbose, *told, hidden, work.place) as reporter:
            for part in work.parts:
                if part.reason:
                    reporter.say(f"{len(part.jobs)} of {work.total} {called(work.jobs)}: {part.reason}")
            if manner.explain_tiles:
                explain(work.parts[0], request.upscaling, reporter)
            else:
                upscale_all(work, request, manner, device, reporter)
            return reporter.status


def upscale_all(work: Work, request: Request, manner: Manner, device: int | None, reporter: Reporter) -> None:
    """Every picture that is not done yet, here or by workers; or only what would be done."""

    def loaded(choice: ModelChoice, network: Backend | Ready, where: str, seconds: float) -> None:
        tell_model(choice, network, reporter, seconds)
        if where:
            reporter.say(where)
        elif device is not None and network.device == "CPU":
            reporter.warn(f"--device {device}: changes nothing, {network.name} runs on the CPU")

    conduct = Conduct(manner.dry_run, manner.record, manner.ray, manner.workers)
    with closing(outcomes(work, request, conduct, reporter.hear, loaded)) as found:
        reporter.follow(found)


def explain(part: Part, options: UpscaleOptions, reporter: Reporter) -> None:
    """Whole, exact and overlapped on a sample of the first picture, one line each."""
    from sanrt.runtime.backends.registry import load_backend
    from sanrt.runtime.runs import compare_tilings as samples

    choice, picture = part.choice, part.jobs[0].source
    started = time.monotonic()
    with load_backend(choice.backend, choice.path, choice.options) as network:
        tell_model(choice, network, reporter, time.monotonic() - started)
        if network.device == "CPU" and network.spec.precision != Precision.FP32:
            reporter.say("all in fp32, so that the tilings alone differ")
            loading = replace(choice.options, precision=Precision.FP32)
            return explain(replace(part, choice=replace(choice, backend=network.name, options=loading)), options, reporter)
        reporter.say(f"{picture}: its centre, at most {samples.SAMPLE} pixels a side, against the whole")
        reporter.say("tiling    largest difference       PSNR      time   memory")
        for each in samples.explain(network, picture, options):
            difference = f"{each.largest:11.5f} of 255 {each.psnr:10.2f} dB"
            reporter.say(f"{each.tiling:8} {difference} {each.seconds:7.2f} s {each.peak >> 20:4} MiB")
    return None


def tell_model(choice: ModelChoice, network: Backend | Ready, reporter: Reporter, seconds: float) -> None:
    """What runs, on what, after how many seconds, and whether PyTorch has been held against it."""
    spec, path = network.spec, choice.path
    others = other_models(choice.models) if path.suffix == WEIGHTS_SUFFIX and not choice.named else ""
    what = f"{spec.architecture.name}, {spec.computes}, {network.name} on {network.device}"
    if spec.architecture.sqrt_iterations not in (None, spec.iterations):
        what += f", {spec.iterations} Newton-Schulz steps where it was trained with {spec.architecture.sqrt_iterations}"
    reporter.say(f"{model_title(path)}{others}: {what}, ready in {seconds:.1f} s")
    if path.suffix == WEIGHTS_SUFFIX and network.name in GRAPH_BACKENDS:
        reporter.say("its graph was written here and not compared with PyTorch; `sanrt export` compares")
