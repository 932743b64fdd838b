"""libvips as the threads of this process share it: its settings, and which file an error is about.

Its error buffer belongs to the process, names no file, and pyvips empties it whenever an attribute of an image is asked for.
So what libvips says of a damaged file is asked for once more while no other thread uses it.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from threading import Condition, Lock, local
from typing import Any, TypeVar

from sanrt.errors import PictureError
from sanrt.extras import required
from sanrt.runtime.host import call_after_fork

T = TypeVar("T")

GLIB_LEVELS = 0xFF
"""Messages of all levels, fatal and recursive ones too."""
OF_WRITING = re.compile(r"target:|wbuffer_write:|system error:|vips2|VipsJpeg: unable to write|heif: Cannot write|\w+save")
"""How the lines begin that libvips writes into its buffer when it cannot write."""


class WarningsOfLibjpeg(logging.Handler):
    """Hears, in the thread that lets go of a JPEG, that libjpeg warned of it since libvips last looked.

    libvips looks before each few rows, so that those of the last rows come out here.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard = local()

    def emit(self, record: logging.LogRecord) -> None:
        if "read gave" in record.getMessage():
            self.heard.any = True


class SharedLock:
    """Held by any number of threads together, or by one alone, which waits until they are done."""

    def __init__(self) -> None:
        self.changed = Condition()
        self.holders = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        with self.changed:
            self.holders += 1
        try:
            yield
        finally:
            with self.changed:
                self.holders -= 1
                self.changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: not self.holders)
            yield


class Locks:
    """One thread reads at a time; any number write. A thread that writes must not begin to read."""

    def __init__(self) -> None:
        self.reading, self.writing = Lock(), SharedLock()


LOCKS, WARNINGS = Locks(), WarningsOfLibjpeg()
call_after_fork(LOCKS.__init__)  # type: ignore[misc]  # their holders are not in the child


class DamagedError(Exception):
    """libvips refused to read; the text is what it said."""


@cache
def vips() -> Any:
    """pyvips, its process-wide settings made once: no cache of operations (it would hold files and pixels), two threads."""
    with required("pyvips[binary]"):
        import pyvips

    logger = logging.getLogger("pyvips")
    logger.addHandler(WARNINGS)
    logger.setLevel(min(logger.level or logging.WARNING, logging.WARNING))
    # GLib's own complaints about absurd headers go where pyvips sends those of libvips, not to stderr.
    handler = pyvips.glib_lib.g_log_set_handler(b"GLib-GObject", GLIB_LEVELS, pyvips._log_handler_cb, pyvips.ffi.NULL)
    atexit.register(pyvips.glib_lib.g_log_remove_handler, b"GLib-GObject", handler)
    pyvips.error._to_string = text_of  # pyvips' own fails, also in threads on other files, for text that is not UTF-8
    pyvips.cache_set_max(0)
    if "VIPS_CONCURRENCY" not in os.environ:
        pyvips.concurrency_set(2)
    return pyvips


def text_of(pointer: Any) -> str:
    """A C string of libvips'."""
    return str(vips().ffi.string(pointer).decode(errors="replace"))


def read(subject: str, work: Callable[[], T]) -> T:
    """The result of opening or decoding a file; PictureError, `subject` and what libvips said, where it is damaged.

    work: called again after a failure, from the beginning. Images that it lets go of are looked at for libjpeg's warnings,
    which mean pixels that it made up.
    """
    with LOCKS.reading:
        with suppress(DamagedError):
            return attempt(work)
        with LOCKS.writing.alone():
            try:
                return attempt(work)
            except DamagedError as error:
                raise PictureError(f"{subject} ({error})") from None


def attempt(work: Callable[[], T]) -> T:
    """The work's result; DamagedError with the last two things that libvips said, if it failed."""
    vips().vips_lib.vips_error_clear()
    WARNINGS.heard.any = False
    try:
        result = work()
    except vips().Error as error:
        raise DamagedError("; ".join(last_lines(error.detail)) or error.message) from None
    except UnicodeDecodeError:
        raise DamagedError("its text is not UTF-8") from None
    if WARNINGS.heard.any:
        said = text_of(vips().vips_lib.vips_error_buffer())
        raise DamagedError("; ".join(last_lines(said)) or "pixels are missing")
    return result


@contextmanager
def writing(subject: str) -> Iterator[None]:
    """Around encoding; PictureError, `subject` and what libvips said of writing, if it fails."""
    try:
        with LOCKS.writing.together():
            yield
    except vips().Error as error:
        lines = last_lines("\n".join(line for line in error.detail.splitlines() if OF_WRITING.match(line)))
        raise PictureError(f"{subject} ({'; '.join(lines) or error.message})") from None


def last_lines(said: str) -> list[str]:
    """The last two lines, each told once."""
    return list(dict.fromkeys(line.strip() for line in said.splitlines() if line.strip()))[-2:]
