"""The interface that the stages of every backend share, see `sanrt.model.graph.stage_model`; imports NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sanrt.arrays import Array

MIN_TRACE = 1e-10
"""Below this a covariance's trace counts as this: a constant feature map must give a gate, not NaN. soca.cu has it too."""

HEAD_HALO, JOIN_HALO, TAIL_HALO = 1, 1, 2
"""Pixels that a result reaches to each side; the tail's 1 + 1/2 + ... + 1/scale is below 2 for every scale."""


@dataclass
class Moments:
    """Mean and centred scatter of the pixels seen so far, merged pairwise (Chan, Golub, LeVeque) in float64."""

    mean: npt.NDArray[np.float64]
    scatter: npt.NDArray[np.float64]
    count: int = 0

    def add(self, mean: Array, scatter: Array, count: int) -> None:
        """Merge the moments of `count` more pixels: mean (C,), scatter (C, C)."""
        total = self.count + count
        delta = mean.astype(np.float64) - self.mean
        self.scatter += scatter + np.outer(delta, delta) * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> Array:
        """(1, C, C) float32."""
        return (self.scatter / self.count).astype(np.float32)[None]


STAGE_INPUTS = {
    "head": ("pixels", "crop"),
    "keys-values": ("x",),
    "attend": ("x", "key", "value"),
    "body": ("x", "crop"),
    "gate": ("sigma",),
    "join": ("features", "gate", "x", "shared", "crop"),
    "tail": ("attended", "first", "crop"),
}
"""Inputs of every stage (`stage_model` in `sanrt.model.graph`); a group's stages carry its number, as in `body.3`."""


STAGE_MAPS = ("head", "attend", "body", "join")
"""Stages whose first output is a feature map; everything else that stages give is small, or the result."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a picture takes beside itself and its result."""

    memory: int
    files: int
    """Of maps that exceed the memory."""


class RowFile(Protocol):
    """Rows of one size, numbered from 0, outside of memory; threads may use it at once."""

    def read(self, first: int, rows: Array) -> None:
        """Fill an array with the rows from the first on."""
        ...

    def write(self, first: int, rows: Array) -> None:
        """Replace the rows from the first on."""
        ...
