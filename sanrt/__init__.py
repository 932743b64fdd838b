"""sanrt: SAN super-resolution from PyTorch to production.

`from sanrt import Upscaler` is the library; `sanrt --help` is the command line.
"""

from __future__ import annotations

from sanrt.errors import SanrtError

__all__ = ["SanrtError", "__version__"]
__version__ = "0.1.0"
