"""A short run on whatever NVIDIA GPU there is, as one command: `python benchmarks/gpu.py --minutes 12 --json gpu.json`.

Steps run in processes of their own, the most telling first, each with a time-out; one that fails says why, and the rest goes
on until the minutes are spent. The table and the file are written as it goes. `--rehearse` runs the same steps small on the
processor; those that nothing can stand in for say so.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is its own folder, not the repository

from benchmarks.measure import environment, run_command
from sanrt.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
PYTHON, DEVICE = "PYTHON", "DEVICE"
"""Words of a command that become this Python, and `cuda` or, in a rehearsal, `cpu`."""
LEAST = 3.0
"""Seconds that must be left for a step to be begun."""
KEPT = 4000
"""Characters of a step's output that are kept, its last ones."""
METRICS = "gpu__time_duration.sum,lts__t_bytes.sum,dram__bytes.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed"


@dataclass(frozen=True)
class Step:
    """One thing to find out."""

    name: str
    seconds: float
    """The time-out."""
    shows: str
    command: tuple[str, ...]
    rehearsal: tuple[str, ...] = ()
    """What stands for it on a processor; the same command if left out."""
    needs: tuple[str, ...] = ()
    """Python modules and programs without which it is left out."""


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    shows: str
    result: str
    """`done`, `failed`, `timed out` or `left out`."""
    seconds: float
    finding: str
    """The last line that it printed, or why there is none."""
    output: str = ""


def probe(name: str) -> tuple[str, ...]:
    return PYTHON, "-m", "benchmarks.gpu_probes", name, DEVICE


def tests(*paths: str) -> tuple[str, ...]:
    return PYTHON, "-m", "pytest", "-q", "-x", "-m", "gpu", *paths


def latency(*words: str) -> tuple[str, ...]:
    return PYTHON, "benchmarks/latency.py", "--seconds", "20", *words


def checked(tool: str, shows: str) -> Step:
    """All kernels on tiny odd shapes under compute-sanitizer."""
    command = ("compute-sanitizer", "--error-exitcode", "9", "--tool", tool, *probe("kernels"))
    return Step(tool, 60, shows, command, probe("kernels"), ("compute-sanitizer",))


SANITIZED = {"memcheck": "no bad access", "racecheck": "no race", "initcheck": "no unwritten value"}
SMALL = (PYTHON, "benchmarks/latency.py", "--seconds", "0", "--size", "20x16", "--backend", "torch", "--threads", "1")
COLLECTED = (PYTHON, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "tests/kernels/cuda/test_gpu.py")
PIPELINE = (PYTHON, "benchmarks/pipeline.py")
STEPS = (
    Step("card", 15, "the GPU and its driver", ("nvidia-smi",), needs=("nvidia-smi",)),
    Step("ceilings", 30, "both ceilings", probe("ceilings")),
    Step("device layer", 30, "all that TensorRT needs of CUDA", probe("device_layer")),
    Step("kernels' tests", 90, "the bounds that were mended and never run", tests("tests/kernels/cuda"), COLLECTED),
    Step("torch-cuda's tests", 60, "the backend against the reference", tests("tests/runtime/backends/test_torch_cuda.py")),
    Step("backends' tests", 60, "onnxruntime-cuda against torch", tests("tests/runtime/backends/test_backends.py")),
    Step("engines' tests", 120, "engines against ONNX Runtime", tests("tests/export/test_engine.py")),
    Step(
        "paper, torch-cuda",
        90,
        "the table, one card",
        latency(
            "--paper", "--size", "320x180", "--backend", "torch-cuda", *(["--precision", "fp16", "--precision", "bf16"])
        ),
        SMALL,
    ),
    Step("experiments", 180, "what each experimental kernel gains", probe("experiments")),
    Step(
        "paper, experimental",
        90,
        "all of them, by the table's own measure",
        ("env", "SANRT_CUDA_EXPERIMENTAL=all", *latency("--paper", "--size", "320x180", "--backend", "torch-cuda")),
        ("env", "SANRT_CUDA_EXPERIMENTAL=all", *SMALL),
        ("cudnn",),
    ),
    Step(
        "kernels", 120, "each kernel before and after, beside its limit", (PYTHON, "benchmarks/kernels.py"), probe("kernels")
    ),
    Step("paper, PyTorch", 60, "the rival", latency("--paper", "--size", "320x180", "--backend", "gpu-torch"), SMALL),
    *(checked(tool, shows) for tool, shows in SANITIZED.items()),
    Step("ncu", 60, "what L2 moves", ("ncu", "--metrics", METRICS, *probe("one_of_each")), probe("one_of_each"), ("ncu",)),
    Step("cuDNN graph", 60, "the cheap step's gain", probe("cudnn_graph"), probe("cudnn_graph"), ("cudnn",)),
    Step("little memory", 60, "recordings are dropped where memory is missed", probe("little_memory")),
    Step("streaming", 60, "exact streaming against whole", probe("streamed")),
    Step(
        "pipeline",
        60,
        "a folder of pictures",
        (*PIPELINE, "--backend", "torch-cuda", "--count", "24", "--size", "640x360"),
        (*PIPELINE, "--backend", "native", "--count", "2", "--size", "32x24", "--threads", "1"),
    ),
    Step("max-autotune", 90, "the honest rival", probe("autotuned_group")),
    Step(
        "onnxruntime-cuda",
        120,
        "fp32, fp16 and bf16",
        latency("--backend", "onnxruntime-cuda", *["--precision", "fp32", "--precision", "fp16", "--precision", "bf16"]),
        SMALL,
    ),
    Step(
        "TensorRT-RTX", 90, "whether it runs on this GPU", probe("rtx_here"), needs=("tensorrt_rtx_bindings", "polygraphy")
    ),
)


