"""The quantised model: an exported ONNX with parts of it in int8 or fp8, as many as a loss of quality allows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sanrt.errors import ModelError, ParityError, UsageError
from sanrt.export.quantise.calibration import (
    CalibrationSet,
    RangeMethod,
    TensorRanges,
    Track,
    calibration_set,
    measure_ranges,
    untracked,
)
from sanrt.export.quantise.parts import matching_parts, quantisable_parts, restricted_to
from sanrt.export.quantise.search import LossMeasurements, PartSelection, select_parts
from sanrt.files import require_writable, write_whole
from sanrt.model.exported import read_model
from sanrt.model.graph import san_model
from sanrt.model.spec import ModelSpec, Quantisation, QuantisedType
from sanrt.runtime.artifacts.models import read_spec
from sanrt.runtime.artifacts.variants import cache_folders, cache_name, cached_for

CODE = ("sanrt.model", "sanrt.export")
"""The packages that decide what is measured."""


@dataclass(frozen=True)
class QuantiseOptions:
    """How a model is quantised."""

    type: QuantisedType
    calibration: Path | None = None
    """Folder of high-resolution pictures; None stands for generated scenes."""
    method: RangeMethod = RangeMethod.MIN_MAX
    """How the range of a tensor follows from the magnitudes seen."""
    max_psnr_drop: float = 0.1
    """Most dB of Y-PSNR that quantisation may cost."""
    keep: tuple[str, ...] = ()
    """Patterns of parts that stay as they are, such as `groups.0.*`."""


@dataclass(frozen=True)
class QuantisedModel:
    """A quantised model's file, and the measurements that decided its parts."""

    path: Path
    spec: ModelSpec
    selection: PartSelection
    pictures: CalibrationSet


def quantised_path(model: Path, kind: QuantisedType) -> Path:
    """Where the quantised form of a model lies: beside it, as `san_x4.int8.onnx`."""
    return model.with_name(f"{model.stem}.{kind}.onnx")


def quantise(model: Path, options: QuantiseOptions, track: Track = untracked) -> QuantisedModel:
    """Calibrate, measure every part, and write the ONNX with the most parts in 8 bits that the budget allows.

    What was measured is kept beside the model, by digest of all that it depends on. Raises ParityError, and writes
    nothing, when no part can be quantised within the budget.
    """
    spec, weights = read_model(model)
    if spec.quantisation:
        raise UsageError(f"{model}: is {spec.quantisation.type} already; name the fp32 model it was made of")
    path = quantised_path(model, options.type)
    if path.exists() and not is_quantised(path):
        raise ModelError(f"{path}: is in the way and would be lost: no quantised model; move it, or name {model.name} anew")
    require_writable(path, f"copy {model.name} to a folder of your own")
    parts = quantisable_parts(spec.architecture)
    kept = matching_parts(parts, options.keep)
    pictures = calibration_set(options.calibration, spec.architecture.scale, track)

    def ranges_json() -> bytes:
        return json.dumps(asdict(measure_ranges(spec, weights, pictures.crops, options.method, track))).encode()

    what, identity = f"ranges-{options.method}.json", [pictures.digest]
    ranges = TensorRanges(**json.loads(cached_for(model, what, identity, CODE, ranges_json)))
    quantisation = Quantisation(options.type, ranges.inputs, ranges.outputs)
    losses = cache_name(model, f"losses-{options.type}.json", [*identity, json.dumps(ranges.inputs)], CODE)
    measure = LossMeasurements(spec, weights, quantisation, pictures.held_out, (cache_folders(model), losses))
    selection = select_parts(parts, kept, measure, options.max_psnr_drop, track)
    if not selection.parts:
        raise nothing_fits(model, options, selection)
    report = {**spec.report, "quantisation": quantisation_report(options, pictures, selection)}
    quantised = replace(spec, quantisation=restricted_to(quantisation, selection.parts), report=report)
    write_whole(path, san_model(quantised, weights).SerializeToString())
    return QuantisedModel(path, quantised, selection, pictures)


def is_quantised(path: Path) -> bool:
    """Whether a file is one that `quantise` writes."""
    try:
        return read_spec(path).quantisation is not None
    except ModelError:
        return False


def nothing_fits(model: Path, options: QuantiseOptions, selection: PartSelection) -> ParityError:
    """The error for a model no part of which is within the budget."""
    measured = [(cost.alone.y_psnr_drop, cost.part) for cost in selection.costs if cost.alone]
    drop, part = min(measured, default=(float("nan"), "none"))
    return ParityError(
        f"{model}: no part can be {options.type} within {options.max_psnr_drop:g} dB of Y-PSNR: the cheapest,"
        f" {part}, costs {drop:.3f} dB; allow more with --max-psnr-drop, or stay with --fp16"
    )


def quantisation_report(options: QuantiseOptions, pictures: CalibrationSet, selection: PartSelection) -> dict[str, Any]:
    """The measurements that the model's metadata keeps, which `sanrt info` shows."""
    return {
        "type": options.type,
        "calibration": f"{len(pictures.crops)} crops of {pictures.name}, {options.method}",
        "held_out": len(pictures.held_out),
        "max_psnr_drop": options.max_psnr_drop,
        "y_psnr_drop": selection.loss.y_psnr_drop,
        "psnr": selection.loss.psnr,
        "parts": selection.to_json(),
    }
