"""Antialiased bicubic resizing as MATLAB's `imresize` does it, and with it the paper's BI degradation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


def cubic(x: Float64) -> Float64:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(size: int, scale: float) -> Float64:
    """Weights (round(size * scale), size) of one axis; below 1 the kernel is widened by 1 / scale (antialiasing).

    Pixels beyond the border are the picture mirrored, its edge pixel included.
    """
    stretch = min(scale, 1.0)
    rows = round(size * scale)
    centre = (np.arange(rows) + 0.5) / scale - 0.5
    reach = int(np.ceil(2 / stretch)) + 1
    taps = np.floor(centre)[:, None] + np.arange(-reach, reach + 1)
    weights = cubic((centre[:, None] - taps) * stretch)
    weights /= weights.sum(1, keepdims=True)
    mirrored = taps.astype(int) % (2 * size)
    source = np.where(mirrored < size, mirrored, 2 * size - 1 - mirrored)
    matrix = np.zeros((rows, size))
    np.add.at(matrix, (np.arange(rows)[:, None], source), weights)
    return matrix


def bicubic(picture: npt.NDArray[np.uint8], scale: float) -> npt.NDArray[np.uint8]:
    """uint8 (H, W, C) resized by `scale`, rounded to uint8 after each axis as MATLAB does."""
    vertical, horizontal = (resize_matrix(side, scale) for side in picture.shape[:2])
    columns = round_to_uint8(np.einsum("yh,hwc->ywc", vertical, picture, optimize=True))
    return round_to_uint8(np.einsum("xw,ywc->yxc", horizontal, columns, optimize=True))


def round_to_uint8(values: Float64) -> npt.NDArray[np.uint8]:
    """Nearest grey level, halves up, clipped to 0..255."""
    return np.floor(values.clip(0, 255) + 0.5).astype(np.uint8)


def degrade(picture: npt.NDArray[np.uint8], scale: int) -> npt.NDArray[np.uint8]:
    """The low-resolution version of a uint8 (H, W, C) picture whose sides `scale` divides."""
    return bicubic(picture, 1 / scale)
