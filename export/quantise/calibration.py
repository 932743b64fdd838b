"""The crops of pictures that quantisation is measured on, and the ranges that convolutions' tensors take on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from sanrt.arrays import Array
from sanrt.errors import PictureError
from sanrt.export.bicubic import degrade
from sanrt.export.quantise.parts import convolutions_of, quantisable_parts
from sanrt.export.samples import Picture, Sample, pictures_in, read_rgb
from sanrt.export.scene import natural_scene
from sanrt.export.tensors import Probe
from sanrt.model.graph import Weights, san_model
from sanrt.model.spec import ModelSpec
from sanrt.runtime.tiling.upscaling import network_input

Item = TypeVar("Item")

CROP = 192
"""Side of a crop in high-resolution pixels; every scale divides it."""
MAX_CROPS = 36
"""Most crops of all pictures together; every third is held out from calibration and judges the result."""
SCENES = 9
"""How many scenes are generated where there are no pictures."""
BINS = 2048
"""Bins of a tensor's histogram of magnitudes."""
PERCENTILE = 99.99
"""Per cent of a tensor's values that do not saturate with the method of that name."""


class Track(Protocol):
    """Passes on the items of a loop while it shows a person how far the loop is, as `rich.progress.track` does."""

    def __call__(self, items: Sequence[Item], description: str) -> Iterable[Item]: ...


def untracked(items: Sequence[Item], description: str) -> Iterable[Item]:
    """A Track that shows nothing."""
    return items


@dataclass(frozen=True)
class CalibrationSet:
    """Crops of one size; the low resolution is made from the high by the paper's degradation."""

    name: str
    crops: tuple[Sample, ...]
    """Ranges are taken from these."""
    held_out: tuple[Sample, ...]
    """Quality is judged on these."""
    too_small: int
    """How many pictures were left out because a side is shorter than a crop."""

    @property
    def digest(self) -> str:
        """SHA-256 of all low-resolution pixels."""
        digest = hashlib.sha256()
        for sample in (*self.crops, *self.held_out):
            digest.update(sample.low.tobytes())
        return digest.hexdigest()


def calibration_set(folder: Path | None, scale: int, track: Track = untracked) -> CalibrationSet:
    """Crops of a folder's pictures, spread over all of them, or of generated scenes; always the same ones.

    Pictures are read one at a time. Raises PictureError for a folder or a picture that cannot be used.
    """
    paths = evenly_spread(pictures_in(folder), MAX_CROPS) if folder else []
    per_picture = max(1, MAX_CROPS // max(1, len(paths)))
    crops: list[Sample] = []
    too_small = 0
    for path in track(paths, "Reading pictures"):
        found = list(crops_of(path.name, read_rgb(path), scale, per_picture))
        too_small += not found
        crops += found
    for seed in track([] if folder else range(SCENES), "Making scenes"):
        crops += crops_of(f"scene {seed}", natural_scene(CROP, CROP, seed), scale, 1)
    held_out = crops[::3]
    crops = [crop for index, crop in enumerate(crops) if index % 3]
    if not crops:
        raise PictureError(
            f"{folder}: {len(held_out)} crops of {CROP} x {CROP} in {len(paths)} pictures, expected 2 or more;"
            f" give it pictures of {CROP} px a side or more"
        )
    name = folder.name if folder else "generated scenes"
    return CalibrationSet(name, tuple(crops), tuple(held_out), too_small)


def evenly_spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of the items, in order and evenly spread over all of them."""
    count = min(len(items), most)
    return [items[index * len(items) // count] for index in range(count)]


def crops_of(name: str, picture: Picture, scale: int, most: int) -> Iterator[Sample]:
    """At most `most` crops of a picture that do not overlap, evenly spread; none of a picture that is too small."""
    rows, columns = (side // CROP for side in picture.shape[:2])
    for row, column in evenly_spread([(row, column) for row in range(rows) for column in range(columns)], most):
        high = np.ascontiguousarray(picture[row * CROP : (row + 1) * CROP, column * CROP : (column + 1) * CROP])
        yield Sample(f"{name} {row},{column}", degrade(high, scale), high)


class RangeMethod(StrEnum):
    """How the range of a tensor follows from the magnitudes seen."""

    MIN_MAX = "min-max"
    """The largest magnitude: nothing saturates."""
    PERCENTILE = "percentile"
    """The magnitude that PERCENTILE per cent of the values do not exceed: the others saturate."""


class Magnitudes:
    """A histogram of magnitudes from 0 to `top`, which doubles when a larger one comes: pairs of bins become one."""

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.float64] = np.zeros(BINS)
        self.top = self.largest = 0.0

    def add(self, values: Array) -> None:
        """Count the magnitudes of some values."""
        magnitudes = np.abs(values).ravel()
        self.largest = max(self.largest, float(magnitudes.max(initial=0.0)))
        self.top = self.top or self.largest
        while self.largest > self.top:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2)])
            self.top *= 2
        self.counts += np.histogram(magnitudes, BINS, (0, self.top or 1.0))[0]

    def range(self, method: RangeMethod) -> float:
        """The range by a method; a percentile's is rounded up to the width of a bin."""
        if method is RangeMethod.MIN_MAX:
            return self.largest
        reached = int(np.searchsorted(self.counts.cumsum(), self.counts.sum() * PERCENTILE / 100))
        return self.top * (reached + 1) / BINS


@dataclass(frozen=True)
class TensorRanges:
    """The ranges of what each convolution takes and gives, by the convolution's name."""

    inputs: dict[str, float]
    outputs: dict[str, float]


def measure_ranges(
    spec: ModelSpec, weights: Weights, crops: Sequence[Sample], method: RangeMethod, track: Track = untracked
) -> TensorRanges:
    """The ranges of all parts' convolutions on the crops, which are run one at a time."""
    model = san_model(spec, weights)
    names = {convolution for part in quantisable_parts(spec.architecture) for convolution in convolutions_of(part)}
    nodes = {node.name: node for node in model.graph.node if node.name in names}
    seen = {tensor: Magnitudes() for node in nodes.values() for tensor in (node.input[0], node.output[0])}
    probe = Probe(model, list(seen))
    for sample in track(crops, "Calibrating"):
        for tensor, values in probe(network_input(sample.low, spec.architecture.value_range)).items():
            seen[tensor].add(values)
    return TensorRanges(
        {name: seen[node.input[0]].range(method) for name, node in nodes.items()},
        {name: seen[node.output[0]].range(method) for name, node in nodes.items()},
    )
