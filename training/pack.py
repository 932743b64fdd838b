"""Pack pictures for training: `python -m training.pack PHOTOS OUT`, for `python -m training.train --data OUT`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from sanrt.errors import PictureError
from training.command import run
from training.data import Picture, picture_files, read_rgb
from training.degrade import bicubic, resize_matrix
from training.drawings import drawing
from training.pack_worn import VERSIONS, pack_worn
from training.tiles import write_part
from training.wear import avif, png

SIDE = 480
"""Of a tile, in high-resolution pixels: a multiple of 8 at every scale's low resolution but x8's, and of 24."""

DEV_SIDE = 384
"""Of a held-out tile: the middle of each picture."""

DRAWINGS = 150
"""Tiles that are drawn: one in eight of all."""

REDUCTIONS = (1.0, 1.5, 2.0, 2.5, 3.0)
"""Photographs are cut up as they are and so many times smaller: there edges are harder and grain is less."""

SMALLEST = 24
"""Every scale divides it, and so must the sides of tiles."""


def pack(
    photos: Annotated[Path, typer.Argument(help="Folder that holds train/ and dev/.")],
    out: Annotated[Path, typer.Argument(help="Folder for the packed pictures.")],
    quality: Annotated[int, typer.Option(help="AVIF quality of the tiles; 0 keeps every pixel, as PNG.")] = 90,
    detail: Annotated[float, typer.Option(help="Leave out tiles that halving and doubling keeps better, dB.")] = 37,
    photo_scale: Annotated[list[int] | None, typer.Option(help="Pack worn pictures for this scale. Repeatable.")] = None,
    versions: Annotated[int, typer.Option(help="Worn versions of every tile.")] = VERSIONS,
    tiles: Annotated[int | None, typer.Option(help="Pack at most so many, chosen at random. [default: all]")] = None,
    drawings: Annotated[int, typer.Option(help="Tiles that are drawn, for hard edges.")] = DRAWINGS,
    part_size: Annotated[float, typer.Option(help="Largest file of tiles, MB.")] = 15,
    side: Annotated[int, typer.Option(help=f"Side of a tile, a multiple of {SMALLEST} px.")] = SIDE,
    dev_side: Annotated[int, typer.Option(help=f"Side of a held-out tile, a multiple of {SMALLEST} px.")] = DEV_SIDE,
    seed: int = 0,
) -> None:
    """Cut PHOTOS/train into tiles with detail and PHOTOS/dev into one tile each; draw some more; pack them, worn too."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.npz"):
        old.unlink()
    pictures = map(read_rgb, picture_files(photos / "train"))
    found = [tile for picture in pictures for k in REDUCTIONS for tile in detailed(reduced(picture, k), side, detail)]
    held_out = [middle(read_rgb(path), dev_side) for path in picture_files(photos / "dev")]
    if not found or not held_out:
        raise PictureError(f"{photos}: {len(found)} tiles and {len(held_out)} held-out pictures; expected some of both")
    random = np.random.default_rng(seed)
    found += [drawing(side, random) for _ in range(drawings)]
    chosen = [encoded(found[i], quality) for i in random.permutation(len(found))[:tiles]]
    for number, part in enumerate(parts(chosen, part_size * 1e6)):
        write_part(out / f"high-{number}.npz", part)
    write_part(out / "dev-high.npz", [png(picture) for picture in held_out])
    for scale in photo_scale or []:
        pack_worn(out, scale, versions)
    for path in sorted(out.glob("*.npz")):
        with np.load(path) as part:
            print(f"{path}: {len(part['ends'])} pictures, {path.stat().st_size / 1e6:.1f} MB")


def reduced(picture: Picture, factor: float) -> Picture:
    """The picture `factor` times smaller, by antialiased bicubic."""
    return picture if factor == 1 else bicubic(picture, 1 / factor)


def detailed(picture: Picture, side: int, detail: float) -> Iterator[Picture]:
    """The tiles of a picture that lose more than `detail` (dB, of RGB) allows when halved and doubled."""
    there_and_back = torch.from_numpy(resize_matrix(side // 2, 2.0) @ resize_matrix(side, 0.5)).float()
    for top in range(0, picture.shape[0] - side + 1, side):
        for left in range(0, picture.shape[1] - side + 1, side):
            tile = np.ascontiguousarray(picture[top : top + side, left : left + side])
            pixels = torch.from_numpy(tile).float()
            error = torch.einsum("yh,hwc,xw->yxc", there_and_back, pixels, there_and_back) - pixels
            if error.square().mean() > 255**2 / 10 ** (detail / 10):
                yield tile


def middle(picture: Picture, side: int) -> Picture:
    """The square in the middle of a picture."""
    if min(picture.shape[:2]) < side:
        raise PictureError(f"a held-out picture of {picture.shape[1]} x {picture.shape[0]} px; expected {side} px a side")
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def encoded(picture: Picture, quality: int) -> bytes:
    """As AVIF, or as PNG when `quality` is 0."""
    return avif(picture, quality) if quality else png(picture)


def parts(pictures: list[bytes], largest: float) -> Iterator[list[bytes]]:
    """Runs of pictures that hold at most `largest` bytes."""
    part: list[bytes] = []
    size = 0
    for picture in pictures:
        if part and size + len(picture) > largest:
            yield part
            part, size = [], 0
        part.append(picture)
        size += len(picture)
    yield part


if __name__ == "__main__":
    run(pack)
