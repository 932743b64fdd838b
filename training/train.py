"""Train a SAN on packed pictures, in as many runs on as many machines as it takes: `python -m training.train --help`."""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed
import typer
from torch.multiprocessing.spawn import spawn

from sanrt.errors import UsageError
from sanrt.model.checkpoint import save_checkpoint
from sanrt.model.san import SAN
from sanrt.model.spec import Architecture
from training.command import run
from training.device import training_device
from training.learner import Learner, on_device
from training.network import initialise
from training.recording import Record, cuda_graph, plain, tape
from training.score import scores
from training.state import Progress, newest, restore, restore_compact, save, save_compact
from training.tiles import BLOCK, Tiles, load_tiles
from training.weights import start_from, trained_network

LAST_SAVE = 30.0
"""Seconds before the end of the budget in which a state is written in any case: whoever set the budget may be strict."""


@dataclass(frozen=True)
class Schedule:
    """The rate over a run: it rises, stays, and falls to zero over the last part."""

    rate: float
    seconds: float
    """Budget of the run."""
    warmup: float
    """Seconds in which the rate rises."""
    decay: float
    """Share of the budget in which the rate falls, as 1 - sqrt of the way."""

    def at(self, spent: float) -> float:
        """The rate after so many seconds."""
        fallen = max(spent - self.decay_start, 0) / max(self.seconds - self.decay_start, 1e-9)
        return self.rate * min(spent / max(self.warmup, 1e-9), 1.0) * max(1 - math.sqrt(fallen), 0.0)

    @property
    def decay_start(self) -> float:
        """Seconds after which the rate falls."""
        return self.seconds * (1 - self.decay)


@dataclass(frozen=True)
class Plan:
    """Everything that a run is made of, but for the pictures."""

    out: Path
    arch: Architecture
    schedule: Schedule
    batch: int
    patch: int
    """Side of a low-resolution patch, pixels."""
    half: bool
    seed: int = 0
    resume: Path | None = None
    """Compact state to go on from where OUT has none."""
    start: Path | None = None
    """Weights to begin with where there is no state at all."""
    teacher: Path | None = None
    save_every: float = 60.0
    score_every: float = 600.0


