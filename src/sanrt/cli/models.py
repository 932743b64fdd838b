"""Which model a command takes, the same for every command, and how the next command names it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import typer

from sanrt.errors import UsageError
from sanrt.extras import extra
from sanrt.model.spec import SCALES, Precision, parse_precision
from sanrt.runtime.artifacts.models import DEFAULT_SCALE, MODELS, default_model, exported_path, other_models


def exported_default(models: Path, scale: int | None, say: Callable[[str], None]) -> Path:
    """The default model as an ONNX: where that is the bundled weights they are exported first, which `say` prints."""
    path, default = exported_path(models, scale), default_model(models, scale)
    if default != path:
        say(f"{path}: not there yet{other_models(models)}; exporting the bundled weights of x{scale or DEFAULT_SCALE} first")
        with extra("export", "making a model"):
            from sanrt.export.onnx import export_onnx
            from sanrt.model.checkpoint import load_checkpoint
        export_onnx(load_checkpoint(default), path)
    return path


def known_scale(scale: int | None) -> int | None:
    """A typer callback: wrong usage for a scale that SAN does not have."""
    if scale not in (None, *SCALES):
        raise typer.BadParameter(f"{scale}: expected {', '.join(map(str, SCALES))}")
    return scale


def precision_name(text: str) -> Precision:
    """A typer parser: the precision of that name."""
    try:
        return parse_precision(text)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error


def one_of(*known: str) -> Callable[[str], str]:
    """A typer callback: wrong usage for any other word."""

    def checked(word: str) -> str:
        if word not in known:
            raise typer.BadParameter(f"{word}: expected {', '.join(known[:-1])} or {known[-1]}")
        return word

    return checked


def run_words(model: Path) -> str:
    """The `sanrt run` command that takes a model."""
    return f"sanrt run INPUT OUTPUT{default_words(model, f' --model {shlex.quote(str(model))}')}"


def build_words(model: Path) -> str:
    """The `sanrt build` command that takes a model."""
    return f"sanrt build{default_words(model, f' {shlex.quote(str(model))}')}"


def default_words(model: Path, named: str) -> str:
    """The words by which a command takes a model: its folder and scale where it has a default model's name, else `named`."""
    scale = default_scale(model)
    if scale is None:
        return named
    folder = "" if model.parent == MODELS else f" --models {shlex.quote(str(model.parent))}"
    return folder + ("" if scale == DEFAULT_SCALE else f" --scale {scale}")


def default_scale(model: Path) -> int | None:
    """The scale of which a model is the default in its folder; None for any other model."""
    return next((scale for scale in SCALES if model == exported_path(model.parent, scale)), None)
