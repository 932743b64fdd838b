"""Parts that the benchmarks share: a process per candidate, times with intervals, this machine's limits and description."""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console

from sanrt.errors import BackendError, ModelError, SanrtError, UsageError, first_line
from sanrt.extras import extra
from sanrt.model.spec import MIN_SIDE, Architecture, Precision
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.models import MODELS, exported_path

Pixels = npt.NDArray[np.uint8]

RESAMPLES, CONFIDENCE = 2000, 95
"""Draws of the bootstrap, and the confidence of its intervals in per cent."""
SCENE = 192
"""Side of the generated picture that larger ones repeat: drawing it takes time that grows with its size."""
MATRIX, GPU_MATRIX, COPIED, REPEATS = 2048, 8192, 2**28, 5
"""Sides of the multiplied matrices, bytes of the copy (no cache holds them), and runs of which the fastest counts."""
PAPER = {"groups": 20, "blocks": 10, "channels": 64, "reduction": 16}
PACKAGES = ("sanrt", "numpy", "torch", "onnxruntime", "onnxruntime-gpu", "llvmlite", "openvino", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Size:
    """A picture's size in pixels."""

    width: int
    height: int

    @property
    def pixels(self) -> int:
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The size in WIDTHxHEIGHT; raises UsageError for anything else, and for sides that the network does not take."""
        found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
        if not found or min(map(int, found.groups())) < MIN_SIDE:
            raise UsageError(f"size {text!r}: expected WIDTHxHEIGHT such as 320x180, each side at least {MIN_SIDE} pixels")
        return cls(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Interval:
    """A percentile of the measured seconds, and where it lies with CONFIDENCE per cent."""

    value: float
    low: float
    high: float


def intervals(turns: list[list[float]], percentiles: tuple[int, ...] = (50, 90, 99)) -> list[Interval]:
    """Percentiles of the times of all turns, and their intervals; of few times, the high percentiles are the slowest one.

    Whole turns are drawn for the bootstrap, since the runs of one are alike: they share the machine's state.
    """
    values = np.percentile(np.concatenate(turns), percentiles)
    drawn = np.random.default_rng(0).integers(len(turns), size=(RESAMPLES, len(turns)))
    found = [np.percentile(np.concatenate([turns[turn] for turn in each]), percentiles) for each in drawn]
    low, high = np.percentile(found, [(100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2], axis=0)
    return [Interval(*map(float, each)) for each in zip(values, low, high, strict=True)]


class Worker:
    """An object that lives in a process of its own, so that its memory is its own; a context manager.

    make: called in the process; it, the arguments and the results of `call` travel by pickle.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call the object's method; raises BackendError with the reason when it fails or the process ends."""
        try:
            self.connection.send((method, arguments))
            failed, result = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise BackendError(f"its process ended (exit {self.process.exitcode}); is there enough memory?") from None
        if failed:
            raise BackendError(result)
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.join()


def serve(connection: Connection, make: Callable[[], Any]) -> None:
    """Make the object when it is first called, then answer calls until the other end closes."""
    made: list[Any] = []
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            made = made or [make()]
            answer = False, getattr(made[0], method)(*arguments)
        except Exception as error:  # whatever a library raises becomes a row's reason
            answer = True, first_line(error)
        connection.send(answer)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes (Linux)."""
    # Not ru_maxrss: a child starts with its parent's.
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def operations(arch: Architecture, size: Size, regions: int = 2) -> float:
    """Multiplications and additions that the network's formulas need for one picture, each counted as one.

    Convolutions, attention's two products, SOCA's covariances; what takes less than a hundredth (roots, gates) is left out.
    """
    c, inner, s = arch.channels, arch.attention_channels, arch.scale
    keys = size.pixels / (2 * regions) ** 2
    attention = 4 * c * inner + 2 * inner * keys
    group = (2 * arch.blocks + 1) * 9 * c * c + c * c
    upsampling = sum(9 * c * c * side * side for side in accumulate(arch.upsampling, int.__mul__))
    ends = 9 + 27 * c + s * s * (27 * c + 9)
    return 2.0 * size.pixels * (ends + 2 * attention + arch.groups * group + upsampling)


class Limits:
    """The largest rates that PyTorch reaches on this machine; runs in a Worker."""

    def __init__(self, threads: int | None) -> None:
        with extra("export", "measuring this machine's limits"):
            import torch

        torch.set_num_threads(threads or machine.cores())

    def product(self, precision: Precision, device: str = "cpu") -> float:
        """Operations per second of a large matrix product."""
        import torch

        dtype = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}[precision]
        side = MATRIX if device == "cpu" else GPU_MATRIX
        a, b = torch.rand(2, side, side, device=device).to(dtype)
        out = torch.empty_like(a)
        return 2 * side**3 / fastest(lambda: torch.mm(a, b, out=out), device)

    def copy(self, device: str = "cpu") -> float:
        """Bytes per second, read and written, of a large copy."""
        import torch

        source = torch.ones(COPIED, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * COPIED / fastest(lambda: target.copy_(source), device)

    def gpu(self) -> bool:
        """Whether there is a GPU to measure."""
        return events_usable()


def fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of some runs, after one that does not count."""
    work()
    time_ = timed if device == "cpu" else timed_by_events
    return min(time_(work) for _ in range(REPEATS))


def timed(work: Callable[[], object]) -> float:
    """Seconds of one run."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def timed_by_events(work: Callable[[], object]) -> float:
    """Seconds between two CUDA events around one run."""
    import torch

    event: Any = torch.cuda.Event
    before, after = (event(enable_timing=True) for _ in range(2))
    before.record()
    work()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def events_usable() -> bool:
    """Whether PyTorch is here and reaches a GPU."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def free_on_gpu() -> int | None:
    """Bytes of the first GPU's memory that nobody has; None without a GPU."""
    return machine.free_gpu_memory(0) if machine.gpus().devices else None


def environment(threads: int | None) -> dict[str, str]:
    """Everything that the figures depend on: machine, versions, threads, and what else the machine did at this moment."""
    gpus = machine.gpus()
    clock = machine.fields(machine.CPUINFO).get("cpu MHz", "")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": f"{machine.cpu_name()} ({', '.join(machine.cpu_features())})",
        "cores": f"{machine.cores()}, quota {machine.core_quota() or 'none'}, {threads or machine.cores()} threads used",
        "clock": f"{clock} MHz now" if clock else "unknown",
        "gpu": ", ".join(gpu.name for gpu in gpus.devices) + f" driver {gpus.driver}" if gpus.devices else gpus.problem,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {found}" for name in PACKAGES if (found := installed(name))),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def installed(package: str) -> str:
    """A package's version, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def picture(size: Size) -> Pixels:
    """A picture with natural statistics, (H, W, 3): a generated scene, repeated where it is too small."""
    from sanrt.export.scene import natural_scene

    scene = natural_scene(min(SCENE, size.height), min(SCENE, size.width))
    rows, columns = -(-size.height // scene.shape[0]), -(-size.width // scene.shape[1])
    return np.ascontiguousarray(np.tile(scene, (rows, columns, 1))[: size.height, : size.width])


@contextmanager
def found_model(model: Path | None, scale: int, paper: bool = False) -> Iterator[Path]:
    """The model to measure: the named one, the paper's network with random weights, the exported one, or the bundled one."""
    if paper and model:
        raise UsageError("--paper and --model: expected one of them")
    if paper:
        with TemporaryDirectory() as folder:
            yield random_model(Architecture(scale, **PAPER), Path(folder) / f"paper_x{scale}.onnx")
    elif model or exported_path(MODELS, scale).exists():
        path = model or exported_path(MODELS, scale)
        if not path.is_file():
            raise ModelError(f"{path}: no such model; make one with `sanrt export --scale {scale}`, or leave --model out")
        yield path
    else:
        with extra("export", "making a model"):
            from sanrt.export.onnx import ExportOptions, export_onnx
            from sanrt.model.checkpoint import bundled_checkpoint, load_checkpoint
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"bundled_x{scale}.onnx"
            yield export_onnx(load_checkpoint(bundled_checkpoint(scale)), path, ExportOptions(check=False)).path


def random_model(arch: Architecture, path: Path) -> Path:
    """An exported network of PyTorch's initial weights."""
    with extra("export", "making a model"):
        import torch

        from sanrt.model.graph import san_model
        from sanrt.model.san import SAN
        from sanrt.model.spec import ModelSpec
    torch.manual_seed(0)
    weights = {name: tensor.detach().numpy() for name, tensor in SAN(arch).state_dict().items()}
    path.write_bytes(san_model(ModelSpec(arch, "random", "random", 5), weights).SerializeToString())
    return path


def console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=180)


def run_command(name: str, function: Callable[..., None]) -> None:
    """Run a benchmark's command line: one line on stderr and exit 1 for whatever is wrong."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(function)
    try:
        app()
    except (SanrtError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(1)
