"""Backends: independent ways to run one exported model, chosen by name or by `auto`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from sanrt.errors import BackendError, ModelError, UsageError
from sanrt.model.spec import ModelSpec, Precision
from sanrt.runtime.engines import STAGES_SUFFIX, SUFFIX, Limits, engines_of
from sanrt.runtime.featuremaps import DeviceMaps
from sanrt.runtime.models import read_spec

log = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]


class Stages(Protocol):
    """A network in the stages of `sanrt.model.graph.stage_model`, each run as often as there are tiles."""

    @property
    def maps(self) -> DeviceMaps | None:
        """Where the stages run on a GPU and their feature maps can stay there."""
        ...

    def run(self, stage: str, *inputs: Any) -> list[Any]:
        """Outputs of a stage, arrays (the first one of STAGE_MAPS is a part of `maps`); raises as `Backend.infer` does."""
        ...


class Backend(Protocol):
    """One loaded model, ready to run; a context manager."""

    name: str
    """As in `--backend`."""
    device: str
    """What it runs on, for people: `CPU`, `NVIDIA H100`."""
    spec: ModelSpec
    """Of the loaded model, its precision as it runs here."""

    @property
    def streams(self) -> bool:
        """Whether it has stages, for exact streaming."""
        ...

    @property
    def memory(self) -> int | None:
        """Bytes of a GPU's own memory that were free when the model was loaded; None where it runs in the host's."""
        ...

    @property
    def engine_digest(self) -> str | None:
        """SHA-256 of the TensorRT engine that runs; None where none does."""
        ...

    @property
    def limits(self) -> Limits:
        """The sizes that `infer` and the stages take."""
        ...

    def infer(self, pictures: Array) -> Array:
        """float32 (B, 3, H, W), 0..value_range -> float32 (B, 3, sH, sW), not clipped; sides at least spec.min_side.

        Raises OutOfMemoryError when memory does not suffice, BackendError for anything else.
        """
        ...

    @property
    def infer_with_regions(self) -> Callable[[Array, int], Array] | None:
        """For k x k attention regions: `infer` calls it with its spec's. None where the model was loaded for those alone."""
        ...

    def stages(self) -> Stages:
        """The network stage by stage, for exact streaming; raises BackendError where the backend has none."""
        ...

    def close(self) -> None:
        """Free everything; the backend is of no use afterwards."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here; a row of `sanrt doctor`."""

    name: str
    version: str | None
    """Of the library behind it; None when it is not installed."""
    usable: bool
    reason: str
    """Why not, or what it would run on."""
    remedy: str = ""
    """The command that makes it usable, where there is one."""
    automatic: bool = True
    """Whether `auto` takes it here when it is usable."""


@dataclass(frozen=True)
class RunOptions:
    """How a model is loaded; the same for every backend."""

    threads: int | None = None
    """CPU threads; None is one per core."""
    precision: Precision | None = None
    """Of convolutions and attention; None is the backend's own choice, told by its `spec.precision`."""
    regions: int = 2
    """k of the k x k attention regions."""
    device: int = 0
    """Index of the GPU, where there are several."""


BACKENDS = {
    "torch": "sanrt.runtime.backends.torch",
    "torch-cuda": "sanrt.runtime.backends.torch_cuda",
    "onnxruntime": "sanrt.runtime.backends.onnxruntime",
    "onnxruntime-cuda": "sanrt.runtime.backends.onnxruntime_cuda",
    "openvino": "sanrt.runtime.backends.openvino",
    "native": "sanrt.runtime.backends.native",
    "tensorrt": "sanrt.runtime.backends.tensorrt",
}
"""Every backend's module; each has `status() -> BackendStatus` and `load(model: Path, options: RunOptions) -> Backend`."""

ALIASES = {"winograd": "native"}
"""Earlier names, as records, preferences and scripts may have them."""

CHECKPOINT_BACKENDS = ("torch-cuda", "torch")
"""Those that load checkpoints too; the others load exported models only."""

