"""TensorRT and TensorRT-RTX: two libraries with almost one Python interface, found and imported here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from sanrt.errors import BackendError, OutOfMemoryError
from sanrt.extras import install_command
from sanrt.runtime.artifacts.flavors import EXTRAS, MODULES, TITLES, Flavor


def import_flavor(flavor: Flavor) -> Any:
    """The Python module; raises BackendError when it is missing or broken."""
    try:
        return import_module(MODULES[flavor])
    except ImportError as error:
        title, remedy = TITLES[flavor], install_command(EXTRAS[flavor])
        reason = "is not installed" if error.name == MODULES[flavor] else f"cannot be imported ({error})"
        raise BackendError(f"{title} {reason}; {remedy}") from error


class TensorRTLog:
    """What TensorRT says: a logger and an error recorder for its objects, and what both were told.

    TensorRT keeps bare pointers to the two, so a TensorRTLog must outlive every object it was given to.
    """

    def __init__(self, trt: Any, keep: bool = False) -> None:
        self.errors: list[tuple[int, str]] = []
        """TensorRT's error code (0 from the log) and the message, oldest first."""
        self.messages: list[str] = []
        """Everything else that was logged, when `keep` asks for it."""
        self.keep, self.no_memory = keep, int(trt.ErrorCodeTRT.FAILED_ALLOCATION)
        self.logger = logger_class(trt)(self)
        self.recorder = recorder_class(trt)(self)

    @property
    def first(self) -> str:
        """The first error, which the later ones follow from, as one line."""
        return " ".join(self.errors[0][1].split()) if self.errors else "no reason given"

    def failure(self, subject: Path, what: str) -> BackendError:
        """OutOfMemoryError or BackendError, in TensorRT's words."""
        memory = self.no_memory in {code for code, _ in self.errors} or "out of memory" in self.first.lower()
        kind = OutOfMemoryError if memory else BackendError
        return kind(f"{subject}: {what} failed ({self.first})")


def activation_bytes(engine: Any, context: Any) -> int | None:
    """Bytes of activations for the shapes that a context is set to; None where TensorRT cannot tell.

    It gives 0 both for a failure and for an engine that needs none, as its own largest size shows.
    """
    size = int(context.update_device_memory_size_for_shapes())
    return None if size == 0 and engine.device_memory_size_v2 > 0 else size


def engine_from_bytes(trt: Any, trt_log: TensorRTLog, engine_bytes: bytes) -> Any:
    """The engine, ready to run; None where TensorRT refuses it, which `trt_log` is told."""
    runtime = trt.Runtime(trt_log.logger)
    runtime.error_recorder = trt_log.recorder
    return runtime.deserialize_cuda_engine(engine_bytes)


@cache
def recorder_class(trt: Any) -> Callable[[TensorRTLog], Any]:
    """An IErrorRecorder that fills a TensorRTLog."""

    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        """TensorRT may call it from any thread; list operations are atomic."""

        def __init__(self, trt_log: TensorRTLog) -> None:
            trt.IErrorRecorder.__init__(self)
            self.trt_log = trt_log

        def num_errors(self) -> int:
            return len(self.trt_log.errors)

        def get_error_code(self, index: int) -> Any:
            return trt.ErrorCodeTRT(self.trt_log.errors[index][0])

        def get_error_desc(self, index: int) -> str:
            return self.trt_log.errors[index][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self.trt_log.errors.clear()

        def report_error(self, code: Any, description: str) -> bool:
            self.trt_log.errors.append((int(code), description))
            return False

    return Recorder


@cache
def logger_class(trt: Any) -> Callable[[TensorRTLog], Any]:
    """An ILogger that fills a TensorRTLog."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Prints nothing: what matters is raised, or read back, by whoever owns the TensorRTLog."""

        def __init__(self, trt_log: TensorRTLog) -> None:
            trt.ILogger.__init__(self)
            self.trt_log = trt_log

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.trt_log.errors.append((0, message))
            elif self.trt_log.keep:
                self.trt_log.messages.append(message)

    return Logger
