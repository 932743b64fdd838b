"""A folder of pictures through `sanrt serve`, beside the pipeline, and what clients wait: `python benchmarks/serve.py`.

The server is a process of its own, asked over loopback; pipeline and server take turns, so that both see the machine alike.
"""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import local
from typing import Annotated

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is its own folder, not the repository

from benchmarks.measure import environment, found_model, run_command
from benchmarks.pipeline import generated, require_written
from sanrt.errors import SanrtError
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.pictures.codec import Encoding
from sanrt.runtime.pictures.jobs import Naming, Replaceable, find_pictures
from sanrt.runtime.runs.pipeline import PipelineOptions, run
from sanrt.runtime.runs.results import Recipe
from sanrt.runtime.runs.timing import Size
from sanrt.runtime.tiling.options import UpscaleOptions
from sanrt.runtime.tiling.upscaling import NetworkRunner

CLIENTS = (1, 4, 16)
FOLDER_CLIENTS = 4
"""Clients that send a folder: enough that the next picture is always there."""

Ask = Callable[[bytes], float]
"""Send a picture, take its result; the seconds between."""


def serve(
    folder: Annotated[Path | None, typer.Argument(help="Pictures; generated PNG files if left out.")] = None,
    model: Annotated[Path | None, typer.Option(help="Exported ONNX; else models/'s, else the bundled weights.")] = None,
    backend: Annotated[str, typer.Option(help="What runs it.")] = "auto",
    count: Annotated[int, typer.Option(min=1, help="Of the generated pictures.")] = 24,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the generated pictures.")] = "320x180",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of pipeline and server.")] = 3,
    requests: Annotated[int, typer.Option(min=1, help="For each number of clients.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the network; all if left out.")] = None,
) -> None:
    """Print the throughput of both, and the latency at p50 and p99 for 1, 4 and 16 clients."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        source = folder or generated(scratch / "pictures", count, Size.parse(size))
        path = stack.enter_context(found_model(model, 4))
        network = stack.enter_context(load_backend(backend, path, RunOptions(threads=threads)))
        jobs = [replace(job, replaces=Replaceable.ANYTHING) for job in find_pictures([source], scratch / "out", Naming())]
        steps = PipelineOptions(Recipe.of(network.spec, None, UpscaleOptions(), Encoding()))
        pictures = [job.source.read_bytes() for job in jobs]
        ask = stack.enter_context(server(path, network.name, threads))

        def through_pipeline() -> float:
            started = time.perf_counter()
            for outcome in run(jobs, NetworkRunner(network, UpscaleOptions()), steps):
                require_written(outcome)
            return time.perf_counter() - started

        def through_server() -> float:
            started = time.perf_counter()
            from_clients(ask, pictures, FOLDER_CLIENTS)
            return time.perf_counter() - started

        through_pipeline(), through_server()  # warm up, and do not count
        turns = [(through_pipeline(), through_server()) for _ in range(rounds)]
        waits = {clients: from_clients(ask, list(islice(cycle(pictures), requests)), clients) for clients in CLIENTS}
    for name, value in environment(threads).items():
        print(f"{name:<10}{value}")
    print(f"\n{path.name}, {network.name} on {network.device}, {network.spec.precision}: {len(jobs)} pictures")
    for name, spent in zip(("pipeline", "server"), zip(*turns, strict=True), strict=True):
        rate = len(jobs) / np.median(spent)
        print(f"{name:<10}{np.median(spent):8.2f} s {rate:7.2f} pictures/s   of", *(f"{seconds:.2f}" for seconds in spent))
    ratios = [pipeline / served for pipeline, served in turns]
    print(f"server / pipeline, throughput: {np.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    for clients, waited in waits.items():
        p50, p99 = np.percentile(waited, [50, 99])
        print(f"{clients:>3} clients: p50 {1000 * p50:8.0f} ms, p99 {1000 * p99:8.0f} ms, {len(waited)} requests")


def from_clients(ask: Ask, pictures: Sequence[bytes], clients: int) -> list[float]:
    """The seconds of each picture, sent by so many clients, each of which waits for one answer before it asks again."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, pictures))


@contextmanager
def server(model: Path, backend: str, threads: int | None) -> Iterator[Ask]:
    """A server's client; each thread has a connection of its own."""
    words = ["--port", "0", "--queue", str(2 * max(CLIENTS)), "--model", str(model), "--backend", backend]
    words += ["--threads", str(threads)] if threads else []
    process = subprocess.Popen([sys.executable, "-m", "sanrt", "serve", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        line = process.stdout.readline()
        if not line:
            raise SanrtError("the server did not start; its reason is above")
        port, own = int(line.split(":")[2].split("/")[0]), local()

        def ask(picture: bytes) -> float:
            if not hasattr(own, "connection"):
                own.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
            started = time.perf_counter()
            own.connection.request("POST", "/v1/upscale", picture)
            answer = own.connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise SanrtError(f"the server answered {answer.status}: {content[:500].decode(errors='replace')}")
            return time.perf_counter() - started

        yield ask
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    run_command("serve", serve)
