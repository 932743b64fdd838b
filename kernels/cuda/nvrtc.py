"""Compiles CUDA sources to PTX and cubins with NVRTC, which needs neither a GPU nor a driver; results are cached."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sanrt.errors import BackendError, first_line
from sanrt.files import cache_folder, cached_file

if TYPE_CHECKING:
    import torch

SOURCES = Path(__file__).parent
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities (times ten) that the kernels are compiled for and checked on."""

PTX_VERSION = "8.3"
"""The PTX that the kernels are stated to be, which drivers know from CUDA 12.3 on: they use nothing newer.

NVRTC states its own, and a driver refuses PTX of a version that is newer than itself.
"""

INSTALL = "pip install 'nvidia-cuda-nvrtc>=13,<14' 'cuda-bindings>=13,<14'"
"""Both are in the kernels and trt extras, of which the first has torch besides."""
HEADERS = ("primitives.cuh", "formats.cuh")


def scalar_type(dtype: torch.dtype) -> str:
    """The C++ type of a tensor's elements in the kernels; raises BackendError for a dtype they do not support."""
    names = {"torch.float16": "Half", "torch.bfloat16": "BFloat", "torch.float32": "float"}
    if str(dtype) not in names:
        raise BackendError(f"CUDA kernels: the map is {dtype}; expected float16, bfloat16 or float32")
    return names[str(dtype)]


@dataclass(frozen=True)
class KernelReport:
    """What ptxas reports of one compiled kernel."""

    registers: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class CudaSource:
    """One .cu file, specialised by preprocessor definitions such as SCALAR=Half."""

    name: str
    """File name without `.cu`."""
    defines: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        """The file with the shared headers before it: nothing is included, so NVRTC needs no header package."""
        return "".join((SOURCES / part).read_text() for part in (*HEADERS, f"{self.name}.cu"))

    def options(self, architecture: str) -> list[str]:
        return [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v", *(f"-D{d}" for d in self.defines)]

    def cubin(self, capability: int) -> bytes:
        """Machine code for one compute capability (such as 90)."""
        return self.cached(f"sm_{capability}", "cubin")

    def ptx(self, capability: int) -> bytes:
        """PTX for a compute capability as text of version PTX_VERSION; runs there and on anything later."""
        made = self.cached(f"compute_{capability}", "ptx").rstrip(b"\0")
        return re.sub(rb"(?m)^\.version .*$", f".version {PTX_VERSION}".encode(), made, count=1)

    def cached(self, architecture: str, kind: str) -> bytes:
        """Code from the user's cache, or compiled; its name has a digest of source, options and NVRTC: it is never stale."""
        identity = "\0".join([self.text, *self.options(architecture), str(nvrtc_version())])
        name = f"{self.name}-{architecture}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.{kind}"
        return cached_file([cache_folder() / "kernels"], name, lambda: self.compile(architecture)[0])

    def compile(self, architecture: str) -> tuple[bytes, dict[str, KernelReport]]:
        """Code (a cubin for `sm_..`, PTX for `compute_..`) and, of a cubin, the report on each kernel."""
        code, log = run_nvrtc(
            self.name, self.text, self.options(architecture), "PTX" if architecture.startswith("compute") else "CUBIN"
        )
        return code, parse_ptxas_report(log)


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
        # cuda-bindings finds the library when it is first called, and lists the places where it is not, a line each.
        raise BackendError(f"CUDA kernels: the NVRTC library cannot be loaded ({first_line(error)}); {INSTALL}") from error
    return major, minor


def run_nvrtc(name: str, source: str, options: list[str], kind: str) -> tuple[bytes, str]:
    """Compile to a kind of code (`PTX` or `CUBIN`): the code and the log; raises BackendError with the first complaint."""
    nvrtc_version()
    nvrtc = import_nvrtc()
    program = check_cuda(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = nvrtc_output(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            complaint = next((line for line in log.splitlines() if "error" in line), status.name)
            raise BackendError(f"CUDA kernels: {name}.cu does not compile with {' '.join(options)} ({complaint})")
        return nvrtc_output(program, getattr(nvrtc, f"nvrtcGet{kind}Size"), getattr(nvrtc, f"nvrtcGet{kind}")), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def nvrtc_output(program: Any, size: Any, get: Any) -> bytes:
    """The bytes that a pair of NVRTC's getters (one for the size, one for the content) returns of a program."""
    buffer: bytes = b"\0" * check_cuda(size(program))
    check_cuda(get(program, buffer))
    return buffer


def check_cuda(result: tuple[Any, ...]) -> Any:
    """The value of an NVRTC or driver call, without its status; raises BackendError for a status that is an error."""
    status, *values = result
    if status:
        raise BackendError(f"CUDA kernels: a CUDA call failed with {status.name}")
    return values[0] if values else None


def parse_ptxas_report(log: str) -> dict[str, KernelReport]:
    """Registers, spills and shared memory of each kernel, read from ptxas's report."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        shared = re.search(r"(\d+) bytes smem", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert registers, f"ptxas reports no registers: {part}"
        found[part.split("'")[0]] = KernelReport(int(registers[1]), spills, int(shared[1]) if shared else 0)
    return found
