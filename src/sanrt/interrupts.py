"""Ctrl-C and SIGTERM on the command line: each ends a command once, and never its cleaning up."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from threading import Timer, main_thread
from types import FrameType, TracebackType
from typing import Any, Self

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as of a shell; after another signal it is that signal's."""
AGAIN_SECONDS = 0.05
"""After which an interrupt is raised again that fell where Python can raise nothing."""


class EndSignals:
    """Makes KeyboardInterrupt of both signals, in the main thread, while it is entered; afterwards they do nothing.

    What comes while a KeyboardInterrupt is cleaned up after is passed over: it would end the cleaning up half way. Signals
    that the parent process had ignored stay ignored.
    """

    def __init__(self) -> None:
        self.status = INTERRUPTED
        """Exit status for the last signal that came."""

    def __enter__(self) -> Self:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.end)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self.end)
        sys.unraisablehook = self.raise_again
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)

    def end(self, number: int, frame: FrameType | None) -> None:
        """The handler of both."""
        self.status = 128 + number
        if not any(isinstance(error, KeyboardInterrupt) for error in handled()):
            raise KeyboardInterrupt

    def raise_again(self, unraisable: Any) -> None:
        """Python's hook for errors in finalizers and in callbacks of C, from where an interrupt would be lost."""
        if unraisable.exc_type is KeyboardInterrupt:
            Timer(AGAIN_SECONDS, to_main_thread, [self.status - 128]).start()
        else:
            sys.__unraisablehook__(unraisable)


def to_main_thread(number: int) -> None:
    """Send a signal so that it ends what the main thread waits for, where the system can."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)


def handled() -> Iterator[BaseException]:
    """The error that `except`, `finally` or `with` of the calling functions is handling, and those that it came from."""
    error = sys.exception()
    while error:
        yield error
        error = error.__context__
