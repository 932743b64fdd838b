"""Variants of an exported model that a backend wants, written once and kept beside it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import astuple
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from sanrt.errors import BackendError, ModelError
from sanrt.model.contract import STAGE_INPUTS
from sanrt.model.spec import GraphOptions, ModelSpec
from sanrt.runtime.artifacts.models import external_files

Weights = Mapping[str, npt.NDArray[Any]]

FOLDER = ".derived"
"""Beside the exported model; safe to delete at any time."""


def file_digest(path: Path, remedy: str = "make a model with `sanrt export --scale 4`") -> str:
    """SHA-256 of a file, as hex; raises ModelError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error


def model_digest(model: Path, remedy: str = "make a model with `sanrt export --scale 4`") -> str:
    """What identifies a model: SHA-256 of its file, or of that and of the files beside an ONNX that hold its weights.

    Raises ModelError when one of them cannot be read.
    """
    digest = file_digest(model, remedy)
    missing = f"the weights of {model.name} lie there; keep it beside the model"
    beside = [file_digest(model.parent / name, missing) for name in external_files(model)]
    return hashlib.sha256("\n".join([digest, *beside]).encode()).hexdigest() if beside else digest


def derived_model(model: Path, options: GraphOptions) -> Path:
    """The given variant of an exported fp32 ONNX; the onnx package is needed only the first time.

    The name carries a digest of the model and of every option, so a changed model or option never meets an old variant.
    """
    from sanrt.version import __version__

    contract = str(STAGE_INPUTS) if options.stage else ""
    identity = "\n".join([model_digest(model), __version__, contract, *map(str, astuple(options))])
    tag = hashlib.sha256(identity.encode()).hexdigest()[:16]
    part = options.stage or f"k{options.regions}"
    path = model.parent / FOLDER / f"{model.stem}-{options.precision}-{options.attention}-{part}-{tag}.onnx"
    if not path.exists():
        write_derived(model, path, partial(variant_bytes, options))
    return path


def derived_weights(model: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The weights of an exported fp32 ONNX by parameter name; the onnx package is needed only the first time."""
    path = model.parent / FOLDER / f"{model.stem}-weights-{model_digest(model)[:16]}.npz"
    if not path.exists():
        write_derived(model, path, weights_bytes)
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ModelError(f"{path}: cannot be read, or is damaged ({error}); remove it, it is made again") from error


def write_derived(model: Path, path: Path, content: Callable[[ModelSpec, Weights], bytes]) -> None:
    """Write what is made of a model's spec and weights beside its final name and move it there."""
    try:
        from sanrt.model.exported import read_model
    except ModuleNotFoundError as error:
        raise BackendError(f"{model}: preparing it needs the onnx package; pip install 'sanrt[cpu]'") from error
    made = content(*read_model(model))
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        unfinished.write_bytes(made)
        unfinished.replace(path)
    except OSError as error:
        raise ModelError(f"{path.parent}: cannot be written ({error.strerror}); use a writable --models folder") from error
    finally:
        unfinished.unlink(missing_ok=True)


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


def replace_file(path: Path, content: bytes) -> None:
    """Keep something that only spares work, whole or not at all: a folder that cannot be written costs that."""
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):
        unfinished.write_bytes(content)
        unfinished.replace(path)
