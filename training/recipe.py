"""Which networks are trained, from what, and in which order: `python -m training.recipe PACK SECONDS [NAME ...]`."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from sanrt.errors import SanrtError, UsageError
from sanrt.runtime.host import cores, cpu_features
from training.command import run
from training.pack_worn import pack_worn_scales
from training.state import Progress, newest, read_compact, read_progress

ROOT = Path(__file__).resolve().parents[1]

STATES = ROOT / "training" / "state"
"""Compact states in the repository: NAME/stable.safetensors to go on from, NAME/decayed.safetensors ready to ship,
from which a network goes on where there is no other."""

RUNS = ROOT / "runs"
"""Full states and logs of this machine; not in the repository."""


@dataclass(frozen=True)
class Item:
    """A network to train."""

    name: str
    scale: int
    goal: float
    """Low-resolution pixels after which the queue goes on to the next."""
    photo: bool = False
    start: str = ""
    """The item whose weights it begins with (of another scale: their body)."""
    teacher: str = ""
    """The item that it learns from beside the pictures."""
    channels: int = 64
    gpu_patch: int = 96
    """Side of a low-resolution patch, pixels, as the next. SOCA's gates learn from its statistics, and a whole picture has
    others: the smaller the patch, the more so."""
    cpu_patch: int = 64
    gpu_batch: int = 16


QUEUE = (
    Item("x4-clean", 4, 1e9),
    Item("x4-photo", 4, 3e8, photo=True, start="x4-clean"),
    Item("x2-clean", 2, 3e8, start="x4-clean"),
    Item("x3-clean", 3, 3e8, start="x4-clean"),
    Item("x2-photo", 2, 2e8, photo=True, start="x4-photo"),
    Item("x3-photo", 3, 2e8, photo=True, start="x4-photo"),
    Item("x8-clean", 8, 1e8, start="x4-clean", gpu_patch=48, cpu_patch=48, gpu_batch=32),
    Item("x8-photo", 8, 1e8, photo=True, start="x8-clean", gpu_patch=48, cpu_patch=48, gpu_batch=32),
    Item("x4-fast", 4, 6e8, teacher="x4-clean", channels=32),
    Item("x2-fast", 2, 3e8, start="x4-fast", teacher="x2-clean", channels=32),
    Item("x3-fast", 3, 3e8, start="x4-fast", teacher="x3-clean", channels=32),
    Item("x8-fast", 8, 1e8, start="x4-fast", teacher="x8-clean", channels=32, gpu_patch=48, cpu_patch=48, gpu_batch=32),
)


def go_on(
    data: Annotated[Path, typer.Argument(help="Folder of pictures packed by training.pack.")],
    seconds: Annotated[float, typer.Argument(help="Budget, shared evenly by the networks that are trained.")],
    names: Annotated[list[str] | None, typer.Argument(help="Of the queue. [default: the first short of its goal]")] = None,
    states: Annotated[Path, typer.Option(help="Folder of the compact states.")] = STATES,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = RUNS,
) -> None:
    """Train networks of the queue on this machine's CPUs, one after the other, and keep their compact states."""
    items = [named(name) for name in names] if names else [next_item(states, runs)]
    for item in items:
        if item.photo:
            pack_worn_scales(data, [item.scale])
        command = training_command(item, data, runs, states, seconds / len(items), cpu_options(item))
        print(" ".join(command), flush=True)
        if code := subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
            raise SanrtError(f"{item.name}: training ended with exit status {code}; see above")
        keep(runs / item.name, states / item.name)


def cpu_options(item: Item) -> list[str]:
    """A batch of 8 or so over all cores, in bf16 where the processor multiplies in it."""
    workers = cores()
    batch = math.ceil(8 / workers) * workers
    half = {"AMX-BF16", "AVX512-BF16"} & set(cpu_features())
    sizes = ["--batch", str(batch), "--patch", str(item.cpu_patch), "--workers", str(workers)]
    return [*sizes, "--bf16" if half else "--fp32"]


def named(name: str) -> Item:
    """The item of that name."""
    for item in QUEUE:
        if item.name == name:
            return item
    raise UsageError(f"{name}: not in the queue; expected one of {', '.join(item.name for item in QUEUE)}")


def next_item(states: Path, runs: Path) -> Item:
    """The first item that has not seen as many pixels as its goal says."""
    for item in QUEUE:
        if seen(item, states, runs).pixels < item.goal:
            return item
    names = ", ".join(item.name for item in QUEUE)
    raise UsageError(f"every network of the queue has reached its goal; name one of {names}")


def seen(item: Item, states: Path, runs: Path) -> Progress:
    """What an item's state before the decay has seen, here or as kept."""
    if local := newest(runs / item.name / "stable") or newest(runs / item.name / "current"):
        return read_progress(local)
    kept = states / item.name / "stable.safetensors"
    return read_compact(kept)[1] if kept.exists() else Progress()


def training_command(item: Item, data: Path, runs: Path, states: Path, seconds: float, options: Sequence[str]) -> list[str]:
    """The command line that trains an item."""
    command = [sys.executable, "-m", "training.train", str(runs / item.name), "--data", str(data)]
    command += ["--seconds", f"{seconds:g}", "--scale", str(item.scale), "--channels", str(item.channels), *options]
    if item.photo:
        command.append("--photo")
    if (kept := states / item.name / "stable.safetensors").exists():
        command += ["--resume", str(kept)]
    elif not newest(runs / item.name / "current"):
        own = states / item.name / "decayed.safetensors"
        if own.exists():
            command += ["--start", str(own)]
        elif item.start:
            command += ["--start", str(best_weights(item.start, states, runs))]
    if item.teacher:
        command += ["--teacher", str(best_weights(item.teacher, states, runs))]
    return command


def best_weights(name: str, states: Path, runs: Path) -> Path:
    """The decayed weights of an item, or else those before the decay; of this machine first."""
    places = [folder / name / f"{kind}.safetensors" for kind in ("decayed", "stable") for folder in (runs, states)]
    for path in places:
        if path.exists():
            return path
    raise UsageError(f"{name}: no weights in {states} or {runs}, which another network begins with; train it first")


def keep(run_folder: Path, state: Path) -> None:
    """Copy a run's compact states to where they outlive the machine."""
    state.mkdir(parents=True, exist_ok=True)
    for name in ("stable.safetensors", "decayed.safetensors"):
        if (run_folder / name).exists():
            shutil.copyfile(run_folder / name, state / name)


if __name__ == "__main__":
    run(go_on)
