"""What is made of an exported model, made once and kept: the variants and the weights that a backend wants, measurements."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sanrt.errors import BackendError
from sanrt.extras import install_command
from sanrt.files import cache_folder, cached_file, file_digest, source_digest
from sanrt.model.bundled import FOLDER as BUNDLED_FOLDER
from sanrt.model.bundled import SUFFIX as WEIGHTS_SUFFIX
from sanrt.model.bundled import read_weights
from sanrt.model.spec import GraphOptions, ModelSpec
from sanrt.runtime.artifacts.models import external_files

Weights = Mapping[str, npt.NDArray[Any]]

FOLDER = ".derived"
"""Beside the exported model; safe to delete at any time."""
GRAPH_CODE = ("sanrt.model",)
"""The packages that decide what a variant is."""


def model_digest(model: Path, remedy: str = "make a model with `sanrt export --scale 4`") -> str:
    """What identifies a model: SHA-256 of its file, or of that and of the files beside an ONNX that hold its weights.

    Raises ModelError when one of them cannot be read.
    """
    digest = file_digest(model, remedy)
    missing = f"the weights of {model.name} lie there; keep it beside the model"
    beside = [file_digest(model.parent / name, missing) for name in external_files(model)]
    return hashlib.sha256("\n".join([digest, *beside]).encode()).hexdigest() if beside else digest


def derived_model(model: Path, options: GraphOptions) -> bytes:
    """A variant of an fp32 model, exported or weights, as an ONNX file; the onnx package is needed only the first time."""
    part = options.stage or f"k{options.regions}"
    what = f"{options.precision}-{options.attention}-{part}.onnx"
    identity = map(str, astuple(options))
    return cached_for(model, what, identity, GRAPH_CODE, partial(made_of, model, partial(variant_bytes, options)))


def derived_weights(model: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The weights of a model by parameter name; the onnx package is needed for an ONNX, and only the first time."""
    if model.suffix == WEIGHTS_SUFFIX:
        return dict(read_weights(model).tensors)
    content = cached_for(model, "weights.npz", (), GRAPH_CODE, partial(made_of, model, weights_bytes))
    with np.load(BytesIO(content)) as arrays:
        return dict(arrays)


def cached_for(model: Path, what: str, identity: Iterable[str], code: Sequence[str], make: Callable[[], bytes]) -> bytes:
    """What `make` makes of a model, kept beside it, or in the user's cache folder where that cannot be written.

    Its file's name ends in `what` and carries a digest of the model, of `identity`, which is all else that it depends on,
    and of the packages whose `code` makes it: no change of any of them meets what was made before.
    """
    return cached_file(cache_folders(model), cache_name(model, what, identity, code), make)


def cache_folders(model: Path) -> tuple[Path, ...]:
    """Where is kept what is made of a model: the first of these that can be written; nothing beside weights that ship."""
    users = cache_folder() / "derived"
    ours = model.parent.resolve() == BUNDLED_FOLDER.resolve()
    return (users,) if ours else (model.parent / FOLDER, users)


def cache_name(model: Path, what: str, identity: Iterable[str], code: Sequence[str]) -> str:
    """The file's name for `cached_for`."""
    tag = hashlib.sha256("\n".join([*identity, source_digest(*code)]).encode()).hexdigest()
    return f"{model.stem[:40]}-{model_digest(model)[:16]}-{tag[:16]}-{what}"


def forget(model: Path) -> None:
    """Remove what is kept beside a model that is about to be replaced."""
    for path in (model.parent / FOLDER).glob(f"*-{model_digest(model)[:16]}-*"):
        path.unlink(missing_ok=True)


def made_of(model: Path, content: Callable[[ModelSpec, Weights], bytes]) -> bytes:
    """What is made of a model's spec and weights."""
    try:
        import onnx  # noqa: F401
    except ModuleNotFoundError as error:
        raise BackendError(f"{model}: preparing it needs the onnx package; {install_command('cpu')}") from error
    if model.suffix == WEIGHTS_SUFFIX:
        weights = read_weights(model)
        return content(weights.spec, weights.tensors)
    from sanrt.model.exported import read_model

    return content(*read_model(model))


def variant_bytes(options: GraphOptions, spec: ModelSpec, weights: Weights) -> bytes:
    """A variant as an ONNX file."""
    from sanrt.model.graph import san_model, stage_model

    made: bytes = (stage_model if options.stage else san_model)(spec, weights, options).SerializeToString()
    return made


def weights_bytes(spec: ModelSpec, weights: Weights) -> bytes:
    """The weights as an npz file."""
    file = BytesIO()
    np.savez(file, **weights)  # type: ignore[arg-type]
    return file.getvalue()
