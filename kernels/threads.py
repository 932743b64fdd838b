"""Threads that share the work of one picture on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt


class Workers:
    """A fixed number of threads, the caller's among them, each with scratch memory of its own.

    A network is hundreds of short pieces of work one after the other: bare queues start one in a fraction of the time that
    concurrent.futures takes.
    """

    def __init__(self, threads: int) -> None:
        self.scratch = threading.local()
        self.begun: list[SimpleQueue[Callable[[], object] | None]] = [SimpleQueue() for _ in range(threads - 1)]
        self.ended: SimpleQueue[BaseException | None] = SimpleQueue()
        for queue in self.begun:
            threading.Thread(target=self.serve, args=(queue,), daemon=True).start()

    def serve(self, queue: SimpleQueue[Callable[[], object] | None]) -> None:
        """What the other threads do."""
        while work := queue.get():
            self.ended.put(self.outcome(work))

    def outcome(self, work: Callable[[], object]) -> BaseException | None:
        """The error that work() raises, if any."""
        try:
            work()
        except BaseException as error:
            return error
        return None

    def run(self, work: Callable[[], object]) -> None:
        """work() on every thread at once; how they share it is theirs. Raises the first error once all have ended."""
        for queue in self.begun:
            queue.put(work)
        outcomes = [self.outcome(work), *(self.ended.get() for _ in self.begun)]
        for error in filter(None, outcomes):
            raise error

    def buffer(self, name: str, size: int) -> npt.NDArray[np.float32]:
        """This thread's own scratch memory of at least `size` numbers."""
        held: npt.NDArray[np.float32] | None = getattr(self.scratch, name, None)
        if held is None or held.size < size:
            held = np.zeros(size, np.float32)
            setattr(self.scratch, name, held)
        return held

    def close(self) -> None:
        """End the threads."""
        for queue in self.begun:
            queue.put(None)
