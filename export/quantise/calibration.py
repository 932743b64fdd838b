"""What quantisation is measured on: crops of pictures, and the ranges that convolutions' inputs take on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from sanrt.arrays import Array
from sanrt.errors import PictureError
from sanrt.export.bicubic import degrade
from sanrt.export.samples import Picture, Sample, pictures_in, read_rgb
from sanrt.export.scene import natural_scene
from sanrt.export.tensors import Probe
from sanrt.model.graph import Weights, san_model
from sanrt.model.spec import ModelSpec
from sanrt.runtime.tiling.upscaling import network_input

Item = TypeVar("Item")

CROP = 192
"""Side of a crop, high-resolution pixels; all scales divide it."""
CROPS = 36
"""At most, over all pictures; every third is held out from calibration and judges the result."""
SCENES = 9
"""Generated ones, where there are no pictures."""
BINS, LEVELS, LENGTH_STEP = 2048, 128, 8
"""Of histograms; of magnitudes in 8 bits; and bins between the ranges that are compared."""
PERCENTILE = 99.99


class Method(StrEnum):
    """How the range of a tensor follows from the values seen."""

    MIN_MAX = "min-max"
    """The largest magnitude: nothing saturates."""
    ENTROPY = "entropy"
    """The least loss of information (Kullback-Leibler) between the values and the rounded ones."""
    PERCENTILE = "percentile"
    """All but the largest one in ten thousand."""


class Track(Protocol):
    """Follows a loop for people, as `rich.progress.track` does."""

    def __call__(self, items: Sequence[Item], description: str) -> Iterable[Item]: ...


def untracked(items: Sequence[Item], description: str) -> Iterable[Item]:
    """Progress that nobody watches."""
    return items


@dataclass(frozen=True)
class CalibrationSet:
    """Crops of one size, low resolution made from high by the paper's degradation."""

    name: str
    crops: tuple[Sample, ...]
    """Ranges are taken from these."""
    held_out: tuple[Sample, ...]
    """Quality is judged on these."""
    too_small: int
    """Pictures that were left out, a side being shorter than a crop."""

    @property
    def digest(self) -> str:
        """SHA-256 of all pixels."""
        digest = hashlib.sha256()
        for sample in (*self.crops, *self.held_out):
            digest.update(sample.low.tobytes())
        return digest.hexdigest()


