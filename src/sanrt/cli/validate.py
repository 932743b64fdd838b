"""`sanrt validate`: is an artifact still the network it was made of?"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sanrt.errors import UsageError
from sanrt.extras import extra
from sanrt.model.spec import Precision

if TYPE_CHECKING:
    from rich.console import Console

    from sanrt.export.locate import Location
    from sanrt.export.validate import Validation


def validate(
    artifact: Annotated[Path, typer.Argument(help="An ONNX or an engine.", show_default=False)],
    images: Annotated[Path | None, typer.Option(help="Folder of pictures; generated scenes if left out.")] = None,
    hr: Annotated[Path | None, typer.Option(help="Their high-resolution originals; alone, they are downscaled.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the artifact; auto takes the first that is usable.")] = "auto",
    precision: Annotated[Precision | None, typer.Option(help="Of an ONNX, where the backend has a choice.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The weights that it was exported from, if not the bundled ones.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest difference, of 255; by its precision if left out.")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    heatmap: Annotated[Path | None, typer.Option(help="Folder for pictures of where the outputs differ.")] = None,
    locate: Annotated[
        bool, typer.Option("--locate", help="Compare stage by stage; name where a difference begins.")
    ] = False,
) -> None:
    """Hold an ONNX or engine against the PyTorch network of the checkpoint it came from; exit 1 outside the tolerance."""
    with extra("export", "sanrt validate"):
        from sanrt.export.locate import locate as find
        from sanrt.export.samples import samples
        from sanrt.export.validate import ValidateOptions, validate
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    options = ValidateOptions(backend, precision, checkpoint, tolerance, heatmap)
    validation = validate(artifact, partial(samples, images, hr), options)
    print_validation(console, validation)
    if json_:
        write_json(json_, validation)
    if locate:
        sample = next(iter(samples(images, hr, validation.spec.architecture.scale)))
        print_location(console, sample.name, find(artifact, sample.low, checkpoint))
    validation.require()


def print_validation(console: Console, validation: Validation) -> None:
    """One row per picture, and the worst of all."""
    from rich.table import Table

    table = Table("picture", "max", "mean", "PSNR", "SSIM", "Y-PSNR")
    for column in table.columns[1:]:
        column.justify = "right"
    for p in validation.pictures:
        d = p.difference
        change = "" if p.y_psnr_drop is None else f"{p.y_psnr:.2f} {-p.y_psnr_drop:+.4f}"
        table.add_row(p.picture, f"{d.max_abs:.3g}", f"{d.mean_abs:.3g}", f"{d.psnr:.1f}", f"{p.ssim:.5f}", change)
    d, drop, limits = validation.difference, validation.y_psnr_drop, validation.tolerance
    change = "" if drop is None else f", Y-PSNR changes by {-drop:+.4f} dB on average (limit -{limits.y_psnr_drop:g})"
    console.print(table)
    console.print(
        f"{validation.artifact}: {validation.spec.coarsest} on {validation.backend} against PyTorch with"
        f" {validation.checkpoint.name}: at most {d.max_abs:.3g} of 255 apart (limit {limits.max_abs:g}){change}"
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
    try:
        path.write_text(json.dumps(validation.to_json(), indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); choose another place for --json") from error
