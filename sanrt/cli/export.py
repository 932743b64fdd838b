"""`sanrt export`: a checkpoint as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sanrt.errors import UsageError
from sanrt.extras import extra
from sanrt.model.spec import MAX_SQRT_ITERATIONS, SCALES
from sanrt.runtime.models import MODELS, exported_path

if TYPE_CHECKING:
    from sanrt.export.onnx import ExportReport
    from sanrt.model.checkpoint import Checkpoint


def export(
    scale: Annotated[int | None, typer.Option(help="2, 3, 4 or 8: export the bundled weights of that scale.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A SAN checkpoint: official .pt, or .safetensors.")] = None,
    sqrt_iterations: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_SQRT_ITERATIONS,
            help="Newton-Schulz steps of the square root, instead of as many as trained with.",
        ),
    ] = None,
    models: Annotated[Path, typer.Option(help="Folder for the model.")] = MODELS,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, instead of MODELS/san_xN.onnx.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Measure the square root on this picture.")] = None,
    check: Annotated[bool, typer.Option(help="Compare the ONNX with PyTorch before it gets its name.")] = True,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the square root of every group.")] = False,
) -> None:
    """Write a checkpoint as an ONNX file and check it against PyTorch."""
    if scale is None and checkpoint is None:
        raise typer.BadParameter("say which weights: --scale 4 for the bundled ones, or --checkpoint PATH")
    if scale not in (None, *SCALES):
        raise typer.BadParameter(f"--scale {scale}: expected {', '.join(map(str, SCALES))}")
    with extra("export", "sanrt export"):
        from sanrt.export.onnx import ExportOptions, export_onnx
    from sanrt.export.scene import natural_scene, read_scene

    weights = chosen_checkpoint(scale, checkpoint)
    options = ExportOptions(
        iterations=sqrt_iterations,
        picture=read_scene(picture) if picture else natural_scene(),
        picture_name=picture.name if picture else "a generated scene",
        check=check,
    )
    report = export_onnx(weights, output or exported_path(models, weights.architecture.scale), options)
    print_report(report, verbose)


def chosen_checkpoint(scale: int | None, path: Path | None) -> Checkpoint:
    """The named weights, or the bundled ones of a scale; raises UsageError when the named ones are of another scale."""
    from sanrt.model.checkpoint import bundled_checkpoint, load_checkpoint

    if path is None:
        assert scale is not None
        return load_checkpoint(bundled_checkpoint(scale))
    checkpoint = load_checkpoint(path)
    found = checkpoint.architecture.scale
    if scale not in (None, found):
        raise UsageError(
            f"{path}: weights for x{found}, but --scale {scale} was asked for; leave --scale out, or pass {found}"
        )
    return checkpoint


def print_report(report: ExportReport, verbose: bool) -> None:
    """What was written, how near it is to PyTorch and to the exact root, and the next command."""
    from rich.console import Console

    from sanrt.cli.tables import parity_line, square_root_line, square_root_table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{report.path}: {report.spec.architecture.name}, {report.path.stat().st_size / 1e6:.1f} MB")
    console.print(f"weights: {report.spec.weights_origin}")
    console.print(f"against PyTorch: {parity_line(report.spec.report['parity'])}")
    console.print(f"square root: {square_root_line(report.spec.report['square_root'])}")
    if verbose:
        console.print(square_root_table(report.spec.report["square_root"]))
    console.print(f"next: {next_commands(report.path, report.spec.architecture.scale)}")


def next_commands(path: Path, scale: int) -> str:
    """What to type now; the file is named only where run and build would not look for it."""
    if path != exported_path(MODELS, scale):
        return f"sanrt run INPUT OUTPUT --model {path}, or first an engine: sanrt build {path} --fp16"
    return f"sanrt run INPUT OUTPUT{'' if scale == 4 else f' --scale {scale}'}, or first an engine: sanrt build --fp16"
