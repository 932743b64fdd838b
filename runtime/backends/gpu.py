"""What a library's CUDA needs of a GPU and its driver, known before anything is imported or started."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from sanrt.runtime import host as machine
from sanrt.runtime.backends.protocol import BackendStatus

CUDA_LINE = re.compile(r"^(?:__)?cuda(?:_version)?(?:__)?\b[^=\n]*=\s*['\"](\d[\d.]*)", re.MULTILINE)
"""How torch and onnxruntime-gpu state in their files which CUDA they were built for."""


def gpu_status(name: str, version: str, device: int, cuda: str, capability: int = 0) -> BackendStatus:
    """The status of an installed backend: usable where GPU `device` and its driver are new enough.

    cuda: version of CUDA that the backend's libraries were built for, `13.0`; empty where unknown.
    capability: lowest compute capability, times ten.
    """
    found = machine.gpus()
    if found.problem:
        return BackendStatus(name, version, False, found.problem, "install NVIDIA's driver and reboot")
    if device >= len(found.devices):
        reason = f"GPU {device} is not there; the driver shows {len(found.devices)}, numbered from 0"
        return BackendStatus(name, version, False, reason)
    gpu = found.devices[device]
    major, minor = gpu.capability
    if 10 * major + minor < capability:
        reason = f"{gpu.name} has compute capability {major}.{minor}; expected {capability / 10} or later"
        return BackendStatus(name, version, False, reason)
    # What was built for a CUDA release runs on drivers of its major release (minor version compatibility) and of later ones.
    if version_numbers(cuda)[:1] > version_numbers(found.cuda)[:1]:
        reason = f"its libraries are of CUDA {cuda}, and the driver {found.driver or 'here'} runs CUDA up to {found.cuda}"
        return BackendStatus(name, version, False, reason, "install a newer NVIDIA driver and reboot")
    return BackendStatus(name, version, True, f"runs on {gpu.name}")


def cuda_of(module: str, file: str) -> str:
    """The CUDA release that a package was built for, as one of its files says; empty where it does not."""
    spec = find_spec(module)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    stated = CUDA_LINE.search(path.read_text()) if path and path.is_file() else None
    return stated[1] if stated else ""


def version_numbers(version: str) -> list[int]:
    """`13.0.2` -> [13, 0, 2]."""
    return [int(number) for number in re.findall(r"\d+", version)]
