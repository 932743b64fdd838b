"""`python -m tests.fuzz_video --count 400`: damaged videos through `sanrt run`; fails on a crash, hang, traceback or loss.

They go in chunks of one process each. A chunk whose process crashes or takes too long is run again, one by one, to name the
video that does it. A written result must hold as many frames as FFmpeg decodes from its source.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import av

from tests.clips import clip
from tests.fuzz_run import START_SECONDS, Outcome, chunks
from tests.mutate import mutated

av.logging.set_level(None)


def main() -> None:
    """Mutate, run, check, sum up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--chunk", type=int, default=40, help="videos of one process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds per video, on average over a chunk")
    parser.add_argument("--keep", type=Path, help="folder for the videos that problems are told of")
    options = parser.parse_args()
    total: Counter[str] = Counter(dict.fromkeys(("written", "refused", "crash", "hang", "traceback"), 0))
    problems: list[str] = []
    for chunk in chunks(mutated(options.count, options.seed, originals()), options.chunk):
        outcome = run(chunk, options.timeout)
        total.update(outcome.counts)
        problems += outcome.problems
        figures = ", ".join(f"{count} {what}" for what, count in total.items())
        print(f"{sum(total.values())} videos, seed {options.seed}: {figures}; {len(problems)} problems", flush=True)
        print(*outcome.problems, sep="\n", end="\n" * bool(outcome.problems), flush=True)
        for name in chunk if options.keep else ():
            if any(name in problem for problem in outcome.problems):
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / name).write_bytes(chunk[name])
    sys.exit(1 if problems else 0)


def originals() -> dict[str, bytes]:
    """File name to content: a tiny undamaged video of each kind."""
    lossless = {"codec": "ffv1", "stored": "yuv420p"}
    kinds = {
        "h264.mp4": {"sound": "aac", "metadata": {"title": "T"}, "chapters": True},
        "hevc.mp4": {"codec": "libx265", "stored": "yuv420p10le", "options": {"x265-params": "log-level=error"}},
        "h264.mkv": {"sound": "flac", "subtitles": "srt", "attachment": True, "chapters": True},
        "ffv1.mkv": lossless | {"pictures": [0, 1, 1, 2]},
        "prores.mov": {"codec": "prores_ks", "stored": "yuv422p10le"},
        "vp9.webm": {"codec": "libvpx-vp9"},
        "mpeg4.avi": {"codec": "mpeg4"},
        "h264.ts": {},
        "h264.flv": {},
    }
    with TemporaryDirectory() as name:
        files = [clip(Path(name, kind), **({"pictures": range(4)} | facts)) for kind, facts in kinds.items()]
        return {path.name: path.read_bytes() for path in files}


def run(videos: Mapping[str, bytes], timeout: float) -> Outcome:
    """The videos in one process; again, one by one, if it crashes or does not end."""
    with TemporaryDirectory() as name:
        source, out = Path(name) / "in", Path(name) / "out"
        source.mkdir()
        for video, data in videos.items():
            (source / video).write_bytes(data)
        command = [sys.executable, "-m", "sanrt", "run", str(source), str(out), "--scale", "2", "--weights", "clean"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=START_SECONDS + timeout * len(videos))
        except subprocess.TimeoutExpired:
            return one_by_one(videos, timeout) if len(videos) > 1 else named(videos, "hang", "does not end")
        if done.returncode not in (0, 1):
            return one_by_one(videos, timeout) if len(videos) > 1 else named(videos, "crash", f"status {done.returncode}")
        told = done.stderr.decode(errors="replace")
        if "Traceback" in told:
            return one_by_one(videos, timeout) if len(videos) > 1 else named(videos, "traceback", told)
        written = sum(path.is_file() for path in out.glob("[!.]*"))
        return Outcome({"written": written, "refused": len(videos) - written}, tuple(complaints(source, out, told)))


def named(videos: Mapping[str, bytes], what: str, told: str) -> Outcome:
    """The outcome of the only one."""
    return Outcome({what: 1}, (f"{next(iter(videos))}: {told}",))


def one_by_one(videos: Mapping[str, bytes], timeout: float) -> Outcome:
    """Each in a process of its own."""
    each = [run({video: data}, timeout) for video, data in videos.items()]
    counts: Counter[str] = Counter()
    for outcome in each:
        counts.update(outcome.counts)
    return Outcome(counts, tuple(problem for outcome in each for problem in outcome.problems))


def complaints(source: Path, out: Path, told: str) -> list[str]:
    """Everything that is not as it should be after a run."""
    lines = told.splitlines()
    refused = Counter(line.partition(f"{source}/")[2].partition(":")[0] for line in lines)
    written = {path.stem: path for path in out.glob("[!.]*") if path.is_file()}
    ours = (f"sanrt: {source}/", f"sanrt: {out}/")
    problems = [f"said: {line}" for line in lines if not line.startswith(ours) or "unexpected" in line]
    for video in sorted(source.iterdir()):
        about = [line for line in lines if video.stem in line]
        if len(about) != (video.stem not in written):
            problems.append(f"{video.name}: written {video.stem in written}, told {about}")
        if "_intact_" in video.name and video.stem not in written:
            problems.append(f"{video.name}: undamaged, not written")
        if video.stem in written and frames_in(written[video.stem]) != frames_in(video):
            problems.append(f"{video.name}: {frames_in(written[video.stem])} frames of {frames_in(video)}")
    left = [path.name for path in out.glob(".*") if not path.name.endswith(".work")]
    return (
        problems
        + [f"left: {name}" for name in left if name]
        + [f"{name}: told twice" for name, n in refused.items() if n > 1]
    )


def frames_in(path: Path) -> int | str:
    """How many frames FFmpeg decodes from a video; why it does not, where it fails."""
    try:
        with av.open(str(path), metadata_errors="replace") as file:
            stream = next(each for each in file.streams.video if not each.disposition & 0x400)
            stream.thread_type = "AUTO"
            return sum(1 for _ in file.decode(stream))
    except (av.FFmpegError, StopIteration) as error:
        return str(error)


if __name__ == "__main__":
    main()
