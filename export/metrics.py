"""Likeness of two pictures: SSIM, and PSNR on luma by the super-resolution papers' protocol. Imports numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from sanrt.arrays import psnr, require_same_shape
from sanrt.errors import PictureError

Float64 = npt.NDArray[np.float64]
Pixels = npt.NDArray[Any]

LUMA = np.array([65.481, 128.553, 24.966]) / 255
"""Weights of R, G and B in ITU-R BT.601 luma of 0..255 pictures, without its offset of 16."""

WINDOW = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
WINDOW /= WINDOW.sum()
"""One axis of SSIM's 11 x 11 Gaussian window, sigma 1.5."""


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


def blurred(x: Float64) -> Float64:
    """(H, W) under SSIM's window -> (H - 10, W - 10)."""
    for axis in (0, 1):
        x = sliding_window_view(x, len(WINDOW), axis) @ WINDOW
    return x


def y_channel(picture: npt.NDArray[np.uint8]) -> Float64:
    """Luma of ITU-R BT.601 as MATLAB's `rgb2ycbcr` has it, not rounded: uint8 RGB (H, W, 3) -> (H, W), 16..235."""
    luma: Float64 = picture @ LUMA + 16
    return luma


def y_psnr(output: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8], shave: int) -> float:
    """PSNR of two uint8 RGB (H, W, 3) pictures on luma, `shave` pixels off every side (the papers shave `scale`); dB."""
    return psnr(*shaved_luma(output, truth, shave))


def shaved_luma(output: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8], shave: int) -> tuple[Float64, Float64]:
    """Both pictures' luma without `shave` pixels on every side."""
    require_same_shape(output, truth)
    height, width = output.shape[:2]
    if min(height, width) <= 2 * shave:
        raise PictureError(f"a {width} x {height} px picture: nothing is left when {shave} px are shaved off every side")
    inside = slice(shave, height - shave), slice(shave, width - shave)
    return y_channel(output[inside]), y_channel(truth[inside])
