"""`sanrt run`: upscale picture files."""

from __future__ import annotations

import re
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from sanrt.cli.formats import FORMATS, written_format
from sanrt.cli.models import known_scale, require_scale
from sanrt.model.bundled import SUFFIX as WEIGHTS_SUFFIX
from sanrt.model.spec import Precision
from sanrt.runtime.artifacts.models import MODELS, default_model, model_title
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.storage import check_buckets, located
from sanrt.runtime.tiling.options import Tiling

if TYPE_CHECKING:
    from sanrt.cli.console import Reporter
    from sanrt.runtime.backends.protocol import Backend, RunOptions
    from sanrt.runtime.runs.ray_pool import Ready, Task
    from sanrt.runtime.runs.results import Findings
    from sanrt.runtime.tiling.options import UpscaleOptions

GRAPH_BACKENDS = ("onnxruntime", "openvino", "onnxruntime-cuda")
"""Those that run ONNX graphs, which for weights are written when they are first run."""
ADDRESS = re.compile(r"local|auto|ray://.*|[^/]+:\d+")
"""What `--ray` takes for an address, not for the next argument."""
COLOURS = {"white": "#ffffff", "black": "#000000"}


@dataclass(frozen=True)
class ModelChoice:
    """Which model runs, and on what."""

    named: Path | None
    """None is the exported model of the scale in `models`, or the bundled weights."""
    models: Path
    scale: int | None
    """None is the named model's, or DEFAULT_SCALE."""
    backend: str
    options: RunOptions

    @property
    def path(self) -> Path:
        """The model's file."""
        return self.named or default_model(self.models, self.scale)

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
        return replace(self, named=self.path.parent / found.model, backend=found.backend, options=options)


