"""`sanrt export`: a checkpoint as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sanrt.cli.models import KindOption, build_words, known_scale, one_of, run_words
from sanrt.cli.panels import panel
from sanrt.model.spec import MAX_SQRT_ITERATIONS, PixelLayout
from sanrt.runtime.artifacts.models import MODELS

if TYPE_CHECKING:
    from sanrt.export.onnx import ExportReport


caller_option, measurement_option = panel("For other programs"), panel("Measurements")


def export(
    scale: Annotated[
        int | None, typer.Option(help="2, 3, 4 or 8: export the bundled weights of that scale.", callback=known_scale)
    ] = None,
    weights: KindOption = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A SAN checkpoint: official .pt, or .safetensors.")] = None,
    models: Annotated[Path, typer.Option(help="Folder for the model.")] = MODELS,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write, instead of san_xN.onnx or CHECKPOINT.onnx in MODELS."),
    ] = None,
    io: Annotated[
        str,
        caller_option(help="Pictures in and out: float32-nchw, or uint8-nhwc (bytes).", callback=one_of(*PixelLayout)),
    ] = str(PixelLayout.FLOAT_NCHW),
    shape: Annotated[str | None, caller_option(help="The one input that it takes, BxHxW; any if left out.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is not of the same weights.")] = False,
    check: Annotated[bool, measurement_option(help="Compare the ONNX with PyTorch before it gets its name.")] = True,
    sqrt_iterations: Annotated[
        int | None,
        measurement_option(
            min=1,
            max=MAX_SQRT_ITERATIONS,
            help="Newton-Schulz steps of the square root, instead of as many as trained with.",
        ),
    ] = None,
    picture: Annotated[Path | None, measurement_option(help="Measure the square root on this picture.")] = None,
    verbose: Annotated[bool, measurement_option("--verbose", "-v", help="Show the square root of every group.")] = False,
) -> None:
    """Write a checkpoint as an ONNX file and check it against PyTorch."""
    if checkpoint is None and scale is None:
        raise typer.BadParameter("say which weights: --scale 4 for the bundled ones, or --checkpoint PATH")
    from sanrt.cli.console import working
    from sanrt.library import export_model

    with working("writing the graph" + ", and comparing it with PyTorch" * check):
        report = export_model(
            checkpoint,
            output,
            scale=scale,
            weights=weights,
            models=models,
            check=check,
            sqrt_iterations=sqrt_iterations,
            picture=picture,
            io=PixelLayout(io),
            shape=shape,
            overwrite=overwrite,
        )
    print_report(report, verbose)


def print_report(report: ExportReport, verbose: bool) -> None:
    """Print what was written, how near it is to PyTorch and to the exact root, and the next command."""
    from sanrt.cli.console import plain_console
    from sanrt.cli.tables import gate_line, parity_line, square_root_line, square_root_table

    console = plain_console()
    console.print(f"{report.path}: {report.spec.architecture.name}, {report.path.stat().st_size / 1e6:.1f} MB")
    if report.replaced:
        console.print(f"replaced: {report.replaced}")
    console.print(f"weights: {report.spec.weights_origin}")
    console.print(f"against PyTorch: {parity_line(report.spec.report['parity'])}")
    console.print(f"square root: {square_root_line(report.spec.report['square_root'])}")
    if verbose:
        console.print(f"SOCA: {gate_line(report.spec.architecture)}")
        console.print(square_root_table(report.spec.report["square_root"]))
    console.print(f"next: {run_words(report.path)}, or first an engine: {build_words(report.path)} --fp16")
