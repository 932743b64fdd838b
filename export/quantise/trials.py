"""Models on every backend that can run them here, side by side: quality on held-out crops, and time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sanrt.arrays import Array
from sanrt.errors import SanrtError
from sanrt.export.metrics import y_psnr
from sanrt.export.quantise.calibration import Track, untracked
from sanrt.export.samples import Sample
from sanrt.model.spec import Precision
from sanrt.runtime.artifacts.engines import SUFFIX
from sanrt.runtime.artifacts.models import read_spec
from sanrt.runtime.backends.protocol import Backend, RunOptions
from sanrt.runtime.backends.registry import AUTO_ORDER, BACKENDS, load_unguarded, status
from sanrt.runtime.tiling.upscaling import infer_padded, network_input, network_output

TIMED_SIDE, ROUNDS = 96, 5
"""Side of the timed picture in pixels, and how often each trial is timed; the quickest run counts."""
MIN_GAIN = 1.05
"""8 bits must be this many times as fast to be worth their error; less may be the clock's noise."""


@dataclass(frozen=True)
class BackendTrial:
    """One model on one backend in one precision."""

    model: Path
    backend: str
    precision: Precision | None
    """The precision that was asked for; None where the model's file has settled it."""
    computes: str
    """The types that it really computes in, as text: `fp32`, `int8 + bf16`."""
    y_psnr: float
    """Mean over the held-out crops against their originals, dB."""
    seconds: float
    """The quickest of ROUNDS runs of a TIMED_SIDE x TIMED_SIDE picture; the trials take turns."""

    @property
    def quantised(self) -> bool:
        """Whether it computes in 8 bits."""
        return "8" in self.computes.partition(" ")[0]


@dataclass(frozen=True)
class BackendComparison:
    """The trials, the fastest first, and the reasons for those that were not possible."""

    trials: tuple[BackendTrial, ...]
    untried: Mapping[str, str]
    """The reason by what was not tried, such as `fp16 on openvino` or `tensorrt`."""


def compare_backends(models: Sequence[Path], held_out: Sequence[Sample], track: Track = untracked) -> BackendComparison:
    """Try exported and quantised models on every usable backend in every precision, and engines, in turns."""
    untried = {s.name: s.reason for s in map(status, BACKENDS) if not s.usable}
    with ExitStack() as stack:
        loaded = []
        for model, name, precision in candidates(models):
            try:
                backend = load_unguarded(name, model, RunOptions(precision=precision))
            except SanrtError as error:
                untried.setdefault(candidate_name(model, name, precision), str(error))
                continue
            trial = BackendTrial(model, name, precision, backend.spec.computes, 0.0, np.inf)
            loaded.append((trial, stack.enter_context(backend)))
        scored = [
            (replace(trial, y_psnr=mean_y_psnr(backend, held_out)), backend)
            for trial, backend in track(loaded, "Comparing quality")
        ]
        done = [trial for trial, _ in scored]
        x = np.random.default_rng(0).uniform(0, 1, (1, 3, TIMED_SIDE, TIMED_SIDE)).astype(np.float32)
        for _ in track(range(ROUNDS), "Timing"):
            done = [
                replace(trial, seconds=min(trial.seconds, run_seconds(backend, x)))
                for trial, (_, backend) in zip(done, scored, strict=True)
            ]
    return BackendComparison(tuple(sorted(done, key=lambda trial: trial.seconds)), untried)


def candidates(models: Sequence[Path]) -> list[tuple[Path, str, Precision | None]]:
    """Model, backend and precision of every trial: all precisions of the usable backends; an engine has settled its own."""
    usable = [name for name in AUTO_ORDER if status(name).usable]
    engines = [(path, "tensorrt", None) for path in models if path.suffix == SUFFIX and "tensorrt" in usable]
    graphs = [path for path in models if path.suffix != SUFFIX]
    others = [name for name in usable if name != "tensorrt"]
    return [*engines, *((path, name, precision) for path in graphs for name in others for precision in Precision)]


def candidate_name(model: Path, backend: str, precision: Precision | None) -> str:
    """How a trial that was not possible is called: by its precision, or in fp32 by the 8-bit type of a quantised model."""
    if precision is None:
        return model.name
    quantised = read_spec(model).quantisation
    return f"{quantised.type if quantised and precision == Precision.FP32 else precision} on {backend}"


def mean_y_psnr(backend: Backend, held_out: Sequence[Sample]) -> float:
    """Mean Y-PSNR of a backend's results on the crops, dB."""
    arch = backend.spec.architecture
    scores = []
    for sample in held_out:
        assert sample.high is not None
        y = infer_padded(backend, network_input(sample.low, arch.value_range))
        scores.append(y_psnr(network_output(y, sample.high, arch.value_range), sample.high, arch.scale))
    return float(np.mean(scores))


def run_seconds(backend: Backend, x: Array) -> float:
    """Wall time of one run on (1, 3, H, W)."""
    started = time.perf_counter()
    backend.infer(x)
    return time.perf_counter() - started


def fp32_y_psnr(trials: Sequence[BackendTrial]) -> float:
    """Y-PSNR of the fp32 model in fp32, which all drops are counted from; dB."""
    return max(trial.y_psnr for trial in trials if trial.computes == Precision.FP32)


def fastest(trials: Sequence[BackendTrial], max_drop: float) -> BackendTrial:
    """The quickest trial at most `max_drop` dB of Y-PSNR below fp32; 8 bits only where they gain MIN_GAIN."""
    floor = fp32_y_psnr(trials) - max_drop
    return min((t for t in trials if t.y_psnr >= floor), key=lambda t: t.seconds * (MIN_GAIN if t.quantised else 1))
