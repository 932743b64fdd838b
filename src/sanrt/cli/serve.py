"""`sanrt serve`: pictures over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sanrt.cli.models import known_scale
from sanrt.cli.panels import panel
from sanrt.cli.request import (
    ELSEWHERE,
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
from sanrt.errors import UsageError
from sanrt.extras import extra
from sanrt.runtime.artifacts.models import MODELS

if TYPE_CHECKING:
    from sanrt.serve.options import ServeOptions

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
    ray: Annotated[
        str | None,
        panel(ELSEWHERE)(metavar="[ADDRESS]", help="Replicas on the Ray cluster there; on a local Ray if left out."),
    ] = None,
    workers: Annotated[
        int | None, panel(ELSEWHERE)(min=1, help="Replicas at most; one per GPU or node if left out.")
    ] = None,
) -> None:
    """Serve a page for people and an API for programs; docs/serve.md describes both."""
    with extra("serve", "sanrt serve"):
        import python_multipart  # noqa: F401 - Starlette tells its absence at the first form

        from sanrt.serve.application import application
        from sanrt.serve.networks import Networks
        from sanrt.serve.server import listen, run, url
    from sanrt.request import ModelChoice
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.serve.options import Limits, ServeOptions, allowed_hosts, read_token

    secret = read_token(token) if token else None
    hosts = allowed_hosts(host, secret, without_token)
    loading = RunOptions(threads=threads, precision=precision, device=device or 0)
    if folder and not folder.is_dir():
        raise UsageError(f"--folder {folder}: no such folder; make it, or leave --folder out")
    choice = ModelChoice(model, models, scale, backend, loading, weights).absolute()
    limits = Limits(max_bytes, int(max_pixels * 1e6), queue, seconds, results, keep)
    options = ServeOptions(choice, limits, memory, folder, secret, hosts)
    if ray:
        return serve_by_ray(options, ray, workers, host, port)
    if workers:
        raise UsageError(f"--workers {workers}: changes nothing without --ray; add it, or leave --workers out")
    networks = Networks()
    with listen(host, port) as listening:
        networks.start(choice)
        tell(f"serving on {url(listening)}; Ctrl-C ends it")
        run(application(options, networks), listening)
    return None


def serve_by_ray(options: ServeOptions, address: str, workers: int | None, host: str, port: int) -> None:
    """The same on a cluster."""
    with extra("ray-serve", "sanrt serve --ray"):
        import ray.serve  # noqa: F401

        from sanrt.serve.ray_deployment import run
    from sanrt.runtime.runs.ray_pool import connected

    with connected(address, workers, options.choice.options.threads) as share:

        def ready() -> None:
            tell(f"serving on http://{host}:{port}/, Ray {address}: {share}; Ctrl-C ends it")

        run(options, share, host, port, ready)
