"""`sanrt plan`: what a run would do and take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sanrt.cli.formats import FORMATS, written_format
from sanrt.cli.models import known_scale
from sanrt.cli.panels import panel
from sanrt.runtime.artifacts.models import DEFAULT_SCALE, MODELS, default_model
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.tiling.options import Tiling

if TYPE_CHECKING:
    from sanrt.runtime.runs.estimate import PicturePlan


run_option = panel("Options of the run")


def plan(
    inputs: Annotated[list[Path], typer.Argument(help="Pictures and folders of pictures.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="Where `sanrt run` would write; what is there already is counted, not planned.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="The model, instead of the one that `sanrt export` wrote.")] = None,
    models: Annotated[Path, typer.Option(help="The folder that `sanrt export` wrote to.")] = MODELS,
    scale: Annotated[
        int, typer.Option(help="2, 3, 4 or 8, where no --model is given.", callback=known_scale)
    ] = DEFAULT_SCALE,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the network; all if left out.")] = None,
    tiling: Annotated[Tiling, run_option(help="As for `sanrt run`.")] = Tiling.AUTO,
    tile: Annotated[int | None, run_option(min=16, help="As for `sanrt run`.")] = None,
    memory: Annotated[str | None, run_option(help="As for `sanrt run`, such as 4G.")] = None,
    format: Annotated[Format | None, run_option(parser=written_format, metavar=FORMATS, help="As for `sanrt run`.")] = None,
    suffix: Annotated[str, run_option(help="As for `sanrt run`.")] = "",
) -> None:
    """Say how pictures would be upscaled, and what memory and time that takes on each backend; none is upscaled."""
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.runtime.backends.registry import model_spec
    from sanrt.runtime.pictures.codec import Encoding
    from sanrt.runtime.pictures.jobs import Naming, find_pictures
    from sanrt.runtime.runs import estimate as plans
    from sanrt.runtime.runs.results import Recipe, sort_out
    from sanrt.runtime.tiling.options import UpscaleOptions
    from sanrt.runtime.tiling.plan import parse_memory

    jobs = find_pictures(inputs, output or Path("results.sanrt-plan"), Naming(suffix, format))
    options = UpscaleOptions(tile, tiling=tiling, memory=parse_memory(memory) if memory else None)
    path = model or default_model(models, scale)
    remaining = jobs
    if output:
        found = sort_out(jobs, Recipe.of(model_spec(path), None, options, Encoding()))
        remaining = list(found.to_do)
        print(
            f"{output}: {len(found.done)} of {len(jobs)} results are there already and would be skipped; "
            f"{len(remaining)} remain",
            *found.reasons,
            sep="\n",
        )
    if not remaining:
        return
    totals: dict[str, float] = {}
    for each in plans.plan(remaining, path, RunOptions(threads=threads), options):
        print("\n".join(lines(each)), flush=True)
        for estimate in each.estimates:
            totals[estimate.backend] = totals.get(estimate.backend, 0) + estimate.seconds
    for backend, seconds in totals.items():
        print(f"all {'that remain ' if output else ''}on {backend}: about {duration(seconds)}")


def lines(plan: PicturePlan) -> list[str]:
    """One picture, for people."""
    if plan.skipped:
        return [f"skipped: {plan.skipped}"]
    rows = [f"{plan.path}: {plan.width} x {plan.height}", *(f"  {refusal}" for refusal in plan.refusals)]
    for each in plan.estimates:
        scratch = f" and {each.scratch / 2**30:.1f} GiB of scratch files" if each.scratch else ""
        rows.append(f"  {each.backend}: {each.plan}, {each.memory / 2**30:.2f} GiB{scratch}, about {duration(each.seconds)}")
    return rows


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
