"""Who may use a server, and what every answer tells browsers."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

GUARDED = ("/v1/", "/metrics")
"""Paths that need the token; the page, health and the description of the API do not."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class ForeignPageError(AuthenticationError):
    """A request that a page of another site makes."""


@dataclass(frozen=True)
class Door(AuthenticationBackend):
    """Refuses requests that other sites' pages make, and those without the token."""

    token: str | None

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        if not conn.scope["path"].startswith(GUARDED):  # not of the URL, of which Host is a part
            return None
        if is_foreign(conn.headers):
            raise ForeignPageError("another site's page asked; only pages of this server may")
        scheme, _, shown = conn.headers.get("authorization", "").partition(" ")
        if self.token and not (
            scheme.lower() == "bearer" and hmac.compare_digest(shown.strip().encode(), self.token.encode())
        ):
            raise AuthenticationError("a token is needed; send the header `Authorization: Bearer TOKEN`")
        return AuthCredentials(["pictures"]), SimpleUser("client")


def is_foreign(headers: Headers) -> bool:
    """Whether a browser says that another site's page asks: by Sec-Fetch-Site, and without it by Origin.

    Browsers leave the former out where the server is neither HTTPS nor this machine, and proxies may change Host.
    """
    if site := headers.get("sec-fetch-site"):
        return site not in ("none", "same-origin")
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()


class BrowserHeaders:
    """Adds HEADERS to every answer; those of the API are never kept in a cache."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if scope["path"].startswith(GUARDED):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        await self.app(scope, receive, with_headers)
