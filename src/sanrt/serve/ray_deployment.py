"""The same application on many processes and machines, by Ray Serve: a door that hands requests to replicas.

A replica is one process with the whole application. What a dying replica had is given to another one: upscaling a picture
twice does no harm.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.authentication import AuthenticationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message

from sanrt.errors import SanrtError
from sanrt.request import ModelChoice
from sanrt.runtime.artifacts.models import MODELS
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.serve.application import CLOSED, application
from sanrt.serve.door import Door
from sanrt.serve.networks import Networks
from sanrt.serve.options import Limits, ServeOptions, read_token
from sanrt.serve.problems import BusyError, SlowSenderError, problem, refused
from sanrt.serve.uploads import limited

if TYPE_CHECKING:
    from ray.serve import Application

    from sanrt.runtime.runs.ray_pool import Share

ATTEMPTS = 3
"""Replicas that may die over one request."""
ONGOING = 2
"""Requests of one replica above which Ray Serve starts another: the one in the network, and the next."""
SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "server", "client")
"""What a replica is told of a request."""

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body."""


class Replica:
    """One process with the application."""

    async def __init__(self, options: ServeOptions) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        networks = Networks()
        await asyncio.to_thread(networks.start, options.choice)
        self.app = application(options, networks)
        self.lifespan = self.app.router.lifespan_context(self.app)
        await self.lifespan.__aenter__()

    async def __del__(self) -> None:
        """Remove the folder for pictures; Ray Serve awaits it where it ends a replica."""
        await self.lifespan.__aexit__(None, None, None)

    async def __call__(self, scope: dict[str, Any], body: bytes) -> Answer:
        """The application's answer to a request whose body is there."""
        incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        outgoing: list[Message] = []

        async def receive() -> Message:
            while not incoming:  # Ray Serve cancels the request of a client that is gone
                await asyncio.sleep(3600)
            return incoming.pop()

        async def send(message: Message) -> None:
            outgoing.append(message)

        asgi = {"version": "3.0", "spec_version": "2.4"}
        await self.app({**scope, "asgi": asgi, "root_path": ""}, receive, send)
        start, *rest = outgoing
        return start["status"], list(start["headers"]), b"".join(message.get("body", b"") for message in rest)


class Entrance:
    """Reads requests, and asks replicas until one of them lives to answer."""

    def __init__(self, replicas: Any, limits: Limits, token: str | None) -> None:
        self.replicas, self.limits, self.door = replicas, limits, Door(token)

    async def __call__(self, request: Request) -> Response:
        """The answer to one request."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError

        try:
            await self.door.authenticate(request)
            async with asyncio.timeout(self.limits.seconds):
                body = await Request(request.scope, limited(request.receive, self.limits)).body()
            for _ in range(ATTEMPTS):
                try:
                    status, headers, content = await self.replicas.remote({key: request.scope[key] for key in SCOPE}, body)
                except RayActorError:
                    continue
                response = Response(content, status)
                response.raw_headers = headers
                return response
            raise BusyError(f"{ATTEMPTS} replicas died over this request; ask again later", retry_after=10)
        except AuthenticationError as error:
            return refused(request, error)
        except BackPressureError:
            return problem(BusyError("all replicas are busy; ask again later", retry_after=self.limits.queue))
        except TimeoutError:
            return problem(SlowSenderError(f"the picture did not arrive within {self.limits.seconds:g} s; send it again"))
        except SanrtError as error:
            return problem(error)
        except ClientDisconnect:
            return Response(status_code=CLOSED)


def deployment(options: ServeOptions, share: Share, least: int = 1) -> Application:
    """What Ray Serve runs: an entrance, and from `least` replicas to one per GPU (without any: per node), by the queue."""
    from ray import serve

    limits = options.limits
    loading = replace(options.choice.options, threads=options.choice.options.threads or share.cpus)
    options = replace(options, choice=replace(options.choice, options=loading), jobs=False)
    replicas = serve.deployment(
        Replica,
        ray_actor_options={"num_cpus": share.cpus, "num_gpus": share.gpus},
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": max(least, share.workers),
            "target_ongoing_requests": ONGOING,
        },
        max_ongoing_requests=limits.queue,
        max_queued_requests=limits.requests,
        graceful_shutdown_timeout_s=limits.seconds,
    )
    entrance = serve.deployment(
        Entrance, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=limits.requests * max(least, share.workers)
    )
    return entrance.bind(replicas.bind(options), limits, options.token)


@dataclass(frozen=True)
class Arguments:
    """What a configuration file of Ray Serve's may say under `args`."""

    scale: int | None = None
    model: str | None = None
    """Its path, on every node."""
    backend: str = "auto"
    token: str | None = None
    """A file with the token, on every node."""
    replicas: int = 1
    """At most."""
    cpus: int = 1
    """Of each replica."""
    gpus: int = 0
    """Of each replica, 0 or 1."""
    queue: int = 8
    """Pictures of one replica that wait or are worked on, at most."""


def build(arguments: dict[str, Any]) -> Application:
    """What `import_path` names in a configuration file of Ray Serve; TypeError for arguments that are none of Arguments."""
    from sanrt.runtime.runs.ray_pool import Share

    said = Arguments(**arguments)
    choice = ModelChoice(Path(said.model) if said.model else None, MODELS, said.scale, said.backend, RunOptions())
    token = read_token(Path(said.token)) if said.token else None
    options = ServeOptions(choice.absolute(), Limits(queue=said.queue), token=token)
    return deployment(options, Share(said.replicas, said.cpus, said.gpus))


def run(options: ServeOptions, share: Share, host: str, port: int, ready: Callable[[], None]) -> None:
    """Serve on a connected cluster until SIGTERM or an interrupt; `ready` is called when it does."""
    from ray import serve

    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR"})
        serve.run(deployment(options, share), name="sanrt", logging_config={"log_level": "ERROR"})
        ready()
        while not ended.wait(1.0):
            pass
    finally:
        serve.shutdown()
        signal.signal(signal.SIGTERM, before)
