"""The parts of a result that are done: files of some seconds in a hidden folder beside it, which a killed run goes on from.

The folder is named by what the result is made of, so that no other run's parts are taken for this one's. A part is there
whole or not at all, and a folder has one user at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

from sanrt.errors import FileError, PictureError, system_reason
from sanrt.files import remove_leftovers, replacing, sole_user, source_digest
from sanrt.runtime.pictures.libvips import vips
from sanrt.runtime.pictures.provenance import Provenance, digest_of
from sanrt.runtime.video.container import ffmpeg
from sanrt.runtime.video.formats import videos_are_readable

SEGMENT_SECONDS = 4
MOST_FRAMES = 240
"""In a segment, of videos with many frames a second."""
NAME = 50
"""Letters of the result's name that the folder's has, at most; of a longer name, its digest is among them."""


@dataclass(frozen=True)
class Segment:
    """A part of a result that is on disk."""

    path: Path
    """A Matroska file whose first frame is a keyframe; the time of a frame is its number in it. An animation's are packed
    frames."""
    times: tuple[tuple[int, int], ...]
    """The timestamp and duration of each frame in the order of display, in the source's time base."""
    order: tuple[int, ...]
    """The frames' numbers in the order of decoding."""
    repeated: int
    """Frames that are equal to the one before, and were not computed."""
    damaged: tuple[int, ...] = ()
    """Timestamps of those that the decoder had to repair."""


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
                return Segment(path, times, tuple(facts["order"]), facts["repeated"], tuple(facts["damaged"]))
        return None

    def finished(self, segment: Segment) -> Segment:
        """The segment, once the disk has what it consists of beside its file."""
        facts = {name: getattr(segment, name) for name in ("times", "order", "repeated", "damaged")}
        with replacing(segment.path.with_suffix(".json")) as file:
            file.write(json.dumps(facts).encode())
        return segment

    def all(self) -> list[Segment]:
        """The segments up to the first that is missing."""
        segments: list[Segment] = []
        while segment := self.found(len(segments)):
            segments.append(segment)
        return segments

    def empty(self) -> None:
        """Remove what is in the folder beside its lock."""
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()


def frames_in_segment(rate: Fraction) -> int:
    """Frames of every segment but the last."""
    return max(1, min(MOST_FRAMES, round(SEGMENT_SECONDS * rate)))


@cache
def makers() -> Mapping[str, str]:
    """The code that makes segments: parts that other code made are not continued."""
    libvips = ".".join(str(vips().version(part)) for part in range(3))
    found = {"sanrt": source_digest("sanrt", "sanrt.runtime", "sanrt.kernels"), "libvips": libvips}
    return found | ({"ffmpeg": ffmpeg().ffmpeg_version_info} if videos_are_readable() else {})


def folder_of(result: Path, made: Provenance) -> Path:
    """Where the segments of a result are."""
    digest = digest_of([asdict(made), makers()])[:16]
    return result.with_name(f".{shortened(result.name)}.sanrt-{digest}.work")


def shortened(name: str) -> str:
    """A file's name, or as many letters that no other name has."""
    return name if len(name) <= NAME else f"{name[: NAME - 9]}~{digest_of(name)[:8]}"


@contextmanager
def work_folder(result: Path, made: Provenance) -> Iterator[WorkFolder]:
    """The folder of a result's segments, held against other runs, without what killed ones left half-written.

    It stays where the body fails, so that the next run goes on there, unless it has no segment yet. FileError where it
    cannot be made; PictureError where another run makes this very result.
    """
    folder = folder_of(result, made)
    remove_others(result, folder)
    try:
        with sole_user(folder / "lock") as ours:
            if not ours:
                raise PictureError(f"{result}: another run makes it at this moment; wait for it")
            remove_leftovers(folder)
            work = WorkFolder(folder)
            try:
                yield work
            except BaseException:
                if not work.all():
                    work.empty()
                raise
            work.empty()
    except OSError as error:
        raise FileError(f"{folder}: cannot be written ({system_reason(error)}); choose another place") from error
    finally:
        with suppress(OSError):  # something is in it
            folder.rmdir()


def remove_others(result: Path, kept: Path | None = None) -> None:
    """Remove the segments of a result that would have been made otherwise, or is there; not those that a run writes now."""
    name = re.compile(rf"\.{re.escape(shortened(result.name))}\.sanrt-[0-9a-f]{{16}}\.work")
    found: list[Path] = []
    with suppress(OSError):
        found += result.parent.iterdir()
    for folder in found:
        if folder == kept or not name.fullmatch(folder.name) or folder.is_symlink():
            continue
        with suppress(OSError), sole_user(folder / "lock") as ours:
            if ours:
                WorkFolder(folder).empty()
        with suppress(OSError):  # something is in it
            folder.rmdir()
