"""Every backend by name, and which of them `auto` takes."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from sanrt.errors import BackendError, CheckpointError, ModelError, SanrtError, UsageError, first_line
from sanrt.extras import extra
from sanrt.model.bundled import SUFFIX as WEIGHTS_SUFFIX
from sanrt.model.bundled import read_weights
from sanrt.model.spec import ModelSpec, Precision
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.engines import STAGES_SUFFIX, SUFFIX, engines_of, read_engine
from sanrt.runtime.artifacts.models import model_title, read_spec
from sanrt.runtime.backends.fp32_fallback import FP32Fallback
from sanrt.runtime.backends.protocol import Backend, BackendStatus, RunOptions
from sanrt.runtime.backends.speed_trial import fastest
from sanrt.wording import option

log = logging.getLogger(__name__)


BACKENDS = {
    "torch": "sanrt.runtime.backends.torch",
    "torch-cuda": "sanrt.runtime.backends.torch_cuda",
    "onnxruntime": "sanrt.runtime.backends.onnxruntime",
    "onnxruntime-cuda": "sanrt.runtime.backends.onnxruntime_cuda",
    "openvino": "sanrt.runtime.backends.openvino",
    "native": "sanrt.runtime.backends.native",
    "tensorrt": "sanrt.runtime.backends.tensorrt.backend",
}
"""Every backend's module; each has `status() -> BackendStatus` and `load(model: Path, options: RunOptions) -> Backend`.

GPU_BACKENDS' `status` takes the index of a GPU. A module that knows more once it sees a model has also
`refusal(model, options) -> str | None`: why `auto` should not take it for that.
"""

ENTRY_POINTS = "sanrt.backends"
"""The group in which other packages name modules like these (docs/backends.md); `auto` takes none of them."""

ALIASES = {"winograd": "native"}
"""Earlier names, as records, preferences and scripts may have them."""

CHECKPOINT_BACKENDS = ("torch-cuda", "torch")
"""Those that load checkpoints too; the others load exported models only."""

GPU_BACKENDS = ("tensorrt", "torch-cuda", "onnxruntime-cuda")
"""Those that need an NVIDIA GPU."""

EIGHT_BIT_BACKENDS = ("tensorrt", "onnxruntime-cuda", "openvino", "onnxruntime")
"""Those that run models with convolutions in 8 bits."""

AUTO_ORDER = ("tensorrt", "torch-cuda", "onnxruntime-cuda", "openvino", "native", "onnxruntime", "torch")
"""The order in which `auto` looks for a usable backend."""

MEASURED = ("openvino", "native")
"""Of these either may be the faster one, by processor and network: where `auto` may take several, it measures them once."""

OPEN_STAGES = 4
"""Stages to keep open: the widest pass over a picture takes turns between so many (head, keys and values, attention)."""


def status(name: str, device: int = 0) -> BackendStatus:
    """Whether a backend can run here, on GPU `device` if it needs one; raises UsageError for a name that is none."""
    if name not in BACKENDS and name in other_backends():
        return other_status(name)
    found: BackendStatus = backend_module(name).status(*[device] * (name in GPU_BACKENDS))
    if name in GPU_BACKENDS and found.remedy and not machine.gpus().devices:  # no package brings a GPU
        problem = machine.gpus().problem
        return replace(found, reason=found.reason if problem in found.reason else f"{found.reason}; {problem}", remedy="")
    return found


def other_status(name: str) -> BackendStatus:
    """The status of another package's backend; one that cannot say it is not usable."""
    try:
        found: BackendStatus = backend_module(name).status()
        return replace(found, name=name, automatic=False)
    except Exception as error:  # whatever another package's code raises
        return BackendStatus(name, None, False, f"{origin(name)}, whose status fails ({first_line(error)})", automatic=False)


def load_backend(name: str, model: Path, options: RunOptions) -> FP32Fallback:
    """Load a model with the named backend, or with the first usable one for `auto`; never another than asked for.

    What overflows in it is computed again in fp32 on the CPU, and told.
    """

    def load_fp32(regions: int) -> Backend:
        source = read_engine(model).model_path if model.suffix == SUFFIX else model
        names = ("onnxruntime", "native", "torch") if is_described(source) else ("torch",)
        name = next((name for name in names if status(name).usable), "torch")
        return load_unguarded(name, source, RunOptions(threads=options.threads, precision=Precision.FP32, regions=regions))

    return FP32Fallback(load_unguarded(name, model, options), load_fp32)


def load_unguarded(name: str, model: Path, options: RunOptions) -> Backend:
    """The same without fp32 behind it, for measurements: NaN and infinity come out as they are."""
    require_whole(model)
    if name in ALIASES:
        log.warning("backend %s is called %s now", name, ALIASES[name])
        name = ALIASES[name]
    names = candidates(model, options) if name == "auto" else (name,)
    chosen = automatic_choice(names, model, options) if name == "auto" else status(name, options.device)
    if chosen is None:
        found = (status(each, options.device) for each in names)
        reasons = "; ".join(f"{s.name}: {s.reason}, {s.remedy}".rstrip(", ") for s in found)
        raise BackendError(f"no backend can run {model} here ({reasons})")
    if not chosen.usable:
        remedy = f"; to fix it: {chosen.remedy}" if chosen.remedy else ""
        usable = ", ".join(s.name for s in map(status, backend_names()) if s.usable) or "none"
        raise BackendError(f"backend {name} is not usable here: {chosen.reason}{remedy} (usable: {usable})")
    require_kind(chosen.name, model)
    load: Callable[[Path, RunOptions], Backend] = backend_module(chosen.name).load
    try:
        return load(model, options)
    except Exception as error:
        if isinstance(error, SanrtError) or chosen.name in BACKENDS:
            raise
        raise BackendError(
            f"{model}: {chosen.name}, {origin(chosen.name)}, failed to load it ({first_line(error)})"
        ) from error


