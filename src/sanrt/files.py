"""Files on disk: written whole or not at all, kept where they only spare work, and identified by their content."""

from __future__ import annotations

import atexit
import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from sanrt.errors import FileError, ModelError, system_reason

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

LEFTOVER = re.compile(r"\..*\.sanrt-([0-9a-f]{8}|[0-9a-f]{16})\.partial")
"""Names of files that a killed process left half-written."""
RENAME_SECONDS = 60
"""Age at which a leftover counts as abandoned on Windows, where a file is closed just before it is renamed."""
BUSY_SECONDS = 5
"""How long a file that another program has open on Windows is waited for."""
UNFINISHED: set[Path] = set()
"""Files that this process writes, from before they are made: an interrupt can come between any two lines."""
SOURCES = (".py", ".cu", ".cuh")
SEAL = hashlib.sha256().digest_size
"""Bytes of the digest at the beginning of a kept file: damaged code, or a damaged model, would be wrong without a word."""


@contextmanager
def replacing(path: Path, remedy: str = "choose another place") -> Iterator[IO[bytes]]:
    """A new file beside `path`, open for writing, which takes its place if the body succeeds and is removed if not.

    Its name belongs to this call alone, whatever other threads and processes write to `path`. It is locked while its
    writer lives, so that `remove_leftovers` spares it. Raises FileError, ending in `remedy`, when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished, file = locked_file(path)
        try:
            with file:
                yield file
                file.flush()
                to_disk(file.fileno())  # else a power cut could leave the name with nothing behind it
                if sys.platform == "win32":  # which renames no open file
                    file.close()
                take_place(unfinished, path)
        finally:
            remove_unfinished(unfinished)
        folder_to_disk(path.parent)
    except OSError as error:
        if sys.platform == "win32" and isinstance(error, PermissionError) and path.exists():
            remedy = f"close what has it open, or {remedy}"
        raise FileError(f"{path}: cannot be written ({system_reason(error)}); {remedy}") from error


def take_place(unfinished: Path, path: Path) -> None:
    """Rename a file to `path`; on Windows, wait `BUSY_SECONDS` for whoever has one of the two open before PermissionError.

    Virus scanners do for a moment, and so do other threads that rename to the same place.
    """
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            unfinished.replace(path)
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > give_up:
                raise
            time.sleep(0.01)
        else:
            return


def to_disk(descriptor: int) -> None:
    """Wait until what was written is on the disk, where the file system can say so."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def folder_to_disk(folder: Path) -> None:
    """The same of a folder's names; one that may not be read is left to the system, as all are on Windows."""
    if sys.platform == "win32":
        return
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            to_disk(descriptor)
        finally:
            os.close(descriptor)


def locked_file(path: Path) -> tuple[Path, IO[bytes]]:
    """A new empty file beside `path`, under a name of its own, and locked.

    On Windows it is as good as locked while it is open: nobody can remove it.
    """
    while True:
        unfinished = path.with_name(f".{path.name[:50]}.sanrt-{secrets.token_hex(8)}.partial")
        UNFINISHED.add(unfinished)
        try:
            file = unfinished.open("xb+")
        except OSError:
            UNFINISHED.discard(unfinished)
            raise
        if sys.platform != "win32":
            with suppress(OSError):  # file systems without locks, where `remove_leftovers` gets none either
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return unfinished, file
        file.close()  # taken for a leftover and removed between the two calls
        UNFINISHED.discard(unfinished)


@atexit.register
def remove_all_unfinished() -> None:
    """Remove what an interrupt left in the moment before the file's writer could see to that."""
    for path in (*UNFINISHED,):
        remove_unfinished(path)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=UNFINISHED.clear)  # they are the parent's


def remove_unfinished(path: Path) -> None:
    """Remove a file of `locked_file`'s, if it has not taken its place; where that fails, the failure before it is told."""
    with suppress(OSError):
        path.unlink()
    UNFINISHED.discard(path)


def write_whole(path: Path, content: bytes | memoryview, remedy: str = "choose another place") -> None:
    """Write a file so that others see all of it or what was there before; FileError, ending in `remedy`, if that fails."""
    remove_leftovers(path.parent)
    with replacing(path, remedy) as file:
        file.write(content)


def require_folder_of(*named: Path | None) -> None:
    """Raise FileError for a file or folder that a person named for results where neither its folder is there nor the next.

    The folder that it lies in is made; several that are not there are more likely mistyped.
    """
    for path in named:
        made = path and not path.parent.exists() and path.parent.parent.is_dir()
        if path and not path.parent.is_dir() and not made:
            raise FileError(f"{path}: there is no folder {path.parent}; make it, or name another place")


