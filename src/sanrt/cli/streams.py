"""Standard input and output: names that no terminal can show, and pictures that come and go through pipes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sanrt.errors import SanrtError, UsageError
from sanrt.runtime.pictures.storage import located

if TYPE_CHECKING:
    from sanrt.runtime.pictures.jobs import Naming

STREAM = "-"
"""What stands for standard input as INPUT and for standard output as OUTPUT."""


def printable(text: str) -> str:
    r"""The text with what a terminal would not print, in file names above all, as escapes: `\x1b`, `caf\xe9.png`."""
    return "".join(letter if letter.isprintable() else escaped(letter) for letter in text)


def escaped(letter: str) -> str:
    r"""`\n`, `\x1b`; `\xe9` for a byte of a file name that is not UTF-8, which Python keeps as a lone surrogate."""
    byte = ord(letter) - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else letter.encode("unicode_escape").decode()


def tell(line: str, error: bool = False) -> None:
    """Print one line, at once: to stdout, or to stderr."""
    print(printable(line), file=sys.stderr if error else sys.stdout, flush=True)


def require_usable(source: str, output: str) -> None:
    """Raise UsageError for a stream that is closed, or where a terminal would get the result."""
    if output == STREAM and sys.stdout and sys.stdout.isatty():
        raise UsageError("-: standard output is a terminal; send it to a file or a program, or name OUTPUT")
    if (source == STREAM and sys.stdin is None) or (output == STREAM and sys.stdout is None):
        raise UsageError("-: that standard stream is closed; name files")


def standard_output() -> IO[bytes]:
    """Standard output for bytes, to be closed: it writes all that it is given.

    `sys.stdout.buffer` does not where Python is told not to buffer: a write that a signal interrupts ends early.
    """
    return open(sys.stdout.fileno(), "wb", closefd=False)


def require_picture(source: Path) -> None:
    """Raise UsageError for what standard input held, if it is a video: its result is not written to standard output."""
    from sanrt.runtime.pictures.kinds import is_video_content
    from sanrt.runtime.video.y4m import MAGIC

    with source.open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            raise UsageError("-: raw frames (YUV4MPEG2) on standard input; add --y4m")
    if is_video_content(source):
        raise UsageError("-: a video on standard input; name OUTPUT, such as out.mp4, or send raw frames (--y4m)")


@contextmanager
def standard_streams(paths: Sequence[str], naming: Naming) -> Iterator[tuple[Sequence[str], str]]:
    """INPUTS and OUTPUT with temporary files in the place of `-`, and what of their paths nobody needs to read.

    A result whose OUTPUT is `-` goes to standard output, and `-` alone is both. Raises UsageError for `-` among several
    inputs, for a stream that is closed, or where a terminal would get the picture.
    """
    if STREAM not in paths:
        yield paths, ""
        return
    *inputs, output = paths if len(paths) > 1 else [STREAM, STREAM]
    if len(inputs) > 1:
        raise UsageError("-: stands for one picture; expected - as the only input, or one input and - as OUTPUT")
    (source,) = inputs
    require_usable(source, output)
    with tempfile.TemporaryDirectory(prefix="sanrt-", ignore_cleanup_errors=True) as folder:
        if source == STREAM:
            source = str(Path(folder, "standard input"))
            with Path(source).open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            if output == STREAM:
                require_picture(Path(source))
        from sanrt.runtime.pictures.pages import pages

        animated = output == STREAM and pages(located(source)) > 1
        result = Path(folder, "standard output", naming.of(located(source), animated))
        result.parent.mkdir()
        try:
            yield [source, str(result) if output == STREAM else output], f"{folder}{os.sep}"
        except SanrtError as problem:
            raise type(problem)(str(problem).replace(f"{folder}{os.sep}", "")) from None
        if output == STREAM and result.exists():
            with result.open("rb") as file, standard_output() as out:
                shutil.copyfileobj(file, out)
