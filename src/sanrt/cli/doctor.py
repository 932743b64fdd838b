"""`sanrt doctor`: what can run here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sanrt.extras import install_command
from sanrt.runtime.artifacts.models import MODELS

if TYPE_CHECKING:
    from rich.table import Table

    from sanrt.runtime.backends.protocol import BackendStatus


def doctor(
    models: Annotated[Path, typer.Option(help="The folder that `sanrt export` writes to.")] = MODELS,
) -> None:
    """Say what this machine has, which backends can run and how to get the others; exit 1 if none can."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sanrt.runtime.runs.doctor import diagnose

    found = diagnose(models)
    facts = Table("machine", "found", box=None)
    for fact in found.facts:
        facts.add_row(*map(Text, fact))
    console = Console()
    console.print(facts, backends_table(found.backends), sep="\n\n")
    print()
    for row in found.backends:
        if row.remedy:
            print(f"to run {row.name}: {row.remedy}")
    if found.default is None:
        print(f"--backend auto: nothing can run; {install_command('cpu')}")
        raise typer.Exit(1)
    print(f"--backend auto: {found.default.name}, {found.default.reason}")


def backends_table(backends: tuple[BackendStatus, ...]) -> Table:
    """One row per backend: version, whether it can run, and why or why not."""
    from rich.table import Table
    from rich.text import Text

    table = Table("backend", "version", "runs", "why", box=None)
    for row in backends:
        table.add_row(*map(Text, (row.name, row.version or "", "yes" if row.usable else "no", row.reason)))
    return table
