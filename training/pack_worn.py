"""Add worn low resolutions to a pack: `python -m training.pack_worn PACK SCALE ...`, on whatever machine trains."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from training.command import run
from training.data import Picture
from training.degrade import degrade
from training.tiles import read_part, write_part
from training.wear import DEV_QUALITIES, jpeg, worn

VERSIONS = 7
"""Worn versions of every tile: with the clean one, an eighth of the patches is clean."""


def pack_worn_scales(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures packed by training.pack.")],
    scales: Annotated[list[int] | None, typer.Argument(help="Scales whose worn low resolutions are wanted.")] = None,
    versions: Annotated[int, typer.Option(help="Worn versions of every tile.")] = VERSIONS,
) -> None:
    """Write what `training.train --photo` needs beside the tiles; a scale that is there already is left alone."""
    for scale in scales or []:
        if not has_worn(folder, scale):
            pack_worn(folder, scale, versions)


def has_worn(folder: Path, scale: int) -> bool:
    """Whether a pack has the worn low resolutions of a scale, of every file of tiles."""
    return all(worn_path(path, scale).exists() for path in folder.glob("*high*.npz"))


def worn_path(path: Path, scale: int) -> Path:
    """Where the worn low resolutions of a file of tiles are: photo-x4-0.npz for high-0.npz."""
    return path.with_name(path.name.replace("high", f"photo-x{scale}"))


def pack_worn(folder: Path, scale: int, versions: int) -> None:
    """Write the worn low resolutions beside a pack's tiles; they are made from the tiles as packed, always alike."""
    random = np.random.default_rng(scale)

    def worn_versions(tile: Picture, own: np.random.Generator) -> list[bytes]:
        low = degrade(tile, scale)
        return [worn(low, own) for _ in range(versions)]

    with ThreadPoolExecutor() as threads:
        for path in sorted(folder.glob("high-*.npz")):
            tiles = read_part(path)
            found = threads.map(worn_versions, tiles, random.spawn(len(tiles)))
            write_part(worn_path(path, scale), [each for some in found for each in some])
    lows = [degrade(tile, scale) for tile in read_part(folder / "dev-high.npz")]
    write_part(worn_path(folder / "dev-high.npz", scale), [jpeg(low, quality) for low in lows for quality in DEV_QUALITIES])


if __name__ == "__main__":
    run(pack_worn_scales)
