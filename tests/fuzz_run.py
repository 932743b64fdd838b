"""`python -m tests.fuzz_run --count 3000`: damaged pictures through one `sanrt run`; fails on a crash, hang or loss."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pyvips

from tests.mutate import mutated


def main() -> None:
    """Mutate, run, check, sum up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds per picture, on average")
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        source, out = Path(name) / "in", Path(name) / "out"
        source.mkdir()
        for picture, data in mutated(options.count, options.seed):
            (source / picture).write_bytes(data)
        command = [sys.executable, "-m", "sanrt", "run", str(source), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 + options.timeout * options.count)
        problems = complaints(source, out, done)
        print(f"{options.count} pictures, seed {options.seed}: {done.stdout.splitlines()[-1]}; {len(problems)} problems")
    sys.exit("\n".join(problems) or 0)


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
