"""Help in sections: options under the headings of their panels, as plain text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import typer
from typer.core import TyperCommand


def panel(title: str) -> Callable[..., Any]:
    """`typer.Option` for the options of one panel."""
    return partial(typer.Option, rich_help_panel=title)


class PanelCommand(TyperCommand):
    """A command whose help lists its options under their `rich_help_panel`, in the order in which they are declared."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record := parameter.get_help_record(ctx):
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(record)
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)
