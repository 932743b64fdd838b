"""What this machine has for this process: CPU features, cores, memory, disk, NVIDIA GPUs; a container's limits count."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path

CPU_FEATURES = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "AVX512-VNNI": "avx512_vnni",
    "AVX512-BF16": "avx512_bf16",
    "AVX512-FP16": "avx512_fp16",
    "AMX-BF16": "amx_bf16",
    "AMX-INT8": "amx_int8",
    "AMX-FP16": "amx_fp16",
}
"""Names for people, and the kernel's flags; all of x86-64."""

COMPUTE_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""

CPUINFO, CGROUPS, OWN_CGROUP = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
NVIDIA_VERSION = Path("/proc/driver/nvidia/version")
CUDA_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
"""The library that every NVIDIA driver installs."""

CACHED_FILES = ("active_file", "inactive_file", "slab_reclaimable")
"""Lines of a control group's memory.stat; in version 1 with `total_` before them."""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU that CUDA shows to this process."""

    name: str
    capability: tuple[int, int]
    memory: int
    """Bytes in all."""


@dataclass(frozen=True)
class Gpus:
    """What the CUDA driver answers."""

    devices: tuple[Gpu, ...] = ()
    driver: str = ""
    """Version, where the kernel module tells it."""
    cuda: str = ""
    """Newest CUDA version that the driver supports."""
    problem: str = ""
    """Why there is no device."""


def text(path: Path) -> str:
    """A file's text, or nothing where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def fields(path: Path) -> dict[str, str]:
    """The first of every `name: value` line of a /proc file."""
    lines = [line.partition(":") for line in text(path).splitlines()]
    return {name.strip(): value.strip() for name, _, value in reversed(lines)}


def cpu_name() -> str:
    """The processor's name."""
    known = fields(CPUINFO).get("model name") if is_x86_64() else None
    return known or platform.processor() or platform.machine() or "unknown"


def is_x86_64() -> bool:
    """Whether this process runs on x86-64; asked before /proc/cpuinfo, which in an emulator is that of the machine below."""
    return platform.machine().lower() in ("x86_64", "amd64")


def cpu_features() -> tuple[str, ...]:
    """Which of CPU_FEATURES the processor has: as the kernel says or, where there is no /proc, as LLVM finds."""
    if not is_x86_64():
        return ()
    flags = {flag.replace("_", "") for flag in fields(CPUINFO).get("flags", "").split() or llvm_features()}
    return tuple(name for name, flag in CPU_FEATURES.items() if flag.replace("_", "") in flags)


def llvm_features() -> Iterator[str]:
    """The features that LLVM finds, where llvmlite is installed."""
    if CPUINFO.exists():
        return
    with suppress(ImportError):
        from llvmlite import binding

        yield from (name.replace("-", "_") for name, found in binding.get_host_cpu_features().items() if found)


def cores() -> int:
    """Cores that this process may keep busy: those it may run on, or a container's share of their time if that is less."""
    import psutil  # here and below, as `sanrt --help` does not wait for it

    process = psutil.Process()
    usable = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1
    return min(usable, ceil(core_quota() or usable))


def core_quota() -> float | None:
    """A container's share of the machine's time, in cores (cgroups version 2 and 1); None without a limit."""
    quotas = []
    for folder in cgroup_folders("cpu"):
        given = text(folder / "cpu.max") or f"{text(folder / 'cpu.cfs_quota_us')} {text(folder / 'cpu.cfs_period_us')}"
        numbers = [int(word) for word in given.split() if word.isdigit()]
        quotas += [numbers[0] / numbers[1]] if len(numbers) == 2 else []
    return min(quotas, default=None)


def cgroup_folders(controller: str) -> Iterator[Path]:
    """The control groups that limit this process, in cgroups version 2 and 1; some may not be visible in a container."""
    for line in text(OWN_CGROUP).splitlines() or ["0::/"]:
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        own = root / group.strip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or will be."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


@cache
def gpus() -> Gpus:
    """Ask the CUDA driver."""
    driver = next((word for word in text(NVIDIA_VERSION).split() if word.count(".") and word[0].isdigit()), "")
    try:
        cuda = ctypes.CDLL(CUDA_DRIVER)
    except OSError:
        return Gpus(driver=driver, problem=f"no NVIDIA driver ({CUDA_DRIVER} is not there)")
    if code := cuda.cuInit(0):
        return Gpus(driver=driver, problem=f"the NVIDIA driver does not start (cuInit: error {code})")
    count, supported = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    cuda.cuDriverGetVersion(ctypes.byref(supported))
    devices = tuple(gpu(cuda, index) for index in range(count.value))
    version = f"{supported.value // 1000}.{supported.value % 1000 // 10}"
    return Gpus(devices, driver, version, "" if devices else "the NVIDIA driver shows no GPU")


def free_gpu_memory(index: int) -> int | None:
    """Bytes of a GPU's memory that nobody has; None if the driver does not tell."""
    cuda, context, free, total = ctypes.CDLL(CUDA_DRIVER), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    if cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), index):
        return None
    cuda.cuCtxPushCurrent_v2(context)
    cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
    cuda.cuDevicePrimaryCtxRelease_v2(index)
    return free.value


def gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    """Name, compute capability and memory of one device."""
    device, number, name, memory = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in COMPUTE_CAPABILITY:
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(number.value)
    return Gpu(name.value.decode(), (capability[0], capability[1]), memory.value)


def free_host_memory() -> int:
    """Bytes that can be had without swapping: the machine's, or a container's if that is less.

    Cached files are given up when memory is wanted, so they do not count as used.
    """
    import psutil

    limits = [free for folder in cgroup_folders("memory") if (free := free_in_cgroup(folder)) is not None]
    return min([int(psutil.virtual_memory().available), *limits])


def free_in_cgroup(folder: Path) -> int | None:
    """What a control group has left, its cached files included; None without a limit."""
    limit = text(folder / "memory.max") or text(folder / "memory.limit_in_bytes")
    used = text(folder / "memory.current") or text(folder / "memory.usage_in_bytes")
    if not (limit.strip().isdigit() and used.strip().isdigit()):
        return None
    counted = dict(line.split() for line in text(folder / "memory.stat").splitlines())
    cached = sum(int(counted.get(f"total_{name}", counted.get(name, 0))) for name in CACHED_FILES)
    return max(0, int(limit) - max(0, int(used) - cached))


def reserve(descriptor: int, size: int) -> None:
    """Make a new file `size` bytes long, with room on its disk where the system can promise it; OSError if there is none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def call_after_fork(action: Callable[[], object]) -> None:
    """Have `action` called in every process that is forked from this one; Windows forks none."""
    if sys.platform != "win32":
        os.register_at_fork(after_in_child=action)
