"""Interrupt `sanrt run` on a clip at random moments: `python -m tests.interrupt 100`.

Ctrl-C once or twice, or SIGTERM, from the first millisecond on. Each must end in one line and the exit status 130 or 143,
with nothing half-written; the run that follows must give the result of an undisturbed one, byte for byte. Moments before
Python runs a line of sanrt's are Python's own, and counted apart.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

from tests.clips import clip

FRAMES = 24
EARLY_SECONDS = 0.3
"""Half of the interrupts come within these."""
BETWEEN_SECONDS = 0.3
"""From a first to a second interrupt, at most."""
EXPECTED = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "interrupted")}


def command(source: Path, result: Path) -> list[str]:
    options = ["--scale", "2", "--backend", "native", "--weights", "photo", "--quiet"]
    return [sys.executable, "-m", "sanrt", "run", *options, str(source), str(result)]


def interrupted(arguments: list[str], moments: list[float], number: signal.Signals) -> tuple[int, str]:
    """The exit status and the standard error of a command that gets a signal so many seconds after its start."""
    started = time.monotonic()
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for moment in moments:
            try:
                process.wait(max(0.0, started + moment - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(number)
        told = process.communicate(timeout=120)[1]
    return process.returncode, told


def verdict(status: int, told: str, number: signal.Signals) -> str:
    """What became of it; in capitals what must not be."""
    expected, word = EXPECTED[number]
    if status == 0 and not told:
        return "done before"
    if status == expected and len(told.splitlines()) == 1 and told.startswith(f"sanrt: {word}"):
        return "one line"
    if "sanrt" not in told.replace("<module 'sanrt'", "") and status in (-number, 1, expected):
        return "before sanrt began"
    return f"STATUS {status}: {told}"


def half_written(folder: Path) -> list[str]:
    """Files that no reader should find, segments that a next run goes on from left out."""
    return [os.fspath(path) for path in folder.rglob("*.partial")]


def main(times: int, seed: int) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = clip(folder / "in.mp4", [number // 2 for number in range(FRAMES)], rate=Fraction(1), sound="aac")
        started = time.monotonic()
        subprocess.run(command(source, folder / "whole.mp4"), check=True)
        whole, seconds = (folder / "whole.mp4").read_bytes(), time.monotonic() - started
        found: Counter[str] = Counter()
        for each in range(times):
            result = folder / f"out{each}.mp4"
            moments = [chance.uniform(0, chance.choice([EARLY_SECONDS, seconds]))]
            moments += [moments[0] + chance.uniform(0, BETWEEN_SECONDS)] * chance.randrange(2)
            number = chance.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM])
            what = verdict(*interrupted(command(source, result), moments, number), number)
            left = half_written(folder)
            subprocess.run(command(source, result), check=True)
            same, hidden = result.read_bytes() == whole, [path.name for path in folder.iterdir() if path.name[0] == "."]
            at = " and ".join(f"{moment:.3f} s" for moment in moments)
            print(f"{each}: {number.name} at {at}: {what}, {'same bytes' if same else 'OTHER BYTES'}", flush=True)
            if what.startswith("STATUS") or left or hidden or not same:
                sys.exit(f"left: {left + hidden}")
            found[what] += 1
            result.unlink()
    print(f"{times} interrupted, none lost: {', '.join(f'{count} {what}' for what, count in found.most_common())}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
