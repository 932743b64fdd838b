"""Pictures to measure on: a folder's, low or high resolution or both, or generated scenes where there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sanrt.errors import PictureError, system_reason
from sanrt.export.bicubic import degrade
from sanrt.export.scene import natural_scene
from sanrt.geometry import Box
from sanrt.model.spec import MIN_SIDE
from sanrt.runtime.pictures.codec import open_picture
from sanrt.runtime.pictures.formats import Format

Picture = npt.NDArray[np.uint8]

SCENES = 3
SCENE_SIDE = 192
"""How many scenes are generated where there are no pictures, and their side in pixels."""
MAX_SCENE_SIDE = 192
"""Longest side of a picture that an export is measured on: steady statistics, in seconds of work."""


@dataclass(frozen=True)
class Sample:
    """A low-resolution picture, and the high-resolution one that the network should find."""

    name: str
    """A picture's path in its folder."""
    low: Picture
    high: Picture | None
    """None where the true picture is not known."""


def samples(images: Path | None, hr: Path | None, scale: int) -> Iterator[Sample]:
    """One at a time: pictures with their HR of the same relative path, HR pictures degraded by `scale`, or generated scenes.

    Raises PictureError for a folder without pictures, for one that cannot be read, and for pairs that do not fit.
    """
    if images is None and hr is None:
        for seed in range(SCENES):
            yield degraded(f"scene {seed}", natural_scene(SCENE_SIDE, SCENE_SIDE, seed), scale)
    elif images is None:
        assert hr is not None
        for path in pictures_in(hr):
            yield degraded(str(path.relative_to(hr)), read_rgb(path), scale)
    else:
        highs = pictures_in(hr) if hr else []
        for path in pictures_in(images):
            name = path.relative_to(images)
            yield paired(name, path, original_of(name, hr, highs), scale) if hr else Sample(str(name), read_rgb(path), None)


def degraded(name: str, high: Picture, scale: int) -> Sample:
    """A picture, cut to a multiple of the scale, and its bicubic low-resolution version."""
    height, width = (side // scale * scale for side in high.shape[:2])
    if not height or not width:
        raise PictureError(f"{name}: {high.shape[1]} x {high.shape[0]}, expected {scale} px a side or more")
    return Sample(name, degrade(high[:height, :width], scale), high[:height, :width])


def original_of(name: Path, folder: Path, pictures: Sequence[Path]) -> Path:
    """The picture of the same relative path in a folder, its ending aside; raises PictureError unless there is one."""
    found = [path for path in pictures if path.relative_to(folder).with_suffix("") == name.with_suffix("")]
    found = [path for path in found if path.suffix == name.suffix] or found
    if len(found) != 1:
        raise PictureError(f"{name}: {len(found) or 'no'} high-resolution pictures of that name in {folder}; expected one")
    return found[0]


def paired(name: Path, path: Path, truth: Path, scale: int) -> Sample:
    """A picture and its truth; raises PictureError when that is not `scale` times as large."""
    low, high = read_rgb(path), read_rgb(truth)
    if high.shape[:2] != (low.shape[0] * scale, low.shape[1] * scale):
        raise PictureError(
            f"{truth}: {high.shape[1]} x {high.shape[0]}, expected {low.shape[1] * scale} x {low.shape[0] * scale},"
            f" {scale} times {path}"
        )
    return Sample(str(name), low, high)


def pictures_in(folder: Path) -> list[Path]:
    """The files in a folder and below that have a picture's ending, in order; raises PictureError when there are none."""
    try:
        found = (
            [p for p in sorted(folder.rglob("*")) if Format.of_suffix(p) and p.is_file()] if list(folder.iterdir()) else []
        )
    except OSError as error:
        raise PictureError(f"{folder}: cannot be read ({system_reason(error)}); expected a folder of pictures") from error
    if not found:
        raise PictureError(f"{folder}: no pictures in it; expected a folder of PNG, JPEG, WebP or TIFF files")
    return found


def read_rgb(path: Path) -> Picture:
    """A picture file as (H, W, 3) uint8; raises PictureError."""
    with open_picture(path) as source:
        pixels = source.rgb()
    return np.asarray(pixels if pixels.dtype == np.uint8 else pixels >> 8, np.uint8)


def read_scene(path: Path) -> Picture:
    """The middle of a picture file, at most MAX_SCENE_SIDE a side, as (H, W, 3) uint8; raises PictureError."""
    pixels = read_rgb(path)
    if min(pixels.shape[:2]) < MIN_SIDE:
        raise PictureError(f"{path}: {pixels.shape[1]} x {pixels.shape[0]}, expected {MIN_SIDE} px a side or more")
    box = Box(0, 0, *pixels.shape[:2]).middle(MAX_SCENE_SIDE)
    return pixels[box.top : box.bottom, box.left : box.right]
