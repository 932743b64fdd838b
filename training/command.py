"""How the recipe's scripts run from a shell."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from sanrt.errors import SanrtError


def run(command: Callable[..., None]) -> None:
    """Run a function as a command line: one line on stderr and exit 1 for whatever is wrong."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command)
    try:
        app()
    except SanrtError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
