"""Latency of ways of running the network, side by side: `sanrt bench`, and the core of `benchmarks/latency.py`.

Contenders take turns, spread evenly over the whole time, so that whatever else the machine does hits all of them alike;
each lives in a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sanrt.arrays import Array, psnr
from sanrt.errors import BackendError
from sanrt.model.spec import Precision
from sanrt.runtime import host as machine
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_unguarded
from sanrt.runtime.host import free_host_memory
from sanrt.runtime.runs.timing import (
    Interval,
    Size,
    Worker,
    events_usable,
    free_on_gpu,
    intervals,
    peak_memory,
    timed,
    timed_by_events,
)
from sanrt.runtime.tiling.plan import PAPER_REGIONS
from sanrt.runtime.tiling.upscaling import network_input

LEAST_TURNS, TURN = 5, 1.0
"""Turns of a contender at the least, and seconds of a turn where its share of the time allows that."""
REST = 0.05
"""Seconds between turns: the threads of the one before stop spinning."""
STEADY, STEADY_RUNS, MOST_WARM_UPS = 1.1, 3, 20
"""Warm-up ends when the last STEADY_RUNS times lie within this ratio, or after this many."""
LONG = 5.0
"""Seconds of a run that cold caches and a processor at rest, a few hundredths of a second, do not change."""


@dataclass(frozen=True)
class Case(Size):
    """A size, and the k of its k x k attention regions."""

    regions: int = PAPER_REGIONS

    def __str__(self) -> str:
        return super().__str__() + (f", k={self.regions}" if self.regions != PAPER_REGIONS else "")


class LeftOut(Exception):
    """A contender cannot take part at a size; no failure."""


@dataclass(frozen=True)
class Running:
    """A loaded network."""

    infer: Callable[[Array], Array]
    """float32 (1, 3, H, W) -> (1, 3, sH, sW)."""
    precision: Precision
    """The type of convolutions and attention, as it runs here."""
    on: str
    """The library that runs it, and the device: `torch on CPU`."""
    on_gpu: bool = False
    infer_with_regions: Callable[[Array, int], Array] | None = None
    """The same with k x k attention regions, as `Backend.infer_with_regions`; None where it has the paper's only."""


@dataclass(frozen=True)
class Contender:
    """One way of running the network."""

    name: str
    open: Callable[[Path, int | None], Running]
    """(model, threads), called in the contender's own process."""
    needed: Callable[[Size], int] | None = None
    """Bytes without which it is left out at a size."""
    needs_gpu: bool = False
    slow_to_start: bool = False
    """It only takes part when asked for."""


class Session:
    """A contender in its own process: warms up, then runs the same picture again and again."""

    def __init__(self, open_: Callable[[Path, int | None], Running], model: Path, threads: int | None) -> None:
        free = free_on_gpu()
        self.running = open_(model, threads)
        self.free_at_first = free if self.running.on_gpu else None
        self.time = timed_by_events if self.running.on_gpu and events_usable() else timed

    def facts(self) -> tuple[Precision, str]:
        """Precision, and what runs it."""
        return self.running.precision, self.running.on

    def takes(self, regions: int) -> bool:
        """Whether it runs with k x k regions."""
        return regions == PAPER_REGIONS or self.running.infer_with_regions is not None

    def warm_up(self, picture: Array, patience: float, regions: int = PAPER_REGIONS) -> Array:
        """Run a new picture until its times are steady, or for `patience` seconds; its output."""
        self.picture, self.infer = picture, self.running.infer
        if regions != PAPER_REGIONS and (other := self.running.infer_with_regions):
            self.infer = lambda picture: other(picture, regions)
        times = [self.run()]
        while not steady(times) and sum(times) < patience:
            times.append(self.run())
        self.long = times[-1] > LONG
        return self.output

    def turn(self, seconds: float) -> list[float]:
        """Times of runs one after the other that together take `seconds`; unless they are LONG, the first does not count."""
        if not self.long:
            self.run()
        times = [self.run()]
        while sum(times) < seconds:
            times.append(self.run())
        return times

    def run(self) -> float:
        """Seconds of one run; backends return arrays on the host, so on a GPU both copies are in it."""

        def infer() -> None:
            self.output = self.infer(self.picture)

        return self.time(infer)

    def peak(self) -> int:
        """Largest resident size so far, bytes."""
        return peak_memory()

    def gpu_memory(self) -> int | None:
        """Bytes of the GPU's memory that are taken since before the model was loaded: pools keep their largest size."""
        now = free_on_gpu()
        return None if self.free_at_first is None or now is None else self.free_at_first - now


@dataclass(frozen=True)
class Timing:
    """One contender on one size."""

    precision: Precision
    on: str
    """The library that ran it, and the device: `torch on CPU`."""
    p50: Interval
    """Seconds, as the next two."""
    p90: Interval
    p99: Interval
    runs: int
    turns: int
    """Turns that these runs were made in."""
    peak: int
    """Bytes resident at most, of the whole process."""
    gpu_memory: int | None
    """Bytes taken of the GPU's memory; None on a CPU."""
    psnr: float | None
    """dB against the reference, of the value range; None where they are equal."""


@dataclass(frozen=True)
class Result:
    """What came of a contender on a size."""

    size: Case
    name: str
    timing: Timing | None
    reason: str = ""
    """Why nothing was measured."""
    failed: bool = False


