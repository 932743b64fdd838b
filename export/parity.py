"""Are these the same? The one comparison behind export, build, quantisation and validate. Imports numpy only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sanrt.arrays import psnr
from sanrt.errors import ParityError
from sanrt.model.spec import Precision, QuantisedType

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Tolerance:
    """The largest distance from the PyTorch reference that still counts as the same network."""

    max_abs: float
    """Largest difference of any value, on the 0..255 scale."""
    min_psnr: float
    """Lowest PSNR to the reference's output on any picture, dB: a largest difference says nothing of all other pixels."""
    y_psnr_drop: float
    """dB of Y-PSNR against high-resolution pictures, on average, where there are any."""


TOLERANCES: Mapping[Precision | QuantisedType, Tolerance] = {
    Precision.FP32: Tolerance(2e-3, 125.0, 0.001),
    Precision.FP16: Tolerance(0.5, 80.0, 0.001),
    Precision.BF16: Tolerance(20.0, 50.0, 0.02),
    Precision.INT16: Tolerance(20.0, 55.0, 0.005),
    QuantisedType.INT8: Tolerance(100.0, 35.0, 0.2),
    QuantisedType.FP8: Tolerance(100.0, 35.0, 0.2),
}
"""The tolerance by the coarsest type of a model (`ModelSpec.coarsest`); `benchmarks/tolerances.py` has the rule."""


@dataclass(frozen=True)
class Difference:
    """The distance of an output from the reference's, on the 0..255 scale whatever the network's value range."""

    max_abs: float
    """NaN where either output holds one."""
    mean_abs: float
    psnr: float
    """dB, not clipped or rounded to pixels first; infinite for equal outputs."""

    def within(self, tolerance: Tolerance) -> bool:
        """Whether no value and not all of them together differ by more than the tolerance; never for NaN."""
        return self.max_abs <= tolerance.max_abs and self.psnr >= tolerance.min_psnr

    def to_json(self) -> dict[str, float | None]:
        """The figures as JSON has them; the infinite PSNR of equal outputs is null."""
        return {"max_abs": self.max_abs, "mean_abs": self.mean_abs, "psnr": None if math.isinf(self.psnr) else self.psnr}


def compare(reference: Floats, candidate: Floats, value_range: float = 255.0) -> Difference:
    """The difference of two outputs of one shape, in a network's value range; raises ParityError when shapes differ."""
    if reference.shape != candidate.shape:
        raise ParityError(f"outputs of shapes {list(reference.shape)} and {list(candidate.shape)}: expected the same")
    error = (candidate.astype(np.float64) - reference.astype(np.float64)) * (255.0 / value_range)
    decibels = psnr(reference, candidate, value_range)
    return Difference(float(np.abs(error).max()), float(np.abs(error).mean()), decibels)


def worst(differences: Iterable[Difference]) -> Difference:
    """The largest difference, the largest mean and the lowest PSNR of several comparisons; NaN wins."""
    all_of = list(differences)
    largest, mean = (float(np.max([getattr(d, name) for d in all_of])) for name in ("max_abs", "mean_abs"))
    return Difference(largest, mean, float(np.min([d.psnr for d in all_of])))


def require(difference: Difference, tolerance: Tolerance, subject: str, remedy: str) -> None:
    """Raise ParityError with the measured difference and the tolerance unless it is within."""
    if not difference.within(tolerance):
        raise ParityError(
            f"{subject}: differs from the PyTorch reference by {difference.max_abs:.3g} of 255 at most"
            f" ({difference.mean_abs:.3g} on average, {difference.psnr:.1f} dB of PSNR), expected"
            f" {tolerance.max_abs:g} or less and {tolerance.min_psnr:g} dB or more; {remedy}"
        )
