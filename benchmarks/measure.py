"""Parts that the benchmarks share: this machine's limits and description, the model to measure, command lines.

Processes, times and their intervals are `sanrt.runtime.runs.timing`, pictures `sanrt.export.scene`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console

from sanrt.errors import ModelError, SanrtError, UsageError
from sanrt.export.scene import repeated_scene
from sanrt.extras import extra
from sanrt.model.bundled import WeightsKind
from sanrt.model.spec import Architecture, Precision
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.models import MODELS, exported_path
from sanrt.runtime.runs.timing import Size, Worker, events_usable, timed, timed_by_events

MATRIX, GPU_MATRIX, COPIED, REPEATS = 2048, 8192, 2**28, 5
"""Sides of the multiplied matrices, bytes of the copy (no cache holds them), and runs of which the fastest counts."""
PAPER = {"groups": 20, "blocks": 10, "channels": 64, "reduction": 16}
PACKAGES = ("sanrt", "numpy", "torch", "onnxruntime", "onnxruntime-gpu", "llvmlite", "openvino", "tensorrt", "tensorrt-rtx")


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


def picture(size: Size) -> npt.NDArray[np.uint8]:
    """A picture with natural statistics, (H, W, 3)."""
    return repeated_scene(size.height, size.width)


@contextmanager
def found_model(
    model: Path | None, scale: int, paper: bool = False, kind: WeightsKind = WeightsKind.CLEAN
) -> Iterator[Path]:
    """The model to measure: the named one, the paper's network with random weights, the exported one, or the bundled one.

    kind: of bundled weights; those for clean pictures are taken from models/ where they are exported.
    """
    if paper and model:
        raise UsageError("--paper and --model: expected one of them")
    if paper:
        with TemporaryDirectory() as folder:
            yield random_model(Architecture(scale, **PAPER), Path(folder) / f"paper_x{scale}.onnx")
    elif model or (kind is WeightsKind.CLEAN and exported_path(MODELS, scale).exists()):
        path = model or exported_path(MODELS, scale)
        if not path.is_file():
            raise ModelError(f"{path}: no such model; make one with `sanrt export --scale {scale}`, or leave --model out")
        yield path
    else:
        with extra("export", "making a model"):
            from sanrt.export.onnx import ExportOptions, export_onnx
            from sanrt.model.checkpoint import bundled_checkpoint, load_checkpoint
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"bundled_{kind}_x{scale}.onnx"
            yield export_onnx(load_checkpoint(bundled_checkpoint(scale, kind)), path, ExportOptions(check=False)).path


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


@dataclass(frozen=True)
class ProcessRun:
    """A command that ended."""

    status: int
    problem: str
    """What it wrote to its standard error."""
    wall: float
    """Seconds, as the next."""
    cpu: float
    """Of all its threads: comparable on a machine that does other work too."""
    peak: int
    """Bytes resident at most."""


class Runs:
    """Runs commands; lives in a process of its own, which stays small."""

    def run(self, command: list[str]) -> ProcessRun:
        """Wait for a command."""
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert process.stderr
        problem = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu = usage.ru_utime + usage.ru_stime
        return ProcessRun(process.returncode, problem.strip(), time.monotonic() - started, cpu, usage.ru_maxrss * 1024)


def run_alone(command: list[str]) -> ProcessRun:
    """Run a command from a small process: the system counts a child's largest memory from its parent's on."""
    with Worker(Runs) as runs:
        run: ProcessRun = runs.call("run", command)
        return run


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
