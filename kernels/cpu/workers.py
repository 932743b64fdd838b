"""Threads that share the work of one picture on the CPU."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from itertools import repeat
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from sanrt.errors import BackendError
from sanrt.kernels.cpu.ir import aligned
from sanrt.wording import option

Outcomes = list[BaseException | None]
"""What became of a thread's share: its error, or None."""
Order = tuple[Callable[[int], object], Outcomes]
"""Work for a thread, and the list to which it adds its outcome."""
Orders = SimpleQueue[Order | None]
"""What a thread waits for; None ends it."""


class Workers:
    """A fixed number of threads, the caller's among them, each with scratch memory of its own.

    A network is dozens of short pieces of work one after the other: bare queues start one in a fraction of the time that
    concurrent.futures takes. One caller at a time. The threads end with `close`, or when nobody refers to the object any
    more; a forked process starts its own.
    """

    def __init__(self, threads: int) -> None:
        self.scratch = threading.local()
        self.orders: list[Orders] = []
        """One for each thread but the caller's."""
        self.start(threads - 1)
        weakref.finalize(self, end, self.orders)

    def start(self, others: int) -> None:
        """Start the threads beside the caller's, in place of any before."""
        self.process = os.getpid()
        self.finished: SimpleQueue[None] = SimpleQueue()
        """Receives an item for every order that is carried out."""
        self.orders.clear()
        try:
            for number in range(1, others + 1):
                orders: Orders = SimpleQueue()
                threading.Thread(target=serve, args=(number, orders, self.finished), daemon=True).start()
                self.orders.append(orders)
        except RuntimeError as error:
            self.close()
            raise BackendError(f"{others + 1} threads cannot be started ({error}); use fewer {option('threads')}") from error

    @property
    def count(self) -> int:
        """Number of threads, the caller's among them."""
        return len(self.orders) + 1

    def run(self, work: Callable[[int], object], release: Callable[[], object] = lambda: None) -> None:
        """Call work(number) on every thread at once, number 0 on the caller's. Raises the first error once all are done.

        release: called when the caller is interrupted (KeyboardInterrupt), before the others are waited for; it has to end
        their waiting for the caller's share, if they do.
        """
        if os.getpid() != self.process:
            # Of a process' threads only the one that forks is there in the child; the others' queues would never be read.
            self.start(len(self.orders))
        outcomes: Outcomes = []
        errors: Outcomes = []
        try:
            # Python looks for signals between bytecodes, of which this loop has none: no interrupt comes when only some
            # threads have their orders, and the count below would never be reached.
            deque(map(SimpleQueue.put, self.orders, repeat((work, outcomes))), maxlen=0)
            errors.append(outcome(work, 0))
        except KeyboardInterrupt as interrupt:
            errors.append(interrupt)
            release()
        while True:
            try:
                while len(outcomes) < len(self.orders):
                    self.finished.get()
                break
            except KeyboardInterrupt as interrupt:  # raised below: until all are done, they write to the maps
                errors.append(interrupt)
        for error in filter(None, [*errors, *outcomes]):
            raise error

    def by_rows(self, count: int, work: Callable[[slice], object]) -> None:
        """Call work(rows) on every thread, each with its share of `count` rows."""
        self.run(lambda t: work(slice(count * t // self.count, count * (t + 1) // self.count)))

    def buffer(self, name: str, size: int) -> npt.NDArray[np.float32]:
        """Scratch memory of the calling thread, of at least `size` float32; the same at every call, never cleared."""
        held: npt.NDArray[np.float32] | None = getattr(self.scratch, name, None)
        if held is None or held.size < size:
            held = aligned((size,))
            setattr(self.scratch, name, held)
        return held

    def close(self) -> None:
        """End the threads; what is run afterwards runs on the caller's alone."""
        end(self.orders)


def serve(number: int, orders: Orders, finished: SimpleQueue[None]) -> None:
    """The life of a thread: carry out orders until None comes.

    It holds nothing of `Workers`, which could never be collected otherwise, nor its threads ended.
    """
    while order := orders.get():
        work, outcomes = order
        outcomes.append(outcome(work, number))
        # While the thread waits for the next order, these names would keep the arrays of this one in memory.
        del order, work, outcomes
        finished.put(None)


def end(threads: list[Orders]) -> None:
    """Tell threads to end."""
    while threads:
        threads.pop().put(None)


def outcome(work: Callable[[int], object], number: int) -> BaseException | None:
    """The error that work(number) raises, or None."""
    try:
        work(number)
    except BaseException as error:
        return error
    return None
