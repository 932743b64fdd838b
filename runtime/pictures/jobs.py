"""Which pictures a run reads and which files it writes: settled, and free of conflicts, before the first one is opened."""

from __future__ import annotations

import mimetypes
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from itertools import islice
from pathlib import Path

from sanrt.errors import PictureError, UsageError, system_reason
from sanrt.extras import install_command
from sanrt.runtime.pictures.formats import ANIMATED, Format
from sanrt.runtime.pictures.kinds import by_kind, is_video_content, kind_of_suffix
from sanrt.runtime.pictures.pages import pages
from sanrt.runtime.pictures.provenance import is_result
from sanrt.runtime.pictures.storage import RemotePath
from sanrt.runtime.video.formats import (
    VIDEO_SUFFIXES,
    WRITTEN_SUFFIXES,
    Container,
    is_text,
    is_video,
    result_suffix,
    videos_are_readable,
)
from sanrt.wording import option

ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,4}$")
"""Of file names; `v1.2` has none."""
NAMED = 3
"""Of many files so many are named; the others are counted."""
NO_WINDOWS_NAME = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*[<>:\"/\\|?*\x00-\x1f].*|.*[. ]", re.IGNORECASE)
"""Names of devices, and what Windows allows in no file's name or drops from its end."""


class Replaceable(Enum):
    """What a result may replace."""

    NOTHING = "nothing"
    RESULT = "result"
    """An earlier result, as sanrt wrote it."""
    ANYTHING = "anything"


@dataclass(frozen=True)
class Job:
    """One picture or video to read and the file that its result goes to."""

    source: Path
    destination: Path
    replaces: Replaceable = Replaceable.NOTHING
    """What may be replaced at the destination; anything else there is an error."""
    named: bool = field(default=False, compare=False)
    """Whether the source was named itself, and not found in a folder."""
    animated: bool = field(default=False, compare=False)
    """Whether the source is a GIF or WebP of several frames."""
    unnamed_video: bool = field(default=False, compare=False)
    """Whether the source is a video whose name does not say it."""

    @property
    def is_video(self) -> bool:
        """Whether its result is a video or an animation; else it is a picture."""
        form = Format.of_suffix(self.destination)
        animation = form is Format.GIF or (form is Format.WEBP and (self.animated or self.is_of_video))
        return animation or Container.of_suffix(self.destination) is not None

    @property
    def needs_ffmpeg(self) -> bool:
        """Whether its source or its result is a video file, and no animation that libvips reads and writes."""
        return self.is_video and (self.is_of_video or Container.of_suffix(self.destination) is not None)

    @property
    def is_of_video(self) -> bool:
        """Whether its source is a video file, by its name or by what it holds."""
        return self.unnamed_video or is_video(self.source)


def job_of(source: Path, destination: Path) -> Job:
    """The job of a source that was named itself, by what the file holds."""
    unnamed_video = Format.of_suffix(source) is None and is_video_content(source)
    return Job(source, destination, named=True, animated=pages(source) > 1, unnamed_video=unnamed_video)


def called(jobs: Sequence[Job]) -> str:
    """What several jobs are, for people."""
    kinds = {"pictures" if not job.is_video else "videos" if job.needs_ffmpeg else "animations" for job in jobs}
    return " and ".join(name for name in ("pictures", "animations", "videos") if name in kinds)


@dataclass(frozen=True)
class Naming:
    """How results are named after their sources."""

    suffix: str = ""
    """Text between the stem and the ending, such as `_x4`."""
    format: Format | None = None
    """The format of every picture's result; None keeps each source's own (a GIF of one frame becomes PNG)."""

    def __post_init__(self) -> None:
        if set(self.suffix) & {"/", os.sep, "\0"}:
            raise UsageError(
                f"{option('suffix')} {self.suffix!r}: expected a part of a file name, such as _x4, without folders"
            )

    def of(self, source: Path, animated: bool = False) -> str:
        """The result's file name; an ending that stands for no format is replaced by that of the content (PNG, if none).

        animated: whether the source is a GIF or WebP of several frames, whose result is one too.
        """
        form, ending = Format.of_suffix(source), source.suffix
        if is_video(source):
            ending = result_suffix(source)
        elif animated and self.format is None:
            ending = ending if form in ANIMATED else _format_of_content(source).facts.suffixes[0]
        elif self.format is not None or form is None or form.written_as is not form:
            ending = (self.format or (form or _format_of_content(source)).written_as).facts.suffixes[0]
        name = source.stem + self.suffix + ending
        if sys.platform == "win32" and NO_WINDOWS_NAME.fullmatch(name):
            raise UsageError(f"{source}: its result would be {name!r}, which is no file's name on Windows; rename it")
        return name


