"""The command line. One module per command; nothing heavier than typer is imported before a command runs."""

from __future__ import annotations

import sys

import typer

from sanrt.cli.build import build
from sanrt.cli.doctor import doctor
from sanrt.cli.export import export
from sanrt.cli.info import info
from sanrt.cli.panels import PanelCommand
from sanrt.cli.plan import plan
from sanrt.cli.run import RunCommand, run
from sanrt.cli.validate import validate
from sanrt.cli.verify import verify
from sanrt.errors import SanrtError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as of a shell."""

app = typer.Typer(
    help="SAN super-resolution, from PyTorch to production: export, build, run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(cls=PanelCommand)(export)
app.command(cls=PanelCommand)(build)
app.command(cls=RunCommand)(run)
app.command(cls=PanelCommand)(plan)
app.command()(info)
app.command(cls=PanelCommand)(validate)
app.command()(verify)
app.command()(doctor)


@app.callback()
def sanrt() -> None:
    """SAN super-resolution, from PyTorch to production."""


def main() -> None:
    """Run the command line: 0 done, 1 failed (one line on stderr), 2 wrong usage, 130 interrupted."""
    try:
        app()
    except SanrtError as error:
        print(f"sanrt: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:  # typer makes one of a KeyboardInterrupt, and says nothing
        if end.code == INTERRUPTED:
            print("sanrt: interrupted", file=sys.stderr)
        raise
