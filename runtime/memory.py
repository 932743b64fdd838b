"""How much memory a run may take."""

from __future__ import annotations

import os
from pathlib import Path

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
