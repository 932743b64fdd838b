"""The state of a run in files small enough to travel, written so that a kill leaves the old one or the new one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sanrt.errors import CheckpointError
from training.learner import Learner

RAW, AVERAGE = "raw.", "average."
"""What the tensors' names begin with in a compact state."""

FIXED = ("mean_in.", "mean_out.")
"""The tensors that are not trained; a compact state has them so that it is a whole network."""


@dataclass(frozen=True)
class Progress:
    """How far a training is."""

    step: int = 0
    """Updates since the weights were initialised, over all runs."""
    spent: float = 0.0
    """Seconds of its budget that the current run has used."""
    finished: bool = False
    """The rate has fallen to zero: the next run starts from the state kept before it fell."""
    pixels: int = 0
    """Low-resolution pixels seen since the weights were initialised."""


def save(folder: Path, learner: Learner, progress: Progress) -> None:
    """Write a full state (weights, average, each moment in a file) into a folder of states, then remove the older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    partial, new = folder / "partial", folder / f"{progress.step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, vector in learner.vectors().items():
        torch.save(cpu_copies(learner.named(vector)), partial / f"{name}.pt")
    numbers = asdict(progress) | {name: scalar.item() for name, scalar in learner.scalars().items()}
    (partial / "progress.json").write_text(json.dumps(numbers))
    if new.exists():
        new.rename(folder / "replaced")
    partial.rename(new)
    for old in folder.iterdir():
        if old != new:
            shutil.rmtree(old)


def newest(folder: Path) -> Path | None:
    """The last complete state in a folder of states."""
    found = sorted(folder.glob("[0-9]" * 8)) or sorted(folder.glob("replaced"))
    return found[-1] if found else None


def restore(state: Path, learner: Learner) -> Progress:
    """Load a full state that `save` wrote, on any machine; raises CheckpointError for another network's."""
    for name, vector in learner.vectors().items():
        path = state / f"{name}.pt"
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); remove {state} to start without it") from error
        fill(learner.named(vector), tensors, path, learner)
    numbers = json.loads((state / "progress.json").read_text())
    for name, scalar in learner.scalars().items():
        scalar.fill_(numbers[name])
    return read_progress(state)


def read_progress(state: Path) -> Progress:
    """How far the training was when a full state was written."""
    numbers = json.loads((state / "progress.json").read_text())
    return Progress(**{field.name: numbers[field.name] for field in fields(Progress) if field.name in numbers})


def save_compact(path: Path, learner: Learner, progress: Progress) -> None:
    """Write the weights and their average as one fp16 file, to be kept in the repository; Adam's moments are left out."""
    seen = {"step": str(progress.step), "pixels": str(progress.pixels)}
    named = {prefix + key: t.half() for prefix in (RAW, AVERAGE) for key, t in learner.weights(prefix == AVERAGE).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({key: tensor.contiguous() for key, tensor in named.items()}, partial, seen)
    partial.replace(path)


def restore_compact(path: Path, learner: Learner) -> Progress:
    """Load what `save_compact` wrote; Adam starts anew, so the run needs a warm-up."""
    tensors, progress = read_compact(path)
    for prefix, vector in ((RAW, learner.flat.detach()), (AVERAGE, learner.average)):
        mine = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        fill(learner.named(vector), {key: t for key, t in mine.items() if not key.startswith(FIXED)}, path, learner)
    return progress


def read_compact(path: Path) -> tuple[dict[str, Tensor], Progress]:
    """The tensors of a compact state, float32, by their prefixed names, and what they have seen."""
    try:
        with safe_open(path, "pt") as file:
            seen = file.metadata() or {}
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); expected a state of training") from error
    return tensors, Progress(step=int(seen.get("step", 0)), pixels=int(seen.get("pixels", 0)))


def cpu_copies(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that own their memory, in plain order, on the CPU."""
    return {key: part.detach().to("cpu", copy=True).contiguous() for key, part in named.items()}


def fill(parts: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path, learner: Learner) -> None:
    """Copy tensors into a learner's; raises CheckpointError unless names and shapes are the same."""
    for key in parts.keys() | tensors.keys():
        found, expected = (list(each[key].shape) if key in each else "none" for each in (tensors, parts))
        if found != expected:
            raise CheckpointError(f"{path}: tensor {key} is {found}, expected {expected} for {learner.net.arch.name}")
    for key, part in parts.items():
        part.copy_(tensors[key])
