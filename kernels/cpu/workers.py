"""Threads that share the work of one picture on the CPU."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from itertools import repeat
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from sanrt.errors import BackendError
from sanrt.kernels.cpu.ir import aligned

Outcomes = list[BaseException | None]
Job = tuple[Callable[[int], object], Outcomes]
"""Work, and where its errors go."""


class Workers:
    """A fixed number of threads, the caller's among them, each with scratch memory of its own.

    A network is dozens of short pieces of work one after the other: bare queues start one in a fraction of the time that
    concurrent.futures takes. They do not survive a fork.
    """

    def __init__(self, threads: int) -> None:
        self.scratch = threading.local()
        self.begun: list[SimpleQueue[Job | None]] = []
        self.ended: SimpleQueue[None] = SimpleQueue()
        try:
            while len(self.begun) < threads - 1:
                queue: SimpleQueue[Job | None] = SimpleQueue()
                threading.Thread(target=self.serve, args=(len(self.begun) + 1, queue), daemon=True).start()
                self.begun.append(queue)
        except RuntimeError as error:
            self.close()
            raise BackendError(f"{threads} threads cannot be started ({error}); use fewer --threads") from error

    @property
    def count(self) -> int:
        """Threads, the caller's among them."""
        return len(self.begun) + 1

    def serve(self, number: int, queue: SimpleQueue[Job | None]) -> None:
        """What the other threads do."""
        while job := queue.get():
            work, outcomes = job
            outcomes.append(outcome(work, number))
            self.ended.put(None)
            del job, work, outcomes  # with the arrays that they hold

    def run(self, work: Callable[[int], object], release: Callable[[], object] = lambda: None) -> None:
        """work(number) on every thread at once, 0 the caller's. Raises the first error once all have ended.

        release: called where the caller is interrupted, so that nobody waits for its share.
        """
        outcomes: Outcomes = []
        errors: Outcomes = []
        try:
            # Within map no interrupt comes between two of them.
            deque(map(SimpleQueue.put, self.begun, repeat((work, outcomes))), maxlen=0)
            errors.append(outcome(work, 0))
        except KeyboardInterrupt as interrupt:
            errors.append(interrupt)
            release()
        while len(outcomes) < len(self.begun):
            try:
                self.ended.get()
            except KeyboardInterrupt as interrupt:  # told when nobody writes to the maps any more
                errors.append(interrupt)
        for error in filter(None, [*errors, *outcomes]):
            raise error

    def buffer(self, name: str, size: int) -> npt.NDArray[np.float32]:
        """This thread's own scratch memory of at least `size` numbers."""
        held: npt.NDArray[np.float32] | None = getattr(self.scratch, name, None)
        if held is None or held.size < size:
            held = aligned((size,))
            setattr(self.scratch, name, held)
        return held

    def close(self) -> None:
        """End the threads; what is run afterwards has only the caller's."""
        while self.begun:
            self.begun.pop().put(None)


def outcome(work: Callable[[int], object], number: int) -> BaseException | None:
    """The error that work(number) raises, if any."""
    try:
        work(number)
    except BaseException as error:
        return error
    return None
