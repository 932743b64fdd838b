"""`sanrt serve`: pictures over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sanrt.cli.models import known_scale
from sanrt.cli.panels import panel
from sanrt.cli.request import (
    BackendOption,
    DeviceOption,
    MemoryOption,
    ModelOption,
    ModelsOption,
    PrecisionOption,
    ThreadsOption,
    WeightsOption,
    byte_count,
)
from sanrt.cli.streams import tell
from sanrt.extras import extra
from sanrt.runtime.artifacts.models import MODELS

LIMITS = "Limits"


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token: Annotated[Path | None, typer.Option(help="File with the token that every request must show.")] = None,
    without_token: Annotated[
        bool, typer.Option("--without-token", help="Serve whoever reaches --host, without a token.")
    ] = False,
    scale: Annotated[
        int | None, typer.Option(help="2, 3, 4 or 8, for requests that do not say one; 4 if left out.", callback=known_scale)
    ] = None,
    weights: WeightsOption = None,
    model: ModelOption = None,
    models: ModelsOption = MODELS,
    backend: BackendOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    memory: MemoryOption = None,
    folder: Annotated[
        Path | None,
        panel(LIMITS)(help="Of pictures while they are worked on; the system's temporary one if left out."),
    ] = None,
    max_bytes: Annotated[int, panel(LIMITS)(parser=byte_count, metavar="SIZE", help="Of a request.")] = "64M",  # type: ignore[assignment]
    max_pixels: Annotated[float, panel(LIMITS)(min=0.01, metavar="MEGAPIXELS", help="Of a picture.")] = 25.0,
    queue: Annotated[int, panel(LIMITS)(min=1, help="Pictures that wait or are worked on, at most.")] = 8,
    seconds: Annotated[
        float, panel(LIMITS)(min=0.1, help="For a picture to arrive, to be upscaled, and to be fetched, each.")
    ] = 600.0,
    results: Annotated[
        int,
        panel(LIMITS)(parser=byte_count, metavar="SIZE", help="Of jobs' results, kept together."),
    ] = "2G",  # type: ignore[assignment]
    keep: Annotated[float, panel(LIMITS)(min=1, metavar="SECONDS", help="For which a job's result is kept.")] = 3600.0,
) -> None:
    """Serve a page for people and an API for programs; docs/serve.md describes both."""
    with extra("serve", "sanrt serve"):
        import multipart as _  # noqa: F401 - Starlette tells its absence at the first form

        from sanrt.serve.application import application
        from sanrt.serve.networks import Networks
        from sanrt.serve.server import listen, run, url
    from sanrt.request import ModelChoice
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.serve.options import Limits, ServeOptions, allowed_hosts, read_token

    secret = read_token(token) if token else None
    hosts = allowed_hosts(host, secret, without_token)
    loading = RunOptions(threads=threads, precision=precision, device=device or 0)
    choice = ModelChoice(model, models, scale, backend, loading, weights).absolute()
    limits = Limits(max_bytes, int(max_pixels * 1e6), queue, seconds, results, keep)
    networks = Networks()
    with listen(host, port) as listening:
        networks.start(choice)
        app = application(ServeOptions(choice, limits, memory, folder, secret, hosts), networks)
        tell(f"serving on {url(listening)}; Ctrl-C ends it")
        run(app, listening)
