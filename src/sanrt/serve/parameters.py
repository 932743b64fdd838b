"""What a request asks of its picture, in the words of `sanrt run`: read by the command line's own parser."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import typer

from sanrt.cli.request import (
    EnsembleOption,
    FlattenOption,
    FormatOption,
    KeepHiddenOption,
    LosslessOption,
    OutscaleOption,
    OverlapOption,
    QualityOption,
    RegionsOption,
    ScaleOption,
    SizeOption,
    TileOption,
    TilingOption,
    WeightsOption,
    bounding_size,
    colour,
    region_count,
)
from sanrt.cli.usage import usage_text
from sanrt.errors import UsageError
from sanrt.model.bundled import WeightsKind
from sanrt.request import ModelChoice, Request
from sanrt.runtime.pictures.codec import Encoding
from sanrt.runtime.pictures.jobs import Naming
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.wording import on_command_line

YES, NO = ("", "1", "true", "yes", "on"), ("0", "false", "no", "off")
"""What a parameter that is a flag may be."""


@dataclass(frozen=True)
class Parameters:
    """What one request asks for."""

    scale: int | None
    weights: WeightsKind | None
    upscaling: UpscaleOptions
    encoding: Encoding
    naming: Naming

    def of(self, source: Path, folder: Path, choice: ModelChoice, memory: int | None) -> Request:
        """The same as `sanrt run SOURCE RESULT`, the result in a folder."""
        scale = self.scale or (None if self.encoding.result_size.outscale or self.encoding.size else choice.scale)
        return Request(
            [str(source), str(folder / self.naming.of(source))],
            replace(choice, scale=scale, weights=self.weights or choice.weights),
            replace(self.upscaling, memory=memory, scratch=folder),
            self.encoding,
            self.naming,
        )


def read_parameters(pairs: Iterable[tuple[str, str]]) -> Parameters:
    """The parameters of a request from its query and form fields; UsageError, in a request's words, for others."""
    pairs = [(name.replace("_", "-"), value) for name, value in pairs]
    for name in {name for name, _ in pairs}:
        if sum(name == other for other, _ in pairs) > 1:
            raise UsageError(f"{name}: said twice; leave one out")
    flags = {option.opts[0] for option in options() if option.is_flag}
    try:
        words = [word for name, value in pairs for word in argument(f"--{name}", value, flags)]
        found: Parameters = parser().main(words, prog_name="sanrt run", standalone_mode=False)
    except UsageError:
        raise
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own, of a click that typer may have inside itself
            raise
        text = re.sub(r"^--|(?<=^there is no option )--|(?<=did you mean )--", "", usage_text(error))
        raise UsageError(text.replace("there is no option", "there is no parameter", 1)) from None
    return found


def argument(option: str, value: str, flags: set[str]) -> Sequence[str]:
    """A parameter as a word of the command line; its value can never be taken for another option."""
    if option not in flags:
        return [f"{option}={value}"]
    if value.lower() not in YES + NO:
        raise UsageError(f"{option.removeprefix('--')}: {value}; expected true or false")
    return [option] if value.lower() in YES else []


def options() -> Sequence[Any]:
    """The options that a request may have, as click describes them."""
    return list(parser().params)


@cache
def names() -> frozenset[str]:
    """What those options are called on the command line."""
    return frozenset(option.opts[0] for option in options())


def in_request(name: str, value: object) -> str:
    """`tile=64`, `lossless=true`, `tile`; `--memory of the server` for what only its owner can say."""
    if f"--{name}" not in names():
        return f"{on_command_line('folder' if name == 'scratch' else name, value)} of the server"
    if value is True:
        return f"{name}=true"
    return on_command_line(name, value).removeprefix("--").replace(" ", "=", 1)


@cache
def parser() -> Any:
    """The command line's parser for those options of `sanrt run` that concern one picture."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(add_help_option=False)(parameters)
    return typer.main.get_command(app)


def parameters(
    scale: ScaleOption = None,
    outscale: OutscaleOption = None,
    size: SizeOption = None,
    weights: WeightsOption = None,
    format: FormatOption = None,
    quality: QualityOption = None,
    lossless: LosslessOption = False,
    flatten: FlattenOption = None,
    keep_hidden_colours: KeepHiddenOption = False,
    self_ensemble: EnsembleOption = False,
    tiling: TilingOption = Tiling.AUTO,
    tile: TileOption = None,
    overlap: OverlapOption = None,
    regions: RegionsOption = "auto",
) -> Parameters:
    """Gather what the parser found."""
    return Parameters(
        scale,
        weights,
        UpscaleOptions(tile, overlap, self_ensemble, tiling, region_count(regions), keep_hidden=keep_hidden_colours),
        Encoding(quality, lossless, colour(flatten) if flatten else None, outscale, bounding_size(size) if size else None),
        Naming(format=format),
    )
