"""Exact streaming of a large picture against a small one in whole mode: time per megapixel and peak resident memory.

`python benchmarks/streaming.py MODEL.onnx PICTURE`: PICTURE is repeated to make a 1-megapixel and a large picture; both go
through `sanrt run` as processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyvips
import typer

SMALL = (1216, 832)
"""About one megapixel."""


@dataclass(frozen=True)
class Measured:
    """One run of `sanrt run`."""

    megapixels: float
    wall: float
    """Seconds."""
    cpu: float
    """Seconds, all threads together: comparable on a machine that does other work too."""
    peak: int
    """Bytes resident at most, the whole process."""

    def __str__(self) -> str:
        each = f"{self.wall / self.megapixels:7.2f} s/Mpx ({self.cpu / self.megapixels:.2f} CPU s/Mpx)"
        return f"{self.megapixels:6.1f} Mpx in {self.wall:7.1f} s, {each}, peak {self.peak / 2**30:.2f} GiB"


def streaming(
    model: Annotated[Path, typer.Argument(help="Exported ONNX.")],
    picture: Annotated[Path, typer.Argument(help="What the pictures are made of.")],
    size: Annotated[tuple[int, int], typer.Option(help="Width and height of the large picture.")] = (6000, 4000),
    memory: Annotated[str, typer.Option(help="--memory of the large run.")] = "4G",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all if left out.")] = None,
) -> None:
    """Print both measurements and the ratio of their times per megapixel."""
    common = ["--model", str(model), *(["--threads", str(threads)] if threads else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = measure(made(picture, SMALL, folder / "small.png"), [*common, "--tiling", "whole"])
        print(f"whole: {whole}", flush=True)
        exact = measure(made(picture, size, folder / "large.png"), [*common, "--tiling", "exact", "--memory", memory])
        print(f"exact: {exact}")
    times = (exact.wall / exact.megapixels) / (whole.wall / whole.megapixels)
    work = (exact.cpu / exact.megapixels) / (whole.cpu / whole.megapixels)
    print(f"ratio of times per megapixel {times:.2f}, of CPU times {work:.2f}")


def made(picture: Path, size: tuple[int, int], path: Path) -> Path:
    """The picture, repeated to fill a size."""
    image = pyvips.Image.new_from_file(str(picture))
    width, height = size
    tiled = image.replicate(-(-width // image.width), -(-height // image.height)).crop(0, 0, width, height)
    tiled.write_to_file(str(path), compression=1)
    return path


def measure(picture: Path, options: list[str]) -> Measured:
    """Run `sanrt run` on one picture."""
    command = [sys.executable, "-m", "sanrt", "run", str(picture), str(picture.with_suffix(".out.png")), "--quiet", *options]
    image = pyvips.Image.new_from_file(str(picture))
    started = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise typer.Exit(1)
    wall = time.monotonic() - started
    return Measured(image.width * image.height / 1e6, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


if __name__ == "__main__":
    typer.run(streaming)
