"""What this machine has: CPU features, usable cores, free disk, NVIDIA GPUs. Standard library only."""

from __future__ import annotations

import ctypes
import os
import shutil
from dataclasses import dataclass
from functools import cache
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
"""Names for people, and the kernel's flags."""

COMPUTE_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""

CPUINFO, CGROUPS = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup")
NVIDIA_VERSION = Path("/proc/driver/nvidia/version")


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
    return fields(CPUINFO).get("model name", "unknown")


def cpu_features() -> tuple[str, ...]:
    """Which of CPU_FEATURES the processor has."""
    flags = fields(CPUINFO).get("flags", "").split()
    return tuple(name for name, flag in CPU_FEATURES.items() if flag in flags)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def core_quota() -> float | None:
    """A container's share of the machine's time, in cores (cgroups version 2 and 1); None without a limit."""
    folder = CGROUPS / "cpu"
    given = text(CGROUPS / "cpu.max") or f"{text(folder / 'cpu.cfs_quota_us')} {text(folder / 'cpu.cfs_period_us')}"
    numbers = [int(word) for word in given.split() if word.isdigit()]
    return numbers[0] / numbers[1] if len(numbers) == 2 else None


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or will be."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


@cache
def gpus() -> Gpus:
    """Ask the CUDA driver library, which every NVIDIA driver installs."""
    driver = next((word for word in text(NVIDIA_VERSION).split() if word.count(".") and word[0].isdigit()), "")
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Gpus(driver=driver, problem="no NVIDIA driver (libcuda.so.1 is not there)")
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
    cuda, context, free, total = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
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


CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""A container's limit and use, in cgroups version 2 and 1."""


def free_host_memory() -> int:
    """Bytes that can be had without swapping: the machine's, or the container's if that is less."""
    limits = [room for limit, used in CGROUP_FILES if (room := container_room(Path(limit), Path(used))) is not None]
    return min([machine_room(), *limits])


def machine_room() -> int:
    """What the kernel says is available; half of the machine's memory where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def container_room(limit: Path, used: Path) -> int | None:
    """What a container has left; None outside of one, or without a limit."""
    try:
        return max(0, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):
        return None
