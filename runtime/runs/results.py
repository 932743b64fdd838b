"""What is in the results' places already: skipped, made again, or refused, before any picture is upscaled."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from sanrt.errors import PictureError, UsageError
from sanrt.model.spec import ModelSpec, Precision
from sanrt.runtime.pictures.codec import Encoding
from sanrt.runtime.pictures.formats import Format, ResultFormat, result_format
from sanrt.runtime.pictures.jobs import Job, Replaceable, some_of
from sanrt.runtime.pictures.provenance import (
    Provenance,
    SourceIdentity,
    digest_of,
    is_intact,
    is_result,
    is_unchanged,
    read_mark,
)
from sanrt.runtime.pictures.storage import RemotePath, translate_errors
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.runtime.video.formats import Container
from sanrt.wording import option

THREADS = 16
"""Files that are looked at together: an object store answers each after some milliseconds."""
RESULT_NAME = re.compile(r"_(x[0-9.]+|[0-9]+x[0-9]+)$")
"""How the stem ends of a result for which no name was given."""
WITHOUT_EFFECT = ("memory", "scratch")
"""Options of upscaling that no pixel depends on."""
IN_TILES = ("tile", "overlap", "tiling")
"""Those that pixels depend on only where tiles overlap."""
OF_PICTURES, OF_VIDEOS = ("quality", "lossless"), ("codec", "crf", "preset")
"""Options of Encoding that change nothing in the other kind."""
UNREADABLE = "its source cannot be read"
"""A job that is left to fail when its turn comes."""
T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """What the results of a run depend on beside their sources: the model, and the options as they were asked for."""

    scale: int
    model: str
    """Digest of architecture, weights and quantisation."""
    upscaling: Mapping[str, Any] = field(default_factory=dict)
    """Options that pixels depend on, by name, where they are not the defaults."""
    encoding: Mapping[str, Any] = field(default_factory=dict)
    """Options of the written files, likewise."""

    @classmethod
    def of(cls, spec: ModelSpec, precision: Precision | None, upscaling: UpscaleOptions, encoding: Encoding) -> Recipe:
        """The recipe of a model and the options of a run."""
        arch = spec.architecture
        model = digest_of(
            [asdict(arch), spec.weights_digest, spec.iterations, spec.quantisation and asdict(spec.quantisation)]
        )
        overlaps = upscaling.tiling is Tiling.OVERLAP or (upscaling.tiling is Tiling.AUTO and upscaling.tile is not None)
        left_out = WITHOUT_EFFECT if overlaps or upscaling.overlap is not None else WITHOUT_EFFECT + IN_TILES
        asked = {name: value for name, value in changed(upscaling).items() if name not in left_out}
        return cls(arch.scale, model, asked | ({"precision": precision} if precision else {}), changed(encoding))

    def provenance(self, source: SourceIdentity, form: ResultFormat) -> Provenance:
        """That of the result of a source in a format."""
        encoding = {name: value for name, value in self.encoding.items() if has_effect(name, value, form)}
        return Provenance(source, self.scale, self.model, digest_of([self.upscaling, encoding]))


@dataclass(frozen=True)
class Present:
    """A file, or something else, in a result's place."""

    made: Provenance | None
    """What it was made from; None if sanrt did not make it."""


@dataclass(frozen=True)
class Findings:
    """What was found in the results' places, and in the sources."""

    to_do: Sequence[Job]
    done: Sequence[Job] = ()
    """Their results are there."""
    again: Mapping[Job, str] = field(default_factory=dict)
    """Why results that are to be done are there and made again."""
    occupied: Mapping[Job, str] = field(default_factory=dict)
    """In their results' places are other files, which stay; what they are."""
    results: Sequence[Job] = ()
    """Their sources are results themselves, in folders: passed over."""


def changed(options: Any) -> dict[str, Any]:
    """The fields of an options object that are not the defaults: an option that is added later changes no digest."""
    return {f.name: value for f in fields(options) if (value := getattr(options, f.name)) != f.default}


def has_effect(option: str, value: Any, form: ResultFormat) -> bool:
    """Whether an option of Encoding can change files of a format."""
    if isinstance(form, Container):
        return option not in OF_PICTURES
    match option:
        case "quality":
            return form.facts.quality not in (None, value)
        case "lossless":
            return form in (Format.WEBP, Format.AVIF)
        case _:
            return option not in OF_VIDEOS


