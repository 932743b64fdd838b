"""The parts of a result that are done: files of some seconds in a hidden folder beside it, which a killed run goes on from.

The folder is named by what the result is made of, so that no other run's parts are taken for this one's. A part is there
whole or not at all, and a folder has one user at a time.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

from sanrt.errors import FileError, PictureError, system_reason
from sanrt.files import remove_leftovers, sole_user, source_digest, write_whole
from sanrt.runtime.pictures.provenance import Provenance, digest_of
from sanrt.runtime.video.container import ffmpeg

SEGMENT_SECONDS = 4
MOST_FRAMES = 240
"""In a segment, of videos with many frames a second."""
FOLDER = re.compile(r"\..*\.sanrt-[0-9a-f]{16}\.work")
NAME = 50
"""Letters of the result's name that the folder's has."""


@dataclass(frozen=True)
class Segment:
    """A part of a result that is on disk."""

    path: Path
    """A Matroska file whose first frame is a keyframe; the time of a frame is its number in it."""
    times: tuple[tuple[int, int], ...]
    """The timestamp and duration of each frame in the order of display, in the source's time base."""
    order: tuple[int, ...]
    """The frames' numbers in the order of decoding."""
    repeated: int
    """Frames that are equal to the one before, and were not computed."""


@dataclass(frozen=True)
class WorkFolder:
    """Where the segments of one result are."""

    folder: Path

    def path(self, number: int) -> Path:
        """The file of a segment."""
        return self.folder / f"{number:06}.mkv"

    def found(self, number: int) -> Segment | None:
        """A segment that an earlier run finished; None without it."""
        path = self.path(number)
        with suppress(OSError, ValueError, KeyError):
            facts = json.loads(path.with_suffix(".json").read_bytes())
            times = tuple((int(pts), int(duration)) for pts, duration in facts["times"])
            if path.is_file():
                return Segment(path, times, tuple(facts["order"]), facts["repeated"])
        return None

    def finished(self, segment: Segment) -> Segment:
        """The segment, once the disk has what it consists of beside its file."""
        facts = {"times": segment.times, "order": segment.order, "repeated": segment.repeated}
        write_whole(segment.path.with_suffix(".json"), json.dumps(facts).encode())
        return segment

    def all(self) -> list[Segment]:
        """The segments up to the first that is missing."""
        segments: list[Segment] = []
        while segment := self.found(len(segments)):
            segments.append(segment)
        return segments


def frames_in_segment(rate: Fraction) -> int:
    """Frames of every segment but the last."""
    return max(1, min(MOST_FRAMES, round(SEGMENT_SECONDS * rate)))


@cache
def makers() -> Mapping[str, str]:
    """The code that makes segments: parts that other code made are not continued."""
    return {"sanrt": source_digest("sanrt", "sanrt.runtime", "sanrt.kernels"), "ffmpeg": ffmpeg().ffmpeg_version_info}


def folder_of(result: Path, made: Provenance) -> Path:
    """Where the segments of a result are."""
    digest = digest_of([asdict(made), makers()])[:16]
    return result.with_name(f".{result.name[:NAME]}.sanrt-{digest}.work")


@contextmanager
def work_folder(result: Path, made: Provenance) -> Iterator[WorkFolder]:
    """The folder of a result's segments, held against other runs, without what killed ones left half-written.

    It stays where the body fails, so that the next run goes on there, unless it has no segment yet. FileError where it
    cannot be made; PictureError where another run makes this very result.
    """
    folder = folder_of(result, made)
    remove_others(result, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with sole_user(folder / "lock") as ours:
            if not ours:
                raise PictureError(f"{result}: another run makes it at this moment; wait for it")
            remove_leftovers(folder)
            work = WorkFolder(folder)
            try:
                yield work
            except BaseException:
                if not work.all():
                    empty(folder)
                raise
            empty(folder)
    except OSError as error:
        raise FileError(f"{folder}: cannot be written ({system_reason(error)}); choose another place") from error
    finally:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == ["lock"]:
                shutil.rmtree(folder)


def empty(folder: Path) -> None:
    """Remove what is in a folder beside its lock."""
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()


def remove_others(result: Path, kept: Path | None = None) -> None:
    """Remove the segments of a result that would have been made otherwise, or is there; not those that a run writes now."""
    found: list[Path] = []
    with suppress(OSError):
        found += result.parent.glob(f".{glob_escaped(result.name[:NAME])}.sanrt-*.work")
    for folder in found:
        if folder == kept or not FOLDER.fullmatch(folder.name) or folder.is_symlink():
            continue
        with suppress(OSError), sole_user(folder / "lock") as ours:
            if ours:
                empty(folder)
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == ["lock"]:
                shutil.rmtree(folder)


def glob_escaped(name: str) -> str:
    """A name as a pattern that only it fits."""
    return re.sub(r"([*?\[])", r"[\1]", name)
