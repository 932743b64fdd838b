"""The picture of `run.sh`: made, upscaled to numbers by the library, and two results compared."""

from __future__ import annotations

import sys

import numpy as np
import pyvips

from sanrt import Upscaler

LARGEST = 0.01
"""Of 255: the most that two processors may differ in fp32."""


def picture() -> np.ndarray:
    """24 x 30 pixels of waves and a little noise, uint8."""
    y, x = np.mgrid[:24, :30] / 7
    waves = np.stack([np.sin(x * (c + 1)) * np.cos(y) for c in range(3)], axis=-1)
    return (127 + 100 * waves + 9 * np.random.default_rng(0).standard_normal(waves.shape)).clip(0, 255).astype(np.uint8)


def upscaled() -> np.ndarray:
    """By the bundled x4 network in fp32, 0..255, not rounded."""
    with Upscaler.load(4, backend="native", precision="fp32") as upscaler:
        return 255 * upscaler((picture() / np.float32(255)).astype(np.float32))


def compare(one: str, other: str) -> None:
    """Ends with status 1 if the numbers or the files differ by more than LARGEST, or by more than a rounding."""
    numbers = np.abs(np.load(f"{one}.npy") - np.load(f"{other}.npy")).max()
    pixels = [pyvips.Image.new_from_file(f"{name}.png").numpy().astype(int) for name in (one, other)]
    steps = np.abs(pixels[0] - pixels[1])
    print(f"largest difference {numbers:.5f} of 255; in the files {steps.max()}, where {(steps > 0).mean():.2%} differ")
    sys.exit(int(numbers > LARGEST or steps.max() > 1))


match sys.argv[1:]:
    case "make", path:
        pyvips.Image.new_from_array(picture()).write_to_file(path)
    case "upscale", path:
        np.save(path, upscaled())
    case "compare", one, other:
        compare(one, other)
