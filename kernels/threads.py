"""Threads that share the work of one picture on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from sanrt.errors import BackendError

Outcomes = list[BaseException | None]
Job = tuple[Callable[[], object], Outcomes]
"""Work, and where its errors go."""


class Workers:
    """A fixed number of threads, the caller's among them, each with scratch memory of its own.

    A network is hundreds of short pieces of work one after the other: bare queues start one in a fraction of the time that
    concurrent.futures takes. They do not survive a fork.
    """

    def __init__(self, threads: int) -> None:
        self.scratch = threading.local()
        self.begun: list[SimpleQueue[Job | None]] = []
        self.ended: SimpleQueue[None] = SimpleQueue()
        try:
            while len(self.begun) < threads - 1:
                queue: SimpleQueue[Job | None] = SimpleQueue()
                threading.Thread(target=self.serve, args=(queue,), daemon=True).start()
                self.begun.append(queue)
        except RuntimeError as error:
            self.close()
            raise BackendError(f"{threads} threads cannot be started ({error}); use fewer --threads") from error

    def serve(self, queue: SimpleQueue[Job | None]) -> None:
        """What the other threads do."""
        while job := queue.get():
            work, outcomes = job
            outcomes.append(outcome(work))
            self.ended.put(None)
            del job, work, outcomes  # with the arrays that they hold

    def run(self, work: Callable[[], object]) -> None:
        """work() on every thread at once; how they share it is theirs. Raises the first error once all have ended."""
        outcomes: Outcomes = []
        for queue in self.begun:
            queue.put((work, outcomes))
        outcomes.append(outcome(work))
        interrupts = []
        while len(outcomes) <= len(self.begun):
            try:
                self.ended.get()
            except KeyboardInterrupt as interrupt:  # told when nobody writes to the maps any more
                interrupts.append(interrupt)
        for error in filter(None, [*interrupts, *outcomes]):
            raise error

    def buffer(self, name: str, size: int) -> npt.NDArray[np.float32]:
        """This thread's own scratch memory of at least `size` numbers."""
        held: npt.NDArray[np.float32] | None = getattr(self.scratch, name, None)
        if held is None or held.size < size:
            held = np.zeros(size, np.float32)
            setattr(self.scratch, name, held)
        return held

    def close(self) -> None:
        """End the threads; what is run afterwards has only the caller's."""
        while self.begun:
            self.begun.pop().put(None)


def outcome(work: Callable[[], object]) -> BaseException | None:
    """The error that work() raises, if any."""
    try:
        work()
    except BaseException as error:
        return error
    return None
