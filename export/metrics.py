"""How alike two pictures are: PSNR and SSIM, of any arrays or by the super-resolution papers' protocol. Only numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from sanrt.errors import PictureError

Array = npt.NDArray[np.float64]
Pixels = npt.NDArray[Any]

LUMA = np.array([65.481, 128.553, 24.966]) / 255
"""Weights of R, G and B in ITU-R BT.601 luma of 0..255 pictures, without its offset of 16."""

WINDOW = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
WINDOW /= WINDOW.sum()
"""One axis of SSIM's 11 x 11 Gaussian window, sigma 1.5."""


@dataclass(frozen=True)
class Score:
    """How near an output comes to the true picture."""

    psnr: float
    """dB; infinite for equal pictures."""
    ssim: float
    """At most 1."""


def psnr(first: Pixels, second: Pixels, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio of two arrays of one shape, in dB; infinite when they are equal."""
    require_same_shape(first, second)
    error = np.mean(np.square(np.subtract(first, second, dtype=np.float64)))
    return float(10 * np.log10(peak**2 / error)) if error else float("inf")


def ssim(first: Pixels, second: Pixels, peak: float = 255.0) -> float:
    """Structural similarity (Wang et al., 2004) of two (H, W) arrays, wherever the 11 x 11 window lies inside."""
    require_same_shape(first, second)
    if first.ndim != 2 or min(first.shape) < len(WINDOW):
        raise PictureError(f"SSIM of an array of shape {first.shape}: expected one channel, both sides >= {len(WINDOW)}")
    x, y = first.astype(np.float64), second.astype(np.float64)
    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(likeness / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))))


def blurred(x: Array) -> Array:
    """(H, W) under SSIM's window -> (H - 10, W - 10)."""
    for axis in (0, 1):
        x = sliding_window_view(x, len(WINDOW), axis) @ WINDOW
    return x


def y_channel(picture: npt.NDArray[np.uint8]) -> Array:
    """Luma of ITU-R BT.601 as MATLAB's `rgb2ycbcr` has it, not rounded: uint8 RGB (H, W, 3) -> (H, W), 16..235."""
    luma: Array = picture @ LUMA + 16
    return luma


def y_psnr(output: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8], shave: int) -> float:
    """PSNR of two uint8 RGB (H, W, 3) pictures on luma, `shave` pixels off every side (the papers shave `scale`); dB."""
    return psnr(*shaved_luma(output, truth, shave))


def y_score(output: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8], shave: int) -> Score:
    """PSNR and SSIM of two uint8 RGB (H, W, 3) pictures on luma, `shave` pixels off every side (the papers: `scale`)."""
    pair = shaved_luma(output, truth, shave)
    return Score(psnr(*pair), ssim(*pair))


def shaved_luma(output: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8], shave: int) -> tuple[Array, Array]:
    """Both pictures' luma without `shave` pixels on every side."""
    require_same_shape(output, truth)
    height, width = output.shape[:2]
    if min(height, width) <= 2 * shave:
        raise PictureError(f"a {width} x {height} px picture: nothing is left when {shave} px are shaved off every side")
    inside = slice(shave, height - shave), slice(shave, width - shave)
    return y_channel(output[inside]), y_channel(truth[inside])


def require_same_shape(first: Pixels, second: Pixels) -> None:
    """Raise PictureError for arrays that numpy would otherwise stretch to fit."""
    if first.shape != second.shape:
        raise PictureError(f"arrays of shape {first.shape} and {second.shape} cannot be compared; expected the same shape")
