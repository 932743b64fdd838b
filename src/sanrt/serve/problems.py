"""Errors as a client sees them: RFC 9457's problem documents, whose detail is the command line's one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sanrt.errors import (
    BackendError,
    CheckpointError,
    ModelError,
    PictureError,
    SanrtError,
    TooManyPixelsError,
    UsageError,
)
from sanrt.serve.door import ForeignPageError


class RefusedError(SanrtError):
    """A request that is answered with a status of its own."""

    status, kind = HTTPStatus.BAD_REQUEST, "usage"
    retry_after: float | None = None
    """Seconds after which it may be asked again."""

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class TooLargeError(RefusedError):
    """A body of too many bytes."""

    status, kind = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large"


class BusyError(RefusedError):
    """No place is free."""

    status, kind = HTTPStatus.SERVICE_UNAVAILABLE, "busy"


class StoppingError(RefusedError):
    """The server is about to end."""

    status, kind = HTTPStatus.SERVICE_UNAVAILABLE, "stopping"


class SlowSenderError(RefusedError):
    """A body that does not arrive."""

    status, kind = HTTPStatus.REQUEST_TIMEOUT, "slow_sender"


class TooLongError(RefusedError):
    """A picture that takes more time than it may."""

    status, kind = HTTPStatus.GATEWAY_TIMEOUT, "too_long"


class NotFoundError(RefusedError):
    """A job, or a path, that is not there."""

    status, kind = HTTPStatus.NOT_FOUND, "not_found"


class GoneError(RefusedError):
    """A job that was ended before its picture."""

    status, kind = HTTPStatus.GONE, "gone"


class NotDoneError(RefusedError):
    """A job without a result yet, or ever."""

    status, kind = HTTPStatus.CONFLICT, "not_done"


class UnexpectedError(SanrtError):
    """A fault of sanrt's own."""


STATUSES: tuple[tuple[type[SanrtError], HTTPStatus, str], ...] = (
    (TooManyPixelsError, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large"),
    (PictureError, HTTPStatus.UNPROCESSABLE_ENTITY, "picture"),
    (UsageError, HTTPStatus.BAD_REQUEST, "usage"),
    (CheckpointError, HTTPStatus.BAD_REQUEST, "model"),
    (ModelError, HTTPStatus.INTERNAL_SERVER_ERROR, "model"),
    (BackendError, HTTPStatus.INTERNAL_SERVER_ERROR, "backend"),
    (SanrtError, HTTPStatus.INTERNAL_SERVER_ERROR, "server"),
)
"""The status and kind of each error; the first that fits counts."""


def status_and_kind(error: SanrtError) -> tuple[HTTPStatus, str]:
    """How an error is answered, and what it is counted as."""
    if isinstance(error, RefusedError):
        return error.status, error.kind
    return next((status, kind) for family, status, kind in STATUSES if isinstance(error, family))


def document(error: SanrtError) -> dict[str, Any]:
    """The problem document of an error."""
    status, kind = status_and_kind(error)
    return content(status, str(error), kind)


def content(status: HTTPStatus, detail: str, kind: str) -> dict[str, Any]:
    """A problem document."""
    return {"type": "about:blank", "title": status.phrase, "status": int(status), "detail": detail, "kind": kind}


def answer(document: dict[str, Any], headers: Mapping[str, str] | None) -> Response:
    """The response with a problem document."""
    return JSONResponse(document, document["status"], headers, "application/problem+json")


def problem(error: SanrtError) -> Response:
    """The response for an error."""
    headers = {}
    if isinstance(error, RefusedError) and error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return answer(document(error), headers)


async def http_problem(request: Request, error: Exception) -> Response:
    """For what Starlette raises: no such path, no such method, a broken form."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    detail = error.detail if error.detail != status.phrase else f"{request.method} {request.url.path}: {status.phrase}"
    kind = NotFoundError.kind if status is HTTPStatus.NOT_FOUND else RefusedError.kind
    return answer(content(status, detail, kind), error.headers)


class KnownHosts:
    """Answers requests for other names than the server's with a problem document: a page's, whose name was bent to it."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        known = False

        async def answered(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal known
            known = True
            await self.app(scope, receive, send)

        async def if_known(message: Message) -> None:
            if known:
                await send(message)

        await TrustedHostMiddleware(answered, self.hosts, www_redirect=False)(scope, receive, if_known)
        if not known:
            detail = f"Host is none of this server's names; expected one of {', '.join(self.hosts)}"
            await answer(content(HTTPStatus.BAD_REQUEST, detail, "refused"), None)(scope, receive, send)


def refused(_: HTTPConnection, error: Exception) -> Response:
    """For a missing or wrong token, and for another site's request."""
    if isinstance(error, ForeignPageError):
        return answer(content(HTTPStatus.FORBIDDEN, str(error), "refused"), None)
    return answer(content(HTTPStatus.UNAUTHORIZED, str(error), "refused"), {"WWW-Authenticate": "Bearer"})
