"""`sanrt verify`: make recorded results again and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    record: Annotated[Path, typer.Argument(help="What `sanrt run --record` wrote.", show_default=False)],
    sample: Annotated[int | None, typer.Option(min=1, help="So many results, spread evenly; all if left out.")] = None,
) -> None:
    """Make results of a run again; say which are the same, bit for bit or within rounding (1 of 255); 1 if any is not."""
    from sanrt.runtime.runs import record as records

    entries = records.sample(records.read_record(record), sample)
    replays = []
    for replay in records.verify(entries):
        replays.append(replay)
        detail = f" ({replay.detail})" if replay.detail else ""
        print(f"{replay.entry.output}: {replay.verdict}{detail}", flush=True)
    counts = (f"{sum(r.verdict is v for r in replays)} {v}" for v in records.Verdict if any(r.verdict is v for r in replays))
    print(", ".join(counts) or "the record is empty")
    raise typer.Exit(0 if all(replay.reproduced for replay in replays) else 1)
