"""Where `validate`'s tolerances come from: `python benchmarks/tolerances.py MODEL... --pictures DIR`.

Every precision that this machine computes or emulates (8 bits where `sanrt build --int8` and `--fp8` have left models beside
MODEL), held against PyTorch on pictures that are no test set. The rule: margins times the worst (largest difference on any
picture; the largest mean drop of Y-PSNR of any model and backend), rounded up to 1, 2 or 5 times a power of ten; and the
lowest PSNR to PyTorch on any picture less the drop's margin, rounded down to 5 dB.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is its own folder, not the repository

from benchmarks.measure import run_command
from sanrt.arrays import Array
from sanrt.errors import BackendError, SanrtError
from sanrt.export.parity import TOLERANCES, Tolerance, worst
from sanrt.export.quantise.calibration import evenly_spread
from sanrt.export.quantise.model import quantised_path
from sanrt.export.samples import Sample, degraded, pictures_in, read_rgb
from sanrt.export.tensors import Probe
from sanrt.export.validate import picture_result, reference_network, reference_output, source_checkpoint
from sanrt.model.exported import read_model
from sanrt.model.graph import san_model
from sanrt.model.spec import GraphOptions, ModelSpec, Precision, QuantisedType
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_unguarded
from sanrt.runtime.tiling.upscaling import network_input

DIFFERENCE_MARGIN, DROP_MARGIN = 4.0, 2.0
"""Factors for weights and pictures that were not measured; the largest of all differences varies more than a mean."""
PSNR_STEP = 5.0
"""dB to which a PSNR is rounded down."""
LEAST = 0.001
"""dB, and of 255: nobody sees less."""
CPU_BACKENDS = ("onnxruntime", "openvino")
"""Backends that run the graph; sanrt's own kernels have to keep within the same, but for int16, which only they have."""

Kind = Precision | QuantisedType
Infer = Callable[[Array], Array]


def tolerances(
    models: Annotated[list[Path], typer.Argument(help="Exported fp32 ONNX files, of the bundled weights.")],
    pictures: Annotated[Path, typer.Option(help="High-resolution pictures to measure on.")],
    count: Annotated[int, typer.Option(help="Pictures, evenly spread over the folder.")] = 12,
) -> None:
    """Print what the rule gives for every type beside what the code has; exit 1 where they differ."""
    measured: dict[Kind, list[tuple[float, float, float]]] = defaultdict(list)
    paths = evenly_spread(pictures_in(pictures), count)
    for model in models:
        spec, _ = read_model(model)
        net = reference_network(source_checkpoint(spec, model, None), spec)
        samples = [degraded(path.name, read_rgb(path), spec.architecture.scale) for path in paths]
        outputs = {sample.name: reference_output(net, spec, input_of(sample, spec)) for sample in track(samples, "PyTorch")}
        for kind, infer in types_run_here(model):
            results = [
                picture_result(s, partial(recalled, outputs[s.name]), infer, spec, kind, TOLERANCES[kind])
                for s in track(samples, f"{model.name} {kind}")
            ]
            drop = sum(r.y_psnr_drop or 0.0 for r in results) / len(results)
            worst_of = worst(r.difference for r in results)
            measured[kind].append((worst_of.max_abs, -worst_of.psnr, drop))
    largest = {kind: tuple(map(max, zip(*figures, strict=True))) for kind, figures in measured.items()}
    ruled = {kind: by_the_rule(difference, -negative, drop) for kind, (difference, negative, drop) in largest.items()}
    table = Table("type", "largest difference", "PSNR, dB", "drop of Y-PSNR, dB", "by the rule", "in the code")
    for kind, (difference, negative, drop) in largest.items():
        figures = f"{difference:.3g}", f"{-negative:.1f}", f"{drop:.4f}"
        table.add_row(str(kind), *figures, text(ruled[kind]), text(TOLERANCES[kind]))
    Console().print(table)
    if any(TOLERANCES[kind] != tolerance for kind, tolerance in ruled.items()):
        raise SanrtError("the table in export/parity.py is not what the rule gives; expected the same")


def input_of(sample: Sample, spec: ModelSpec) -> Array:
    """The network's input for a sample."""
    return network_input(sample.low, spec.architecture.value_range)


def recalled(output: Array, _: Array) -> Array:
    """The reference's output, computed before."""
    return output


def by_the_rule(difference: float, psnr: float, drop: float) -> Tolerance:
    """The tolerance for what was measured of a type."""
    lowest = (psnr - 20 * math.log10(DROP_MARGIN)) // PSNR_STEP * PSNR_STEP
    return Tolerance(round_up(DIFFERENCE_MARGIN * difference), lowest, round_up(DROP_MARGIN * drop))


def round_up(value: float) -> float:
    """A value rounded up to 1, 2 or 5 times a power of ten; LEAST or more."""
    value = max(LEAST, value)
    power = math.floor(math.log10(value))
    return next(f for f in (float(f"{digit}e{power}") for digit in (1, 2, 5, 10)) if value <= f)


def text(tolerance: Tolerance) -> str:
    """All figures."""
    return f"{tolerance.max_abs:g}, {tolerance.min_psnr:g} dB, {tolerance.y_psnr_drop:g} dB"


def types_run_here(model: Path) -> Iterator[tuple[Kind, Infer]]:
    """Each type with everything here that computes in it; engines' typed graphs are run or emulated by ONNX Runtime."""
    spec, weights = read_model(model)
    for precision in (Precision.FP16, Precision.BF16):
        yield precision, typed(spec, weights, precision)
    for precision in (Precision.FP32, Precision.BF16):
        yield from runnable(model, precision, precision)
    yield from runnable(model, Precision.INT16, Precision.INT16, ("native",))
    for kind in QuantisedType:
        if (quantised := quantised_path(model, kind)).exists():
            yield from runnable(quantised, Precision.FP32, kind)


def typed(spec: ModelSpec, weights: dict[str, Array], precision: Precision) -> Infer:
    """The graph of an engine."""
    session = Probe(san_model(spec, weights, GraphOptions(precision=precision)), ["output"])
    return lambda x: session(x)["output"]


def runnable(
    model: Path, precision: Precision, kind: Kind, backends: tuple[str, ...] = CPU_BACKENDS
) -> Iterator[tuple[Kind, Infer]]:
    """The CPU backends that run a model in a precision."""
    for name in backends:
        with suppress(BackendError):
            yield kind, load_unguarded(name, model, RunOptions(precision=precision)).infer


if __name__ == "__main__":
    run_command("tolerances", tolerances)
