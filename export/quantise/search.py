"""Which parts of a network can compute in 8 bits within a loss of quality: what each costs, the largest set that fits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from sanrt.arrays import Array
from sanrt.export.metrics import y_psnr
from sanrt.export.parity import compare
from sanrt.export.quantise.calibration import Track, untracked
from sanrt.export.quantise.parts import restricted_to
from sanrt.export.samples import Sample
from sanrt.export.tensors import Probe
from sanrt.files import keep, kept
from sanrt.model.graph import Weights, san_model
from sanrt.model.spec import ModelSpec, Quantisation
from sanrt.runtime.tiling.upscaling import network_input, network_output


@dataclass(frozen=True)
class QualityLoss:
    """The cost of a set of 8-bit parts on the held-out crops."""

    psnr: float
    """dB, of the output against the fp32 network's."""
    y_psnr_drop: float
    """dB by which the mean Y-PSNR against the original is lower than the fp32 network's."""


@dataclass(frozen=True)
class PartCost:
    """A part of the network, and what it costs alone."""

    part: str
    alone: QualityLoss | None
    """None for a part that was not measured because it is kept as it is."""
    quantised: bool


@dataclass(frozen=True)
class PartSelection:
    """The parts that a search chose for 8 bits, and what they cost."""

    costs: tuple[PartCost, ...]
    """Every part, in the network's order."""
    loss: QualityLoss
    """The loss with all the chosen parts in 8 bits."""

    @property
    def parts(self) -> list[str]:
        """Names of the parts to quantise."""
        return [cost.part for cost in self.costs if cost.quantised]

    def to_json(self) -> list[Mapping[str, object]]:
        """One row per part, for the model's metadata; an infinite PSNR is null."""
        return [
            {
                "part": cost.part,
                "psnr": cost.alone and (cost.alone.psnr if math.isfinite(cost.alone.psnr) else None),
                "y_psnr_drop": cost.alone and cost.alone.y_psnr_drop,
                "quantised": cost.quantised,
            }
            for cost in self.costs
        ]


class LossMeasurements:
    """Losses of sets of parts, each measured once: they are kept in a file, so that a search can be taken up again."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        quantisation: Quantisation,
        held_out: Sequence[Sample],
        cache: tuple[Sequence[Path], str],
    ) -> None:
        """`cache` is where the losses are kept: folders, of which one can be written, and the file's name."""
        self.spec, self.weights, self.quantisation, self.held_out, self.cache = spec, weights, quantisation, held_out, cache
        self.reference: list[Array] = []
        self.known = {key: QualityLoss(**loss) for key, loss in json.loads(kept(*cache) or b"{}").items()}

    def __call__(self, parts: Sequence[str]) -> QualityLoss:
        """The loss with these parts in 8 bits and all else as it is."""
        key = " ".join(sorted(parts))
        if key not in self.known:
            self.known[key] = self.measure(parts)
            keep(*self.cache, json.dumps({key: asdict(loss) for key, loss in self.known.items()}).encode())
        return self.known[key]

    def measure(self, parts: Sequence[str]) -> QualityLoss:
        """Run the held-out crops through the network and through its quantised variant."""
        self.reference = self.reference or self.outputs(None)
        found = self.outputs(restricted_to(self.quantisation, parts))
        drops = [
            self.y_psnr(expected, sample) - self.y_psnr(y, sample)
            for sample, expected, y in zip(self.held_out, self.reference, found, strict=True)
        ]
        value_range = self.spec.architecture.value_range
        difference = compare(np.concatenate(self.reference), np.concatenate(found), value_range)
        return QualityLoss(difference.psnr, float(np.mean(drops)))

    def outputs(self, quantisation: Quantisation | None) -> list[Array]:
        """The network's output on each held-out crop, (1, 3, sH, sW)."""
        probe = Probe(san_model(replace(self.spec, quantisation=quantisation), self.weights), ["output"])
        value_range = self.spec.architecture.value_range
        return [probe(network_input(sample.low, value_range))["output"] for sample in self.held_out]

    def y_psnr(self, y: Array, sample: Sample) -> float:
        """Y-PSNR of an output against the crop it should be, dB."""
        arch = self.spec.architecture
        assert sample.high is not None
        return y_psnr(network_output(y, sample.high, arch.value_range), sample.high, arch.scale)


def select_parts(
    parts: Sequence[str],
    kept: Sequence[str],
    measure: Callable[[Sequence[str]], QualityLoss],
    max_drop: float,
    track: Track = untracked,
) -> PartSelection:
    """The most parts whose Y-PSNR drop is within `max_drop` dB, the least sensitive first; `kept` ones stay out.

    Takes one measurement per part, and then logarithmically many.
    """
    candidates = [part for part in parts if part not in kept]
    alone = {part: measure([part]) for part in track(candidates, "Measuring parts")}
    order = sorted(candidates, key=lambda part: -alone[part].psnr)
    count = largest_prefix(len(order), lambda n: measure(order[:n]).y_psnr_drop <= max_drop)
    chosen = order[:count]
    costs = tuple(PartCost(part, alone.get(part), part in chosen) for part in parts)
    return PartSelection(costs, measure(chosen) if chosen else QualityLoss(float("inf"), 0.0))


def largest_prefix(count: int, fits: Callable[[int], bool]) -> int:
    """The largest n up to `count` for which the first n fit, by bisection; 0 always fits."""
    if not count or fits(count):
        return count
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
