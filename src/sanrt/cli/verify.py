"""`sanrt verify`: make recorded results again and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sanrt.cli.streams import tell


def verify(
    record: Annotated[Path, typer.Argument(help="What `sanrt run --record` wrote.", show_default=False)],
    sample: Annotated[int | None, typer.Option(min=1, help="So many results, spread evenly; all if left out.")] = None,
) -> None:
    """Make results of a run again; say which are the same, bit for bit or within rounding (1 of 255); 1 if any is not."""
    from sanrt.cli.console import Reporter
    from sanrt.runtime.runs import record as records

    replays = []
    with Reporter(0):
        for replay in records.verify(records.sample(records.read_record(record), sample)):
            replays.append(replay)
            detail = f" ({replay.detail})" if replay.detail else ""
            tell(f"{replay.entry.output}: {replay.verdict}{detail}")
    counts = (f"{sum(r.verdict is v for r in replays)} {v}" for v in records.Verdict if any(r.verdict is v for r in replays))
    tell(", ".join(counts))
    raise typer.Exit(0 if all(replay.reproduced for replay in replays) else 1)
