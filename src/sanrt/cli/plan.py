"""`sanrt plan`: what a run would do and take."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from sanrt.cli.request import (
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
from sanrt.cli.streams import STREAM, tell
from sanrt.errors import UsageError
from sanrt.request import ModelChoice, Part, Request, occupied_lines, require_place
from sanrt.runtime.artifacts.models import MODELS, model_title
from sanrt.runtime.tiling.options import Tiling

if TYPE_CHECKING:
    from sanrt.runtime.runs.estimate import PictureEstimate


def plan(
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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the sums and errors, not every picture.")] = False,
    codec: CodecOption = None,
    crf: CrfOption = None,
    preset: PresetOption = None,
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
) -> None:
    """Say how `sanrt run` with the same words would upscale pictures and videos, and what memory and time that takes."""
    from sanrt.cli.console import Reporter
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.runtime.backends.registry import load_unguarded
    from sanrt.runtime.pictures.codec import Encoding
    from sanrt.runtime.pictures.jobs import Naming, called
    from sanrt.runtime.runs.estimate import estimates
    from sanrt.runtime.runs.pipeline import Failed
    from sanrt.runtime.runs.refusals import refusals
    from sanrt.runtime.runs.results import reasons
    from sanrt.runtime.tiling.options import UpscaleOptions

    if STREAM in paths:
        raise UsageError("-: a plan is made of files; name them")
    choice = ModelChoice(model, models, scale, backend, RunOptions(threads, precision, device=device or 0), weights)
    k = region_count(regions)
    upscaling = UpscaleOptions(tile, overlap, self_ensemble, tiling, k, memory, scratch, keep_hidden_colours)
    background, within = colour(flatten) if flatten else None, bounding_size(size) if size else None
    encoding = Encoding(quality, lossless, background, outscale, within, codec, crf, preset)
    request = Request(paths, choice, upscaling, encoding, Naming(suffix, format))
    work = request.resolve(overwrite, include_results=include_results)
    require_place(work, here=True)
    found, seconds, failed, needless = work.found, 0.0, len(work.found.occupied), 0
    for reason in reasons(found.again, "would be made again"):
        tell(reason)
    if found.done:
        tell(f"{len(found.done)} of {work.total} results are there already and would be skipped")
    for _, why in occupied_lines(found):
        tell(f"sanrt: {why}", error=True)
    makable: list[Part] = []
    for part in work.parts:
        refused = refusals(part.jobs, part.recipe.scale, encoding)
        makable.append(replace(part, jobs=[job for job in part.jobs if job not in refused]))
        for outcome in refused.values():
            is_failed = isinstance(outcome, Failed)
            tell(f"sanrt: {outcome.reason}" if is_failed else outcome.reason, error=is_failed)
            failed, needless = failed + is_failed, needless + (not is_failed)
    for part in filter(lambda part: part.jobs, makable):
        chosen = part.choice
        if len(work.parts) > 1:
            tell(f"{model_title(chosen.path)}: {len(part.jobs)} of {len(found.to_do)} {called(found.to_do)}")
        with Reporter(0, quiet), load_unguarded(chosen.backend, chosen.path, chosen.options) as network:
            for each in estimates(part.jobs, network, chosen.path, chosen.options, upscaling, encoding):
                if each.needless:
                    tell(f"{each.refusal}; it would be left as it is")
                elif each.refusal:
                    tell(f"sanrt: {each.refusal}", error=True)
                elif not quiet:
                    tell(line(each))
                seconds += each.seconds
                needless += each.needless
                failed += bool(each.refusal) and not each.needless
    if found.to_do or failed:
        count = len(found.to_do) + len(found.occupied) - failed - needless
        tell(f"{count} to write, about {duration(seconds)}" + f", {failed} failed" * bool(failed))
    for line_passed in work.passed_over:
        tell(f"sanrt: {line_passed}", error=True)
    raise typer.Exit(1 if failed else 0)


def line(plan: PictureEstimate) -> str:
    """One picture or video, for people."""
    scratch = f", {amount(plan.scratch)} of scratch files" if plan.scratch else ""
    shown = f", {plan.frames} frames of {float(plan.rate):.5g} per second" if plan.frames else ""
    pace = f" ({plan.frames / plan.seconds:.3g} frames/s)" if plan.frames else ""
    return (
        f"{plan.path}: {plan.width} x {plan.height}{shown} on {plan.backend}: {plan.plan}, "
        f"{plan.memory / 2**30:.2f} GiB of memory{scratch}, about {duration(plan.seconds)}{pace}"
        f"{''.join(f'; {note}' for note in plan.notes)}"
    )


def amount(size: int) -> str:
    """Bytes as people say them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 100 else f"{size / 2**20:.2g} MiB"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
