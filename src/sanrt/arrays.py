"""The array type that the network takes and gives, and how near two arrays are."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from sanrt.errors import PictureError

Array = npt.NDArray[np.float32]
"""float32, mostly (B, C, H, W)."""


def psnr(first: npt.NDArray[Any], second: npt.NDArray[Any], peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio of two arrays of one shape, in dB; infinite when they are equal, NaN where either has one.

    Raises PictureError for arrays of different shapes.
    """
    require_same_shape(first, second)
    error = float(np.mean(np.square(np.subtract(first, second, dtype=np.float64))))
    return 20 * math.log10(peak) - 10 * math.log10(error) if error else math.inf


def require_same_shape(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> None:
    """Raise PictureError for arrays that numpy would otherwise stretch to fit."""
    if first.shape != second.shape:
        raise PictureError(f"arrays of shape {first.shape} and {second.shape} cannot be compared; expected the same shape")
