"""Plot training logs: `python -m training.curve RUN/log.jsonl ...` (needs the `training` extra)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sanrt.errors import SanrtError, UsageError, system_reason
from sanrt.extras import install_command
from training.command import run

CURVES = Path(__file__).resolve().parent / "curves"

Row = dict[str, float | list[float]]
"""A line of the log."""

PANELS = {"l1": "L1, share of the value range", "y_psnr": "Y-PSNR, dB"}
"""What is plotted over the iterations, as the log names it, and its axis."""


def curve(
    logs: Annotated[list[Path], typer.Argument(help="log.jsonl files; each is named after its folder.")],
    out: Annotated[Path | None, typer.Option(help="[default: training/curves/NAMES.png]")] = None,
) -> None:
    """Draw loss and score over the iterations of one or several runs."""
    runs = {log.resolve().parent.name: read_log(log) for log in logs}
    if len(runs) < len(logs):
        raise UsageError(f"{len(logs)} logs in folders of {len(runs)} names; expected a different name for each run")
    path = out or CURVES / f"{'-'.join(runs)}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, path)
    print(path)


def read_log(path: Path) -> list[Row]:
    """The rows that training wrote, in order."""
    try:
        rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({system_reason(error)}); expected a log of training.train") from error
    except ValueError as error:
        raise UsageError(f"{path}: not a log of training.train ({error})") from error
    if not rows or not all(isinstance(row, dict) and "step" in row for row in rows):
        raise UsageError(f"{path}: no rows of a training log; train for 200 steps")
    return rows


def draw(runs: dict[str, list[Row]], path: Path) -> None:
    """One panel for each of PANELS, one line for each run that logged it."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise SanrtError(f"matplotlib is not installed; {install_command('training')}") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for name, rows in runs.items():
            points = [(row["step"], first(row[key])) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=name)
                axes.legend()
        axes.set(xlabel="iteration", ylabel=label)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def first(value: float | list[float]) -> float:
    """A number, or the first of several: the clean pictures' score."""
    return value[0] if isinstance(value, list) else value


if __name__ == "__main__":
    run(curve)