def why_no_new_files(folder: Path) -> str:
    """Why no file can be made in a folder that is there or would be made; empty where nothing speaks against it."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        return f"{there.absolute()} is a file"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there.absolute()} allows no new files"


def require_writable(path: Path, remedy: str = "choose another place") -> None:
    """Raise FileError, ending in `remedy`, where a file cannot be written, before the work that it is for."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished, file = locked_file(path)
        file.close()
        remove_unfinished(unfinished)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({system_reason(error)}); {remedy}") from error


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what killed processes left half-written in `folder` (not below); files whose writer lives are spared.

    Returns what was removed.
    """
    removed, found = [], list[Path]()
    with suppress(OSError):  # a folder that is not there, or may be written to and not be looked into
        found += folder.iterdir()
    for leftover in found:
        if not LEFTOVER.fullmatch(leftover.name) or leftover.is_symlink() or not leftover.is_file():
            continue  # opening a pipe would wait for its writer
        with suppress(OSError):
            remove_abandoned(leftover)
            removed.append(leftover)
    return removed


def remove_abandoned(leftover: Path) -> None:
    """Remove an unfinished file; OSError if its writer lives."""
    if sys.platform == "win32":
        if time.time() - leftover.stat().st_mtime < RENAME_SECONDS:
            raise BlockingIOError
        leftover.unlink()
    else:
        with leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder `NAME-...` in `parent` for this user alone, removed in the end; before, those of killed processes.

    A locked file beside each, made before it and removed after it, says that its process lives.
    """
    remove_abandoned_folders(parent, name)
    lock, file = locked_file(parent / name)
    folder = parent / f"{name}-{LEFTOVER.fullmatch(lock.name)[1]}"  # type: ignore[index]
    with file:
        folder.mkdir(0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if sys.platform == "win32":  # which removes no open file
                file.close()
            remove_unfinished(lock)


def remove_abandoned_folders(parent: Path, name: str) -> None:
    """Remove what `temporary_folder` made by that name and a killed process left."""
    for folder in parent.glob(f"{name}-*"):
        if (found := re.fullmatch(rf"{re.escape(name)}-([0-9a-f]{{16}})", folder.name)) and not folder.is_symlink():
            lock = parent / f".{name}.sanrt-{found[1]}.partial"
            with suppress(OSError):  # its process lives, or it is another user's
                if lock.exists():
                    remove_abandoned(lock)
                shutil.rmtree(folder)


@contextmanager
def sole_user(lock: Path) -> Iterator[bool]:
    """Hold a file against other processes; whether that worked: else another has it.

    It is made, with its folder, where it is not there, and removed in the end by who held it. The system lets go of it when
    a process ends, however it ends. Raises OSError where the file cannot be made.
    """
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("ab") as file:
            try:
                if sys.platform == "win32":
                    import msvcrt

                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    yield False
                    return
            if sys.platform != "win32" and not is_at(file, lock):
                continue  # who held it removed it between the two calls
            try:
                yield True
            finally:
                if sys.platform == "win32":  # which removes no open file
                    file.close()
                with suppress(OSError):
                    lock.unlink()
            return


def is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is the one at `path` now."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def cache_folder() -> Path:
    """sanrt's part of the user's cache folder: `sanrt` in $XDG_CACHE_HOME, or in ~/.cache; all of it may be deleted."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")  # noqa: PTH111, PTH118
    return Path(home) / "sanrt"


def cached_file(folders: Sequence[Path], name: str, make: Callable[[], bytes]) -> bytes:
    """What an earlier call kept as `name` in one of these folders, else what `make` returns, which is kept now.

    `name` must identify the content, the code that makes it included.
    """
    content = kept(folders, name)
    if content is None:
        content = make()
        keep(folders, name, content)
    return content


def kept(folders: Sequence[Path], name: str) -> bytes | None:
    """What `keep` wrote into the first of these folders that has it; None where none has, or it was damaged since."""
    for folder in folders:
        with suppress(OSError):
            sealed = (folder / name).read_bytes()
            if hashlib.sha256(sealed[SEAL:]).digest() == sealed[:SEAL]:
                return sealed[SEAL:]
    return None


def keep(folders: Sequence[Path], name: str, content: bytes) -> None:
    """Write what only spares work, its SHA-256 before it, to the first of these folders that can be written.

    Where none can, nothing is kept, and the work is done again next time.
    """
    for folder in folders:
        try:
            return write_whole(folder / name, hashlib.sha256(content).digest() + content)
        except FileError as error:
            log.debug("%s", error)
    return None


def file_digest(path: Path, remedy: str = "make a model with `sanrt export --scale 4`") -> str:
    """SHA-256 of a file, as hex; raises ModelError, ending in `remedy`, when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({system_reason(error)}); {remedy}") from error


@cache
def source_digest(*packages: str) -> str:
    """SHA-256 over the source of these packages, as hex, by which what they made is known to be made by other code.

    The version number is not enough: it stays the same in a checkout.
    """
    digest = hashlib.sha256()
    for package in packages:
        spec = find_spec(package)
        assert spec
        for folder in spec.submodule_search_locations or ():
            for path in sorted(path for path in Path(folder).rglob("*") if path.suffix in SOURCES):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