@dataclass(frozen=True)
class Worker:
    """One of the processes that share a batch."""

    rank: int = 0
    workers: int = 1
    clock: Callable[[], float] = time.monotonic
    record: Record = plain

    def share(self, batch: int) -> slice:
        """Its part of every batch."""
        return slice(self.rank * batch // self.workers, (self.rank + 1) * batch // self.workers)

    def seconds(self) -> float:
        """The first worker's clock, which all go by."""
        clock = torch.tensor(self.clock(), dtype=torch.float64)
        if self.workers > 1:
            torch.distributed.broadcast(clock, 0)
        return clock.item()


class Stepper:
    """Steps of training that a CUDA graph can hold: batches are drawn from numbers that lie on the device beforehand."""

    def __init__(self, learner: Learner, tiles: Tiles, plan: Plan, worker: Worker) -> None:
        self.learner, self.tiles, self.plan, self.worker = learner, tiles, plan, worker
        device = tiles.high.device
        self.block = -1
        self.draws = self.drawn(0).to(device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses, self.norms = (torch.full((BLOCK,), torch.nan, device=device) for _ in range(2))
        changed = [*learner.vectors().values(), *learner.scalars().values(), learner.rate, self.losses, self.norms]
        self.run = worker.record(self.once, changed)

    def drawn(self, block: int) -> torch.Tensor:
        """This worker's random numbers of BLOCK steps."""
        plan = self.plan
        return self.tiles.draw(plan.batch, plan.patch, plan.seed, block)[:, self.worker.share(plan.batch)].contiguous()

    def step(self, number: int, rate: float) -> None:
        """The step of this number, counted from the first one of all runs."""
        block, row = divmod(number, BLOCK)
        if block != self.block:
            self.draws.copy_(self.drawn(block))
            self.losses.fill_(torch.nan)
            self.norms.fill_(torch.nan)
            self.block = block
        self.row.fill_(row)
        self.learner.rate.fill_(rate)
        self.run()

    def once(self) -> None:
        """What is recorded: nothing in it depends on a value that only Python knows."""
        draws = self.draws.index_select(0, self.row)[0]
        loss, norm = self.learner.step(*self.tiles.patches(draws, self.plan.patch))
        self.losses.index_copy_(0, self.row, loss[None])
        self.norms.index_copy_(0, self.row, norm[None])

    def report(self) -> dict[str, float]:
        """Loss and gradient norm over the current block; here the host waits for the device."""
        losses, norms = (values[~values.isnan()].cpu() for values in (self.losses, self.norms))
        if not len(losses):
            return {}
        numbers = {"l1": losses.mean(), "norm": norms.mean(), "largest_norm": norms.max()}
        return {name: round(value.item(), 6) for name, value in numbers.items()}


def train_on(plan: Plan, tiles: Tiles, held_out: Tiles, worker: Worker) -> Progress:
    """Train until the budget is spent; OUT/stable holds the state before the decay, OUT/current the last one."""
    learner, progress = prepare(plan, tiles.high.device)
    stepper = Stepper(learner, tiles, plan, worker)
    diary = Diary(plan, learner, stepper, held_out, progress) if worker.rank == 0 else None
    begun = worker.seconds() - progress.spent
    while not progress.finished:
        before = progress.spent
        stepper.step(progress.step, plan.schedule.at(before))
        spent = worker.seconds() - begun
        pixels = progress.pixels + plan.batch * plan.patch**2
        progress = Progress(progress.step + 1, spent, spent >= plan.schedule.seconds, pixels)
        if diary:
            diary.write(progress, before)
    return progress


def prepare(plan: Plan, device: torch.device) -> tuple[Learner, Progress]:
    """The learner as the last run left it: interrupted, before its decay, as kept elsewhere; or at its beginning."""
    torch.manual_seed(plan.seed)
    net = SAN(plan.arch)
    initialise(net)
    if plan.start:
        start_from(net, plan.start)
    learner = Learner(net, device, plan.half, trained_network(plan.teacher) if plan.teacher else None)
    if current := newest(plan.out / "current"):
        progress = restore(current, learner)
        if not progress.finished:
            return learner, progress
    if stable := newest(plan.out / "stable"):
        return learner, restore(stable, learner)
    return learner, restore_compact(plan.resume, learner) if plan.resume else Progress()


class Diary:
    """What a run writes down, and when: states, scores, and a line of log for every block of steps."""

    def __init__(self, plan: Plan, learner: Learner, stepper: Stepper, held_out: Tiles, progress: Progress) -> None:
        self.plan, self.learner, self.stepper, self.held_out = plan, learner, stepper, held_out
        self.saved = self.scored = progress.spent

    def write(self, progress: Progress, before: float) -> None:
        """Called after every step; `before` is what had been spent before it."""
        plan, spent = self.plan, progress.spent
        stable_end = plan.schedule.decay_start
        if before < stable_end <= spent:
            save(plan.out / "stable", self.learner, replace(progress, spent=0.0, finished=False))
        near_end = plan.schedule.seconds - LAST_SAVE
        if progress.finished or spent - self.saved >= plan.save_every or before < near_end <= spent:
            save(plan.out / "current", self.learner, progress)
            self.saved = spent
        if self.saved == spent or before < stable_end <= spent:
            self.keep(progress, decaying=before >= stable_end)
        if progress.finished or progress.step % BLOCK == 0:
            self.log(progress)

    def keep(self, progress: Progress, decaying: bool) -> None:
        """Write OUT/stable.safetensors to go on from elsewhere, or OUT/decayed.safetensors, ready to ship."""
        if not decaying:
            save_compact(self.plan.out / "stable.safetensors", self.learner, progress)
        else:
            partial = self.plan.out / "decayed.partial"
            save_checkpoint(partial, self.averaged(), f"sanrt's recipe, {progress.pixels:.2g} low-resolution pixels seen")
            partial.replace(self.plan.out / "decayed.safetensors")

    def log(self, progress: Progress) -> None:
        """Add a line to OUT/log.jsonl, now and then with a score of the averaged weights."""
        line: dict[str, Any] = {"step": progress.step, "seconds": round(progress.spent, 1)}
        line |= {"rate": round(self.plan.schedule.at(progress.spent), 7)} | self.stepper.report()
        if progress.finished or progress.spent - self.scored >= self.plan.score_every:
            line["y_psnr"] = [round(score, 3) for score in self.score()]
            self.scored = progress.spent
        with (self.plan.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def score(self) -> list[float]:
        """Y-PSNR of the averaged weights on each version of the held-out pictures, dB."""
        return scores(on_device(self.averaged(), self.held_out.high.device), self.held_out, self.plan.half)

    def averaged(self) -> SAN:
        """The network with the averaged weights, on the CPU."""
        net = SAN(self.plan.arch)
        net.load_state_dict(self.learner.weights(averaged=True))
        return net


def train(
    out: Annotated[Path, typer.Argument(help="Folder for the states and the log; what is found there is gone on with.")],
    data: Annotated[Path, typer.Option(help="Folder of pictures packed by training.pack.")],
    seconds: Annotated[float, typer.Option(help="Budget of this run; an interrupted run goes on with what is left of it.")],
    scale: int = 4,
    photo: Annotated[bool, typer.Option(help="Learn from JPEG, blurred and noisy pictures too.")] = False,
    groups: int = 4,
    blocks: int = 4,
    channels: int = 64,
    reduction: int = 4,
    batch: int = 8,
    patch: Annotated[int, typer.Option(help="Side of a low-resolution patch, pixels.")] = 32,
    rate: Annotated[float, typer.Option(help="Rate between warm-up and decay.")] = 1e-3,
    warmup: Annotated[float, typer.Option(help="Seconds in which the rate rises.")] = 60,
    decay: Annotated[float, typer.Option(help="Share of the budget in which the rate falls to zero.")] = 0.3,
    start: Annotated[Path | None, typer.Option(help="Weights to begin with; of another scale: their body.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Weights whose output is half of the target.")] = None,
    resume: Annotated[Path | None, typer.Option(help="stable.safetensors to go on from where OUT has no state.")] = None,
    seed: int = 0,
    workers: Annotated[int, typer.Option(help="Processes of one thread each that share a batch, on a CPU.")] = 1,
    half: Annotated[bool, typer.Option("--bf16/--fp32", help="bf16 pays on GPUs and on CPUs with AMX.")] = True,
    save_every: Annotated[float, typer.Option(help="Seconds between states.")] = 60,
    score_every: Annotated[float, typer.Option(help="Seconds between scores on the held-out pictures.")] = 600,
    graph: Annotated[bool | None, typer.Option(help="Record a step and replay it. [default: on a GPU]")] = None,
) -> None:
    """Train with L1 and Adam for a budget of seconds: the rate rises, stays and falls. Write states and OUT/log.jsonl."""
    device = training_device()
    if workers > 1 and (device.type == "cuda" or batch % workers):
        raise UsageError(f"--workers {workers}: expected 1 on a GPU, and a divisor of the batch of {batch} on a CPU")
    arch = Architecture(scale, groups, blocks, channels, reduction)
    schedule = Schedule(rate, seconds, warmup, decay)
    plan = Plan(out, arch, schedule, batch, patch, half, seed, resume, start, teacher, save_every, score_every)
    with locked(out):
        tiles, held_out = (load_tiles(data, scale, photo, device, prefix) for prefix in ("", "dev-"))
        print(f"{arch.name}: {len(tiles.high)} tiles, {len(tiles.low)} versions, on {device}", flush=True)
        if workers > 1:
            (out / "meeting").unlink(missing_ok=True)
            spawn(train_together, (workers, plan, tiles, held_out), workers)  # type: ignore[no-untyped-call]
        else:
            train_on(plan, tiles, held_out, Worker(record=recorder(device, graph)))


def recorder(device: torch.device, graph: bool | None) -> Record:
    """How steps are run on a device: as CUDA graph on a GPU, unless it is refused; a CPU can rehearse that."""
    if device.type == "cuda":
        return plain if graph is False else cuda_graph
    return tape if graph else plain


def train_together(rank: int, workers: int, plan: Plan, tiles: Tiles, held_out: Tiles) -> None:
    """One of several processes: all have the same weights and average their gradients."""
    torch.set_num_threads(1)
    meeting = f"file://{(plan.out / 'meeting').resolve()}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    train_on(plan, tiles, held_out, Worker(rank, workers))
    torch.distributed.destroy_process_group()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a run's folder; raises UsageError where another process does."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{out}: another process trains there; wait for it, or end it") from error
        yield


if __name__ == "__main__":
    run(train)
