"""Which variant of an exported model `sanrt run` takes by itself: the one that was measured fastest on this machine."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sanrt.files import write_whole
from sanrt.model.spec import Precision
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.engines import EngineInfo, changed, engines_of
from sanrt.runtime.artifacts.variants import model_digest
from sanrt.runtime.backends.fp32_fallback import FP32Fallback
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import ALIASES, backend_module, backend_names, load_backend, status

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preference:
    """A measured choice, kept beside the exported model."""

    model: str
    """File name of the variant, in the exported model's folder."""
    backend: str
    precision: Precision | None
    """None is the backend's own choice."""
    exported: str
    """SHA-256 of the exported model: the choice holds for no other."""
    machine: str
    """The processor it was measured on."""


def preference_path(model: Path) -> Path:
    """`san_x4.preferred.json` for `san_x4.onnx`; removing it removes the preference."""
    return model.with_suffix(".preferred.json")


def prefer(model: Path, variant: Path, backend: str, precision: Precision | None) -> None:
    """Make a variant the default choice for an exported model on this machine."""
    preference = Preference(variant.name, backend, precision, model_digest(model), machine.cpu_name())
    write_whole(preference_path(model), (json.dumps(asdict(preference), indent=2) + "\n").encode())


def preferred(model: Path) -> Preference | None:
    """The choice that was measured for this very model on this machine, where its file and its backend are still there.

    An engine that was built since, and runs here, takes its place.
    """
    choice = read_preference(preference_path(model))
    if choice is None:
        return None
    fits = choice.machine == machine.cpu_name() and (model.parent / choice.model).is_file() and status(choice.backend).usable
    if not fits or choice.exported != model_digest(model):
        return None
    engine = engine_since(preference_path(model), {model, model.parent / choice.model})
    return replace(choice, model=engine.path.name, backend="tensorrt", precision=None) if engine else choice


def engine_since(preference: Path, models: Iterable[Path]) -> EngineInfo | None:
    """The newest engine of these models that runs here, if it was built after a preference: what was asked for last."""
    found = [info for model in models for info in engines_of(model)]
    newer = [info for info in found if changed(info.path) > changed(preference)]
    if not newer or not status("tensorrt").usable:
        return None
    fit = (info for info in sorted(newer, key=lambda info: -changed(info.path)) if not refused(info))
    return next(fit, None)


def refused(info: EngineInfo) -> bool:
    """Whether an engine does not run here."""
    return backend_module("tensorrt").refusal(info.path, RunOptions()) is not None


def read_preference(path: Path) -> Preference | None:
    """The choice in a file; None where there is none, or one that this sanrt does not understand, which is told."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    try:
        facts = json.loads(content)
        precision = None if facts["precision"] is None else Precision(facts["precision"])
        choice = Preference(**{**facts, "precision": precision})
        backend = ALIASES.get(choice.backend, choice.backend)
        texts, beside = (choice.model, choice.backend, choice.exported, choice.machine), Path(choice.model).name
        if not all(isinstance(text, str) for text in texts) or backend not in backend_names() or beside != choice.model:
            raise ValueError(f"{choice.model!r} on {choice.backend!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.warning("%s: names no model and backend of this sanrt (%s), so it is passed over; remove it", path, error)
        return None
    return replace(choice, backend=backend)


def load_default(model: Path, options: RunOptions) -> FP32Fallback:
    """An exported model as `auto` runs it: in its preferred variant, or itself on the first usable backend."""
    choice = preferred(model)
    if choice is None:
        return load_backend("auto", model, options)
    options = replace(options, precision=options.precision or choice.precision)
    return load_backend(choice.backend, model.parent / choice.model, options)
