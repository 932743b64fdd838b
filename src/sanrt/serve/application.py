"""The ASGI application: routes, and what each of them does."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from sanrt.cli.streams import printable
from sanrt.errors import SanrtError
from sanrt.serve.door import BrowserHeaders, Door
from sanrt.serve.networks import Networks
from sanrt.serve.openapi import description
from sanrt.serve.options import ServeOptions
from sanrt.serve.problems import http_problem, problem, refused, status_and_kind
from sanrt.serve.queue import Queue
from sanrt.serve.service import Result, Service
from sanrt.serve.uploads import Uploads, receive_picture, while_connected

CLOSED = 499
"""Status of a request whose client is gone: nobody reads it."""


def application(options: ServeOptions, networks: Networks) -> Starlette:
    """The application, whose end drops the networks. For one process, and one life."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        with tempfile.TemporaryDirectory(prefix="sanrt-serve-", dir=options.folder) as folder:
            queue = Queue(options.limits, networks)
            app.state.service = Service(options, queue)
            app.state.uploads = Uploads(Path(folder), options.limits)
            try:
                yield
            finally:
                queue.stop()
                await asyncio.to_thread(queue.close)

    return Starlette(
        routes=[
            Route("/v1/upscale", upscale, methods=["POST"]),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/openapi.json", openapi),
            Route("/metrics", metrics),
        ],
        middleware=[
            Middleware(BrowserHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=options.hosts, www_redirect=False),
            Middleware(AuthenticationMiddleware, backend=Door(options.token), on_error=refused),
        ],
        exception_handlers={SanrtError: counted_problem, HTTPException: http_problem, ClientDisconnect: gone},
        lifespan=lifespan,
    )


async def upscale(request: Request) -> Response:
    """POST /v1/upscale: a picture in, its result out."""
    service, uploads = parts(request)
    service.queue.require_place()
    with ExitStack() as opened:
        place = opened.enter_context(uploads.place())
        file, pairs = await receive_picture(request, place, service.options.limits)
        order = await service.order(file, pairs)
        result = await while_connected(request, service.upscale(order))
        return ResultResponse(result, service.options.limits.seconds, opened.pop_all())


class ResultResponse(FileResponse):
    """A result's bytes, and in headers what was noted; what it holds is let go of afterwards."""

    def __init__(self, result: Result, seconds: float, held: ExitStack) -> None:
        """`seconds` is the time that the client has to fetch it."""
        timing = ", ".join(f"{step};dur={1000 * took:.0f}" for step, took in result.seconds.items())
        headers = {"Server-Timing": timing, "Sanrt-Model": result.model}
        name = f"picture{result.path.suffix}"
        super().__init__(result.path, 200, headers, result.media_type, None, name, None, "inline")
        for note in result.notes:
            self.headers.append("Sanrt-Note", printable(note).encode("ascii", "backslashreplace").decode())
        self.seconds, self.held = seconds, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.held:
            try:
                async with asyncio.timeout(self.seconds):
                    await super().__call__(scope, receive, send)
            except TimeoutError:
                parts(Request(scope))[0].queue.metrics.failures.labels("slow_reader").inc()


async def healthz(_: Request) -> Response:
    """GET /healthz: the process answers."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    """GET /readyz: a picture that is sent now would be taken."""
    parts(request)[0].queue.require_place()
    return JSONResponse({"status": "ready"})


async def openapi(_: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(description())


async def metrics(request: Request) -> Response:
    """GET /metrics."""
    registry = parts(request)[0].queue.metrics.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def parts(request: Request) -> tuple[Service, Uploads]:
    """What the lifespan made."""
    state: Any = request.app.state
    return state.service, state.uploads


async def counted_problem(request: Request, error: Exception) -> Response:
    """The problem document for what sanrt raised, which is counted by its kind."""
    assert isinstance(error, SanrtError)
    parts(request)[0].queue.metrics.failures.labels(status_and_kind(error)[1]).inc()
    return problem(error)


async def gone(request: Request, _: Exception) -> Response:
    """For a client that left before its answer."""
    parts(request)[0].queue.metrics.failures.labels("gone").inc()
    return Response(status_code=CLOSED)
