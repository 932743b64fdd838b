"""`sanrt build --auto`: quantised models and engines of every type, made ready to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sanrt.errors import ParityError, SanrtError
from sanrt.export.engine import BuildProgress, build_engine, choose_flavor
from sanrt.export.quantise.calibration import Track, untracked
from sanrt.export.quantise.model import QuantisedModel, QuantiseOptions, quantise
from sanrt.model.spec import GRAPH_PRECISIONS, Precision, QuantisedType
from sanrt.runtime.artifacts.engines import BuildOptions
from sanrt.runtime.artifacts.models import read_spec
from sanrt.runtime.artifacts.sizes import default_profile
from sanrt.runtime.backends.registry import status

ONLY_ENGINES = "only TensorRT computes in it, and that does not run here"


@dataclass(frozen=True)
class QuantisedModels:
    """A model in every 8-bit type that was possible, and the reasons for the others."""

    models: tuple[QuantisedModel, ...]
    untried: dict[str, str]
    """The reason by the type that was not made."""


def quantise_every_type(model: Path, options: QuantiseOptions, track: Track = untracked) -> QuantisedModels:
    """The model in every 8-bit type that something here computes in, within the budget."""
    models, untried = [], {}
    for kind in QuantisedType:
        if kind == QuantisedType.FP8 and not status("tensorrt").usable:
            untried[str(kind)] = ONLY_ENGINES
            continue
        try:
            models.append(quantise(model, replace(options, type=kind), track))
        except ParityError as error:
            untried[str(kind)] = str(error)
    return QuantisedModels(tuple(models), untried)


def build_every_engine(model: Path, quantised: Sequence[Path], progress: BuildProgress) -> dict[str, str]:
    """Build an engine of every type beside the models, where TensorRT runs; returns the reasons for those that failed."""
    if not status("tensorrt").usable:
        return {}
    unbuilt = {}
    for path, precision in [*((model, p) for p in GRAPH_PRECISIONS), *((path, Precision.FP16) for path in quantised)]:
        try:
            profile = default_profile(replace(read_spec(path), precision=precision))
            build_engine(path, BuildOptions(choose_flavor(), precision, (profile,)), None, progress)
        except SanrtError as error:
            unbuilt[f"{precision} engine of {path.name}"] = str(error)
    return unbuilt
