"""Packed training pictures: square tiles in files that travel, and the same on the training's device, where patches are cut.

A pack is a folder of `high-N.npz` (the tiles, in high resolution) and `photo-xS-N.npz` (the same tiles in low resolution, as
people's JPEG photographs are: several versions of each, see `training.wear`), and the same of held-out pictures in
`dev-high.npz` and `dev-photo-xS.npz`. Every file holds encoded pictures (AVIF, JPEG or PNG) back to back.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sanrt.errors import PictureError
from training.data import Picture
from training.degrade import resize_matrix

BLOCK = 200
"""Steps whose random numbers are drawn at once."""

CHUNK = 32
"""Tiles that are reduced at once, to bound the float64 memory that it takes."""


@dataclass(frozen=True)
class Tiles:
    """Square pictures in memory, low resolution beside high; both uint8, on one device."""

    high: Tensor
    """(N, S, S, 3)."""
    low: Tensor
    """(V, N, S / scale, S / scale, 3): V versions of each, the first one reduced by bicubic and nothing else."""

    @property
    def scale(self) -> int:
        return self.high.shape[1] // self.low.shape[2]

    def patches(self, draws: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """B patches, float 0..255, channels last: low (B, 3, side, side) and high (B, 3, scale * side, scale * side).

        draws: int64 (B, 5) of tile, version, top and left in low-resolution pixels, and orientation, 0..7.
        """
        tile, version, top, left, turn = draws.unbind(1)
        low = cut(self.low.flatten(0, 1), version * len(self.high) + tile, top, left, turn, side)
        high = cut(self.high, tile, top * self.scale, left * self.scale, turn, side * self.scale)
        return low, high

    def draw(self, batch: int, side: int, seed: int, block: int) -> Tensor:
        """The random numbers of BLOCK steps, for `patches`: int64 (BLOCK, batch, 5), on the CPU.

        They depend on seed and block alone, so a resumed run goes on as if it had not stopped.
        """
        random = np.random.Generator(np.random.Philox(key=[seed, block]))
        places = self.low.shape[2] - side + 1
        if places < 1:
            raise PictureError(f"tiles of {self.low.shape[2]} low-resolution px; expected at least the {side} px of a patch")
        limits = [len(self.high), len(self.low), places, places, 8]
        return torch.from_numpy(random.integers(0, limits, (BLOCK, batch, 5)))


def cut(pictures: Tensor, number: Tensor, top: Tensor, left: Tensor, turn: Tensor, side: int) -> Tensor:
    """Square parts of (N, S, S, 3), flipped and transposed as `turn` says: float (B, 3, side, side); the others are (B)."""
    line = torch.arange(side, device=pictures.device)
    i, j = line[None, :, None], line[None, None, :]
    number, top, left, turn = (t[:, None, None] for t in (number, top, left, turn))
    y, x = torch.where(turn >= 4, j, i), torch.where(turn >= 4, i, j)
    y = torch.where(turn % 2 == 1, side - 1 - y, y)
    x = torch.where(turn // 2 % 2 == 1, side - 1 - x, x)
    size = pictures.shape[1]
    pixels = pictures.flatten(0, 2)[(number * size + top + y) * size + left + x]
    return pixels.permute(0, 3, 1, 2).float()


def reduce(high: Tensor, scale: int) -> Tensor:
    """`degrade` of every tile on the tiles' own device, to the bit: uint8 (N, S, S, 3) -> (N, S / scale, S / scale, 3)."""
    matrix = torch.from_numpy(resize_matrix(high.shape[1], 1 / scale)).to(high.device)
    chunks = []
    for chunk in torch.split(high, CHUNK):
        columns = rounded(torch.einsum("yh,nhwc->nywc", matrix, chunk.double()))
        chunks.append(rounded(torch.einsum("xw,nywc->nyxc", matrix, columns.double())))
    return torch.cat(chunks)


def rounded(values: Tensor) -> Tensor:
    """uint8, halves up, clipped to 0..255."""
    return (values.clamp(0, 255) + 0.5).floor().to(torch.uint8)


def load_tiles(folder: Path, scale: int, photo: bool, device: torch.device, prefix: str = "") -> Tiles:
    """Read a pack's tiles (prefix "dev-": the held-out ones), with the versions that people's photographs are if `photo`."""
    parts = sorted(folder.glob(f"{prefix}high*.npz"))
    if not parts:
        raise PictureError(f"{folder}: no {prefix}high*.npz; expected pictures packed by python -m training.pack")
    high = torch.from_numpy(np.concatenate([read_part(part) for part in parts])).to(device)
    low = reduce(high, scale)[None]
    if photo:
        names = [part.name.replace("high", f"photo-x{scale}") for part in parts]
        worn = torch.from_numpy(np.concatenate([read_part(folder / name) for name in names]))
        low = torch.cat([low, worn.to(device).view(len(high), -1, *low.shape[2:]).transpose(0, 1)])
    return Tiles(high, low)


def read_part(path: Path) -> npt.NDArray[np.uint8]:
    """The pictures of one file, decoded: uint8 (N, S, S, 3)."""
    from PIL import Image  # here: whoever trains needs it, whoever takes a name from here does not

    try:
        with np.load(path) as part:
            data, ends = part["data"].tobytes(), part["ends"].tolist()
    except (OSError, KeyError, ValueError) as error:
        raise PictureError(f"{path}: not a file of packed pictures ({error}); pack them again") from error

    def decoded(span: tuple[int, int]) -> Picture:
        return np.asarray(Image.open(io.BytesIO(data[slice(*span)])).convert("RGB"))

    with ThreadPoolExecutor() as threads:
        return np.stack(list(threads.map(decoded, zip([0, *ends[:-1]], ends, strict=True))))


def write_part(path: Path, encoded: Sequence[bytes]) -> None:
    """Write encoded pictures as one file, for `read_part`."""
    data = np.frombuffer(b"".join(encoded), np.uint8)
    np.savez(path, data=data, ends=np.cumsum([len(each) for each in encoded]))
