"""sanrt: SAN super-resolution from PyTorch to production.

`from sanrt import Upscaler` is the library, the other functions are what the commands do; `sanrt --help` is the command
line.
"""

from __future__ import annotations

from importlib import import_module

from sanrt.errors import SanrtError
from sanrt.version import __version__

TYPE_CHECKING = False  # for type checkers; `typing` takes most of the time until the command line can catch an interrupt
if TYPE_CHECKING:
    from typing import Any

    from sanrt.library import build_engine, export_model, upscale_files, validate_model
    from sanrt.runtime.runs.pipeline import Failed, Skipped, Written
    from sanrt.upscaler import Upscaler

__all__ = [
    "Failed",
    "SanrtError",
    "Skipped",
    "Upscaler",
    "Written",
    "__version__",
    "build_engine",
    "export_model",
    "upscale_files",
    "validate_model",
]

MODULES = {
    "Upscaler": "sanrt.upscaler",
    **dict.fromkeys(("Failed", "Skipped", "Written"), "sanrt.runtime.runs.pipeline"),
    **dict.fromkeys(("build_engine", "export_model", "upscale_files", "validate_model"), "sanrt.library"),
}
"""Where each name is that brings NumPy along, which `sanrt --help` does not wait for."""


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name in MODULES:
        return getattr(import_module(MODULES[name]), name)
    raise AttributeError(f"module 'sanrt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
