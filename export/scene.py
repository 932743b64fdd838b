"""A picture with the statistics of natural ones, made from a seed, so that sanrt has something real to measure on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LEAVES = 1200
"""How many discs a scene is made of."""
SCENE = 192
"""Side of the scene that larger pictures repeat: drawing one takes time that grows with its size."""


def natural_scene(height: int = 96, width: int = 96, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Dead leaves: discs of power-law sizes that hide one another, over 1/f texture; (H, W, 3), the same for the same seed.

    Occlusion gives edges at every scale and the texture a natural spectrum (Lee, Mumford and Huang, 2001).
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.ogrid[: 2 * height, : 2 * width]
    picture = np.full((2 * height, 2 * width, 3), 128.0)
    radii = 2.0 / np.sqrt(rng.uniform((2.0 / min(height, width)) ** 2, 1.0, LEAVES))
    for radius in radii:
        y, x = rng.uniform(0, 2 * height), rng.uniform(0, 2 * width)
        colour = rng.uniform(20, 235) + rng.normal(0, 20, 3)
        top, left = max(0, int(y - radius)), max(0, int(x - radius))
        box = slice(top, int(y + radius) + 1), slice(left, int(x + radius) + 1)
        picture[box][(rows[box[0]] - y) ** 2 + (columns[:, box[1]] - x) ** 2 <= radius**2] = colour
    picture += 12 * pink_noise(rng, 2 * height, 2 * width)[..., None]
    anti_aliased = picture.reshape(height, 2, width, 2, 3).mean((1, 3))
    return np.asarray(anti_aliased.round().clip(0, 255), np.uint8)


def repeated_scene(height: int, width: int) -> npt.NDArray[np.uint8]:
    """A picture of any size, (H, W, 3): a scene of at most SCENE a side, repeated where that is too small."""
    scene = natural_scene(min(SCENE, height), min(SCENE, width))
    rows, columns = -(-height // scene.shape[0]), -(-width // scene.shape[1])
    return np.ascontiguousarray(np.tile(scene, (rows, columns, 1))[:height, :width])


def pink_noise(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.float64]:
    """(H, W) noise whose amplitude falls with the frequency, of mean 0 and deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency, (height, width))
    return np.asarray(noise / noise.std())
