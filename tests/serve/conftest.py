"""A server in a thread of the tests' process, and clients of it."""

from __future__ import annotations

import gc
import http.client
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips

pytest.importorskip("starlette", reason="needs the serve extra")
pytest.importorskip("uvicorn", reason="needs the serve extra")

from sanrt.request import ModelChoice
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.serve.application import application
from sanrt.serve.networks import Networks
from sanrt.serve.options import Limits, ServeOptions, allowed_hosts
from sanrt.serve.server import listen, server


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes
    notes: list[str] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    host: str
    port: int
    app: Any

    @property
    def queue(self) -> Any:
        return self.app.state.service.queue

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            found = connection.getresponse()
            return Answer(
                found.status,
                {name.lower(): value for name, value in found.getheaders()},
                found.read(),
                [value for name, value in found.getheaders() if name.lower() == "sanrt-note"],
            )
        finally:
            connection.close()

    def upscale(self, picture: bytes, query: str = "", **headers: str) -> Answer:
        return self.ask("POST", f"/v1/upscale{'?' * bool(query)}{query}", picture, **headers)

    def metric(self, name: str, **labels: str) -> float:
        return self.queue.metrics.registry.get_sample_value(name, labels) or 0.0


class Complaints(logging.Handler):
    """What asyncio and uvicorn have to say of the application."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@contextmanager
def no_complaints() -> Iterator[None]:
    """Fail for exceptions that nobody took, and for tracebacks."""
    found, loggers = Complaints(), [logging.getLogger(name) for name in ("asyncio", "uvicorn.error")]
    for logger in loggers:
        logger.addHandler(found)
    try:
        yield
        gc.collect()  # asyncio tells of an exception when its future is freed
    finally:
        for logger in loggers:
            logger.removeHandler(found)
    assert not found.lines, found.lines


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for something that must come about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def models(tiny_model) -> Path:
    """The folder with tiny models for x2 and x4."""
    tiny_model(4)
    return tiny_model(2).parent


@pytest.fixture(scope="session")
def serving(models, tmp_path_factory) -> Callable[..., AbstractContextManager[Running]]:
    """`with serving(queue=2) as running:` a server with other limits than the default ones."""

    @contextmanager
    def started(
        token: str | None = None, named: Path | None = None, backend: str = "onnxruntime", **limits: Any
    ) -> Iterator[Running]:
        choice = ModelChoice(named, models, None if named else 2, backend, RunOptions(threads=1))
        folder = tmp_path_factory.mktemp("pictures")
        hosts = allowed_hosts("127.0.0.1", token, False)
        networks = Networks()
        networks.start(choice)
        app = application(ServeOptions(choice, Limits(**limits), None, folder, token, hosts), networks)
        with listen("127.0.0.1", 0) as listening, no_complaints():
            made = server(app)
            thread = threading.Thread(target=made.run, kwargs={"sockets": [listening]}, name="server")
            thread.start()
            try:
                until(lambda: made.started)
                yield Running("127.0.0.1", listening.getsockname()[1], app)
            finally:
                made.should_exit = True
                thread.join()
        assert not list(folder.iterdir()), "files of requests are left"

    return started


@pytest.fixture(scope="module")
def running(serving) -> Iterator[Running]:
    """A server with the default limits."""
    with serving() as found:
        yield found


def encoded(
    suffix: str = ".png", bands: int = 3, height: int = 20, width: int = 30, dtype: Any = np.uint8, **how: Any
) -> bytes:
    """A picture file's bytes."""
    rng = np.random.default_rng(bands)
    image = pyvips.Image.new_from_array(rng.integers(0, np.iinfo(dtype).max, (height, width, bands), dtype, endpoint=True))
    grey, colour = ("b-w", "srgb") if dtype is np.uint8 else ("grey16", "rgb16")
    return image.copy(interpretation=grey if bands < 3 else colour).write_to_buffer(suffix, **how)
