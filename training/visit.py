"""A short visit to a GPU, in one command: `python -m training.visit OUT PACK NAME=SECONDS ...`.

It looks at the machine, times a step, trains networks of the queue one after the other, each under a time limit, and ends
with a table. OUT is to be taken home: NAME.tar of each network, of its compact states and its log, and visit.log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import typer
from rich.console import Console
from rich.table import Table

from sanrt.errors import UsageError
from training.command import run
from training.recipe import STATES, Item, keep, named, training_command

GRACE = 40.0
"""Seconds beyond its budget that a network gets to read its pictures and to write its state; an H200 took 20 to 34."""

PROBE_LIMIT = 120.0
"""Seconds that looking at the machine may take."""


@dataclass(frozen=True)
class Outcome:
    """What a network's training came to."""

    name: str
    ending: str
    """`done`, or why not."""
    seconds: float
    lines: tuple[dict[str, Any], ...]
    """Of its log."""


def visit(
    out: Annotated[Path, typer.Argument(help="Folder for what is to be taken home.")],
    data: Annotated[Path, typer.Argument(help="Folder of pictures packed by training.pack.")],
    budgets: Annotated[list[str], typer.Argument(help="NAME=SECONDS for each network of the queue, in order.")],
    limit: Annotated[float, typer.Option(help="Seconds after which the visit ends; budgets that do not fit are cut.")] = 570,
    batch: Annotated[int | None, typer.Option(help="Patches of a step. [default: the queue's]")] = None,
    patch: Annotated[int | None, typer.Option(help="Side of a patch. [default: the queue's]")] = None,
    states: Annotated[Path, typer.Option(help="Folder of the compact states to go on from.")] = STATES,
    work: Annotated[Path, typer.Option(help="Folder for full states, which stay here.")] = Path("runs"),
    probe_seconds: Annotated[float, typer.Option(help="For each of four timings of a step; 0 leaves them out.")] = 4,
    more: Annotated[str, typer.Option(help="Further options of training.train, as one text.")] = "",
) -> None:
    """Look, time, train, report; whatever fails leaves the rest going."""
    end = time.monotonic() + limit
    plan = [parsed(budget) for budget in budgets]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "visit.log").open("w") as log, packing_worn(data, [item for item, _ in plan], log) as worn:
        if probe_seconds:
            looking = probe_command(data, plan[0][0], batch, patch, probe_seconds)
            say(log, f"probe: {called('probe', looking, PROBE_LIMIT, log)}")
        outcomes = []
        for item, asked in plan:
            if item.photo:
                worn.wait()
            begun = time.monotonic()
            seconds = min(asked, end - begun - GRACE)
            ending = trained(item, seconds, data, work, states, sizes(item, batch, patch) + more.split(), log)
            lines = read_lines(work / item.name / "log.jsonl")
            outcomes.append(Outcome(item.name, ending, time.monotonic() - begun, lines))
            keep(work / item.name, states / item.name)
            take_home(work / item.name, out, item.name)
            log.writelines(json.dumps({"name": item.name} | line) + "\n" for line in lines)
        say(log, report(outcomes))


@contextmanager
def packing_worn(data: Path, items: list[Item], log: TextIO) -> Iterator[subprocess.Popen[bytes]]:
    """The process that makes the worn pictures of photo networks on the CPUs, while others are trained."""
    scales = sorted({item.scale for item in items if item.photo})
    command = [sys.executable, "-m", "training.pack_worn", str(data), *map(str, scales)]
    with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}) as worn:
        yield worn


def trained(item: Item, seconds: float, data: Path, work: Path, states: Path, options: list[str], log: TextIO) -> str:
    """Train a network of the queue for so many seconds; returns `done`, or why not."""
    if seconds <= 0:
        return "no time left"
    try:
        command = training_command(item, data, work, states, seconds, ["--score-every", "1000", *options])
    except UsageError as error:  # weights that it begins with are missing: another's training failed
        return str(error)
    return called(item.name, command, seconds + GRACE, log)


def sizes(item: Item, batch: int | None, patch: int | None) -> list[str]:
    """The options of training.train that suit a GPU."""
    return ["--batch", str(batch or item.gpu_batch), "--patch", str(patch or item.gpu_patch), "--warmup", "10"]


def probe_command(data: Path, item: Item, batch: int | None, patch: int | None, seconds: float) -> list[str]:
    """The command line that looks at the machine by an item's network."""
    command = [sys.executable, "-m", "training.probe", str(data), str(batch or item.gpu_batch), str(seconds)]
    command += ["--scale", str(item.scale), "--channels", str(item.channels)]
    return [*command, "--patch", str(patch)] if patch else command


def parsed(budget: str) -> tuple[Item, float]:
    """The item and the seconds of NAME=SECONDS."""
    name, _, seconds = budget.partition("=")
    try:
        return named(name), float(seconds)
    except ValueError as error:
        raise UsageError(f"{budget}: expected NAME=SECONDS, such as x4-clean=400") from error


def called(name: str, command: list[str], limit: float, log: TextIO) -> str:
    """Run a command for at most `limit` seconds, its output into the log; returns `done`, or how it ended."""
    log.write(f"--- {name}: {' '.join(command)}\n")
    log.flush()
    try:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    return "done" if code == 0 else f"exit status {code}"


def read_lines(path: Path) -> tuple[dict[str, Any], ...]:
    """The lines of a training log; none if there is no log."""
    return tuple(json.loads(line) for line in path.read_text().splitlines()) if path.exists() else ()


def take_home(run_folder: Path, out: Path, name: str) -> None:
    """Pack a run's compact states and its log into OUT/NAME.tar: one file, since few may travel."""
    with tarfile.open(out / f"{name}.tar", "w") as tar:
        for path in (*sorted(run_folder.glob("*.safetensors")), *run_folder.glob("log.jsonl")):
            tar.add(path, f"{name}/{path.name}")


def report(outcomes: list[Outcome]) -> str:
    """A table of what was reached."""
    table = Table(title=device_name())
    for heading in ("network", "ending", "seconds", "steps in all", "steps/s", "L1", "held out, dB"):
        table.add_column(heading)
    for each in outcomes:
        last = each.lines[-1] if each.lines else {}
        scored = [line["y_psnr"] for line in each.lines if "y_psnr" in line] or ["-"]
        shown = (last.get("step", "-"), steps_per_second(each.lines), last.get("l1", "-"), scored[-1])
        table.add_row(each.name, each.ending, f"{each.seconds:.0f}", *map(str, shown))
    console = Console(width=120)
    with console.capture() as text:
        console.print(table)
    return text.get()


def steps_per_second(lines: tuple[dict[str, Any], ...]) -> str:
    """From the first to the last line of a log, reading pictures left out."""
    if len(lines) < 2:
        return "-"
    first, last = lines[0], lines[-1]
    return f"{(last['step'] - first['step']) / (last['seconds'] - first['seconds']):.1f}"


def device_name() -> str:
    """The GPU, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: a rehearsal"


def say(log: TextIO, text: str) -> None:
    """Into the log and onto the terminal, whose end may be all that comes home."""
    print(text, flush=True)
    log.write(text + "\n")
    log.flush()


if __name__ == "__main__":
    run(visit)