class RunCommand(TyperCommand):
    """`sanrt run`, whose `--ray` may stand without an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """A local Ray where no address follows."""
        at = args.index("--ray") + 1 if "--ray" in args else 0
        if at and not ADDRESS.fullmatch(next(iter(args[at:]), "")):
            args = [*args[:at], "local", *args[at:]]
        return super().parse_args(ctx, args)


def run(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUTS... [OUTPUT]",
            show_default=False,
            help="Pictures and folders of pictures, also s3://...; then the folder of the results, or the file of one. "
            "One path alone: the result lies beside it, as a_x4.png or photos_x4/.",
        ),
    ],
    model: Annotated[Path | None, typer.Option(help="The model, instead of the one that `sanrt export` wrote.")] = None,
    models: Annotated[Path, typer.Option(help="The folder that `sanrt export` wrote to.")] = MODELS,
    scale: Annotated[
        int | None, typer.Option(help="2, 3, 4 or 8; 4 unless --model says otherwise.", callback=known_scale)
    ] = None,
    backend: Annotated[str, typer.Option(help="What runs the network; auto takes the first that is usable.")] = "auto",
    precision: Annotated[
        Precision | None, typer.Option(help="Of convolutions and attention; the backend's own choice if left out.")
    ] = None,
    tiling: Annotated[
        Tiling, typer.Option(help="Of large pictures; auto is whole if memory suffices, else exact.")
    ] = Tiling.AUTO,
    tile: Annotated[int | None, typer.Option(min=16, help="Cut larger pictures into tiles of this many pixels.")] = None,
    overlap: Annotated[int | None, typer.Option(min=0, help="Pixels that overlapped tiles share.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of the host, to stay below, such as 4G; a share of what is free if left out.")
    ] = None,
    regions: Annotated[str, typer.Option(help="k of the k x k attention regions; auto is by the picture's size.")] = "auto",
    self_ensemble: Annotated[bool, typer.Option("--self-ensemble", help="Average over 8 flips and rotations.")] = False,
    format: Annotated[
        Format | None,
        typer.Option(parser=written_format, metavar=FORMATS, help="Of every result; each picture's own if left out."),
    ] = None,
    suffix: Annotated[str, typer.Option(help="Added to every name, such as _x4.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace whatever is in the results' places.")] = False,
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="Of JPEG, WebP and AVIF.")] = None,
    lossless: Annotated[bool, typer.Option("--lossless", help="WebP and AVIF without loss.")] = False,
    flatten: Annotated[str | None, typer.Option(help="Lay transparency onto white, black or #rrggbb.")] = None,
    keep_hidden_colours: Annotated[
        bool,
        typer.Option(
            "--keep-hidden-colours",
            help="Under full transparency (textures of games); else they are the nearest visible ones.",
        ),
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the network; all if left out.")] = None,
    device: Annotated[int, typer.Option(min=0, help="Number of the GPU.")] = 0,
    record: Annotated[Path | None, typer.Option(help="Append a line per result to this file, for `sanrt verify`.")] = None,
    explain_tiles: Annotated[
        bool, typer.Option("--explain-tiles", help="Compare the tilings on the first picture.")
    ] = False,
    ray: Annotated[
        str | None, typer.Option(metavar="[ADDRESS]", help="Run on the Ray cluster there; on a local Ray if left out.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="With --ray, instead of one per GPU (or node).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; do nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every picture.")] = False,
) -> None:
    """Upscale pictures: files, and folders with their tree kept; what is done already is skipped.

    Other files in the results' places are never replaced without --overwrite.
    """
    from sanrt.cli.console import Reporter
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.runtime.backends.registry import model_spec
    from sanrt.runtime.pictures.codec import Encoding
    from sanrt.runtime.pictures.jobs import Naming, find_pictures, output_beside, passed_over
    from sanrt.runtime.runs import pipeline
    from sanrt.runtime.runs.pipeline import PipelineOptions, Skipped
    from sanrt.runtime.runs.ray_pool import Task
    from sanrt.runtime.runs.record import Recorder
    from sanrt.runtime.runs.results import Recipe, sort_out
    from sanrt.runtime.tiling.options import UpscaleOptions
    from sanrt.runtime.tiling.plan import parse_memory
    from sanrt.runtime.tiling.upscaling import NetworkRunner

    k = region_count(regions)
    upscaling = UpscaleOptions(
        tile,
        overlap,
        self_ensemble,
        tiling,
        k,
        parse_memory(memory) if memory else None,
        keep_hidden=keep_hidden_colours,
    )
    choice = ModelChoice(model, models, scale, backend, RunOptions(threads=threads, precision=precision, device=device))
    encoding = Encoding(quality, lossless, colour(flatten) if flatten else None)
    naming = Naming(suffix, format)
    named = [located(path) for path in paths]
    if ray:
        named, choice = [path.absolute() for path in named], choice.absolute()
    check_buckets(named)
    choice = choice.preferred()
    spec = model_spec(choice.path)
    require_scale(choice.path, spec.architecture.scale, scale)
    beside = [] if named[1:] else [output_beside(named[0], spec.architecture.scale, naming)]
    *inputs, output = named + beside
    jobs = find_pictures(inputs, output, naming, into_folder=paths[-1].endswith("/"))
    recipe = Recipe.of(spec, precision, upscaling, encoding)
    found = sort_out(jobs, recipe, overwrite or explain_tiles)
    skipped = [Skipped(job) for job in found.done]
    with Reporter(len(jobs), quiet, verbose, passed_over(inputs, output)) as reporter:
        for line in found.reasons:
            reporter.say(line)
        if not found.to_do:
            reporter.follow(skipped)
            raise typer.Exit(reporter.status)
        if ray and not (dry_run or explain_tiles):
            task = Task(choice.path, choice.backend, choice.options, upscaling, recipe, encoding, record)
            run_on_ray(ray, workers, choice, task, found, reporter)
            raise typer.Exit(reporter.status)
        with loaded(choice, reporter) as network:
            if explain_tiles:
                explain(network, choice, jobs[0].source, upscaling, reporter)
                raise typer.Exit
            options, runner = PipelineOptions(recipe, encoding), NetworkRunner(network, upscaling)
            recorder = None
            if record and not dry_run:
                recorder = Recorder(record, network, choice.path, choice.options, upscaling, encoding, recipe)
            work = (
                pipeline.preview(found.to_do, runner, options)
                if dry_run
                else pipeline.run(found.to_do, runner, options, reporter.hear)
            )
            with closing(work) as outcomes, recorder or nullcontext():
                reporter.follow(chain(skipped, recorder.follow(outcomes) if recorder else outcomes))
    raise typer.Exit(reporter.status)


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


def run_on_ray(
    address: str, workers: int | None, choice: ModelChoice, task: Task, found: Findings, reporter: Reporter
) -> None:
    """The same as on one machine, by workers of a Ray cluster."""
    from sanrt.runtime.runs.pipeline import Skipped
    from sanrt.runtime.runs.ray_pool import LOCAL, Pool, connected, shared_folder_probe

    shared = nullcontext() if address == LOCAL else shared_folder_probe(found.to_do[0].destination.parent)
    with (
        shared as seen,
        connected(address, workers, task.running.threads) as share,
        Pool(task, share, seen, reporter.hear) as pool,
    ):
        tell_model(choice, pool.loaded[0], reporter)
        reporter.say(f"Ray {address}: {share}")
        with closing(pool.run(found.to_do)) as outcomes:
            reporter.follow(chain(map(Skipped, found.done), outcomes))


def region_count(text: str) -> int | None:
    """k of `--regions`; None for auto."""
    if text == "auto":
        return None
    if not text.isdigit() or not 1 <= int(text) <= 1000:
        raise typer.BadParameter(f"--regions {text}: expected auto or a number from 1 to 1000")
    return int(text)


def colour(text: str) -> tuple[int, int, int]:
    """8-bit RGB of `white`, `black` or `#rrggbb`."""
    digits = COLOURS.get(text, text)
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", digits):
        raise typer.BadParameter(f"--flatten {text}: expected white, black or #rrggbb")
    red, green, blue = bytes.fromhex(digits[1:])
    return red, green, blue


def loaded(choice: ModelChoice, reporter: Reporter) -> Backend:
    """The chosen model on the chosen backend."""
    from sanrt.runtime.backends.registry import load_backend

    network = load_backend(choice.backend, choice.path, choice.options)
    tell_model(choice, network, reporter)
    return network


def tell_model(choice: ModelChoice, network: Backend | Ready, reporter: Reporter) -> None:
    """What runs, on what, and whether PyTorch has been held against it."""
    spec, path = network.spec, choice.path
    reporter.say(f"{model_title(path)}: {spec.architecture.name}, {spec.computes}, {network.name} on {network.device}")
    if path.suffix == WEIGHTS_SUFFIX and network.name in GRAPH_BACKENDS:
        reporter.say("its graph was written here and not compared with PyTorch; `sanrt export` compares")
