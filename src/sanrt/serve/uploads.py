"""A request's picture, from the network to a file: bounded in bytes and time, nothing decoded yet."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from sanrt.errors import UsageError
from sanrt.serve.options import Limits
from sanrt.serve.problems import BusyError, SlowSenderError, TooLargeError

FORM = "multipart/form-data"
FIELDS = 32
"""Of a form, at most."""
UNNAMED = "picture"
"""What a picture is called that came without a name."""
MOST_LETTERS = 100
"""Of a result's name, before what says its size."""
T = TypeVar("T")


@dataclass
class Uploads:
    """Pictures that come in, each in a folder of its own."""

    folder: Path
    limits: Limits
    open: int = 0
    """Requests that have one now."""

    @contextmanager
    def request(self) -> Iterator[None]:
        """One of the requests that may have a picture at once; BusyError where there are too many."""
        if self.open >= self.limits.requests:
            raise BusyError(f"{self.open} requests are open, the most that this server takes; ask again later", 1)
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    @contextmanager
    def place(self) -> Iterator[Path]:
        """A new folder, removed in the end with all that is in it."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


@dataclass(frozen=True)
class Upload:
    """A request's picture in a file, and what is asked of it."""

    file: Path
    stem: str
    """Its name as the sender has it, without folders and ending; UNNAMED where there is none."""
    pairs: Sequence[tuple[str, str]]
    """Parameters: of the query, and of the form if the body is one."""


async def receive_picture(request: Request, place: Path, limits: Limits) -> Upload:
    """A request's picture.

    Raises TooLargeError, SlowSenderError, UsageError for a body without a picture, ClientDisconnect where the sender is
    gone.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.bytes:
        raise too_large(limits)
    file, sent, pairs = place / "picture", "", list(request.query_params.multi_items())
    bounded = Request(request.scope, limited(request.receive, limits))
    try:
        async with asyncio.timeout(limits.seconds):
            if request.headers.get("content-type", "").startswith(FORM):
                sent, fields = await save_form(bounded, file)
                pairs += fields
            else:
                await save_body(bounded, file)
    except TimeoutError:
        raise SlowSenderError(f"the picture did not arrive within {limits.seconds:g} s; send it again") from None
    if not file.stat().st_size:
        raise UsageError("the request has no picture; send one as the body, or as a file in a form")
    return Upload(file, clean_stem(sent), pairs)


def clean_stem(sent: str) -> str:
    """A file's name as a sender gave it, without folders, ending and what no terminal prints; UNNAMED if none is left."""
    name = "".join(letter for letter in re.split(r"[/\\]", sent)[-1] if letter.isprintable())
    return PurePosixPath(name).stem.strip(" .")[:MOST_LETTERS] or UNNAMED


def too_large(limits: Limits) -> TooLargeError:
    """For a body of too many bytes."""
    return TooLargeError(f"the request has more than {limits.bytes} bytes, the most that this server takes")


def limited(receive: Receive, limits: Limits) -> Receive:
    """The body as it comes, until it is too large.

    Starlette's own limit answers in plain text.
    """
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limits.bytes:
            raise too_large(limits)
        return message

    return counted


async def save_body(request: Request, path: Path) -> None:
    """The body as a file."""
    with path.open("wb") as file:
        async for piece in request.stream():
            if piece:
                await run_in_threadpool(file.write, piece)


async def save_form(request: Request, path: Path) -> tuple[str, list[tuple[str, str]]]:
    """The name of the one file of a form, which goes to `path`, and its other fields."""
    async with request.form(max_files=1, max_fields=FIELDS) as form:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if len(files) != 1:
            raise UsageError("the form has no file; send the picture as a file, such as -F picture=@a.png")
        with path.open("wb") as target:
            await run_in_threadpool(partial(shutil.copyfileobj, files[0].file, target))
        return files[0].filename or "", [(name, value) for name, value in form.multi_items() if isinstance(value, str)]


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; where the client goes away first it is cancelled, and ClientDisconnect raised.

    For a request whose body has been read.
    """
    task, leaving = asyncio.create_task(work), asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        leaving.cancel()
        task.cancel()
        await asyncio.wait({task})


async def disconnected(request: Request) -> None:
    """Return when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
