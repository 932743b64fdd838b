"""CUDA sources -> PTX and cubins with NVRTC, which needs neither a GPU nor a driver; cached by digest."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sanrt.errors import BackendError

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities (times ten) that the kernels are compiled for and checked on."""

HEADERS = ("primitives.cuh", "formats.cuh")
INSTALL = "pip install 'sanrt[kernels]'"


def scalar(dtype: torch.dtype) -> str:
    """The kernels' name for a map's number format; raises BackendError for one they do not take."""
    names = {"torch.float16": "Half", "torch.bfloat16": "BFloat", "torch.float32": "float"}
    if str(dtype) not in names:
        raise BackendError(f"CUDA kernels: the map is {dtype}; expected float16, bfloat16 or float32")
    return names[str(dtype)]


@dataclass(frozen=True)
class Report:
    """What ptxas says of one kernel."""

    registers: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Program:
    """One source file specialised by definitions, such as SCALAR=Half."""

    name: str
    """File name without `.cu`."""
    defines: tuple[str, ...]

    @cached_property
    def source(self) -> str:
        """The file with the shared headers before it: nothing is included, so NVRTC needs no header package."""
        return "".join((HERE / part).read_text() for part in (*HEADERS, f"{self.name}.cu"))

    def options(self, architecture: str) -> list[str]:
        return [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v", *(f"-D{d}" for d in self.defines)]

    def cubin(self, capability: int) -> bytes:
        """Machine code for one compute capability (such as 90)."""
        return self.cached(f"sm_{capability}", "cubin")

    def ptx(self, capability: int) -> bytes:
        """PTX for a compute capability; runs there and on anything later."""
        return self.cached(f"compute_{capability}", "ptx")

    def cached(self, architecture: str, kind: str) -> bytes:
        identity = "\0".join([self.source, *self.options(architecture), str(nvrtc_version())])
        path = cache_folder() / f"{self.name}-{architecture}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.{kind}"
        if path.exists():
            return path.read_bytes()
        code, _ = self.compile(architecture)
        write_whole(path, code)
        return code

    def compile(self, architecture: str) -> tuple[bytes, dict[str, Report]]:
        """Code (a cubin for `sm_..`, PTX for `compute_..`) and, of a cubin, the report on each kernel."""
        code, log = compiled(
            self.name, self.source, self.options(architecture), "PTX" if architecture.startswith("compute") else "CUBIN"
        )
        return code, reports(log)


def import_nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise BackendError(f"CUDA kernels: NVRTC is not installed ({error}); {INSTALL}") from error
    return nvrtc


def nvrtc_version() -> tuple[int, int]:
    nvrtc = import_nvrtc()
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        raise BackendError(f"CUDA kernels: the NVRTC library cannot be loaded ({error}); {INSTALL}") from error
    return major, minor


def compiled(name: str, source: str, options: list[str], kind: str) -> tuple[bytes, str]:
    """Run NVRTC; raises BackendError with the compiler's first complaint."""
    nvrtc_version()
    nvrtc = import_nvrtc()
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = (
            fetched(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace").rstrip("\0 \n")
        )
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            complaint = next((line for line in log.splitlines() if "error" in line), status.name)
            raise BackendError(f"CUDA kernels: {name}.cu does not compile with {' '.join(options)} ({complaint})")
        return fetched(program, getattr(nvrtc, f"nvrtcGet{kind}Size"), getattr(nvrtc, f"nvrtcGet{kind}")), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def fetched(program: Any, size: Any, get: Any) -> bytes:
    """What a pair of NVRTC getters returns of a program."""
    buffer: bytes = b"\0" * checked(size(program))
    checked(get(program, buffer))
    return buffer


def checked(result: tuple[Any, ...]) -> Any:
    """The value of an NVRTC or driver call; raises BackendError with the status's name."""
    status, *values = result
    if status:
        raise BackendError(f"CUDA kernels: a CUDA call failed with {status.name}")
    return values[0] if values else None


def reports(log: str) -> dict[str, Report]:
    """Registers, spills and shared memory of each kernel, read from ptxas's report."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        shared = re.search(r"(\d+) bytes smem", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert registers, f"ptxas reports no registers: {part}"
        found[part.split("'")[0]] = Report(int(registers[1]), spills, int(shared[1]) if shared else 0)
    return found


def cache_folder() -> Path:
    """`sanrt/kernels` in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sanrt" / "kernels"


def write_whole(path: Path, data: bytes) -> None:
    """Write and rename: another process never reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)
