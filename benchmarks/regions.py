"""The PSNR that finer attention regions cost: `python benchmarks/regions.py SET MODEL.onnx`; SET holds HR/ and LR/."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is its own folder, not the repository

from benchmarks.measure import run_command
from benchmarks.quality import Method, Pair, picture_set, score_all, short_name, upscaled
from sanrt.runtime.backends.protocol import Backend, RunOptions
from sanrt.runtime.backends.registry import load_unguarded
from training.data import Picture


def regions(
    pictures: Annotated[Path, typer.Argument(help="Folder with HR/ and LR/.")],
    model: Annotated[Path, typer.Argument(help="Exported ONNX, or a checkpoint with --backend torch.")],
    counts: Annotated[list[int] | None, typer.Option("--regions", help="k, repeated; 2, 3, 4 and 8 if left out.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the model.")] = "onnxruntime",
) -> None:
    """Print a model's mean PSNR on Y for k x k attention regions, and the largest loss of a picture against the first k."""
    tested = picture_set(short_name(pictures), pictures / "HR", pictures / "LR")
    first: list[float] = []
    print(" k   PSNR, dB   change   worst picture")
    for k in counts or [2, 3, 4, 8]:
        with load_unguarded(backend, model, RunOptions(regions=k)) as network:
            method = Method(f"k={k}", network.spec.architecture.scale, partial(upscale_with, network))
            (row,), _ = score_all([method], [tested])
        psnrs = [score.psnr for score in row.pictures.values()]
        first = first or psnrs
        change = np.subtract(psnrs, first)
        print(f"{k:2d}   {row.psnr:8.3f}   {change.mean():+.4f}   {change.min():+.4f}", flush=True)


def upscale_with(network: Backend, pair: Pair, _: int) -> Picture:
    """The low-resolution picture of a pair through a model."""
    return upscaled(network, pair.low)


if __name__ == "__main__":
    run_command("regions", regions)