def find_pictures(
    inputs: Sequence[Path], output: Path, naming: Naming = Naming(), recursive: bool = True, into_folder: bool = False
) -> list[Job]:
    """Every picture among `inputs` (files and folders), once, with its destination.

    `output` is a folder if there is one, with `into_folder`, or for several pictures; for one input file it is a file if it
    has an ending. The tree below an input folder is kept. Named files always count; in folders, those with a supported
    ending that are neither hidden nor in `output`. UsageError for an output whose ending stands for no written format, or
    for one picture where there are several, and where two results would share a file or one would replace its source;
    PictureError if there is no picture.
    """
    one = len(inputs) == 1 and not inputs[0].is_dir()
    if not into_folder and not output.is_dir() and _names_a_file(output, one):
        _check_file(inputs[0], output, one, naming)
        jobs = [job_of(inputs[0], output)]
    else:
        if not into_folder:
            _check_expansion(inputs, output)
        jobs = [job for given in inputs for job in _jobs_of(given, output, naming, recursive)]
        jobs = _without_results(_once(jobs)) if naming.suffix else _once(jobs)
        jobs = jobs if naming.format else _told_apart(jobs)
    if not jobs:
        suffixes = [suffix for form in Format if form.is_readable for suffix in form.facts.suffixes]
        endings = " ".join([*suffixes, *(VIDEO_SUFFIXES if videos_are_readable() else ())])
        others = ", ".join(f"{len(files)} {kind}" for kind, files in _unread(inputs, output, recursive).items())
        found = f"only {others}" if others else "no pictures found"
        raise PictureError(f"{', '.join(map(str, inputs))}: {found}; expected files ending in {endings}")
    _check_conflicts(jobs)
    return jobs


def passed_over(inputs: Sequence[Path], output: Path, recursive: bool = True) -> list[str]:
    """A line for each kind of picture in the input folders that is not read here: how many, the first ones, what to do."""
    return [
        f"passed over: {len(files)} {kind} ({some_of(files)}); {_remedy(files[0])}"
        for kind, files in _unread(inputs, output, recursive).items()
    ]


def some_of(paths: Sequence[Path]) -> str:
    """The first of some files by name, and how many more there are."""
    rest = len(paths) - NAMED
    return ", ".join(map(str, paths[:NAMED])) + (f" and {rest} more" if rest > 0 else "")


def _unread(inputs: Sequence[Path], output: Path, recursive: bool) -> Mapping[str, list[Path]]:
    """Pictures in the input folders that are not read here, by kind."""
    folders = [given for given in inputs if given.is_dir()]
    return by_kind(file for given in folders for file in _files_in(given, recursive, output.resolve()) if not _is_read(file))


def _remedy(file: Path) -> str:
    form, kind = Format.of_suffix(file), kind_of_suffix(file)
    if form or is_video(file):
        return f"to read them: {install_command('formats' if form else 'video')}"
    return kind.remedy if kind else ""


def output_beside(given: Path, size: str, naming: Naming) -> Path:
    """Where results of a size (`x4`) go if no output is named: `a_x4.png` beside `a.png`, `photos_x4` beside `photos`."""
    at = given if given.name.strip(".") or isinstance(given, RemotePath) else given.resolve()
    if not at.name or (isinstance(at, RemotePath) and at == at.root_folder):
        raise UsageError(f"{given}: has no folder beside it; name OUTPUT, the last argument")
    if given.is_dir():
        return at.with_name(f"{at.name}_{size}")
    return at.with_name(replace(naming, suffix=naming.suffix or f"_{size}").of(at, pages(given) > 1))