@dataclass
class Entrant:
    """A contender's runs on one size, in its own process."""

    contender: Contender
    worker: Worker
    turns: list[list[float]] = field(default_factory=list)
    """Seconds of the runs, turn by turn."""
    psnr: float = 0.0
    stopped: Exception | None = None

    def attempt(self, method: str, *arguments: Any) -> Any:
        """Call the session; a failure takes the entrant out of this size."""
        try:
            return self.worker.call(method, *arguments)
        except BackendError as error:
            self.stopped = error

    def enter(self, size: Case, x: Array, reference: Array, peak: float, patience: float) -> None:
        """Warm up on a new picture, and compare its output with the reference, whose values run from 0 to `peak`."""
        self.turns, self.stopped = [], None
        try:
            require_memory(self.contender, size)
        except LeftOut as reason:
            self.stopped = reason
            return
        if not self.attempt("takes", size.regions):
            self.stopped = self.stopped or LeftOut(f"has the paper's {PAPER_REGIONS} x {PAPER_REGIONS} regions only")
            return
        output = self.attempt("warm_up", x, patience, size.regions)
        if self.stopped is None and not np.isfinite(output).all():
            self.stopped = BackendError("its output has values that are not finite")
        if self.stopped is None:
            self.psnr = psnr(output, reference, peak)

    def progress(self, seconds: float) -> float:
        """The share of its work that it has done, 1 is all: its runs took its seconds, in LEAST_TURNS turns or more."""
        if self.stopped:
            return 1.0
        used = sum(map(sum, self.turns)) / seconds if seconds else 1.0
        return min(len(self.turns) / LEAST_TURNS, used)

    def go(self, seconds: float) -> None:
        """One turn."""
        time.sleep(REST)
        times = self.attempt("turn", min(TURN, seconds / LEAST_TURNS))
        if self.stopped is None:
            self.turns.append(times)

    def result(self, size: Case) -> Result:
        """Its figures, or the reason why it has none."""
        if self.stopped:
            return Result(size, self.contender.name, None, str(self.stopped), not isinstance(self.stopped, LeftOut))
        call = self.worker.call
        precision, on = call("facts")
        p50, p90, p99 = intervals(self.turns)
        counts, memory = (sum(map(len, self.turns)), len(self.turns)), (call("peak"), call("gpu_memory"))
        closeness = None if np.isinf(self.psnr) else self.psnr
        return Result(size, self.contender.name, Timing(precision, on, p50, p90, p99, *counts, *memory, closeness))


def steady(times: list[float]) -> bool:
    """Whether the last few times agree, or there are enough of them."""
    last = times[-STEADY_RUNS:]
    return len(times) >= MOST_WARM_UPS or (len(last) == STEADY_RUNS and max(last) <= STEADY * min(last))


def open_backend(name: str, precision: Precision | None, model: Path, threads: int | None) -> Running:
    """One of sanrt's backends, as `sanrt run` uses it."""
    backend = load_unguarded(name, model, RunOptions(threads=threads, precision=precision))
    on, on_gpu = f"{backend.name} on {backend.device}", backend.memory is not None
    return Running(backend.infer, backend.spec.precision, on, on_gpu, backend.infer_with_regions)


def in_precision(name: str, precision: Precision | None) -> Contender:
    """One of sanrt's backends; None is its own choice."""
    return Contender(f"{name} {precision}" if precision else name, partial(open_backend, name, precision))


def own_precisions(name: str) -> list[Precision | None]:
    """The precisions that a backend is measured in unless told: its own choice, and both where that is a choice of two."""
    fast = {"openvino": (Precision.BF16, {"AMX-BF16", "AVX512-BF16"}), "native": (Precision.INT16, {"AVX512-VNNI"})}
    precision, features = fast.get(name, (None, set[str]()))
    return [Precision.FP32, precision] if features & set(machine.cpu_features()) else [None]


def race(
    contenders: Sequence[Contender],
    reference: Contender,
    model: Path,
    value_range: float,
    pictures: Callable[[Size], npt.NDArray[np.uint8]],
    sizes: Sequence[Case],
    seconds: float,
    threads: int | None,
) -> Iterator[list[Result]]:
    """Every contender's result on each size, in the given order; a failure stops nobody else.

    `pictures` makes an (H, W, 3) picture of a size; outputs are compared with the reference's. `seconds` are of all measured
    runs on one size.
    """
    with ExitStack() as stack:
        judge = stack.enter_context(Worker(partial(Session, reference.open, model, threads)))
        entrants = [
            Entrant(each, stack.enter_context(Worker(partial(Session, each.open, model, threads)))) for each in contenders
        ]
        share = seconds / len(entrants)
        for size in sizes:
            x = network_input(pictures(size), value_range)
            expected = judge.call("warm_up", x, 0.0, size.regions)
            for entrant in entrants:
                entrant.enter(size, x, expected, value_range, share / 2)
            take_turns(entrants, share)
            yield [entrant.result(size) for entrant in entrants]


def take_turns(entrants: list[Entrant], seconds: float) -> None:
    """Whoever has done least goes next: all begin one after the other, fast ones' turns then lie between slow ones'."""
    while (behind := min(entrants, key=lambda entrant: entrant.progress(seconds))).progress(seconds) < 1:
        behind.go(seconds)


def require_memory(contender: Contender, size: Size) -> None:
    """Raise LeftOut where a contender's own matrices exceed the free memory of what it runs on."""
    needed = contender.needed(size) if contender.needed else 0
    free = (free_on_gpu() or 0) if contender.needs_gpu else free_host_memory()
    if needed > free:
        raise LeftOut(f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
