"""The command line. One module per command; nothing heavier than typer is imported before a command runs."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from sanrt.cli.bench import bench
from sanrt.cli.build import build
from sanrt.cli.doctor import doctor
from sanrt.cli.export import export
from sanrt.cli.info import info
from sanrt.cli.panels import PanelCommand
from sanrt.cli.plan import plan
from sanrt.cli.run import RunCommand, run
from sanrt.cli.serve import serve
from sanrt.cli.streams import tell
from sanrt.cli.triton import triton
from sanrt.cli.usage import usage_context, usage_words
from sanrt.cli.validate import validate
from sanrt.cli.verify import verify
from sanrt.errors import InterruptedRunError, SanrtError, UsageError, system_reason
from sanrt.version import __version__
from sanrt.wording import on_command_line, worded

INTERRUPTED = 130
"""Exit status after an interrupt, as of a shell; typer's own."""

app = typer.Typer(
    help="SAN super-resolution, from PyTorch to production: export, build, run.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(cls=PanelCommand)(export)
app.command(cls=PanelCommand)(build)
app.command(cls=RunCommand)(run)
app.command(cls=PanelCommand)(plan)
app.command(cls=RunCommand)(serve)
app.command(cls=PanelCommand)(triton)
app.command()(info)
app.command()(bench)
app.command(cls=PanelCommand)(validate)
app.command()(verify)
app.command()(doctor)


def tell_version(wanted: bool) -> None:
    """What `sanrt --version` prints."""
    if wanted:
        tell(f"sanrt {__version__}")
        raise typer.Exit


@app.callback()
def sanrt(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=tell_version, is_eager=True)
    ] = False,
) -> None:
    """SAN super-resolution, from PyTorch to production."""
    context.with_resource(worded(on_command_line))


def main() -> None:
    """Run the command line within a Python program; the `sanrt` command is `sanrt.__main__`, which hears signals besides."""
    sys.exit(command_line())


def command_line() -> int:
    """The exit status of a command: 0 done, 1 failed (one line on stderr), 2 wrong usage, 130 interrupted."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False)
        if sys.stdout:
            sys.stdout.flush()
    except InterruptedRunError as error:
        tell(f"sanrt: interrupted: {error}", error=True)
        return INTERRUPTED
    except SanrtError as error:
        tell(f"sanrt: {error}", error=True)
        status = 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        status = output_failed(error)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own, of a click that typer may have inside itself
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # whose words are the help
            print(error.format_message(), file=sys.stderr)
        else:
            tell(f"sanrt{usage_context(error)}: {usage_words(error)}", error=True)
        status = 2
    if status == INTERRUPTED:
        tell("sanrt: interrupted", error=True)
    return status or 0


def output_failed(error: OSError) -> int:
    """The exit status where a file or standard output cannot be used, told unless its reader just left; raises others."""
    if error.filename is not None:
        tell(f"sanrt: {error.filename}: {system_reason(error)}", error=True)
        return 1
    if error.errno not in WRITE_ERRORS:
        raise error
    sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - what is left in it would be tried again on exit
    if error.errno not in READER_LEFT:
        tell(f"sanrt: standard output: cannot be written ({system_reason(error)}); free some space", error=True)
    return 1


READER_LEFT = (errno.EPIPE, errno.EINVAL) if sys.platform == "win32" else (errno.EPIPE,)
WRITE_ERRORS = (*READER_LEFT, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Of writing to a stream; all other files' are told where they are written."""
