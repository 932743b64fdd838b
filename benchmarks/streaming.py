"""Exact streaming of a large picture against a small one in whole mode: time per megapixel and peak resident memory.

`python benchmarks/streaming.py MODEL PICTURE`: PICTURE is repeated to make a 1-megapixel and a large picture; both go
through `sanrt run` as processes of their own.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyvips
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is its own folder, not the repository

from benchmarks.measure import ProcessRun, run_alone, run_command

SMALL = (1216, 832)
"""About one megapixel."""


@dataclass(frozen=True)
class Measured:
    """One run of `sanrt run`."""

    megapixels: float
    run: ProcessRun

    @property
    def wall(self) -> float:
        """Seconds per megapixel, as the next."""
        return self.run.wall / self.megapixels

    @property
    def cpu(self) -> float:
        return self.run.cpu / self.megapixels

    def __str__(self) -> str:
        each = f"{self.wall:7.2f} s/Mpx ({self.cpu:.2f} CPU s/Mpx)"
        return f"{self.megapixels:6.1f} Mpx in {self.run.wall:7.1f} s, {each}, peak {self.run.peak / 2**30:.2f} GiB"


def streaming(
    model: Annotated[Path, typer.Argument(help="Exported ONNX, or weights (.safetensors).")],
    picture: Annotated[Path, typer.Argument(help="What the pictures are made of.", exists=True, dir_okay=False)],
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
    print(f"ratio of times per megapixel {exact.wall / whole.wall:.2f}, of CPU times {exact.cpu / whole.cpu:.2f}")


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
    run = run_alone(command)
    if run.status:
        print(run.problem, file=sys.stderr)
        raise typer.Exit(1)
    return Measured(image.width * image.height / 1e6, run)


if __name__ == "__main__":
    run_command("streaming", streaming)
