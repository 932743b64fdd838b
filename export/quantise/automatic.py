"""`sanrt build --auto`: what this machine could run, made ready to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sanrt.errors import ParityError, SanrtError
from sanrt.export.engine import Progress, build_engine, choose_flavor
from sanrt.export.quantise.calibration import Track, untracked
from sanrt.export.quantise.quantised import Quantised, QuantiseOptions, quantise
from sanrt.model.spec import GRAPH_PRECISIONS, Precision, QuantisedType
from sanrt.runtime.artifacts.engines import BuildOptions
from sanrt.runtime.backends.registry import status

ONLY_ENGINES = "only TensorRT computes in it, and that does not run here"


@dataclass(frozen=True)
class Prepared:
    """Quantised models, and what was not made -> why not. Engines lie beside the models."""

    quantised: tuple[Quantised, ...]
    untried: dict[str, str]


def quantised_kinds(model: Path, options: QuantiseOptions, track: Track = untracked) -> Prepared:
    """The model in every 8-bit type that something here computes in, within the budget."""
    made, untried = [], {}
    for kind in QuantisedType:
        if kind == QuantisedType.FP8 and not status("tensorrt").usable:
            untried[str(kind)] = ONLY_ENGINES
            continue
        try:
            made.append(quantise(model, replace(options, type=kind), track))
        except ParityError as error:
            untried[str(kind)] = str(error)
    return Prepared(tuple(made), untried)


def engines(model: Path, quantised: Sequence[Path], progress: Progress) -> dict[str, str]:
    """Build an engine of every type beside the models, where TensorRT runs; what cannot be built -> why not."""
    if not status("tensorrt").usable:
        return {}
    untried = {}
    for path, precision in [*((model, p) for p in GRAPH_PRECISIONS), *((path, Precision.FP16) for path in quantised)]:
        try:
            build_engine(path, BuildOptions(choose_flavor(), precision), None, progress)
        except SanrtError as error:
            untried[f"{precision} engine of {path.name}"] = str(error)
    return untried
