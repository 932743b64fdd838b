"""What a server is started with: the model, the limits, and who may use it."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sanrt.errors import UsageError, require_number

if TYPE_CHECKING:
    from sanrt.request import ModelChoice

LEAST_TOKEN = 16
"""Characters of a token: fewer can be guessed."""


@dataclass(frozen=True)
class Limits:
    """What is refused before any work is done on it."""

    bytes: int = 64 * 2**20
    """Of a request's body."""
    pixels: int = 25_000_000
    """Of a picture, by its header."""
    queue: int = 8
    """Pictures that wait or are worked on, together."""
    seconds: float = 600.0
    """For a body to arrive, for a picture to be upscaled, and for a result to be fetched, each."""
    results: int = 2 * 2**30
    """Bytes of jobs' results that are kept on disk."""
    keep: float = 3600.0
    """Seconds that a job is kept after its end."""

    def __post_init__(self) -> None:
        for name in ("bytes", "pixels", "queue", "results"):
            require_number(name, getattr(self, name), 1)

    @property
    def requests(self) -> int:
        """Requests with a picture at once, slow senders and slow readers among them."""
        return 4 * self.queue


@dataclass(frozen=True)
class ServeOptions:
    """A server: what it upscales with, its limits, and its door."""

    choice: ModelChoice
    """The model; its scale is that of requests which do not say one."""
    limits: Limits = field(default_factory=Limits)
    memory: int | None = None
    """Bytes of the host's memory that the process should stay below; None leaves it a share of what is free."""
    folder: Path | None = None
    """Where pictures lie while they are worked on, and results; None is the system's temporary folder."""
    token: str | None = None
    """What every request must show; None asks for none."""
    hosts: tuple[str, ...] = ("*",)
    """Host names under which the server answers."""
    jobs: bool = True
    """Whether there are jobs, which only the process that has them knows."""


def read_token(path: Path) -> str:
    """The token in a file; UsageError if it cannot be read, or is too short to be one."""
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--token {path}: cannot be read ({getattr(error, 'strerror', 'not UTF-8')})") from None
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"--token {path}: expected one line of at least {LEAST_TOKEN} characters without spaces, "
            f"such as {secrets.token_urlsafe(24)}"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_hosts(host: str, token: str | None, without_token: bool) -> tuple[str, ...]:
    """The names that a server at this address answers to: those of this machine for loopback, so that no other site's
    name can be made to lead there, else any.

    UsageError for an address that others reach, without a token.
    """
    if is_loopback(host):
        return ("localhost", "127.0.0.1", "[::1]", "::1", host)
    if token is None and not without_token:
        raise UsageError(
            f"--host {host}: other machines reach it; add --token FILE, or --without-token to serve everybody who does"
        )
    return ("*",)
