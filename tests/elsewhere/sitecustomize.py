"""Makes this Linux look to sanrt like another system: `SANRT_AS_IF=win32 PYTHONPATH=tests/elsewhere python ...`.

Only sanrt's own modules see it, by their imports: `sys.platform` and `os.name` of that system, and none of the modules and
functions that it has not got. Python and the libraries stay what they are. What Windows does with files that are open holds
for everybody: they are neither removed, renamed nor replaced. No file of /proc or /sys can be opened by sanrt.
"""

from __future__ import annotations

import builtins
import ctypes
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

SYSTEM = os.environ.get("SANRT_AS_IF", "")
MODULES = {
    "darwin": set[str](),
    "win32": {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"},
}
"""What cannot be imported there."""
LINUX = {
    "os": (
        "sched_getaffinity sched_setaffinity posix_fallocate posix_fadvise fallocate memfd_create copy_file_range "
        "O_TMPFILE O_DIRECT getrandom eventfd pidfd_open setns unshare"
    ),
    "signal": "SIGRTMIN SIGRTMAX SIGPWR SIGPOLL SIGSTKFLT sigtimedwait sigwaitinfo",
    "time": "CLOCK_BOOTTIME",
    "mmap": "MAP_POPULATE",
    "socket": "AF_NETLINK AF_VSOCK",
    "resource": "prlimit RLIMIT_SIGPENDING",
}
"""What macOS lacks of these modules."""
UNIX = {
    "os": (
        "fork forkpty register_at_fork getuid geteuid getgid getegid getgroups getpgid getpgrp getsid setsid killpg nice "
        "getpriority setpriority chown fchown lchown fchmod mkfifo mknod statvfs fstatvfs uname wait wait3 wait4 WNOHANG "
        "pread pwrite preadv pwritev readv writev sched_yield pathconf sysconf confstr O_NOFOLLOW O_DIRECTORY O_NONBLOCK "
        "O_CLOEXEC O_SYNC lockf tcgetpgrp ttyname openpty ctermid getloadavg sync posix_spawn sendfile O_NOCTTY fchdir"
    ),
    "signal": "SIGKILL SIGHUP SIGQUIT SIGUSR1 SIGUSR2 SIGALRM SIGCHLD SIGPIPE SIGXFSZ SIGXCPU SIGCONT SIGSTOP alarm "
    "setitimer pause sigwait pthread_kill pthread_sigmask siginterrupt",
    "time": "tzset clock_settime CLOCK_REALTIME",
    "mmap": "MAP_PRIVATE MAP_SHARED MAP_ANONYMOUS PROT_READ PROT_WRITE",
    "socket": "AF_UNIX",
    "select": "poll epoll kqueue",
}
"""What Windows lacks besides."""


class Seen(ModuleType):
    """A module as it is elsewhere: without some names, and with other values for some."""

    def __init__(self, real: ModuleType, absent: set[str], changed: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(_real=real, _absent=absent, _replaced={}, **changed)

    def __getattr__(self, name: str) -> Any:
        if name in self._absent:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on {SYSTEM}")
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What a test replaces is replaced in the module itself, but for what differs here."""
        if name in self.__dict__:
            self.__dict__[name] = value
        else:
            self._replaced.setdefault(name, getattr(self._real, name))
            setattr(self._real, name, value)

    def __delattr__(self, name: str) -> None:
        """What was replaced is put back: pytest deletes what it did not find in this module's own dictionary."""
        if name in self._replaced:
            setattr(self._real, name, self._replaced.pop(name))


def absent_names(module: str) -> set[str]:
    """What a module lacks on the system."""
    names = LINUX.get(module, "") + " " + (UNIX.get(module, "") if SYSTEM == "win32" else "")
    return set(names.split())


def changed_values(module: str) -> dict[str, Any]:
    """What a module says otherwise on the system."""
    if module == "sys":
        return {"platform": SYSTEM}
    if module == "os" and SYSTEM == "win32":
        return {"name": "nt"}
    if module == "platform":
        return {"system": lambda: {"darwin": "Darwin", "win32": "Windows"}[SYSTEM]}
    if module == "ctypes" and SYSTEM == "win32":
        kernel = SimpleNamespace(SwitchToThread=ctypes.CDLL(None).sched_yield)
        return {"windll": SimpleNamespace(kernel32=kernel)}
    return {}


seen: dict[str, ModuleType] = {}
"""Modules as sanrt sees them, by name."""
real_import, real_stat = builtins.__import__, os.stat


def importing(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:
    """`import` as sanrt's modules see it."""
    importer = (globals or {}).get("__name__", "")
    if level or not (importer == "sanrt" or importer.startswith("sanrt.")):
        return real_import(name, globals, locals, fromlist, level)
    if name.partition(".")[0] in MODULES[SYSTEM]:
        raise ModuleNotFoundError(f"No module named {name!r} on {SYSTEM}", name=name)
    module = real_import(name, globals, locals, fromlist, level)
    name = module.__name__
    if name not in seen:
        absent, changed = absent_names(name), changed_values(name)
        seen[name] = Seen(module, absent, changed) if absent or changed else module
    return seen[name]


def asks_for_sanrt(frame: FrameType | None) -> bool:
    """Whether the innermost caller outside of the standard library is a module of sanrt's."""
    standard = str(Path(os.__file__).parent)
    while frame:
        name, file = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
        if name.startswith("sanrt."):
            return True
        if name != __name__ and not (file.startswith((standard, "<frozen")) and "site-packages" not in file):
            return False
        frame = frame.f_back
    return False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: FileNotFoundError where sanrt opens what only Linux has."""
    if event == "open":
        require_elsewhere(arguments[0])


def stat_elsewhere(path: Any, **options: Any) -> os.stat_result:
    """os.stat, likewise."""
    require_elsewhere(path)
    return real_stat(path, **options)


def require_elsewhere(path: Any) -> None:
    """FileNotFoundError for files of /proc and /sys, where a module of sanrt's asks for them."""
    if str(path).startswith(("/proc/", "/sys/")) and asks_for_sanrt(sys._getframe(1)):
        raise FileNotFoundError(2, f"not there on {SYSTEM}", path)


def in_use(path: Any) -> bool:
    """Whether this process has a file open."""
    try:
        wanted = real_stat(path, follow_symlinks=False)
    except OSError:
        return False
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found = os.fstat(int(descriptor.name))
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def as_on_windows(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `os` that refuses paths of files that are open, as Windows does."""

    def checked(*paths: Any, **options: Any) -> Any:
        for path in paths[:2]:
            if isinstance(path, str | bytes | os.PathLike) and in_use(path):
                raise PermissionError(13, "The process cannot access the file: it is open", str(path))
        return function(*paths, **options)

    return checked


if SYSTEM:
    sys.addaudithook(watch)
    os.stat = stat_elsewhere  # type: ignore[assignment]
    builtins.__import__ = importing
    if SYSTEM == "win32":
        for function in ("remove", "unlink", "rename", "replace"):
            setattr(os, function, as_on_windows(getattr(os, function)))
        shutil._use_fd_functions = False  # type: ignore[attr-defined]  # or it removes by folder descriptors
