"""The quality and the speed of every precision: `python benchmarks/precision.py MODEL --set DIR`, MODEL being an export.

Y-PSNR on test sets by the papers' protocol against the fp32 graph's, and time on the CPU, everything in turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is its own folder, not the repository

from benchmarks.measure import run_command
from sanrt.arrays import Array
from sanrt.errors import BackendError
from sanrt.export.metrics import y_psnr
from sanrt.export.parity import compare, worst
from sanrt.export.quantise.calibration import calibration_set
from sanrt.export.samples import Sample, samples
from sanrt.export.tensors import Probe
from sanrt.model.exported import read_model
from sanrt.model.graph import san_model
from sanrt.model.spec import GraphOptions, ModelSpec, Precision
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_unguarded
from sanrt.runtime.tiling.upscaling import network_input, network_output

TIMED = (1, 3, 128, 128)
TIMED_BACKENDS = (
    *((name, Precision.FP32) for name in ("openvino", "onnxruntime", "native")),
    ("native", Precision.INT16),
)
"""Shape of the timed input, and the backends that are timed with their precisions."""
ROUNDS = 7
"""Turns of every backend; the least processor time counts."""


@dataclass(frozen=True)
class Variant:
    """The network in one precision, as a function (1, 3, H, W) -> (1, 3, sH, sW)."""

    name: str
    infer: Callable[[Array], Array]


def precision(
    model: Annotated[Path, typer.Argument(help="An exported fp32 ONNX; its .int8.onnx beside it is measured too.")],
    set_: Annotated[list[Path], typer.Option("--set", help="Folder that holds HR/ and LR/; repeatable.")],
    calibration: Annotated[Path, typer.Option(help="Pictures to calibrate the naive quantisation with.")],
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure every precision that this machine can compute, and naive int8 of the whole network beside them."""
    spec, _ = read_model(model)
    with TemporaryDirectory() as folder:
        measured = list(variants(model, spec, calibration, Path(folder), threads))
        reference, others = measured[0], measured[1:]
        table = Table(
            "variant",
            *(set_name(s) for s in set_),
            "max",
            "mean",
            title="Change of Y-PSNR, dB; difference from fp32, of 255",
        )
        pictures = [list(samples(s / "LR", s / "HR", spec.architecture.scale)) for s in set_]
        expected = [[scored(reference, sample, spec) for sample in each] for each in track(pictures, "fp32")]
        for variant in track(others, "Quality"):
            table.add_row(variant.name, *row(variant, pictures, expected, spec))
        Console().print(table)
    Console().print(timed(model, threads))


def set_name(folder: Path) -> str:
    """The name of a test set, which is usually kept as NAME/SCALE."""
    return folder.resolve().parts[-2]


def variants(model: Path, spec: ModelSpec, calibration: Path, folder: Path, threads: int) -> Iterator[Variant]:
    """The variants, fp32 first: engines' typed graphs by ONNX Runtime, other backends' own types, int8 of all kinds."""
    _, weights = read_model(model)
    yield Variant("fp32", probe(san_model(spec, weights)))
    yield Variant("fp16", probe(san_model(spec, weights, GraphOptions(precision=Precision.FP16))))
    yield Variant("bf16", probe(san_model(spec, weights, GraphOptions(precision=Precision.BF16))))
    yield Variant("bf16, openvino", load_unguarded("openvino", model, RunOptions(threads, Precision.BF16)).infer)
    with suppress(BackendError):
        yield Variant("int16, native", load_unguarded("native", model, RunOptions(threads, Precision.INT16)).infer)
    int8 = model.with_name(f"{model.stem}.int8.onnx")
    if int8.exists():
        quantised, its_weights = read_model(int8)
        yield Variant("int8, budget", probe(san_model(quantised, its_weights)))
        half = san_model(quantised, its_weights, GraphOptions(precision=Precision.FP16))
        yield Variant("int8, budget, rest fp16", probe(half))
        yield Variant("int8, budget, onnxruntime", load_unguarded("onnxruntime", int8, RunOptions(threads)).infer)
    yield Variant("int8, whole network", naive(model, calibration, folder / "naive.onnx", spec))


def probe(graph: onnx.ModelProto) -> Callable[[Array], Array]:
    """A graph as a function."""
    session = Probe(graph, ["output"])
    return lambda x: session(x)["output"]


def naive(model: Path, calibration: Path, path: Path, spec: ModelSpec) -> Callable[[Array], Array]:
    """Static quantisation of every convolution and product by onnxruntime, its options as they come: per tensor, min-max."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    crops = calibration_set(calibration, spec.architecture.scale).crops

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Gives onnxruntime's calibration the crops that sanrt calibrates with."""

        def __init__(self) -> None:
            self.inputs = iter([network_input(crop.low, spec.architecture.value_range) for crop in crops])

        def get_next(self) -> dict[str, Any] | None:
            x = next(self.inputs, None)
            return None if x is None else {"input": x}

    quantize_static(model, path, Reader(), op_types_to_quantize=["Conv", "MatMul"])
    return probe(onnx.load(path))


def scored(variant: Variant, sample: Sample, spec: ModelSpec) -> tuple[float, Array]:
    """Y-PSNR of one picture, and the output."""
    arch = spec.architecture
    assert sample.high is not None
    y = variant.infer(network_input(sample.low, arch.value_range))
    return y_psnr(network_output(y, sample.high, arch.value_range), sample.high, arch.scale), y


def row(
    variant: Variant, pictures: list[list[Sample]], expected: list[list[tuple[float, Array]]], spec: ModelSpec
) -> Iterator[str]:
    """Mean change on each set, then the largest difference and the largest mean difference of any picture."""
    differences = []
    for each, wanted in zip(pictures, expected, strict=True):
        changes = []
        for sample, (psnr, y) in zip(each, wanted, strict=True):
            found, output = scored(variant, sample, spec)
            changes.append(found - psnr)
            differences.append(compare(y, output, spec.architecture.value_range))
        yield f"{np.mean(changes):+.4f}"
    yield from (f"{value:.3g}" for value in (worst(differences).max_abs, worst(differences).mean_abs))


def timed(model: Path, threads: int) -> Table:
    """Everything that runs on the CPU, in turns: the least processor time of ROUNDS runs (others do not lengthen it)."""
    int8 = model.with_name(f"{model.stem}.int8.onnx")
    loaded = {}
    for path, (name, precision) in product(filter(Path.exists, (model, int8)), TIMED_BACKENDS):
        with suppress(BackendError):
            loaded[path.name, f"{name}, {precision}"] = load_unguarded(name, path, RunOptions(threads, precision))
    x = np.random.default_rng(0).uniform(0, 255, TIMED).astype(np.float32)
    least = dict.fromkeys(loaded, float("inf"))
    for _ in track(range(ROUNDS + 1), "Timing"):
        for key, backend in loaded.items():
            start = time.process_time()
            backend.infer(x)
            least[key] = min(least[key], time.process_time() - start)
    best = min(
        seconds for (file, variant), seconds in least.items() if file == model.name and variant.endswith(Precision.FP32)
    )
    size = f"{TIMED[3]} x {TIMED[2]}"
    table = Table(
        "model", "backend", "ms", "speed", title=f"{size}, {threads} threads: processor time; speed over the best fp32"
    )
    for (file, backend_name), seconds in least.items():
        table.add_row(file, backend_name, f"{1e3 * seconds:.0f}", f"{best / seconds:.2f}")
    return table


if __name__ == "__main__":
    run_command("precision", precision)