EIGHT_BIT_BACKENDS = ("tensorrt", "onnxruntime-cuda", "openvino", "onnxruntime")
"""Those that run models with convolutions in 8 bits."""

AUTO_ORDER = ("tensorrt", "torch-cuda", "onnxruntime-cuda", "openvino", "native", "onnxruntime", "torch")
"""The order in which `auto` looks for a usable backend."""

OPEN_STAGES = 4
"""Stages to keep open: the widest pass over a picture takes turns between so many (head, keys and values, attention)."""


def status(name: str) -> BackendStatus:
    """Whether a backend can run here; raises BackendError for a name that is none."""
    return backend_module(name).status()  # type: ignore[no-any-return]


def load_backend(name: str, model: Path, options: RunOptions) -> Backend:
    """Load a model with the named backend, or with the first usable one for `auto`; never another than asked for."""
    if model.suffix == STAGES_SUFFIX:
        raise UsageError(f"{model}: stage engines run beside a whole one; name its {SUFFIX}, or the ONNX of both")
    if name in ALIASES:
        log.warning("backend %s is called %s now", name, ALIASES[name])
        name = ALIASES[name]
    names = candidates(model, options) if name == "auto" else (name,)
    chosen = automatic_choice(names) if name == "auto" else status(name)
    if chosen is None:
        reasons = "; ".join(f"{s.name}: {s.reason}, {s.remedy}".rstrip(", ") for s in map(status, names))
        raise BackendError(f"no backend can run {model} here ({reasons})")
    if not chosen.usable:
        remedy = f"; to fix it: {chosen.remedy}" if chosen.remedy else ""
        usable = ", ".join(s.name for s in map(status, BACKENDS) if s.usable) or "none"
        raise BackendError(f"backend {name} is not usable here: {chosen.reason}{remedy} (usable: {usable})")
    load: Callable[[Path, RunOptions], Backend] = backend_module(chosen.name).load
    return load(model, options)


def candidates(model: Path, options: RunOptions) -> tuple[str, ...]:
    """What `auto` may choose for a model: only TensorRT runs engines, and it runs a model only by an engine that fits."""
    if model.suffix == SUFFIX:
        return ("tensorrt",)
    if model.suffix != ".onnx":
        return CHECKPOINT_BACKENDS
    names = EIGHT_BIT_BACKENDS if computes_in_8_bits(model) else AUTO_ORDER
    return tuple(name for name in names if name != "tensorrt" or engine_fits(model, options))


def computes_in_8_bits(model: Path) -> bool:
    """Whether an exported model has convolutions in 8 bits; one that cannot be read is told when it is loaded."""
    try:
        return read_spec(model).quantisation is not None
    except ModelError:
        return False


def engine_fits(model: Path, options: RunOptions) -> bool:
    """Whether a model has engines, and one of them runs here (unknown without TensorRT and a GPU); why not is logged."""
    if not engines_of(model):
        return False
    refusal = backend_module("tensorrt").refusal(model, options) if status("tensorrt").usable else None
    if refusal:
        log.warning("tensorrt passed over: %s", refusal)
    return refusal is None


def automatic_choice(names: Iterable[str]) -> BackendStatus | None:
    """The first of these backends that `auto` may take here."""
    return next((s for s in map(status, names) if s.usable and s.automatic), None)


def library_version(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for distribution in distributions:
        with suppress(PackageNotFoundError):
            return version(distribution)
    return None


def require_precision(name: str, options: RunOptions, *known: Precision) -> None:
    """Raise BackendError when a precision is asked for that a backend does not have."""
    if options.precision not in (None, *known):
        raise BackendError(
            f"backend {name} runs in {' or '.join(known)}, {options.precision} was asked for; use --precision {known[0]}"
        )


def backend_module(name: str) -> Any:
    """The module behind a backend's name, or behind an earlier one."""
    name = ALIASES.get(name, name)
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; expected auto, {', '.join(BACKENDS)}")
    return import_module(BACKENDS[name])