def sort_out(recipes: Mapping[Job, Recipe], overwrite: bool = False, include_results: bool = False) -> Findings:
    """What becomes of each job; with `overwrite` none is done, and whatever is in a result's place will be replaced.

    recipes: each job's. include_results: whether results of sanrt that lie in folders are enlarged again.
    UsageError where a file that sanrt did not make, or that was changed since, is in the place of a named picture's result,
    or where no result of sanrt's shows that the folder is one of results.
    """
    looked = together(lambda job: look_at(job.destination), [] if overwrite else recipes)
    present = {job: found for job, found in looked.items() if found}
    made = {job: found.made for job, found in present.items() if found.made}
    differences = together(lambda job: difference(job, made[job], recipes[job]), made)
    done = {job for job, why in differences.items() if not why}
    unnamed = [job for job in recipes if job not in done and not job.named and not include_results]
    results = {job for job, is_own in together(lambda job: is_result(job.source), unnamed).items() if is_own}
    rest = [job for job in recipes if job not in done | results]
    if overwrite:
        return Findings([replace(job, replaces=Replaceable.ANYTHING) for job in rest], results=[*results])
    intact = together(lambda job: is_intact(job.destination), [job for job in rest if job in made])
    others = [job for job in rest if job in present and not intact.get(job)]
    occupied = {
        job: "changed since sanrt made it" if job in made else "not made by sanrt, or changed since" for job in others
    }
    if any(job.named for job in occupied) or not (done or any(intact.values())):
        refuse(occupied)
    refuse({job: "the result of another picture" for job in rest if job in made and is_anothers(job, made[job])})
    again = {replace(job, replaces=Replaceable.RESULT): differences[job] for job in rest if intact.get(job)}
    to_do = [replace(job, replaces=Replaceable.RESULT) if job in made else job for job in rest if job not in occupied]
    in_order = {name: [job for job in recipes if job in found] for name, found in (("done", done), ("results", results))}
    return Findings(to_do, again=again, occupied=occupied, **in_order)


def appeared(job: Job, recipe: Recipe) -> bool:
    """Whether another run has written this very result since this one began; PictureError if it may not be replaced."""
    if job.replaces is Replaceable.ANYTHING or (found := look_at(job.destination)) is None:
        return False
    if found.made and not difference(job, found.made, recipe):
        return True
    if job.replaces is Replaceable.RESULT and is_intact(job.destination):
        return False
    raise PictureError(f"{job.destination}: appeared, or was changed, since the run began; it is not replaced")


def look_at(path: Path) -> Present | None:
    """What is in a result's place; None if there is nothing."""
    with translate_errors(path, "cannot be read"):
        if not isinstance(path, RemotePath) and not path.is_file():
            return Present(None) if path.is_symlink() or path.exists() else None
        try:
            mark = read_mark(path)
        except FileNotFoundError:
            return None
    return Present(mark.provenance if mark else None)


def difference(job: Job, made: Provenance, recipe: Recipe) -> str:
    """What a result was made from that this run would not make it from, for people; empty if there is nothing."""
    now = recipe.provenance(made.source, result_format(job.destination) or Format.PNG)
    if made.scale != now.scale:
        return f"made at x{made.scale} before"
    if made.model != now.model:
        return "made by another model before"
    if made.options != now.options:
        return "made with other options before"
    try:
        unchanged = is_unchanged(made.source, job.source)
    except OSError:
        return UNREADABLE
    return "" if unchanged else "made from another picture, or from this one before it changed"


def is_anothers(job: Job, made: Provenance) -> bool:
    """Whether a named picture's result would replace one that is likely another's, and OUTPUT was left out.

    So it is where the picture is a result itself, or the other has the name of a result: `a_x4.png b_x4.png`.
    """
    if not job.named or job.destination.stem.startswith(job.source.stem):
        return False
    if not (RESULT_NAME.search(job.destination.stem) or is_result(job.source)):
        return False
    with suppress(OSError):
        return not is_unchanged(made.source, job.source)
    return False


def refuse(found: Mapping[Job, str]) -> None:
    """UsageError that names the first files in the results' places and says what they are, if there are any."""
    for what in dict.fromkeys(found.values()):
        places = [job.destination for job, other in found.items() if other == what]
        raise UsageError(
            f"{some_of(places)}: already there and {what}; nothing was done; "
            f"name another output, or replace what is there with {option('overwrite', True)}"
        )


def reasons(again: Mapping[Job, str], outcome: str) -> Iterator[str]:
    """A line for each reason to make results again, with what becomes of them: `made again`."""
    for why in dict.fromkeys(why for why in again.values() if why != UNREADABLE):
        jobs = [job for job, other in again.items() if other == why]
        more = f" and {len(jobs) - 1} more" if jobs[1:] else ""
        yield f"{jobs[0].destination}{more}: {why}; {outcome}"


def together(look: Callable[[Job], T], jobs: Collection[Job]) -> dict[Job, T]:
    """What a look at each job gives."""
    with ThreadPoolExecutor(THREADS, "sanrt-look") as pool:
        return dict(zip(jobs, pool.map(look, jobs), strict=True))
