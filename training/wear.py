"""What happens to people's photographs: a little blur or noise, then JPEG, sometimes twice."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from training.data import Picture

DEV_QUALITIES = (95, 85, 60, 30)
"""JPEG qualities of the held-out pictures, all with halved chroma, as most files are."""


def jpeg(picture: Picture, quality: int, full_chroma: bool = False) -> bytes:
    """A uint8 (H, W, 3) picture as JPEG, its chroma halved in both directions unless `full_chroma`."""
    return saved(picture, "JPEG", quality=quality, subsampling="4:4:4" if full_chroma else "4:2:0")


def png(picture: Picture) -> bytes:
    """A uint8 (H, W, 3) picture as PNG."""
    return saved(picture, "PNG", compress_level=2)


def avif(picture: Picture, quality: int) -> bytes:
    """A uint8 (H, W, 3) picture as AVIF of full chroma: a third smaller than JPEG at the same PSNR, and without its grid."""
    return saved(picture, "AVIF", quality=quality, subsampling="4:4:4", speed=8, max_threads=1)


def saved(picture: Picture, file_format: str, **options: Any) -> bytes:
    """The file of a picture. Pillow writes it, which GPU machines have; they have no pyvips."""
    from PIL import Image  # here and below: whoever takes DEV_QUALITIES from here does not need it

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, file_format, **options)
    return file.getvalue()


def decoded(data: bytes) -> Picture:
    """The picture in a file: uint8 (H, W, 3)."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def worn(picture: Picture, random: np.random.Generator) -> bytes:
    """A low-resolution picture as somebody might have it, as JPEG: quality 30 to 100, both chroma samplings, any grid.

    A quarter is slightly blurred, a quarter slightly noisy, a fifth was a JPEG before, on another grid of blocks.
    """
    if random.random() < 0.25:
        picture = blurred(picture, random.uniform(0.2, 0.8))
    if random.random() < 0.25:
        picture = noisy(picture, random.uniform(0.5, 4), random)
    if random.random() < 0.2:
        picture = compressed_before(picture, random)
    return jpeg(picture, int(random.integers(30, 101)), full_chroma=bool(random.random() < 0.3))


def blurred(picture: Picture, sigma: float) -> Picture:
    """Under a Gaussian of so many pixels, the border repeated."""
    reach = math.ceil(3 * sigma)
    taps = np.exp(-np.square(np.arange(-reach, reach + 1) / sigma) / 2)
    taps /= taps.sum()
    height, width = picture.shape[:2]
    soft = np.pad(picture.astype(float), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    soft = sum(tap * soft[i : i + height] for i, tap in enumerate(taps))
    soft = sum(tap * soft[:, i : i + width] for i, tap in enumerate(taps))
    result: Picture = np.round(soft).clip(0, 255).astype(np.uint8)
    return result


def noisy(picture: Picture, sigma: float, random: np.random.Generator) -> Picture:
    """With Gaussian noise of so many grey levels, of grey or of every channel by itself."""
    shape = picture.shape if random.random() < 0.5 else (*picture.shape[:2], 1)
    noise = random.normal(0, sigma, shape)
    return (picture + noise).round().clip(0, 255).astype(np.uint8)


def compressed_before(picture: Picture, random: np.random.Generator) -> Picture:
    """After a first compression, as part of a picture that reached up to 15 px further up and left."""
    top, left = random.integers(0, 16, 2)
    larger = np.pad(picture, ((top, 0), (left, 0), (0, 0)), mode="reflect")
    first = decoded(jpeg(larger, int(random.integers(50, 96)), full_chroma=bool(random.random() < 0.3)))
    return first[top:, left:]
