"""Pictures in memory as callers have them (NumPy, Pillow, PyTorch, anything with `__array__`), as checked arrays."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from sanrt.errors import UsageError, first_line

DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))
ROUNDING = 1e-4
"""How far beyond 0..1 floats may lie: that much comes of rounding, and is clipped."""
EXPECTED = "expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
PILLOW_MODES = ("L", "RGB", "RGBA", "I;16")
"""Those whose arrays are what a picture shows."""
PILLOW_CONVERSIONS = {"1": "L", "LA": "RGBA", "La": "RGBA", "RGBa": "RGBA", "RGBX": "RGB", "PA": "RGBA"}
"""What is converted without loss."""


def is_picture(value: Any) -> bool:
    """Whether a value is one picture, not a sequence of them."""
    return hasattr(value, "__array__") or hasattr(value, "__array_interface__")


def picture_array(picture: Any) -> npt.NDArray[Any]:
    """uint8, uint16 or float32 in 0..1, (H, W), (H, W, 3) or (H, W, 4), in this machine's byte order.

    (H, W, 1) becomes (H, W). Raises UsageError for whatever else it is given.
    """
    if isinstance(picture, (str, bytes, os.PathLike)):
        raise UsageError(
            f"picture is a path ({os.fsdecode(picture)}); read it first, as with PIL.Image.open, or use `sanrt run`"
        )
    if not is_picture(picture):
        raise UsageError(f"picture is {type(picture).__name__}; {EXPECTED}: an array, a Pillow picture or a tensor")
    try:
        array = np.asarray(pillow_picture(picture))
    except UsageError:
        raise
    except Exception as error:  # of any library: a tensor on a GPU, one that needs its gradient
        raise UsageError(f"picture is {type(picture).__name__}, no array can be had of it ({first_line(error)})") from error
    return checked(array)


def pillow_picture(picture: Any) -> Any:
    """A Pillow picture in a mode whose array is what it shows; anything else as it is."""
    mode = getattr(picture, "mode", None)
    if not isinstance(mode, str) or not hasattr(picture, "convert") or mode in PILLOW_MODES:
        return picture
    wanted = PILLOW_CONVERSIONS.get(mode)
    if mode == "P":
        wanted = "RGBA" if "transparency" in picture.info else "RGB"
    if wanted is None:
        raise UsageError(f"picture is a Pillow picture of mode {mode}; expected RGB, RGBA or L: picture.convert('RGB')")
    return picture.convert(wanted)


def checked(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array in a type and form that the network takes; raises UsageError for any other."""
    if array.dtype.newbyteorder("=") not in DTYPES:
        raise UsageError(f"picture is {array.dtype}; expected uint8, uint16, or float32 in 0..1")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        remedy = "; channels come last: transpose(1, 2, 0), or permute(1, 2, 0) of a tensor" if first else ""
        raise UsageError(f"picture has shape {array.shape}; {EXPECTED}{remedy}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype != np.float32:
        return array
    low, high = float(array.min()), float(array.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise UsageError(f"picture runs from {low:.9g} to {high:.9g}; expected floats in 0..1")
    return array if low >= 0 and high <= 1 else array.clip(0, 1)
