"""Pictures that are upscaled while nobody waits for the answer: their progress, and results that are kept for a while."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from sanrt.errors import SanrtError
from sanrt.runtime.runs.pipeline import Advanced, Event, Opened
from sanrt.serve.options import Limits
from sanrt.serve.problems import BusyError, GoneError, NotDoneError, NotFoundError, document, status_and_kind
from sanrt.serve.service import Order, Result, Service

MOST_JOBS = 1000
"""Jobs that are known at once, ended ones included."""
HEARTBEAT = 15.0
"""Seconds after which followers are sent something, so that neither they nor a proxy take the connection for dead."""


class State(StrEnum):
    """What becomes of a job."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass
class Job:
    """One picture."""

    order: Order
    place: ExitStack
    """Holds the folder of its files."""
    id: str = field(default_factory=partial(secrets.token_urlsafe, 16))
    """Not to be guessed: who knows it may see the result."""
    state: State = State.WAITING
    progress: float = 0.0
    """Share of the picture that went through the network, as far as its backend tells."""
    result: Result | None = None
    problem: SanrtError | None = None
    task: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and replaced by another one, when anything changes."""

    @property
    def ended(self) -> bool:
        """Whether nothing changes any more."""
        return self.state in (State.DONE, State.FAILED)

    @property
    def bytes(self) -> int:
        """Of the result."""
        return self.result.path.stat().st_size if self.result else 0

    def heard(self, event: Event) -> None:
        """What happened to the picture; called in the event loop."""
        if isinstance(event, Opened):
            self.update(State.RUNNING)
        if isinstance(event, Advanced):
            self.progress += event.share
            self.update(self.state)

    def update(self, state: State) -> None:
        """Tell followers."""
        self.state = state
        self.changed.set()
        self.changed = asyncio.Event()

    def to_json(self) -> dict[str, Any]:
        """Its facts, for clients."""
        return {
            "id": self.id,
            "state": self.state,
            "progress": round(min(1.0, max(0.0, self.progress)), 4),
            "width": self.order.width,
            "height": self.order.height,
            "result": self.result and {**self.result.to_json(), "bytes": self.bytes},
            "problem": self.problem and document(self.problem),
        }

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: its facts now, and whenever they change, until it has ended."""
        while True:
            changed = self.changed
            yield f"event: {self.state}\ndata: {json.dumps(self.to_json())}\n\n"
            if self.ended:
                return
            while not changed.is_set():
                try:
                    await asyncio.wait_for(changed.wait(), HEARTBEAT)
                except TimeoutError:
                    yield ": still there\n\n"


@dataclass
class Jobs:
    """Those of one process, by their identity. Used in the event loop."""

    service: Service
    limits: Limits
    known: dict[str, Job] = field(default_factory=dict)

    def require_room(self) -> None:
        """Raise BusyError where too many jobs or results are kept."""
        kept = sum(job.bytes for job in self.known.values())
        if kept >= self.limits.results or len(self.known) >= MOST_JOBS:
            raise BusyError(
                f"{len(self.known)} jobs with {kept} bytes of results are kept, the most that this server takes; "
                "DELETE those that were fetched, or wait for their end",
                retry_after=self.limits.keep / 10,
            )

    def start(self, order: Order, place: ExitStack) -> Job:
        """A job for an order, whose folder it takes over from `place`; raises as `require_room` and `Queue.place` do."""
        self.require_room()
        in_line = ExitStack()
        in_line.enter_context(self.service.queue.place())
        job = Job(order, place.pop_all())
        job.task = asyncio.create_task(self.work(job))
        job.task.add_done_callback(lambda _: in_line.close())
        self.known[job.id] = job
        return job

    async def work(self, job: Job) -> None:
        """Do it; its picture is not kept beyond that, its result as long as the limits say."""
        loop = asyncio.get_running_loop()

        def listener(event: Event) -> None:
            loop.call_soon_threadsafe(job.heard, event)

        try:
            job.result = await self.service.upscale(job.order, listener)
            job.progress = 1.0
            job.update(State.DONE)
        except SanrtError as error:
            self.fail(job, error)
        job.order.source.unlink()
        loop.call_later(self.limits.keep, self.forget, job.id)

    def fail(self, job: Job, error: SanrtError) -> None:
        """End a job without a result."""
        job.problem = error
        self.service.queue.metrics.failed(status_and_kind(error)[1])
        job.update(State.FAILED)

    def find(self, identity: str) -> Job:
        """The job; NotFoundError where there is none."""
        if identity not in self.known:
            raise NotFoundError("no such job: it was deleted, its time is over, or it never was")
        return self.known[identity]

    def result(self, identity: str) -> Result:
        """Its result; NotDoneError where there is none yet, or ever."""
        job = self.find(identity)
        if job.problem:
            raise NotDoneError(f"the job failed: {job.problem}")
        if job.result is None:
            raise NotDoneError(f"the job is {job.state}; ask again when it is done", retry_after=1)
        return job.result

    def forget(self, identity: str) -> None:
        """End a job, and remove its files once nothing works on them."""
        job = self.known.pop(identity, None)
        if job is None or job.task is None:
            return
        if not job.ended:
            self.fail(job, GoneError("the job was deleted, or the server is stopping"))
        job.task.cancel()
        job.task.add_done_callback(lambda _: job.place.close())

    async def stop(self) -> None:
        """End all: results cannot be fetched from a server that is stopping."""
        tasks = [job.task for job in self.known.values() if job.task]
        for identity in list(self.known):
            self.forget(identity)
        await asyncio.gather(*tasks, return_exceptions=True)
