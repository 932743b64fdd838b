"""Which model a command takes, the same for every command, and how the next command names it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import typer

from sanrt.errors import UsageError
from sanrt.extras import extra
from sanrt.model.spec import SCALES
from sanrt.runtime.artifacts.models import DEFAULT_SCALE, MODELS, exported_path, other_models


def bundled_weights(scale: int) -> Path:
    """The checkpoint that a missing default model is exported from."""
    with extra("export", "making a model"):
        from sanrt.model.checkpoint import bundled_checkpoint
    return bundled_checkpoint(scale)


def default_model(models: Path, scale: int | None, say: Callable[[str], None]) -> Path:
    """The model where none is named, exported from the bundled weights first if it is not there, which `say` prints."""
    path = exported_path(models, scale)
    if not path.exists():
        scale = scale or DEFAULT_SCALE
        say(f"{path}: not there yet{other_models(models)}; exporting the bundled x{scale} weights first")
        with extra("export", "making a model"):
            from sanrt.export.onnx import export_onnx
            from sanrt.model.checkpoint import load_checkpoint
        export_onnx(load_checkpoint(bundled_weights(scale)), path)
    return path


def known_scale(scale: int | None) -> int | None:
    """A typer callback: wrong usage for a scale that SAN does not have."""
    if scale not in (None, *SCALES):
        raise typer.BadParameter(f"{scale}: expected {', '.join(map(str, SCALES))}")
    return scale


def one_of(*known: str) -> Callable[[str], str]:
    """A typer callback: wrong usage for any other word."""

    def checked(word: str) -> str:
        if word not in known:
            raise typer.BadParameter(f"{word}: expected {', '.join(known[:-1])} or {known[-1]}")
        return word

    return checked


def require_scale(path: Path, found: int, asked: int | None) -> None:
    """Raise UsageError when a model or checkpoint is of another scale than was asked for."""
    if asked not in (None, found):
        raise UsageError(f"{path}: is for x{found}, but --scale {asked} was asked for; leave --scale out, or pass {found}")


def run_words(model: Path) -> str:
    """The `sanrt run` command that takes a model."""
    return f"sanrt run INPUT OUTPUT{default_words(model, f' --model {shlex.quote(str(model))}')}"


def build_words(model: Path) -> str:
    """The `sanrt build` command that takes a model."""
    return f"sanrt build{default_words(model, f' {shlex.quote(str(model))}')}"


def default_words(model: Path, named: str) -> str:
    """The words by which a command takes a model: none or its scale where it is the default one, else `named`."""
    scale = next((scale for scale in SCALES if model == exported_path(MODELS, scale)), None)
    if scale is None:
        return named
    return "" if scale == DEFAULT_SCALE else f" --scale {scale}"
