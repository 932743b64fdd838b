"""Peak memory of one backend on one picture: `python benchmarks/memory.py --backend torch --size 640x360`.

The network has random weights of the paper's size by default; the picture runs whole, in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is its own folder, not the repository

from benchmarks.measure import random_model, run_command
from sanrt.model.spec import Architecture
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_unguarded
from sanrt.runtime.runs.timing import Size, peak_memory


def main(
    backend: Annotated[str, typer.Option(help="A backend's name.")] = "torch",
    size: Annotated[str, typer.Option(help="Width x height of the picture.")] = "640x360",
    scale: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    groups: int = 20,
    blocks: int = 10,
    channels: int = 64,
    reduction: int = 16,
) -> None:
    """Print the largest resident memory of a process that upscales one picture."""
    picture = Size.parse(size)
    arch = Architecture(scale, groups, blocks, channels, reduction)
    with TemporaryDirectory() as folder:
        model = random_model(arch, Path(folder) / "random.onnx")
        load_unguarded(backend, model, RunOptions()).close()  # writes the variant that the backend derives, if any
        call = f"print(peak({backend!r}, {str(model)!r}, {picture.height}, {picture.width}))"
        child = [sys.executable, "-c", f"from benchmarks.memory import peak; {call}"]
        mebibytes = float(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    print(f"{arch.name}, {backend}, {picture}: peak {mebibytes:.0f} MiB")


def peak(backend: str, model: str, height: int, width: int) -> float:
    """Upscale one random picture; this process's largest resident size in MiB (Linux)."""
    picture = np.random.default_rng(0).uniform(0, 255, (1, 3, height, width)).astype(np.float32)
    with load_unguarded(backend, Path(model), RunOptions()) as loaded:
        loaded.infer(picture)
    return peak_memory() / 2**20


if __name__ == "__main__":
    run_command("memory", main)
