"""`python -m tests.fuzz_run --count 10000`: damaged pictures through `sanrt run`; fails on a crash, hang, traceback or loss.

They go in chunks of one process each. Where a chunk takes too long, its pictures are run one by one to name the one that
hangs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pyvips

from tests.mutate import mutated

START_SECONDS = 60
"""What a process may take beside its pictures."""


@dataclass(frozen=True)
class Outcome:
    """What became of some pictures."""

    counts: Mapping[str, int]
    """Of pictures: written, refused, crash, hang, traceback."""
    problems: tuple[str, ...]


def main() -> None:
    """Mutate, run, check, sum up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--chunk", type=int, default=250, help="pictures of one process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds per picture, on average over a chunk")
    options = parser.parse_args()
    total: Counter[str] = Counter(dict.fromkeys(("written", "refused", "crash", "hang", "traceback"), 0))
    problems: list[str] = []
    for chunk in chunks(mutated(options.count, options.seed), options.chunk):
        outcome = run(chunk, options.timeout)
        total.update(outcome.counts)
        problems += outcome.problems
        figures = ", ".join(f"{count} {what}" for what, count in total.items())
        print(f"{sum(total.values())} pictures, seed {options.seed}: {figures}; {len(problems)} problems", flush=True)
        print(*outcome.problems, sep="\n", end="\n" * bool(outcome.problems), flush=True)
    sys.exit(1 if problems else 0)


def chunks(pictures: Iterable[tuple[str, bytes]], size: int) -> Iterator[dict[str, bytes]]:
    """The pictures, so many at a time."""
    rest = iter(pictures)
    while chunk := dict(islice(rest, size)):
        yield chunk


def run(pictures: Mapping[str, bytes], timeout: float) -> Outcome:
    """The pictures in one process; again, one by one, if it does not end."""
    with TemporaryDirectory() as name:
        source, out = Path(name) / "in", Path(name) / "out"
        source.mkdir()
        for picture, data in pictures.items():
            (source / picture).write_bytes(data)
        command = [sys.executable, "-m", "sanrt", "run", str(source), str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS + timeout * len(pictures))
        except subprocess.TimeoutExpired:
            if len(pictures) == 1:
                return Outcome({"hang": 1}, (f"{next(iter(pictures))}: does not end",))
            each = [run({picture: data}, timeout) for picture, data in pictures.items()]
            counts: Counter[str] = Counter()
            for outcome in each:
                counts.update(outcome.counts)
            return Outcome(counts, tuple(problem for outcome in each for problem in outcome.problems))
        problems = tuple(complaints(source, out, done))
        if done.returncode not in (0, 1):
            return Outcome({"crash": len(pictures)}, problems)
        if "Traceback" in done.stderr:
            return Outcome({"traceback": len(pictures)}, problems)
        written = sum(path.is_file() for path in out.rglob("*"))
        return Outcome({"written": written, "refused": len(pictures) - written}, problems)


def complaints(source: Path, out: Path, done: subprocess.CompletedProcess[str]) -> list[str]:
    """Everything that is not as it should be after a run."""
    lines = done.stderr.splitlines()
    told = {line.partition(f"{source}/")[2].partition(":")[0] for line in lines}
    written = {path.stem: path for path in out.rglob("*") if path.is_file()}
    problems = [f"exit status {done.returncode}"] if done.returncode not in (0, 1) else []
    problems += [line for line in lines if not line.startswith(f"sanrt: {source}/") or "unexpected" in line]
    for picture in sorted(source.iterdir()):
        if (picture.name in told) == (picture.stem in written):
            problems.append(f"{picture.name}: told {picture.name in told}, written {picture.stem in written}")
        if "_intact_" in picture.name and picture.stem not in written and "float" not in picture.name:
            problems.append(f"{picture.name}: undamaged, not written")
    return problems + [f"{path.name}: damaged result" for path in written.values() if not is_whole(path)]


def is_whole(path: Path) -> bool:
    """Whether every pixel of a picture can be read."""
    try:
        pyvips.Image.new_from_file(str(path), fail_on="error").avg()
    except pyvips.Error:
        return False
    return True


if __name__ == "__main__":
    main()
