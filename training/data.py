"""Pictures from files, as arrays and as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Picture = npt.NDArray[np.uint8]
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"}


def read_rgb(path: Path) -> Picture:
    """A picture file as uint8 (H, W, 3), grey repeated."""
    import pyvips  # here: a machine that trains on packed pictures needs none

    image = pyvips.Image.new_from_file(str(path)).colourspace("srgb")
    array: Picture = image[:3].numpy() if image.bands >= 3 else image[0].bandjoin([image[0], image[0]]).numpy()
    return array


def picture_files(*folders: Path) -> list[Path]:
    """Every picture below the folders, in a fixed order."""
    return sorted(p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)


def to_tensor(pictures: Picture) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), channels last in memory."""
    import torch  # here: benchmarks read pictures where there is no torch

    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float()
