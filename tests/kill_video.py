"""Kill `sanrt run` on a clip at random moments: `python -m tests.kill_video 20`.

Each time it is killed once or several times and then left to finish; the result must be that of an undisturbed run, byte for
byte, and nothing may be left beside it.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

from tests.clips import clip

FRAMES = 48
SEGMENTS = 12
MOST_KILLS = 2
"""Of one result."""


def command(source: Path, result: Path) -> list[str]:
    options = ["--scale", "2", "--backend", "native", "--weights", "photo", "--quiet"]
    return [sys.executable, "-m", "sanrt", "run", *options, str(source), str(result)]


def killed(segments: int, seconds: float, source: Path, result: Path) -> str:
    """Kill a run so many seconds after it has so many segments: when that was; empty if it was done before."""
    process, folder = subprocess.Popen(command(source, result)), result.parent

    def there() -> int:
        return len(list(folder.glob(".out*.work/*.json")))

    while process.poll() is None and there() < segments:
        time.sleep(0.002)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return f"{seconds:.2f} s after segment {segments}, with {there()}"
    if process.returncode:
        sys.exit(f"it failed with {process.returncode}")
    return ""


def main(times: int, seed: int) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = clip(folder / "in.mp4", [number // 2 for number in range(FRAMES)], rate=Fraction(1), sound="aac")
        subprocess.run(command(source, folder / "whole.mp4"), check=True)
        whole = (folder / "whole.mp4").read_bytes()
        kills = 0
        for number in range(times):
            result = folder / f"out{number}.mp4"
            moments, segments = [], chance.randrange(SEGMENTS)
            while len(moments) < MOST_KILLS and (moment := killed(segments, chance.uniform(0, 0.4), source, result)):
                moments.append(moment)
                segments = chance.randrange(segments, SEGMENTS + 1)
            subprocess.run(command(source, result), check=True)  # at the least it removes what a kill at the very end left
            kills += len(moments)
            left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
            same = result.read_bytes() == whole
            what = "same bytes" if same else "OTHER BYTES"
            print(f"{number}: killed {'; '.join(moments) or 'never'}: {what}, left: {left or 'nothing'}", flush=True)
            if not same or left:
                sys.exit(1)
            result.unlink()
    print(f"{kills} kills, {times} results, all as undisturbed")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