def calibration_set(folder: Path | None, scale: int, track: Track = untracked) -> CalibrationSet:
    """Crops of a folder's pictures, spread over all of them, or of generated scenes; always the same ones.

    Pictures are read one at a time. Raises PictureError for a folder or a picture that cannot be used.
    """
    paths = spread(pictures_in(folder), CROPS) if folder else []
    each = max(1, CROPS // max(1, len(paths)))
    crops: list[Sample] = []
    too_small = 0
    for path in track(paths, "Reading pictures"):
        found = list(crops_of(path.name, read_rgb(path), scale, each))
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


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items, evenly spread."""
    count = min(len(items), most)
    return [items[index * len(items) // count] for index in range(count)]


def crops_of(name: str, picture: Picture, scale: int, most: int) -> Iterator[Sample]:
    """Crops of a picture that do not overlap, evenly spread; none of one that is too small."""
    rows, columns = (side // CROP for side in picture.shape[:2])
    for row, column in spread([(row, column) for row in range(rows) for column in range(columns)], most):
        high = np.ascontiguousarray(picture[row * CROP : (row + 1) * CROP, column * CROP : (column + 1) * CROP])
        yield Sample(f"{name} {row},{column}", degrade(high, scale), high)


def parts(spec: ModelSpec) -> list[str]:
    """What may be in 8 bits, in the network's order: residual blocks, the convolutions that end groups, upsampling ones."""
    arch = spec.architecture
    groups = [
        [*(f"groups.{group}.blocks.{block}" for block in range(arch.blocks)), f"groups.{group}.conv"]
        for group in range(arch.groups)
    ]
    upsampling = 1 if arch.scale == 3 else arch.scale.bit_length() - 1
    return [*chain(*groups), *(f"upsampler.{2 * layer}" for layer in range(upsampling))]


def convolutions(part: str) -> list[str]:
    """Names of a part's convolutions; a block has two."""
    return [f"{part}.conv1", f"{part}.conv2"] if ".blocks." in part else [part]


@dataclass(frozen=True)
class Ranges:
    """Of every part's convolutions, by their names."""

    inputs: dict[str, float]
    outputs: dict[str, float]


def calibrated(
    spec: ModelSpec, weights: Weights, crops: Sequence[Sample], method: Method, track: Track = untracked
) -> Ranges:
    """The ranges of what the parts' convolutions take and give; one crop is run at a time."""
    model = san_model(spec, weights)
    names = {conv for part in parts(spec) for conv in convolutions(part)}
    nodes = {node.name: node for node in model.graph.node if node.name in names}
    probe = Probe(model, sorted({tensor for node in nodes.values() for tensor in (node.input[0], node.output[0])}))
    collector = collector_for(method)
    for sample in track(crops, "Calibrating"):
        collector.collect(probe(network_input(sample.low, spec.architecture.value_range)))
    found = collector.ranges()
    return Ranges(
        {name: found[node.input[0]] for name, node in nodes.items()},
        {name: found[node.output[0]] for name, node in nodes.items()},
    )


class Collector(Protocol):
    """Takes tensors as they come and keeps what their ranges need."""

    def collect(self, tensors: dict[str, Array]) -> None: ...

    def ranges(self) -> dict[str, float]: ...


def collector_for(method: Method) -> Collector:
    """The collector of a method."""
    return LargestCollector() if method == Method.MIN_MAX else HistogramCollector(method)


class LargestCollector:
    """Min-max, for symmetric ranges: one number per tensor."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def collect(self, tensors: dict[str, Array]) -> None:
        for name, values in tensors.items():
            self.largest[name] = max(self.largest.get(name, 0.0), float(np.abs(values).max()))

    def ranges(self) -> dict[str, float]:
        return self.largest


class HistogramCollector:
    """One histogram per tensor. onnxruntime's calibrators are no good here: they keep all tensors of a data set, and their
    bins grow with the largest outlier, until the entropy of a single tensor takes minutes (onnxruntime 1.32).
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.histograms: dict[str, Histogram] = {}

    def collect(self, tensors: dict[str, Array]) -> None:
        for name, values in tensors.items():
            self.histograms.setdefault(name, Histogram()).add(values)

    def ranges(self) -> dict[str, float]:
        if self.method == Method.ENTROPY:
            return {name: h.least_divergence() for name, h in self.histograms.items()}
        return {name: h.percentile(PERCENTILE) for name, h in self.histograms.items()}


class Histogram:
    """Magnitudes in BINS bins from 0 to `top`, which doubles when something larger comes: pairs of bins become one."""

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.float64] = np.zeros(BINS)
        self.top = 0.0

    def add(self, values: Array) -> None:
        """Count the values' magnitudes."""
        magnitudes = np.abs(values).ravel()
        largest = float(magnitudes.max(initial=0.0))
        self.top = self.top or largest
        while largest > self.top:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2)])
            self.top *= 2
        self.counts += np.histogram(magnitudes, BINS, (0, self.top or 1.0))[0]

    def percentile(self, percent: float) -> float:
        """The magnitude that so many per cent do not exceed, to the width of a bin."""
        reached = int(np.searchsorted(self.counts.cumsum(), self.counts.sum() * percent / 100))
        return self.top * (reached + 1) / BINS

    def least_divergence(self) -> float:
        """The range with the least Kullback-Leibler divergence of the values, cut at it, from what LEVELS steps keep."""
        lengths = range(LEVELS, BINS + 1, LENGTH_STEP)
        return self.top * min(lengths, key=lambda length: divergence(self.counts, length)) / BINS


def divergence(counts: npt.NDArray[np.float64], length: int) -> float:
    """Of the first bins, the rest added to their last, from the same in LEVELS steps, each spread over its filled bins."""
    kept = counts[:length]
    filled = kept > 0
    step = np.arange(length) * LEVELS // length
    mean = np.bincount(step, kept) / np.maximum(np.bincount(step, filled), 1)
    coarse = np.where(filled, mean[step], 0.0) / max(kept.sum(), 1.0)
    whole = kept.copy()
    whole[-1] += counts[length:].sum()
    whole /= max(whole.sum(), 1.0)
    present = whole > 0
    return float((whole[present] * np.log(whole[present] / np.maximum(coarse[present], 1e-12))).sum())
