"""Pictures in line, and through the pipeline's steps: decoded and encoded by threads while one network computes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from sanrt.errors import SanrtError
from sanrt.request import Part, Request
from sanrt.runtime.runs.pipeline import (
    WAITING,
    Event,
    Listener,
    PipelineOptions,
    Written,
    encoders,
    enlarge,
    nobody,
    read,
    reason,
    write,
)
from sanrt.runtime.tiling.upscaling import NetworkRunner
from sanrt.serve.metrics import Metrics
from sanrt.serve.networks import Networks
from sanrt.serve.options import Limits
from sanrt.serve.problems import BusyError, StoppingError, TooLongError, UnexpectedError

T = TypeVar("T")

DECODED = 2
"""Pictures in memory before or in the network: the one that runs, and the next, as in a run over a folder."""
FIRST_GUESS = 2.0
"""Seconds that a picture takes, until one has been measured."""


class AbandonedError(Exception):
    """Nobody waits for this picture any more."""


class Queue:
    """The one line of a process. Made, and used, in the event loop."""

    def __init__(self, limits: Limits, networks: Networks) -> None:
        self.limits, self.networks, self.stopping, self.pictures = limits, networks, False, 0
        self.metrics = Metrics(lambda: self.pictures, lambda: len(self.networks.loaded))
        writers = encoders()
        self.decoding, self.encoding = asyncio.Semaphore(DECODED), asyncio.Semaphore(WAITING + writers)
        self.reader, self.writer = ThreadPoolExecutor(1, "sanrt-read"), ThreadPoolExecutor(writers, "sanrt-write")
        self.usual = FIRST_GUESS

    def require_place(self) -> None:
        """Raise BusyError where the line is full, StoppingError where the server is about to end."""
        if self.stopping:
            raise StoppingError("the server is stopping; ask again when it is back", retry_after=10)
        if self.pictures >= self.limits.queue:
            raise BusyError(
                f"{self.pictures} pictures wait or are worked on, the most that this server takes; ask again later",
                retry_after=self.usual * self.pictures,
            )

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in line, as long as the context lasts; raises as `require_place` does."""
        self.require_place()
        self.pictures += 1
        try:
            yield
        finally:
            self.pictures -= 1

    async def upscale(self, part: Part, request: Request, listener: Listener = nobody) -> Written:
        """The outcome of the one picture of a request, which has a place.

        Raises what its steps raise (as SanrtErrors of one line), StoppingError, and TooLongError. Cancelled, it leaves the
        line at once; a step that runs is waited for, a streamed picture's only to the end of a tile.
        """
        limit = asyncio.timeout(None)
        try:
            async with limit:
                return await self.steps(part, request, listener, limit)
        except SanrtError:
            raise
        except Exception as error:
            if limit.expired():
                allowed = f"the {self.limits.seconds:g} s that this server allows"
                raise TooLongError(f"took more than {allowed}; send a smaller picture") from None
            raise UnexpectedError(reason(part.jobs[0], error)) from error

    async def steps(self, part: Part, request: Request, listener: Listener, limit: asyncio.Timeout) -> Written:
        """Wait, then read, enlarge and write, at most DECODED pictures before the network and some behind it."""
        (job,), entered, abandoned = part.jobs, time.perf_counter(), threading.Event()

        def heard(event: Event) -> None:
            if abandoned.is_set():
                raise AbandonedError
            listener(event)

        async def step(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
            running = pool.submit(work)
            result = asyncio.wrap_future(running)
            try:
                return await asyncio.shield(result)
            except asyncio.CancelledError:
                abandoned.set()
                if not running.cancel():
                    await asyncio.gather(result, return_exceptions=True)
                raise

        options = PipelineOptions(part.recipe, request.encoding)
        async with self.decoding:
            if self.stopping:
                self.require_place()
            started = time.perf_counter()
            limit.reschedule(asyncio.get_running_loop().time() + self.limits.seconds)
            with self.networks.needed(part.choice) as key:
                network = await step(self.networks.thread, partial(self.networks.load, key))
                runner = NetworkRunner(network, request.upscaling)
                picture = await step(self.reader, partial(read, job, runner, options, heard))
                picture = await step(self.networks.thread, partial(enlarge, picture, runner, heard))
            await self.encoding.acquire()
        try:
            written = await step(self.writer, partial(write, picture, options))
        finally:
            self.encoding.release()
        assert isinstance(written, Written)
        self.usual += (time.perf_counter() - started - self.usual) / 8
        self.metrics.upscaled(written.pixels, {"wait": started - entered, **written.seconds})
        return written

    def stop(self) -> None:
        """Take no more pictures, and send each that waits away when its turn comes: only those that run are finished."""
        self.stopping = True

    def close(self) -> None:
        """End the threads, and drop the models."""
        for pool in (self.reader, self.writer):
            pool.shutdown(wait=True)
        self.networks.stop()