def gpu(
    minutes: Annotated[float, typer.Option(min=0, help="For everything.")] = 12,
    step: Annotated[list[str] | None, typer.Option(help="A step by its name; repeated. All if left out.")] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Small, on the processor, with stand-ins.")] = False,
    json_: Annotated[Path, typer.Option("--json", help="Where everything is written, after each step.")] = Path("gpu.json"),
) -> None:
    """Find out as much as the minutes allow; exit 1 where a step failed."""
    chosen = [each for each in STEPS if not step or each.name in step]
    if unknown := set(step or ()) - {each.name for each in chosen}:
        raise typer.BadParameter(f"{sorted(unknown)[0]!r}: expected {', '.join(each.name for each in STEPS)}")
    stamp, outcomes = environment(None), list[Outcome]()
    for outcome in run_steps(chosen, 60 * minutes, rehearse):
        outcomes.append(outcome)
        print(f"{outcome.name:<20} {outcome.result:<10} {outcome.seconds:6.1f} s  {outcome.finding}", flush=True)
        facts = {"rehearsal": rehearse, "machine": stamp, "steps": [asdict(each) for each in outcomes]}
        write_whole(json_, (json.dumps(facts, indent=2) + "\n").encode(), "choose another place for --json")
    raise typer.Exit(int(any(each.result in ("failed", "timed out") for each in outcomes)))


def run_steps(steps: Sequence[Step], budget: float, rehearse: bool = False) -> Iterator[Outcome]:
    """Run steps one after another until the budget of seconds is spent; what is left out says why."""
    end = time.monotonic() + budget
    for step in steps:
        left, command = end - time.monotonic(), (rehearse and step.rehearsal) or step.command
        missing = () if rehearse and step.rehearsal else [need for need in step.needs if not is_there(need)]
        if missing:
            yield Outcome(step.name, step.shows, "left out", 0.0, f"{', '.join(missing)} not installed")
        elif left < LEAST:
            yield Outcome(step.name, step.shows, "left out", 0.0, "the minutes are spent")
        else:
            yield run_step(step, command, min(step.seconds, left), "cpu" if rehearse else "cuda")


def is_there(need: str) -> bool:
    """Whether a program or a Python module is installed."""
    return shutil.which(need) is not None or find_spec(need) is not None


def run_step(step: Step, command: Sequence[str], limit: float, device: str) -> Outcome:
    """Run a command in a process group of its own, which is killed as a whole when its time is up."""
    words = [{PYTHON: sys.executable, DEVICE: device}.get(word, word) for word in command]
    started = time.monotonic()
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        result = "done" if process.returncode == 0 else "failed"
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        result = "timed out"
    lines = [line.strip() for line in output.splitlines() if any(map(str.isalnum, line))]  # tables end in a frame
    finding = lines[-1] if lines else f"no output, status {process.returncode}"
    if result == "timed out":
        finding = f"after {limit:.0f} s; its last line: {finding}"
    return Outcome(step.name, step.shows, result, time.monotonic() - started, finding, output[-KEPT:])


if __name__ == "__main__":
    run_command("gpu", gpu)
