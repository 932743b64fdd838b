"""Training pictures in memory: random aligned crops of low and high resolution, flipped and turned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyvips
import torch
from torch import Tensor

from training.degrade import degrade

Picture = npt.NDArray[np.uint8]
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"}


def read_rgb(path: Path) -> Picture:
    """A picture file as uint8 (H, W, 3), grey repeated."""
    image = pyvips.Image.new_from_file(str(path)).colourspace("srgb")
    array: Picture = image[:3].numpy() if image.bands >= 3 else image[0].bandjoin([image[0], image[0]]).numpy()
    return array


def picture_files(*folders: Path) -> list[Path]:
    """Every picture below the folders, in a fixed order."""
    return sorted(p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)


class Patches:
    """Endless random patches of the pictures in `folders`; the same seed gives the same sequence."""

    def __init__(self, folders: list[Path], scale: int, patch: int, seed: int) -> None:
        self.scale, self.patch = scale, patch
        self.random = np.random.default_rng(seed)
        self.pairs: list[tuple[Picture, Picture]] = []
        for path in picture_files(*folders):
            high = read_rgb(path)
            high = high[: high.shape[0] // scale * scale, : high.shape[1] // scale * scale]
            if min(high.shape[:2]) >= patch * scale:
                self.pairs.append((degrade(high, scale), high))
        if not self.pairs:
            raise SystemExit(f"no picture of at least {patch * scale} px a side in {', '.join(map(str, folders))}")

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """`size` patches as float (B, 3, p, p) and (B, 3, scale * p, scale * p), 0..255."""
        lows, highs = zip(*(self.sample() for _ in range(size)), strict=True)
        return to_tensor(np.stack(lows)), to_tensor(np.stack(highs))

    def sample(self) -> tuple[Picture, Picture]:
        low, high = self.pairs[self.random.integers(len(self.pairs))]
        s, p = self.scale, self.patch
        top, left = (int(self.random.integers(side - p + 1)) for side in low.shape[:2])
        turn, flip = int(self.random.integers(4)), bool(self.random.integers(2))

        def cut(picture: Picture, by: int) -> Picture:
            part = np.rot90(picture[top * by : (top + p) * by, left * by : (left + p) * by], turn)
            return part[:, ::-1] if flip else part

        return cut(low, 1), cut(high, s)


def to_tensor(pictures: Picture) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float()
