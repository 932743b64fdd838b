"""`sanrt run - - --y4m`: raw video from standard input to standard output."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sanrt.cli.streams import STREAM, require_usable, standard_output, tell
from sanrt.errors import UsageError
from sanrt.request import stream_model
from sanrt.runtime.artifacts.models import model_title

if TYPE_CHECKING:
    from sanrt.request import Request

SOURCE = "standard input"


def stream_frames(request: Request, quiet: bool) -> None:
    """Enlarge the frames that come; the model, progress and a summary go to stderr, unless `quiet`.

    Raises UsageError for files in the place of the streams, else as `enlarge` does.
    """
    if any(path != STREAM for path in request.paths) or len(request.paths) > 2:
        raise UsageError("--y4m: goes from standard input to standard output; name - - alone, or leave it out for files")
    require_usable(STREAM, STREAM)
    from sanrt.runtime.backends.registry import load_backend
    from sanrt.runtime.runs.y4m_stream import Stream, enlarge, matrix_note
    from sanrt.runtime.tiling.upscaling import NetworkRunner
    from sanrt.runtime.video.y4m import read_header

    def say(line: str) -> None:
        if line and not quiet:
            tell(f"sanrt: {line}", error=True)

    header = read_header(sys.stdin.buffer, SOURCE)
    choice = stream_model(request, header.width, header.height)
    with load_backend(choice.backend, choice.path, choice.options) as network, standard_output() as out:
        stream = Stream(sys.stdin.buffer, SOURCE, header, out)
        runner = NetworkRunner(network, request.upscaling)
        say(f"{model_title(choice.path)}: {network.spec.computes}, {network.name} on {network.device}")
        say(matrix_note(stream, runner, request.encoding))
        with frame_counter(quiet, say) as advanced:
            enlarge(stream, runner, request.encoding, advanced)


@contextmanager
def frame_counter(quiet: bool, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """What is called for each frame: it shows how many there were, on a terminal; a summary follows in any case."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    started, count = time.monotonic(), 0

    def facts() -> str:
        return f"{count} frames, {count / max(time.monotonic() - started, 1e-9):.2f} frames/s"

    shown = not quiet and sys.stderr.isatty()
    with Progress(TextColumn("{task.description}"), console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task(facts())

        def advanced() -> None:
            nonlocal count
            count += 1
            bar.update(task, description=facts())

        try:
            yield advanced
        finally:
            summary = facts()
    say(summary)
