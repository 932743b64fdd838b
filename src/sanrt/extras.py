"""Optional packages: what is missing is told as the command that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sanrt.errors import MissingPackageError


@contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """Around imports that need an extra: a missing package becomes one line with the pip command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{purpose} needs {error.name}, which is not installed; pip install 'sanrt[{name}]'"
        ) from error
