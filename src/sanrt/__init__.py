"""sanrt: SAN super-resolution from PyTorch to production.

`from sanrt import Upscaler` is the library; `sanrt --help` is the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sanrt.errors import SanrtError
from sanrt.version import __version__

if TYPE_CHECKING:
    from sanrt.upscaler import Upscaler

__all__ = ["SanrtError", "Upscaler", "__version__"]


def __getattr__(name: str) -> Any:
    """Upscaler brings numpy along, which `sanrt --help` does not wait for."""
    if name == "Upscaler":
        from sanrt.upscaler import Upscaler

        return Upscaler
    raise AttributeError(f"module 'sanrt' has no attribute {name!r}")
