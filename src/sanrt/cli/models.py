"""Which model a command takes, the same for every command, and how the next command names it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from sanrt.errors import UsageError
from sanrt.model.bundled import WeightsKind
from sanrt.model.spec import SCALES, Precision, parse_precision
from sanrt.runtime.artifacts.models import DEFAULT_SCALE, MODELS, exported_path


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


def one_kind(text: str) -> WeightsKind:
    """A typer parser: the kind of weights of that name."""
    return WeightsKind(one_of(*WeightsKind)(text))


def weights_kind(text: str) -> WeightsKind | None:
    """A typer parser: the kind of weights of that name; None for auto."""
    name = one_of("auto", *WeightsKind)(text)
    return None if name == "auto" else WeightsKind(name)


KindOption = Annotated[
    WeightsKind | None,
    typer.Option("--weights", parser=one_kind, metavar="[clean|photo|fast]", help="Of the bundled ones; clean if left out."),
]


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
    """The words by which a command takes a model: folder, scale, kind where it has a default model's name, else `named`."""
    found = default_kind(model)
    if found is None:
        return named
    scale, kind = found
    folder = "" if model.parent == MODELS else f" --models {shlex.quote(str(model.parent))}"
    weights = "" if kind is WeightsKind.CLEAN else f" --weights {kind}"
    return folder + ("" if scale == DEFAULT_SCALE else f" --scale {scale}") + weights


def default_kind(model: Path) -> tuple[int, WeightsKind] | None:
    """The scale and kind of which a model is the default in its folder; None for any other model."""
    kinds = product(SCALES, WeightsKind)
    return next(((scale, kind) for scale, kind in kinds if model == exported_path(model.parent, scale, kind)), None)
