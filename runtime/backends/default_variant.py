"""Which variant of an exported model `sanrt run` takes by itself: the one that was measured fastest on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sanrt.files import write_whole
from sanrt.model.spec import Precision
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.variants import model_digest
from sanrt.runtime.backends.fp32_fallback import FP32Fallback
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import ALIASES, load_backend, status


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
    """The choice that was measured for this very model on this machine, where its file and its backend are still there."""
    try:
        choice = Preference(**json.loads(preference_path(model).read_text()))
        backend, precision = ALIASES.get(choice.backend, choice.backend), choice.precision and Precision(choice.precision)
        choice = replace(choice, backend=backend, precision=precision)
    except (OSError, ValueError, TypeError):
        return None
    fits = choice.machine == machine.cpu_name() and (model.parent / choice.model).is_file() and status(choice.backend).usable
    return choice if fits and choice.exported == model_digest(model) else None


def load_default(model: Path, options: RunOptions) -> FP32Fallback:
    """An exported model as `auto` runs it: in its preferred variant, or itself on the first usable backend."""
    choice = preferred(model)
    if choice is None:
        return load_backend("auto", model, options)
    options = replace(options, precision=options.precision or choice.precision)
    return load_backend(choice.backend, model.parent / choice.model, options)