def _names_a_file(output: Path, one: bool) -> bool:
    """Whether an output that is no folder yet is a file, or is named like one.

    For several pictures that takes the ending of a picture or video; for one any that begins with a letter, so that no
    mistyped ending makes a folder.
    """
    kind = (mimetypes.guess_type(output.name)[0] or "").partition("/")[0]
    known = Format.of_suffix(output) or is_video(output) or kind in ("image", "video")
    return bool(output.exists() or known or (one and ENDING.search(output.name)))


def _check_file(given: Path, output: Path, one: bool, naming: Naming) -> None:
    """UsageError unless one result, that of `given`, can be written to a file of this name."""
    if not one:
        what = "is a file" if output.exists() else "is named like one picture"
        raise UsageError(
            f"no folder for the results of several pictures: {output}, the last argument, {what}; "
            "add a folder, such as `sanrt run ... upscaled/`"
        )
    form = Format.of_suffix(output)
    if is_video(given) and Container.of_suffix(output) is None and form not in ANIMATED:
        endings = " ".join([*WRITTEN_SUFFIXES, *(suffix for form in ANIMATED for suffix in form.facts.suffixes)])
        raise UsageError(
            f"{output}: the result of a video is one, or an animation; expected a name ending in one of {endings}, or a "
            f"folder: {output}/"
        )
    may_be_animated = Format.of_suffix(given) in (None, *ANIMATED)
    if is_video(given) or (may_be_animated and Container.of_suffix(output)):
        return
    if form is Format.GIF and may_be_animated:
        if pages(given) != 1:  # what cannot be read is refused in its turn
            return
        raise UsageError(f"{output}: sanrt writes GIFs of several frames, {given} has one; name a .png, or a folder")
    if form is None or form.written_as is not form:
        endings = " ".join(form.facts.suffixes[0] for form in Format if form.written_as is form)
        raise UsageError(
            f"{output}: sanrt writes no such files; expected a name ending in one of {endings}, or a folder: {output}/"
        )
    if naming.format not in (None, form):
        raise UsageError(f"{output}: its ending does not stand for {option('format', naming.format)}; leave one of them out")


def _check_expansion(inputs: Sequence[Path], output: Path) -> None:
    """UsageError where OUTPUT is likely none, but the last of all that a shell made of `*`.

    So it is where the inputs are all else that lies beside it, and it holds pictures, none of them a result.
    """
    beside: set[Path] = set()
    with suppress(OSError):
        if inputs[1:] and output.is_dir() and not isinstance(output, RemotePath):
            beside = {_place(path) for path in output.parent.iterdir() if not path.name.startswith(".")}
    if {_place(path) for path in (*inputs, output)} != beside:
        return
    pictures = list(_pictures_in(output, recursive=False, skipped=output.resolve()))
    if pictures and not any(map(is_result, pictures)):
        raise UsageError(
            f"{output}: is the last of all that lies there, as `*` names it, and holds pictures that sanrt did not make "
            f"({some_of(pictures)}); nothing was done; name the folder of the results, such as upscaled/, or {output}/"
        )


def _once(jobs: list[Job]) -> list[Job]:
    """The first job of every source, which counts as named if any of them is."""
    first: dict[Path, Job] = {}
    for job in jobs:
        place = _place(job.source)
        earlier = first.setdefault(place, job)
        first[place] = replace(earlier, named=earlier.named or job.named)
    return list(first.values())


def _jobs_of(given: Path, output: Path, naming: Naming, recursive: bool) -> Iterator[Job]:
    if not given.is_dir():
        animated = pages(given) > 1
        yield Job(given, output / naming.of(given, animated), named=True, animated=animated)
        return
    for source in _pictures_in(given, recursive, skipped=output.resolve()):
        animated = pages(source) > 1
        yield Job(source, output / source.relative_to(given).with_name(naming.of(source, animated)), animated=animated)


