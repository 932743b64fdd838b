"""Which pictures a run reads and which files it writes: settled, and free of conflicts, before the first one is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from sanrt.errors import PictureError, UsageError
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.storage import RemotePath


@dataclass(frozen=True)
class Job:
    """One picture to read and the file that its result goes to."""

    source: Path
    destination: Path

    @property
    def done(self) -> bool:
        """Whether the result is there and not older than the source; results are complete, or not there at all."""
        try:
            result = self.destination.stat()
            return S_ISREG(result.st_mode) and result.st_size > 0 and result.st_mtime_ns >= self.source.stat().st_mtime_ns
        except OSError:
            return False


@dataclass(frozen=True)
class Naming:
    """How results are named after their sources."""

    suffix: str = ""
    """Text between the stem and the ending, such as `_x4`."""
    format: Format | None = None
    """The format of every result; None keeps each source's own (GIF becomes PNG)."""

    def of(self, source: Path) -> str:
        """The result's file name; an ending that stands for no format is replaced by that of the content (PNG, if none)."""
        form = Format.of_suffix(source)
        if self.format is None and form is not None and form.written_as is form:
            return source.stem + self.suffix + source.suffix
        wanted = self.format or (form or _format_of_content(source)).written_as
        return source.stem + self.suffix + wanted.facts.suffixes[0]


def find_pictures(inputs: Sequence[Path], output: Path, naming: Naming = Naming(), recursive: bool = True) -> list[Job]:
    """Every picture among `inputs` (files and folders) with its destination.

    `output` is a file if it has a picture's ending and there is one input file, else a folder; the tree below an input
    folder is kept. Named files always count; in folders, those with a supported ending that are neither hidden nor in
    `output`. UsageError where two results would share a file or one would replace its source; PictureError if there is
    no picture.
    """
    if len(inputs) == 1 and not inputs[0].is_dir() and Format.of_suffix(output) and not output.is_dir():
        if naming.format not in (None, Format.of_suffix(output)):
            raise UsageError(f"{output}: its ending does not stand for --format {naming.format}; leave one of them out")
        jobs = [Job(inputs[0], output)]
    else:
        if output.exists() and not output.is_dir():
            raise UsageError(f"{output}: is a file; several pictures need a folder")
        jobs = [job for given in inputs for job in _jobs_of(given, output, naming, recursive)]
        jobs = _without_results(jobs) if naming.suffix else jobs
    if not jobs:
        endings = " ".join(suffix for form in Format for suffix in form.facts.suffixes)
        raise PictureError(f"{', '.join(map(str, inputs))}: no pictures found; expected files ending in {endings}")
    _check_conflicts(jobs)
    return jobs


def _jobs_of(given: Path, output: Path, naming: Naming, recursive: bool) -> Iterator[Job]:
    if not given.is_dir():
        yield Job(given, output / naming.of(given))
        return
    for source in _pictures_in(given, recursive, skipped=output.resolve()):
        yield Job(source, output / source.relative_to(given).with_name(naming.of(source)))


def _pictures_in(folder: Path, recursive: bool, skipped: Path) -> Iterator[Path]:
    """Files with a supported ending, in order; not hidden ones, nor any below `skipped` unless that is `folder` itself."""
    if isinstance(folder, RemotePath):
        yield from (file for file in folder.files(recursive) if _is_picture_below(file, folder, skipped))
        return
    for root, folders, files in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = sorted(
            name for name in folders if recursive and not name.startswith(".") and (Path(root) / name).resolve() != skipped
        )
        for name in sorted(files):
            if not name.startswith(".") and Format.of_suffix(Path(name)):
                yield Path(root) / name


def _is_picture_below(file: Path, folder: Path, skipped: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and Format.of_suffix(file) is not None and (skipped == folder or skipped not in file.parents)


def _raise_unreadable(error: OSError) -> None:
    raise PictureError(f"{error.filename}: folder cannot be read ({error.strerror})")


def _without_results(jobs: list[Job]) -> list[Job]:
    """The jobs whose source is not another's result (of an earlier run into the folder of the sources)."""
    results = {_place(job.destination) for job in jobs if _place(job.destination) != _place(job.source)}
    return [job for job in jobs if _place(job.source) not in results]


def _check_conflicts(jobs: list[Job]) -> None:
    taken: dict[Path, Path] = {}
    for job in jobs:
        place = _place(job.destination)
        if place == _place(job.source):
            raise UsageError(f"{job.source}: the result would replace it; choose another output or --suffix")
        other = taken.setdefault(place, job.source)
        if other is not job.source:
            raise UsageError(
                f"{other} and {job.source} would both become {job.destination}; rename one or run them separately"
            )


def _place(path: Path) -> Path:
    """The file's folder resolved, its own name not: a link is replaced, not followed, on writing."""
    return path.parent.resolve() / path.name


def _format_of_content(path: Path) -> Format:
    """By the first bytes; PNG where they tell nothing, which opening the file will report."""
    try:
        with path.open("rb") as file:
            return Format.of_content(file.read(32)) or Format.PNG
    except OSError:
        return Format.PNG
