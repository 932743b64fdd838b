"""Times of runs in processes of their own, their percentiles with intervals, and a process's largest memory."""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self

import numpy as np
import psutil

from sanrt import wording
from sanrt.errors import BackendError, UsageError, first_line
from sanrt.model.spec import MIN_SIDE
from sanrt.runtime import host as machine
from sanrt.wording import Wording

RESAMPLES, CONFIDENCE = 2000, 95
"""Draws of the bootstrap, and the confidence of its intervals in per cent."""
PROCESS_STATUS = Path("/proc/self/status")
LOOK_SECONDS = 0.002


@dataclass(frozen=True)
class Size:
    """A picture's size in pixels."""

    width: int
    height: int

    @property
    def pixels(self) -> int:
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The size in WIDTHxHEIGHT; raises UsageError for anything else, and for sides that the network does not take."""
        found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
        if not found or min(map(int, found.groups())) < MIN_SIDE:
            raise UsageError(f"size {text!r}: expected WIDTHxHEIGHT such as 320x180, each side at least {MIN_SIDE} pixels")
        return cls(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Interval:
    """A percentile of the measured seconds, and where it lies with CONFIDENCE per cent."""

    value: float
    low: float
    high: float


def intervals(turns: list[list[float]], percentiles: tuple[int, ...] = (50, 90, 99)) -> list[Interval]:
    """Percentiles of the times of all turns, and their intervals; of few times, the high percentiles are the slowest one.

    Whole turns are drawn for the bootstrap, since the runs of one are alike: they share the machine's state.
    """
    values = np.percentile(np.concatenate(turns), percentiles)
    drawn = np.random.default_rng(0).integers(len(turns), size=(RESAMPLES, len(turns)))
    found = [np.percentile(np.concatenate([turns[turn] for turn in each]), percentiles) for each in drawn]
    low, high = np.percentile(found, [(100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2], axis=0)
    return [Interval(*map(float, each)) for each in zip(values, low, high, strict=True)]


class Worker:
    """An object that lives in a process of its own, so that its memory is its own; a context manager.

    make: called in the process; it, the arguments and the results of `call` travel by pickle.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make, wording.wording), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call the object's method; raises BackendError with the reason when it fails or the process ends."""
        try:
            self.connection.send((method, arguments))
            failed, result = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise BackendError(f"its process ended (exit {self.process.exitcode}); is there enough memory?") from None
        if failed:
            raise BackendError(result)
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.join()


def serve(connection: Connection, make: Callable[[], Any], words: Wording) -> None:
    """Make the object when it is first called, then answer calls until the other end closes, in its process's words."""
    wording.wording = words
    made: list[Any] = []
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            made = made or [make()]
            answer = False, getattr(made[0], method)(*arguments)
        except Exception as error:  # whatever a library raises becomes a row's reason
            answer = True, first_line(error)
        connection.send(answer)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    if PROCESS_STATUS.exists():  # not ru_maxrss, which on Linux starts with the parent's
        found = re.search(r"VmHWM:\s*(\d+)", PROCESS_STATUS.read_text())
        assert found
        return int(found[1]) * 1024
    if peak := getattr(psutil.Process().memory_info(), "peak_wset", None):  # Windows
        return int(peak)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


class ResidentPeak:
    """The process's largest resident size while the body of a `with` runs, looked at every few milliseconds.

    Unlike `peak_memory` it forgets what was before, on every system.
    """

    def __enter__(self) -> Self:
        self.process, self.done = psutil.Process(), Event()
        self.before = self.bytes = self.process.memory_info().rss
        self.thread = Thread(target=self.look, daemon=True)
        self.thread.start()
        return self

    def look(self) -> None:
        while not self.done.wait(LOOK_SECONDS):
            self.bytes = max(self.bytes, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self.bytes = max(self.bytes, self.process.memory_info().rss)
        self.done.set()
        self.thread.join()


def timed(work: Callable[[], object]) -> float:
    """Seconds of one run."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def timed_by_events(work: Callable[[], object]) -> float:
    """Seconds between two CUDA events around one run."""
    import torch

    event: Any = torch.cuda.Event
    before, after = (event(enable_timing=True) for _ in range(2))
    before.record()
    work()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def events_usable() -> bool:
    """Whether PyTorch is here and reaches a GPU."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def free_on_gpu() -> int | None:
    """Bytes of the first GPU's memory that nobody has; None without a GPU."""
    return machine.free_gpu_memory(0) if machine.gpus().devices else None
