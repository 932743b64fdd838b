"""An exported ONNX with parts of it in int8 or fp8, as many as a loss of quality allows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sanrt.errors import ModelError, ParityError, UsageError
from sanrt.export.quantise.calibration import (
    CalibrationSet,
    Method,
    Ranges,
    Track,
    calibrated,
    calibration_set,
    parts,
    untracked,
)
from sanrt.export.quantise.search import Measurements, Plan, of_parts, plan_parts, table_rows
from sanrt.model.graph import Weights, read_model, san_model
from sanrt.model.spec import ModelSpec, Quantisation, QuantisedType
from sanrt.runtime.artifacts.models import read_spec
from sanrt.runtime.artifacts.variants import FOLDER, file_digest
from sanrt.version import __version__

MAX_PSNR_DROP = 0.1
"""dB of Y-PSNR that quantisation may cost, unless said otherwise."""


@dataclass(frozen=True)
class QuantiseOptions:
    """How a model is quantised."""

    type: QuantisedType
    calibration: Path | None = None
    """Folder of high-resolution pictures; None is generated scenes."""
    method: Method = Method.MIN_MAX
    max_psnr_drop: float = MAX_PSNR_DROP
    keep: tuple[str, ...] = ()
    """Patterns of parts that stay as they are, such as `groups.0.*`."""


@dataclass(frozen=True)
class Quantised:
    """What was written, and why so."""

    path: Path
    spec: ModelSpec
    plan: Plan
    pictures: CalibrationSet


def quantised_path(model: Path, kind: QuantisedType) -> Path:
    """Beside the exported model: `san_x4.int8.onnx`."""
    return model.with_name(f"{model.stem}.{kind}.onnx")


def quantise(model: Path, options: QuantiseOptions, track: Track = untracked) -> Quantised:
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
    all_parts = parts(spec)
    kept = kept_parts(all_parts, options.keep)
    pictures = calibration_set(options.calibration, spec.architecture.scale, track)
    identity = [file_digest(model), __version__, pictures.digest]
    ranges = kept_ranges(model, spec, weights, pictures, options.method, identity, track)
    quantisation = Quantisation(options.type, ranges.inputs, ranges.outputs)
    cache = cache_path(model, f"{options.type}-losses", [*identity, json.dumps(ranges.inputs)])
    measure = Measurements(spec, weights, quantisation, pictures.held_out, cache)
    plan = plan_parts(all_parts, kept, measure, options.max_psnr_drop, track)
    if not plan.parts:
        raise nothing_fits(model, options, plan)
    report = {**spec.report, "quantisation": facts(options, pictures, plan)}
    spec = replace(spec, quantisation=of_parts(quantisation, plan.parts), report=report)
    write(path, san_model(spec, weights).SerializeToString())
    return Quantised(path, spec, plan, pictures)


def is_quantised(path: Path) -> bool:
    """Whether a file is what `quantise` writes."""
    try:
        return read_spec(path).quantisation is not None
    except ModelError:
        return False


def kept_parts(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The parts that stay as they are; raises UsageError for a pattern that means none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"{pattern!r}: no such part; expected a name or pattern among {names[0]} .. {names[-1]}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def kept_ranges(
    model: Path,
    spec: ModelSpec,
    weights: Weights,
    pictures: CalibrationSet,
    method: Method,
    identity: Sequence[str],
    track: Track,
) -> Ranges:
    """The convolutions' ranges, from the last time that the same was asked or measured now."""
    path = cache_path(model, f"ranges-{method}", identity)
    try:
        return Ranges(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        ranges = calibrated(spec, weights, pictures.crops, method, track)
        write(path, json.dumps(asdict(ranges)).encode())
        return ranges


def cache_path(model: Path, what: str, identity: Sequence[str]) -> Path:
    """Where something measured is kept: beside the model, under a digest of all that it depends on."""
    tag = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    return model.parent / FOLDER / f"{model.stem}-{what}-{tag}.json"


def nothing_fits(model: Path, options: QuantiseOptions, plan: Plan) -> ParityError:
    """No part is within the budget."""
    measured = [(cost.alone.y_psnr_drop, cost.part) for cost in plan.costs if cost.alone]
    drop, part = min(measured, default=(float("nan"), "none"))
    return ParityError(
        f"{model}: no part can be {options.type} within {options.max_psnr_drop:g} dB of Y-PSNR: the cheapest,"
        f" {part}, costs {drop:.3f} dB; allow more with --max-psnr-drop, or stay with --fp16"
    )


def facts(options: QuantiseOptions, pictures: CalibrationSet, plan: Plan) -> dict[str, Any]:
    """What the metadata keeps, for `sanrt info`."""
    return {
        "type": options.type,
        "calibration": f"{len(pictures.crops)} crops of {pictures.name}, {options.method}",
        "held_out": len(pictures.held_out),
        "max_psnr_drop": options.max_psnr_drop,
        "y_psnr_drop": plan.loss.y_psnr_drop,
        "psnr": plan.loss.psnr,
        "parts": table_rows(plan),
    }


def write(path: Path, content: bytes) -> None:
    """Beside its place, then renamed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error.strerror}); use a writable --models folder") from error
    finally:
        partial.unlink(missing_ok=True)
