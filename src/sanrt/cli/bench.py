"""`sanrt bench`: how fast every backend is on this machine."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sanrt.cli.models import KindOption, known_scale, precision_name
from sanrt.cli.streams import tell
from sanrt.errors import UsageError
from sanrt.files import require_folder_of, require_writable, write_whole
from sanrt.model.bundled import WeightsKind
from sanrt.model.spec import Precision
from sanrt.runtime.artifacts.models import MODELS, default_model, model_title, require_own_weights, require_scale

if TYPE_CHECKING:
    from rich.table import Table

    from sanrt.model.spec import ModelSpec
    from sanrt.runtime.runs.latency import Contender, Result, Running

SIZES = ("160x90", "320x180")
WIDTH = 100
"""Columns of the table, at the least: cut figures would tell nothing."""
REFERENCES = (("torch", None), ("native", Precision.FP32))
"""What outputs are compared with, in fp32: the first that is usable."""


def bench(
    model: Annotated[
        Path | None, typer.Argument(help="An exported ONNX, instead of the model that `sanrt run` takes by itself.")
    ] = None,
    scale: Annotated[
        int | None, typer.Option(help="2, 3, 4 or 8; 4 unless MODEL says otherwise.", callback=known_scale)
    ] = None,
    weights: KindOption = None,
    backend: Annotated[list[str] | None, typer.Option(help="Repeated; every one that is usable here if left out.")] = None,
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            parser=precision_name,
            metavar=f"[{'|'.join(Precision)}]",
            help="Repeated; the backends' own choice, and fp32 where that is another, if left out.",
        ),
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help=f"Of the input, WIDTHxHEIGHT, repeated; {' and '.join(SIZES)} if left out.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Of measured runs, in all.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all if left out.")] = None,
    models: Annotated[Path, typer.Option(help="The folder that `sanrt export` wrote to.")] = MODELS,
    json_: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
) -> None:
    """Time every backend that is usable here, in turns, and compare its output with fp32; exit 1 when one of them fails.

    Each runs in a process of its own. Times are of the network alone, copies to and from a GPU included.
    """
    from sanrt.cli.console import plain_console
    from sanrt.export.scene import repeated_scene
    from sanrt.runtime import host as machine
    from sanrt.runtime.backends.registry import model_spec
    from sanrt.runtime.runs.latency import Case, race
    from sanrt.runtime.runs.timing import Size

    require_own_weights(model, weights)
    require_folder_of(json_)
    if json_:
        require_writable(json_, "choose another place for --json")
    path = model or default_model(models, scale, weights or WeightsKind.CLEAN)
    spec = model_spec(path)
    arch = spec.architecture
    require_scale(path, arch.scale, scale)
    sizes = sorted({Case(each.width, each.height) for each in map(Size.parse, size or SIZES)}, key=lambda case: case.pixels)
    contenders = chosen(path, backend, precision or [], threads)
    exact = reference(path, spec)
    console = plain_console()
    console.width = max(console.width, WIDTH)
    what = f"{arch.name}, {spec.quantisation.type} in part" if spec.quantisation else arch.name
    console.print(f"{model_title(path)}: {what}; {machine.cpu_name()}, {threads or machine.cores()} threads")
    results: list[Result] = []
    with console.status("measuring"):
        for found in race(
            contenders,
            exact,
            path,
            arch.value_range,
            lambda size: repeated_scene(size.height, size.width),
            sizes,
            seconds / len(sizes),
            threads,
        ):
            results += found
    console.print(table(results, exact.name))
    if json_:
        figures = json.dumps([asdict(result) for result in results], indent=2)
        write_whole(json_, (figures + "\n").encode(), "choose another place for --json")
    for result in results:
        if result.reason:
            console.print(f"{result.size} {result.name}: {result.reason}")
    raise typer.Exit(int(any(result.failed for result in results)))


def chosen(model: Path, names: list[str] | None, precisions: list[Precision], threads: int | None) -> list[Contender]:
    """The named backends in each precision; without names all that are usable here for a model, the others are told."""
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.runtime.backends.registry import candidates, is_described, other_backends, status
    from sanrt.runtime.runs.latency import in_precision, own_precisions

    others = other_backends() if is_described(model) else ()
    possible = names or [*candidates(model, RunOptions(threads)), *others]
    for each in [status(name) for name in possible]:  # an unknown name is told here
        if not names and not each.usable:
            tell(f"left out: {each.name}, {each.reason}")
            possible.remove(each.name)
    if not possible:
        raise UsageError(f"{model}: nothing can run it here; see `sanrt doctor`")
    return [in_precision(name, each) for name in possible for each in precisions or own_precisions(name)]


def reference(model: Path, spec: ModelSpec) -> Contender:
    """What outputs are compared with: the model in fp32, by the first of REFERENCES that is usable here.

    For a model with 8-bit parts that is the one it was made of, which lies beside it; UsageError if it does not.
    """
    from sanrt.runtime.backends.registry import status
    from sanrt.runtime.runs.latency import in_precision

    name, precision = next((each for each in REFERENCES if status(each[0]).usable), REFERENCES[0])
    exact = replace(in_precision(name, precision), name=f"{name} in fp32")
    if spec.quantisation is None:
        return exact
    source = model.with_name(model.name.replace(f".{spec.quantisation.type}.", "."))
    if source == model or not source.is_file():
        raise UsageError(
            f"{model}: is compared with the fp32 model that it was made of; expected that as {source} beside it"
        )
    return replace(exact, open=partial(open_other, exact, source))


def open_other(contender: Contender, model: Path, _: Path, threads: int | None) -> Running:
    """A contender that runs another model than the rest."""
    return contender.open(model, threads)


def table(results: list[Result], reference: str) -> Table:
    """A row per size and backend, the fastest first."""
    from rich.table import Table

    title = f"Of the network alone; pixels are the input's, PSNR is to {reference}"
    shown = Table(title=title, box=None, title_justify="left", padding=(0, 2, 0, 0))
    for heading in ("size", "backend", "computes in"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("median, ms", "p90, ms", "pictures/s", "Mpx/s", "MiB", "PSNR, dB"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for result in sorted(results, key=lambda each: (each.size.pixels, each.timing.p50.value if each.timing else math.inf)):
        shown.add_row(str(result.size), *cells(result))
    return shown


def cells(result: Result) -> list[str]:
    """A row behind its size; memory is the process's, and what was taken of a GPU's."""
    found = result.timing
    if found is None:
        return [result.name, "failed" if result.failed else "left out"]
    median = found.p50.value
    memory = f"{found.peak >> 20}" + ("" if found.gpu_memory is None else f" + {found.gpu_memory >> 20} GPU")
    return [
        found.on.removesuffix(" on CPU"),
        str(found.precision),
        f"{1e3 * median:.1f}",
        f"{1e3 * found.p90.value:.1f}",
        f"{1 / median:.2f}",
        f"{result.size.pixels / median / 1e6:.3f}",
        memory,
        "equal" if found.psnr is None else f"{found.psnr:.1f}",
    ]
