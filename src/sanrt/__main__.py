"""The `sanrt` command, and `python -m sanrt`. Nothing of sanrt's is imported before interrupts are caught."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C or SIGTERM, at any moment, ends it with one line and the exit status 130 or 143."""
    status = None
    try:
        from sanrt.interrupts import INTERRUPTED, EndSignals

        with EndSignals() as signals:
            try:
                from sanrt.cli import command_line

                status = command_line()
                status = signals.status if status == INTERRUPTED else status
            except KeyboardInterrupt:
                status = interrupted(signals.status)
    except KeyboardInterrupt:
        status = interrupted(130) if status is None else status
    sys.exit(status)


def interrupted(status: int) -> int:
    """The same status, after the line that tells an interrupt."""
    print("sanrt: interrupted", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    main()
