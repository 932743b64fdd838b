"""The HTTP server: one process, one socket, and an end that finishes what runs."""

from __future__ import annotations

import signal
import socket
from types import FrameType
from typing import NoReturn

import uvicorn
from starlette.applications import Starlette

from sanrt.errors import UsageError

KEEP_ALIVE = 5
"""Seconds that an idle connection is kept."""


class Server(uvicorn.Server):
    """uvicorn, which tells the application when it is to end and not only when all connections are closed."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app: Starlette = self.config.app  # type: ignore[assignment]
        app.state.service.queue.stop()
        await app.state.jobs.stop()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to; UsageError for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--host {host} --port {port}: cannot be listened on ({reason}); choose another") from None


def url(listening: socket.socket) -> str:
    """Where to find the page."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def server(app: Starlette) -> Server:
    """A server of the application, not yet started."""
    return Server(
        uvicorn.Config(
            app, log_level="error", access_log=False, timeout_keep_alive=KEEP_ALIVE, lifespan="on", server_header=False
        )
    )


def run(app: Starlette, listening: socket.socket) -> None:
    """Serve until SIGTERM or an interrupt; then pictures that run are finished and sent."""
    before = signal.signal(signal.SIGTERM, terminated)  # uvicorn raises the signal again when it has ended
    try:
        server(app).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)


def terminated(signum: int, frame: FrameType | None) -> NoReturn:
    """End with success: to be told to stop is no failure."""
    raise SystemExit(0)
