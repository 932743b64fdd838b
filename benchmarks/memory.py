"""Peak memory of one backend on one picture: `python benchmarks/memory.py --backend torch --size 640x360`.

The network has random weights of the paper's size by default; the picture runs whole, in a process of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer

from sanrt.model.graph import san_model
from sanrt.model.san import SAN
from sanrt.model.spec import Architecture, ModelSpec
from sanrt.runtime.backends import RunOptions, load_backend


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
    width, height = size.split("x")
    arch = Architecture(scale, groups, blocks, channels, reduction)
    with TemporaryDirectory() as folder:
        model = random_model(arch, Path(folder) / "random.onnx")
        load_backend(backend, model, RunOptions()).close()  # writes the variant that the backend derives, if any
        call = f"print(peak({backend!r}, {str(model)!r}, {height}, {width}))"
        child = [sys.executable, "-c", f"from benchmarks.memory import peak; {call}"]
        mebibytes = float(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    print(f"{arch.name}, {backend}, {width} x {height}: peak {mebibytes:.0f} MiB")


def random_model(arch: Architecture, path: Path) -> Path:
    """An exported network of PyTorch's initial weights."""
    torch.manual_seed(0)
    weights = {name: tensor.detach().numpy() for name, tensor in SAN(arch).state_dict().items()}
    path.write_bytes(san_model(ModelSpec(arch, "random", "random", 5), weights).SerializeToString())
    return path


def peak(backend: str, model: str, height: int, width: int) -> float:
    """Upscale one random picture; this process's largest resident size in MiB (Linux)."""
    picture = np.random.default_rng(0).uniform(0, 255, (1, 3, height, width)).astype(np.float32)
    with load_backend(backend, Path(model), RunOptions()) as loaded:
        loaded.infer(picture)
    # Not ru_maxrss: a child starts with its parent's.
    kibibytes = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert kibibytes
    return int(kibibytes[1]) / 1024


if __name__ == "__main__":
    typer.run(main)
