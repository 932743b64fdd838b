"""Models side by side on every backend that can run them here: quality on held-out crops, and time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sanrt.errors import SanrtError
from sanrt.export.metrics import y_psnr
from sanrt.export.quantise.calibration import Track, untracked
from sanrt.export.samples import Sample
from sanrt.model.spec import Precision
from sanrt.runtime.artifacts.engines import SUFFIX
from sanrt.runtime.artifacts.models import read_spec
from sanrt.runtime.backends.protocol import Backend, RunOptions
from sanrt.runtime.backends.registry import AUTO_ORDER, BACKENDS, load_backend, status
from sanrt.runtime.tiling.upscaling import infer_padded, network_input, network_output

TIMED_SIDE, ROUNDS = 96, 5
MIN_GAIN = 1.05
"""8 bits must be so many times as fast to be worth their error, and not to be the noise of the clock."""


@dataclass(frozen=True)
class Trial:
    """One model on one backend in one precision."""

    model: Path
    backend: str
    precision: Precision | None
    """As asked for; None where the model's file has settled it."""
    computes: str
    """For people: `fp32`, `int8 + bf16`."""
    y_psnr: float
    """Against the held-out crops' originals, on average, dB."""
    seconds: float
    """The quickest of ROUNDS runs, which took turns with the other trials', of a TIMED_SIDE x TIMED_SIDE picture."""

    @property
    def quantised(self) -> bool:
        """Whether it computes in 8 bits."""
        return "8" in self.computes.partition(" ")[0]


@dataclass(frozen=True)
class Comparison:
    """What was compared, the fastest first, and what was not: `fp16 on openvino`, `tensorrt` -> the reason."""

    trials: tuple[Trial, ...]
    untried: Mapping[str, str]


def compared(models: Sequence[Path], held_out: Sequence[Sample], track: Track = untracked) -> Comparison:
    """Exported and quantised models on every usable backend in every precision, and engines; all in turns."""
    untried = {s.name: s.reason for s in map(status, BACKENDS) if not s.usable}
    with ExitStack() as stack:
        loaded = []
        for model, name, precision in ways(models):
            try:
                backend = load_backend(name, model, RunOptions(precision=precision))
            except SanrtError as error:
                untried.setdefault(way_name(model, name, precision), str(error))
                continue
            trial = Trial(model, name, precision, backend.spec.computes, 0.0, np.inf)
            loaded.append((trial, stack.enter_context(backend)))
        scored = [
            (replace(trial, y_psnr=quality(backend, held_out)), backend)
            for trial, backend in track(loaded, "Comparing quality")
        ]
        done = [trial for trial, _ in scored]
        x = np.random.default_rng(0).uniform(0, 1, (1, 3, TIMED_SIDE, TIMED_SIDE)).astype(np.float32)
        for _ in track(range(ROUNDS), "Timing"):
            done = [
                replace(trial, seconds=min(trial.seconds, seconds(backend, x)))
                for trial, (_, backend) in zip(done, scored, strict=True)
            ]
    return Comparison(tuple(sorted(done, key=lambda trial: trial.seconds)), untried)


def ways(models: Sequence[Path]) -> list[tuple[Path, str, Precision | None]]:
    """Every model on the backends that are usable here, each in every precision; an engine has settled its own."""
    usable = [name for name in AUTO_ORDER if status(name).usable]
    engines = [(path, "tensorrt", None) for path in models if path.suffix == SUFFIX and "tensorrt" in usable]
    graphs = [path for path in models if path.suffix != SUFFIX]
    others = [name for name in usable if name != "tensorrt"]
    return [*engines, *((path, name, precision) for path in graphs for name in others for precision in Precision)]


def way_name(model: Path, backend: str, precision: Precision | None) -> str:
    """For people; a quantised model's is its 8-bit type's where it is not the rest's precision that is refused."""
    if precision is None:
        return model.name
    quantised = read_spec(model).quantisation
    return f"{quantised.type if quantised and precision == Precision.FP32 else precision} on {backend}"


def quality(backend: Backend, held_out: Sequence[Sample]) -> float:
    """Mean Y-PSNR of the crops, dB."""
    return float(np.mean([score(backend, sample) for sample in held_out]))


def score(backend: Backend, sample: Sample) -> float:
    """Y-PSNR of one crop, dB."""
    arch = backend.spec.architecture
    assert sample.high is not None
    y = infer_padded(backend, network_input(sample.low, arch.value_range))
    return y_psnr(network_output(y, sample.high, arch.value_range), sample.high, arch.scale)


def seconds(backend: Backend, x: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
    """Wall time of one run."""
    started = time.perf_counter()
    backend.infer(x)
    return time.perf_counter() - started


def reference_quality(found: Sequence[Trial]) -> float:
    """Y-PSNR of the fp32 model in fp32, which all drops are counted from."""
    return max(trial.y_psnr for trial in found if trial.computes == Precision.FP32)


def fastest(found: Sequence[Trial], max_drop: float) -> Trial:
    """The quickest at most `max_drop` dB of Y-PSNR below fp32; 8 bits only where they gain MIN_GAIN."""
    floor = reference_quality(found) - max_drop
    return min((t for t in found if t.y_psnr >= floor), key=lambda t: t.seconds * (MIN_GAIN if t.quantised else 1))
