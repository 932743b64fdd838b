"""The ASGI application: routes, and what each of them does."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from sanrt.cli.streams import printable
from sanrt.errors import SanrtError
from sanrt.files import temporary_folder
from sanrt.runtime.artifacts.models import DEFAULT_SCALE
from sanrt.serve.door import BrowserHeaders, Door
from sanrt.serve.jobs import Jobs
from sanrt.serve.networks import Networks
from sanrt.serve.openapi import description
from sanrt.serve.options import ServeOptions
from sanrt.serve.parameters import in_request
from sanrt.serve.problems import KnownHosts, RefusedError, http_problem, problem, refused, status_and_kind
from sanrt.serve.queue import Queue
from sanrt.serve.service import Order, Result, Service, available_weights
from sanrt.serve.uploads import Uploads, receive_picture, while_connected
from sanrt.version import __version__
from sanrt.wording import worded

PAGE = Path(__file__).parent / "page"
EVENTS = "text/event-stream"
CLOSED = 499
"""Status of a request whose client is gone: nobody reads it."""


def application(options: ServeOptions, networks: Networks) -> Starlette:
    """The application, whose end drops the networks. For one process, and one life."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        place = options.folder or Path(tempfile.gettempdir())
        with worded(in_request), temporary_folder(place, "sanrt-serve") as folder:
            queue = Queue(options.limits, networks)
            app.state.service = Service(options, queue)
            app.state.uploads = Uploads(folder, options.limits)
            app.state.jobs = Jobs(app.state.service, options.limits)
            try:
                yield
            finally:
                queue.stop()
                await app.state.jobs.stop()
                await asyncio.to_thread(queue.close)

    made = Starlette(
        routes=[
            Route("/v1/upscale", upscale, methods=["POST"]),
            *(JOBS if options.jobs else ()),
            Route("/v1/about", about),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/openapi.json", openapi),
            Route("/metrics", metrics),
            Route("/", page),
            Mount("/page", StaticFiles(directory=PAGE)),
        ],
        middleware=[
            Middleware(BrowserHeaders),
            Middleware(KnownHosts, hosts=options.hosts),
            Middleware(AuthenticationMiddleware, backend=Door(options.token), on_error=refused),
        ],
        exception_handlers={SanrtError: counted_problem, HTTPException: http_problem, ClientDisconnect: gone},
        lifespan=lifespan,
    )
    made.router.redirect_slashes = False
    return made


async def upscale(request: Request) -> Response:
    """POST /v1/upscale: a picture in, its result out."""
    service, uploads, limits = state(request).service, state(request).uploads, state(request).service.options.limits
    service.queue.require_place()
    with ExitStack() as held:
        held.enter_context(uploads.request())
        order = await received(request, held.enter_context(uploads.place()))
        with service.queue.place():
            result = await while_connected(request, service.upscale(order))
        return ResultResponse(result, limits.seconds, held.pop_all())


async def received(request: Request, place: Path) -> Order:
    """What a request asks for, its picture in a folder; raises SanrtError, before any pixel is decoded."""
    service: Service = state(request).service
    return await service.order(await receive_picture(request, place, service.options.limits))


async def start_job(request: Request) -> Response:
    """POST /v1/jobs: a picture in, where to ask for its result out."""
    jobs, uploads = state(request).jobs, state(request).uploads
    jobs.service.queue.require_place()
    jobs.require_room()
    with ExitStack() as place, uploads.request():
        order = await received(request, place.enter_context(uploads.place()))
        job = jobs.start(order, place)
    return JSONResponse(job.to_json(), 202, {"Location": f"/v1/jobs/{job.id}"})


async def follow_job(request: Request) -> Response:
    """GET /v1/jobs/ID: its facts; with `Accept: text/event-stream`, as they change, until it has ended."""
    job = state(request).jobs.find(request.path_params["id"])
    if EVENTS in request.headers.get("accept", ""):
        return StreamingResponse(job.events(), media_type=EVENTS)
    return JSONResponse(job.to_json())


async def job_result(request: Request) -> Response:
    """GET /v1/jobs/ID/result: the picture."""
    jobs = state(request).jobs
    return ResultResponse(jobs.result(request.path_params["id"]), jobs.limits.seconds, ExitStack())


async def delete_job(request: Request) -> Response:
    """DELETE /v1/jobs/ID: end it, and remove what there is of it."""
    jobs, identity = state(request).jobs, request.path_params["id"]
    jobs.find(identity)
    jobs.forget(identity)
    return Response(status_code=204)


JOBS = (
    Route("/v1/jobs", start_job, methods=["POST"]),
    Route("/v1/jobs/{id}", follow_job, methods=["GET"]),
    Route("/v1/jobs/{id}", delete_job, methods=["DELETE"]),
    Route("/v1/jobs/{id}/result", job_result, methods=["GET"]),
)


async def about(request: Request) -> Response:
    """GET /v1/about: what can be asked for."""
    options = state(request).service.options
    return JSONResponse(
        {
            "version": __version__,
            "scale": options.choice.scale or DEFAULT_SCALE,
            "weights": available_weights(options.choice),
            "limits": asdict(options.limits),
            "jobs": options.jobs,
        }
    )


class ResultResponse(FileResponse):
    """A result's bytes, and in headers what was noted; what it holds is let go of afterwards."""

    def __init__(self, result: Result, seconds: float, held: ExitStack) -> None:
        """`seconds` is the time that the client has to fetch it."""
        timing = ", ".join(f"{step};dur={1000 * took:.0f}" for step, took in result.seconds.items())
        headers = {"Server-Timing": timing, "Sanrt-Model": in_ascii(result.model)}
        super().__init__(result.path, 200, headers, result.media_type, None, result.name, None, "inline")
        for note in result.notes:
            self.headers.append("Sanrt-Note", in_ascii(note))
        self.seconds, self.held = seconds, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.held:
            try:
                async with asyncio.timeout(self.seconds):
                    await super().__call__(scope, receive, send)
            except OSError:  # the client is too slow, or the job was deleted
                state(Request(scope)).service.queue.metrics.failed("slow_reader")


def in_ascii(text: str) -> str:
    """A text as a header may hold it, the rest as escapes."""
    return printable(text).encode("ascii", "backslashreplace").decode()


async def page(_: Request) -> Response:
    """GET /: the page for people."""
    return FileResponse(PAGE / "index.html")


async def healthz(_: Request) -> Response:
    """GET /healthz: the process answers."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    """GET /readyz: a picture that is sent now would be taken."""
    try:
        state(request).service.queue.require_place()
    except RefusedError as error:  # an answer to the question, no request that came to nothing
        return problem(error)
    return JSONResponse({"status": "ready"})


async def openapi(_: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(description())


async def metrics(request: Request) -> Response:
    """GET /metrics."""
    registry = state(request).service.queue.metrics.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def state(request: HTTPConnection) -> Any:
    """What the lifespan made: `service`, `uploads`, `jobs`."""
    return request.app.state


async def counted_problem(request: Request, error: Exception) -> Response:
    """The problem document for what sanrt raised, which is counted by its kind."""
    assert isinstance(error, SanrtError)
    state(request).service.queue.metrics.failed(status_and_kind(error)[1])
    return problem(error)


async def gone(request: Request, _: Exception) -> Response:
    """For a client that left before its answer."""
    state(request).service.queue.metrics.failed("gone")
    return Response(status_code=CLOSED)