def _pictures_in(folder: Path, recursive: bool, skipped: Path) -> Iterator[Path]:
    """Those of `_files_in` with a supported ending."""
    return (file for file in _files_in(folder, recursive, skipped) if _is_read(file))


def _is_read(file: Path) -> bool:
    form = Format.of_suffix(file)
    return videos_are_readable() if is_video(file) else form is not None and form.is_readable


def _files_in(folder: Path, recursive: bool, skipped: Path) -> Iterator[Path]:
    """Files, in order; not hidden ones, text that is named like a video, nor any below `skipped` unless it is `folder`."""
    if isinstance(folder, RemotePath):
        yield from (file for file in folder.files(recursive) if _is_seen(file, folder, skipped) and not is_text(file))
        return
    for root, folders, files in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = sorted(
            name for name in folders if recursive and not name.startswith(".") and (Path(root) / name).resolve() != skipped
        )
        for name in sorted(files):
            if not name.startswith(".") and not is_text(Path(root) / name):
                yield Path(root) / name


def _is_seen(file: Path, folder: Path, skipped: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and (skipped == folder or skipped not in file.parents)


def _raise_unreadable(error: OSError) -> None:
    raise PictureError(f"{error.filename}: folder cannot be read ({system_reason(error)})")


def _without_results(jobs: list[Job]) -> list[Job]:
    """The jobs whose source is not another's result, as an earlier run into the folder of the sources left it.

    What was named counts whatever it is, and so does a file that only has a result's name.
    """
    results = {_place(job.destination) for job in jobs if _place(job.destination) != _place(job.source)}
    return [job for job in jobs if job.named or _place(job.source) not in results or not is_result(job.source)]


def _told_apart(jobs: list[Job]) -> list[Job]:
    """Where results would share a file since their sources' formats are not written: `a.bmp.png` beside `a.tga.png`."""
    shared = Counter(_place(job.destination) for job in jobs)

    def named(job: Job) -> Job:
        at, ending = job.destination, job.source.suffix
        if shared[_place(at)] == 1 or ending == at.suffix or not (Format.of_suffix(job.source) or is_video(job.source)):
            return job
        return replace(job, destination=at.with_name(at.stem + ending + at.suffix))

    return [named(job) for job in jobs]


def _check_conflicts(jobs: list[Job]) -> None:
    taken: dict[Path, Path] = {}
    sources = {place: job.source for job in jobs for place in (_place(job.source), _place(job.source.resolve()))}
    for job in jobs:
        place = _place(job.destination)
        if place in (_place(job.source), _place(job.source.resolve())):
            raise UsageError(f"{job.source}: the result would replace it; choose another output or {option('suffix')}")
        if place in sources:
            raise UsageError(
                f"{sources[place]}: is to be upscaled, and the result of {job.source} would replace it; "
                f"choose another output or {option('suffix')}"
            )
        other = taken.setdefault(place, job.source)
        if other is not job.source:
            raise UsageError(
                f"{other} and {job.source} would both become {job.destination}; rename one or run them separately"
            )


def _place(path: Path) -> Path:
    """The file's folder resolved, its own name not: a link is replaced, not followed, on writing.

    Where the file system takes names that differ in case alone for one file, so does this.
    """
    folder = path.parent.resolve()
    place = folder / path.name
    return Path(unicodedata.normalize("NFC", str(place)).casefold()) if _ignores_case(folder) else place


@cache
def _ignores_case(folder: Path) -> bool:
    """Whether the file system there ignores case: seen by any name in the folder, else by its own."""
    if isinstance(folder, RemotePath):
        return False
    with suppress(OSError):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        names = [path for path in (*islice(there.iterdir(), 1), there) if path.name.swapcase() != path.name]
        return any(path.with_name(path.name.swapcase()).samefile(path) for path in names[:1])
    return False


def _format_of_content(path: Path) -> Format:
    """By the first bytes; PNG where they tell nothing, which opening the file will report."""
    try:
        with path.open("rb") as file:
            return Format.of_content(file.read(256)) or Format.PNG
    except OSError:
        return Format.PNG