def is_described(model: Path) -> bool:
    """Whether a file says what it is, as exported models and weights in sanrt's format do; torch must read any other."""
    if model.suffix == WEIGHTS_SUFFIX:
        with suppress(CheckpointError):
            read_weights(model)
            return True
        return False
    return model.suffix.lower() == ".onnx"


def require_kind(backend: str, model: Path) -> None:
    """Raise UsageError for a file of a kind that a backend does not run; one that is missing is told when it is loaded."""
    if not model.exists():
        return
    if model.suffix == SUFFIX and backend != "tensorrt":
        raise UsageError(
            f"{model}: an engine, which only tensorrt runs; leave {option('backend', backend)} out, or name its ONNX"
        )
    if model.suffix == WEIGHTS_SUFFIX and backend == "tensorrt":
        raise UsageError(
            f"{model_title(model)}: tensorrt runs engines alone; `sanrt export` the weights, then `sanrt build`"
        )
    if model.suffix != SUFFIX and not is_described(model) and backend not in CHECKPOINT_BACKENDS:
        command = f"`sanrt export --checkpoint {shlex.quote(str(model))}`"
        raise UsageError(
            f"{model}: no exported model, which {backend} needs; if it is a checkpoint, make one with {command}"
        )


def require_whole(model: Path) -> None:
    """UsageError for the stages of a model."""
    if model.suffix == STAGES_SUFFIX:
        raise UsageError(f"{model}: stage engines run beside a whole one; name its {SUFFIX}, or the ONNX of both")


def model_spec(model: Path) -> ModelSpec:
    """What a model is by its own description, without loading it to run; SanrtError when that cannot be read."""
    require_whole(model)
    if is_described(model):
        return read_spec(model)
    if model.suffix == SUFFIX:
        return read_engine(model).spec
    with extra("export", f"{model}: reading a checkpoint"):
        spec: ModelSpec = backend_module("torch").checkpoint_network(model)[1]
        return spec


def candidates(model: Path, options: RunOptions) -> tuple[str, ...]:
    """What `auto` may choose for a model, best first: only TensorRT runs engines, and models only where they have one."""
    if model.suffix == SUFFIX:
        return ("tensorrt",)
    if not is_described(model):
        return CHECKPOINT_BACKENDS
    names = EIGHT_BIT_BACKENDS if computes_in_8_bits(model) else AUTO_ORDER
    return tuple(name for name in names if name != "tensorrt" or engines_of(model))


def computes_in_8_bits(model: Path) -> bool:
    """Whether an exported model has convolutions in 8 bits; one that cannot be read is told when it is loaded."""
    try:
        return read_spec(model).quantisation is not None
    except ModelError:
        return False


def automatic_choice(
    names: Iterable[str], model: Path | None = None, options: RunOptions | None = None
) -> BackendStatus | None:
    """The first of these backends that `auto` prefers here, of those in MEASURED the fastest for the model if one is given.

    Where `auto` prefers none that is usable, it is the last one that is. Why others are not taken is logged.
    """
    options, last, fit = options or RunOptions(), None, list[BackendStatus]()
    for found in (status(name, options.device) for name in names):
        if fit and not {fit[0].name, found.name} <= set(MEASURED):
            break
        others = model and model.suffix != SUFFIX  # an engine's own refusal is told when it is loaded
        if found.usable and not (model and others and passed_over(found.name, model, options)):
            last = found
            fit += [found] if found.automatic else []
    if model is None or len(fit) < 2:
        return fit[0] if fit else last
    loaders = {each.name: partial(backend_module(each.name).load, model, options) for each in fit}
    machinery = machine.cpu_name(), *machine.cpu_features(), str(machine.cores())
    identity = *machinery, *(f"{each.name} {each.version}" for each in fit), str(options)
    name = fastest(loaders, model, identity)
    return next(each for each in fit if each.name == name)


def passed_over(name: str, model: Path, options: RunOptions) -> bool:
    """Whether a usable backend has a reason not to be taken for a model, which is then logged."""
    refusal = getattr(backend_module(name), "refusal", None)
    if reason := refusal and refusal(model, options):
        # An engine that does not fit is somebody's to mend; what is slower here is not.
        log.log(logging.WARNING if name in GPU_BACKENDS else logging.INFO, "%s passed over: %s", name, reason)
    return bool(reason)


def backend_names() -> tuple[str, ...]:
    """Every backend that `--backend` takes: sanrt's own, then those of other packages."""
    return (*BACKENDS, *other_backends())


@cache
def other_backends() -> dict[str, EntryPoint]:
    """Backends that other installed packages bring, by name; one whose name is taken is passed over, which is logged."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name in (*BACKENDS, *ALIASES, "auto", *found):
            log.warning("backend %s of package %s is passed over: the name is taken", entry.name, package(entry))
        else:
            found[entry.name] = entry
    return found


def package(entry: EntryPoint) -> str:
    """The package that an entry point is from, with its version."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unnamed package"


def origin(backend: str) -> str:
    """Where another package's backend comes from, for messages."""
    return f"a backend of package {package(other_backends()[backend])}"


def require_known(name: str) -> None:
    """Raise UsageError for a name that no backend has or had, and that is not `auto`."""
    if name not in ("auto", *ALIASES, *BACKENDS) and name not in other_backends():
        raise UsageError(f"unknown backend {name!r}; expected auto, {', '.join(backend_names())}")


def backend_module(name: str) -> Any:
    """The module behind a backend's name, or behind an earlier one."""
    require_known(name)
    name = ALIASES.get(name, name)
    return import_module(BACKENDS[name]) if name in BACKENDS else other_backends()[name].load()
