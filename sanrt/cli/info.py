"""`sanrt info`: what a file is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def info(file: Annotated[Path, typer.Argument(help="An ONNX, an engine or a checkpoint.")]) -> None:
    """Say what an ONNX, an engine or a checkpoint is: scale, sizes, precision, identity."""
    from sanrt.model.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(file)
    print(checkpoint.architecture.name, checkpoint.origin)
