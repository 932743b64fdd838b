"""Variants of an exported model that a backend wants, written once and kept beside it."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

from sanrt.errors import BackendError, ModelError
from sanrt.model.spec import STAGE_INPUTS, GraphOptions

FOLDER = ".derived"
"""Beside the exported model; safe to delete at any time."""


def file_digest(path: Path, remedy: str = "make a model with `sanrt export --scale 4`") -> str:
    """SHA-256 of a file, as hex; raises ModelError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error


def derived_model(model: Path, options: GraphOptions) -> Path:
    """The given variant of an exported fp32 ONNX; the onnx package is needed only the first time.

    The name carries a digest of the model and of every option, so a changed model or option never meets an old variant.
    """
    from sanrt import __version__

    contract = str(STAGE_INPUTS) if options.stage else ""
    identity = "\n".join([file_digest(model), __version__, contract, *map(str, astuple(options))])
    tag = hashlib.sha256(identity.encode()).hexdigest()[:16]
    part = options.stage or f"k{options.regions}"
    path = model.parent / FOLDER / f"{model.stem}-{options.precision}-{options.attention}-{part}-{tag}.onnx"
    if not path.exists():
        write_variant(model, options, path)
    return path


def write_variant(model: Path, options: GraphOptions, path: Path) -> None:
    """Write a variant beside its final name and move it there."""
    try:
        from sanrt.model.graph import read_model, san_model, stage_model
    except ModuleNotFoundError as error:
        raise BackendError(f"{model}: preparing it needs the onnx package; pip install 'sanrt[cpu]'") from error
    spec, weights = read_model(model)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        variant = (stage_model if options.stage else san_model)(spec, weights, options)
        partial.write_bytes(variant.SerializeToString())
        partial.replace(path)
    except OSError as error:
        raise ModelError(f"{path.parent}: cannot be written ({error.strerror}); use a writable --models folder") from error
    finally:
        partial.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Keep something that only spares work, whole or not at all: a folder that cannot be written costs that."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):
        partial.write_bytes(content)
        partial.replace(path)
