"""`sanrt triton`: a model repository for NVIDIA's Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sanrt.cli.models import KindOption, known_scale, one_of
from sanrt.cli.streams import tell
from sanrt.extras import extra
from sanrt.runtime.artifacts.models import MODELS


def triton(
    repository: Annotated[Path, typer.Argument(help="What Triton's --model-repository names.", show_default=False)],
    model: Annotated[Path | None, typer.Option(help="An ONNX or an engine, instead of what `sanrt export` wrote.")] = None,
    scale: Annotated[
        int | None, typer.Option(help="2, 3, 4 or 8; 4 unless --model says otherwise.", callback=known_scale)
    ] = None,
    weights: KindOption = None,
    models: Annotated[Path, typer.Option(help="The folder that `sanrt export` wrote to.")] = MODELS,
    name: Annotated[str | None, typer.Option(help="Of the model in the repository; its file's if left out.")] = None,
    instances: Annotated[int, typer.Option(min=1, help="Copies that run at once on each device.")] = 1,
    kind: Annotated[
        str, typer.Option(help="auto, cpu or gpu: where an ONNX runs.", callback=one_of("auto", "cpu", "gpu"))
    ] = "auto",
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Most pictures of one size together; 1 for an ONNX, an engine's largest, if left out."),
    ] = None,
) -> None:
    """Put a model into a repository of Triton's: configuration, version, and a client to begin from."""
    with extra("triton", "sanrt triton"):
        from sanrt.export.triton import TritonOptions, write_repository
    from sanrt.library import model_to_build

    path = model_to_build(model, models, scale, weights, print)
    made = write_repository(repository, path, TritonOptions(name, instances, kind, batch))
    tell(f"{made.config}: {made.model} is {'new' if made.new else 'there already'}")
    tell(f"a client: python {made.client} {made.config.parent.name} SOURCE RESULT")
