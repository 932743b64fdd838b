"""What this machine has and which backends it can run."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import distributions
from math import prod
from pathlib import Path

from sanrt.errors import ModelError
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.engines import SUFFIX, read_engine
from sanrt.runtime.backends.protocol import BackendStatus
from sanrt.runtime.backends.registry import AUTO_ORDER, automatic_choice, backend_names, status
from sanrt.runtime.host import free_host_memory
from sanrt.version import __version__

GIB = 2**30
CUDA_PACKAGES = re.compile(r"(nvidia-(cublas|cudnn|cuda-runtime|cuda-nvrtc|cufft)(-cu\d+)?|cuda-(python|bindings)|pycuda)")
TENSORRT_PACKAGES = re.compile(r"tensorrt(-rtx)?(-cu\d+)?((-|_)(libs|bindings))?")


@dataclass(frozen=True)
class Diagnosis:
    """What `sanrt doctor` found."""

    facts: tuple[tuple[str, str], ...]
    """Facts about the machine: what was looked at, and what was found."""
    backends: tuple[BackendStatus, ...]
    default: BackendStatus | None
    """What `--backend auto` takes for an exported model; None when nothing can run."""


def diagnose(models: Path) -> Diagnosis:
    """Look at the machine and at every backend; `models` is where the disk matters."""
    checked = {name: status(name) for name in backend_names()}
    facts = (*software(), *processor(models), *graphics(), *engines(models))
    default = automatic_choice(name for name in AUTO_ORDER if name != "tensorrt")
    return Diagnosis(facts, tuple(checked.values()), default)


def software() -> Iterable[tuple[str, str]]:
    """Versions of what is independent of the backend."""
    yield "sanrt", __version__
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def processor(models: Path) -> Iterable[tuple[str, str]]:
    """The CPU, and the memory and disk that this process may use."""
    yield "CPU", machine.cpu_name()
    yield "CPU features", ", ".join(machine.cpu_features()) or "none of " + ", ".join(machine.CPU_FEATURES)
    quota = machine.core_quota()
    yield "cores", f"{machine.cores()}" + (f", limited to the time of {quota:g}" if quota else "")
    yield "free memory", f"{free_host_memory() / GIB:.1f} GiB"
    yield "free disk", f"{machine.free_disk(models) / GIB:.1f} GiB for {models}"


def graphics() -> Iterable[tuple[str, str]]:
    """NVIDIA GPUs, their driver, and the libraries installed for them."""
    found = machine.gpus()
    for index, gpu in enumerate(found.devices):
        major, minor = gpu.capability
        yield f"GPU {index}", f"{gpu.name}, compute capability {major}.{minor}, {gpu.memory / GIB:.1f} GiB"
    if found.problem:
        yield "GPU", found.problem
    if found.driver or found.cuda:
        yield "driver", f"{found.driver or 'version unknown'}, CUDA up to {found.cuda or 'unknown'}"
    yield "CUDA libraries", installed_packages(CUDA_PACKAGES)
    yield "TensorRT", installed_packages(TENSORRT_PACKAGES)


def engines(models: Path) -> Iterable[tuple[str, str]]:
    """The engines in a folder, and what their largest pictures take of a GPU's memory."""
    for path in sorted(models.glob(f"*{SUFFIX}")):
        try:
            info = read_engine(path)
        except ModelError as error:
            yield "engine", str(error)
            continue
        largest = max((profile.max for profile in info.identity.options.profiles), key=prod)
        memory = info.activations(largest) / GIB
        yield "engine", f"{path.name}, for {info.identity.gpu}: up to {largest} in {memory:.1f} GiB of a GPU's memory"


def installed_packages(pattern: re.Pattern[str]) -> str:
    """Installed Python packages whose whole name fits."""
    found = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in distributions()}
    return ", ".join(f"{name} {found[name]}" for name in sorted(found) if pattern.fullmatch(name)) or "no Python package"
