"""`sanrt info`: what a file is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def info(file: Annotated[Path, typer.Argument(help="An ONNX, an engine or a checkpoint.")]) -> None:
    """Say what an ONNX, an engine or a checkpoint is: scale, sizes, precision, identity."""
    if file.suffix == ".engine":
        return engine_info(file)
    from sanrt.model.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(file)
    print(checkpoint.architecture.name, checkpoint.origin)
    return None


def engine_info(file: Path) -> None:
    """An engine's facts; raises ModelError when it is damaged or its ONNX has changed since."""
    from rich.console import Console

    from sanrt.cli.tables import facts_table
    from sanrt.runtime.engines import check_fresh, read_engine, read_plan

    info = read_engine(file)
    Console(soft_wrap=True, highlight=False, markup=False).print(facts_table(info.table()))
    read_plan(info)
    check_fresh(info)
