"""The time that Ray costs: the same small pictures by the local pipeline and by one worker on a local Ray, threads alike.

    python -m benchmarks.ray_overhead --model models/san_x4.onnx

Loading the model and starting Ray are left out of both times and printed apart. The two take turns, so that whatever else
the machine does meets both.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import pyvips
import typer

from benchmarks.measure import run_command
from sanrt.runtime.backends.protocol import Backend, RunOptions
from sanrt.runtime.backends.registry import load_backend, model_spec
from sanrt.runtime.pictures.codec import Encoding
from sanrt.runtime.pictures.jobs import Job, Naming, find_pictures
from sanrt.runtime.runs import pipeline
from sanrt.runtime.runs.pipeline import PipelineOptions, Written
from sanrt.runtime.runs.ray_pool import LOCAL, Pool, Task, connected
from sanrt.runtime.runs.results import Recipe
from sanrt.runtime.tiling.options import UpscaleOptions
from sanrt.runtime.tiling.upscaling import NetworkRunner


def pictures(folder: Path, count: int, side: int) -> Path:
    """Write PNG files of noise into a new folder."""
    folder.mkdir()
    for seed in range(count):
        values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
        pyvips.Image.new_from_array(values).write_to_file(str(folder / f"{seed:05}.png"))
    return folder


def timed(outcomes: list[pipeline.Outcome], started: float) -> float:
    """Seconds of a run in which all went well."""
    assert all(isinstance(outcome, Written) for outcome in outcomes)
    return time.perf_counter() - started


def local_seconds(network: Backend, jobs: list[Job]) -> float:
    """Seconds that the pipeline of one machine takes."""
    upscaling = UpscaleOptions()
    options = PipelineOptions(Recipe.of(network.spec, None, upscaling, Encoding()))
    started = time.perf_counter()
    return timed(list(pipeline.run(jobs, NetworkRunner(network, upscaling), options)), started)


def main(
    model: Annotated[Path, typer.Option(help="An exported ONNX.")],
    count: Annotated[int, typer.Option(help="Pictures.")] = 500,
    side: Annotated[int, typer.Option(help="Of each picture, in pixels.")] = 64,
    threads: Annotated[int, typer.Option(help="Of the network, in both.")] = 1,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 3,
) -> None:
    """Print both times, their ratio and Ray's start-up."""
    with tempfile.TemporaryDirectory(prefix="sanrt-") as folder:
        source = pictures(Path(folder, "in"), count, side)
        running = RunOptions(threads=threads)
        times: list[tuple[float, float]] = []
        started = time.perf_counter()
        upscaling = UpscaleOptions()
        recipe = Recipe.of(model_spec(model), None, upscaling, Encoding())
        task = Task(model.absolute(), "onnxruntime", running, upscaling, recipe)
        with load_backend("onnxruntime", model, running) as network, connected(LOCAL, 1, threads) as share:
            connecting = time.perf_counter() - started
            with Pool(task, share) as pool:
                print(f"start-up: Ray {connecting:.1f} s, worker {time.perf_counter() - started - connecting:.1f} s")
                for turn in range(rounds):
                    local = local_seconds(network, find_pictures([source], Path(folder, f"local{turn}"), Naming()))
                    jobs, started = find_pictures([source], Path(folder, f"ray{turn}"), Naming()), time.perf_counter()
                    ray = timed(list(pool.run(jobs)), started)
                    times.append((local, ray))
                    print(f"local {local:.2f} s, Ray {ray:.2f} s, ratio {ray / local:.3f}", flush=True)
    print(f"{count} pictures of {side} x {side}: median ratio {median(second / first for first, second in times):.3f}")


if __name__ == "__main__":
    run_command("ray_overhead", main)
