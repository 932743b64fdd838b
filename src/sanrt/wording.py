"""How messages name options: as their reader writes them, in Python, on a command line or in a request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Wording = Callable[[str, object], str]
"""An option's name, as on the command line without its dashes, and its value, or None for the option itself: in words."""

NOTICE = 25
"""Level of log records, between INFO and WARNING, that the command line shows though nothing is wrong: what takes long."""
PYTHON_NAMES = {
    "flatten": "background",
    "gpu": "gpus",
    "keep-hidden-colours": "keep_hidden",
    "max": "largest",
    "min": "smallest",
    "opt": "best",
}
"""What the library calls options that have another name there."""
PYTHON_VALUES = {("flatten", "white"): (255, 255, 255), ("kernels", "fused"): True, ("kernels", "none"): False}
"""What values of options are there."""


def in_python(name: str, value: object) -> str:
    """`tile=64`, `overwrite=True`; `tile` in backquotes."""
    known = PYTHON_NAMES.get(name, name.replace("-", "_"))
    if value is None:
        return f"`{known}`"
    value = PYTHON_VALUES.get((name, value), str(value)) if isinstance(value, str) else value
    return f"{known}={value!r}"


def on_command_line(name: str, value: object) -> str:
    """`--tile 64`, `--overwrite`, `--tile`."""
    if value is None or value is True:
        return f"--{name}"
    return f"--{name} {'x'.join(map(str, value)) if isinstance(value, tuple) else value}"


wording: Wording = in_python


def option(name: str, value: object = None) -> str:
    """An option in the words of whoever will read it: `option("tile", 64)` is `--tile 64`, `tile=64`, ...

    `value` is True for a flag that is given.
    """
    return wording(name, value)


@contextmanager
def worded(chosen: Wording) -> Iterator[None]:
    """While the body runs this process words its messages so, in all its threads: it has one front end at a time."""
    global wording
    before, wording = wording, chosen
    try:
        yield
    finally:
        wording = before
