"""`sanrt validate`: is an artifact still the network it was made of?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sanrt.cli.models import precision_name
from sanrt.cli.panels import panel
from sanrt.errors import ModelError
from sanrt.files import require_folder_of, write_whole
from sanrt.model.spec import Precision

if TYPE_CHECKING:
    from rich.console import Console

    from sanrt.export.locate import Location
    from sanrt.export.validate import Validation


limit_option, report_option = panel("Limits"), panel("Reports")


def validate(
    artifact: Annotated[Path, typer.Argument(help="An ONNX or an engine.", show_default=False)],
    images: Annotated[Path | None, typer.Option(help="Folder of pictures; generated scenes if left out.")] = None,
    hr: Annotated[Path | None, typer.Option(help="Their high-resolution originals; alone, they are downscaled.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The weights that it was exported from, if not the bundled ones.")
    ] = None,
    backend: Annotated[str, typer.Option(help="What runs the artifact; auto takes the first that is usable.")] = "auto",
    precision: Annotated[
        Precision | None,
        typer.Option(
            parser=precision_name, metavar=f"[{'|'.join(Precision)}]", help="Of an ONNX, where the backend has a choice."
        ),
    ] = None,
    tolerance: Annotated[
        float | None, limit_option(min=0, help="Largest difference, of 255; by its precision if left out.")
    ] = None,
    min_psnr: Annotated[
        float | None, limit_option(min=0, help="Lowest PSNR to the reference, dB; by its precision if left out.")
    ] = None,
    json_: Annotated[Path | None, report_option("--json", help="Write every figure to this file.")] = None,
    heatmap: Annotated[Path | None, report_option(help="Folder for pictures of where the outputs differ.")] = None,
    polygraphy: Annotated[
        Path | None,
        report_option(help="Folder for inputs, PyTorch's outputs, and the Polygraphy commands that compare them."),
    ] = None,
    locate: Annotated[
        bool, report_option("--locate", help="Compare stage by stage; name where a difference begins.")
    ] = False,
) -> None:
    """Hold an ONNX or engine against the PyTorch network of the checkpoint it came from; exit 1 outside the tolerance."""
    from sanrt.cli.console import plain_console
    from sanrt.library import validate_model

    require_folder_of(json_)
    console = plain_console()
    try:
        validation = validate_model(
            artifact,
            images,
            hr,
            checkpoint=checkpoint,
            backend=backend,
            precision=precision,
            tolerance=tolerance,
            min_psnr=min_psnr,
            heatmaps=heatmap,
            polygraphy=polygraphy,
        )
    except ModelError:
        if artifact.exists():
            console.print(f"failed: {artifact} was refused")
        raise
    print_rows(console, validation)
    if json_:
        write_json(json_, validation)
    if locate:
        from sanrt.export.locate import locate as find
        from sanrt.export.samples import samples

        sample = next(iter(samples(images, hr, validation.spec.architecture.scale)))
        print_location(console, sample.name, find(artifact, sample.low, checkpoint))
    print_verdict(console, validation)
    validation.require()


def print_rows(console: Console, validation: Validation) -> None:
    """One row per picture, each with the limits of the type that it was computed in."""
    from rich.table import Table

    table = Table("picture", "type", "max", "mean", "PSNR", "SSIM", "Y-PSNR", "limits")
    for column in table.columns[2:]:
        column.justify = "right"
    for p in validation.rows:
        d = p.difference
        change = "" if p.y_psnr_drop is None else f"{p.y_psnr:.2f} {-p.y_psnr_drop:+.4f}"
        limits = f"{p.tolerance.max_abs:.3g}, {p.tolerance.min_psnr:.0f} dB"
        figures = (f"{d.max_abs:.3g}", f"{d.mean_abs:.3g}", f"{d.psnr:.1f}", f"{p.ssim:.5f}")
        table.add_row(p.picture, str(p.type), *figures, change, limits)
    console.print(table)


def print_verdict(console: Console, validation: Validation) -> None:
    """Passed or failed, and the worst of what the backend computed."""
    d, drop, limits = validation.difference, validation.y_psnr_drop, validation.tolerance
    change = "" if drop is None else f", Y-PSNR changes by {-drop:+.4f} dB on average (limit -{limits.y_psnr_drop:g})"
    console.print(
        f"{'passed' if validation.passed else 'failed'}: {validation.artifact}, {validation.spec.coarsest} on"
        f" {validation.backend} against PyTorch with {validation.checkpoint.name}: at most {d.max_abs:.3g} of 255 apart"
        f" (limit {limits.max_abs:.3g}), {d.mean_abs:.3g} on average, {d.psnr:.1f} dB of PSNR or more (limit"
        f" {limits.min_psnr:.0f}){change}"
    )


def print_location(console: Console, picture: str, location: Location) -> None:
    """The stage where the error jumps, between its neighbours."""
    if location.jump is None:
        largest = max(location.stages, key=lambda stage: stage.error)
        console.print(
            f"stage by stage on {picture}: no jump; the largest relative error is {largest.error:.2g}, at {largest.stage}"
        )
        return
    at = location.stages.index(location.jump)
    for stage in location.stages[max(0, at - 3) : at + 2]:
        console.print(f"  {stage.stage:<36} {stage.error:.2g}" + "  <- jumps here" * (stage is location.jump))
    console.print(f"stage by stage on {picture}: the first to differ is {location.jump.stage}")


def write_json(path: Path, validation: Validation) -> None:
    """Every figure, to a file."""
    write_whole(path, (json.dumps(validation.to_json(), indent=2) + "\n").encode(), "choose another place for --json")
