"""What is in the results' places already: skipped, made again, or refused, before any picture is upscaled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from sanrt.errors import PictureError, UsageError
from sanrt.model.spec import ModelSpec, Precision
from sanrt.runtime.pictures.codec import Encoding
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.jobs import Job, Replaceable
from sanrt.runtime.pictures.provenance import Provenance, SourceIdentity, digest_of, is_intact, is_unchanged, read_mark
from sanrt.runtime.pictures.storage import RemotePath, translate_errors
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions

THREADS = 16
"""Files that are looked at together: an object store answers each after some milliseconds."""
NAMED = 3
"""Refused files that are named; the others are counted."""
WITHOUT_EFFECT = ("memory", "scratch")
"""Options of upscaling that no pixel depends on."""
IN_TILES = ("tile", "overlap", "tiling")
"""Those that pixels depend on only where tiles overlap."""
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

    def provenance(self, source: SourceIdentity, form: Format) -> Provenance:
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
    """What was found in the results' places."""

    to_do: Sequence[Job]
    done: Sequence[Job] = ()
    """Their results are there."""
    reasons: Sequence[str] = ()
    """Why results are made again, one line for each reason."""


def changed(options: Any) -> dict[str, Any]:
    """The fields of an options object that are not the defaults: an option that is added later changes no digest."""
    return {f.name: value for f in fields(options) if (value := getattr(options, f.name)) != f.default}


def has_effect(option: str, value: Any, form: Format) -> bool:
    """Whether an option of Encoding can change files of a format."""
    match option:
        case "quality":
            return form.facts.quality not in (None, value)
        case "lossless":
            return form in (Format.WEBP, Format.AVIF)
        case _:
            return True


def sort_out(jobs: Sequence[Job], recipe: Recipe, overwrite: bool = False) -> Findings:
    """Which jobs are done; with `overwrite` none is, and whatever is in a result's place will be replaced.

    UsageError if a file that sanrt did not make, or that was changed since, would have to be replaced.
    """
    if overwrite:
        return Findings([replace(job, replaces=Replaceable.ANYTHING) for job in jobs])
    present = {job: found for job, found in together(lambda job: look_at(job.destination), jobs).items() if found}
    results = {job: found.made for job, found in present.items() if found.made}
    refuse([job.destination for job in present if job not in results], "not made by sanrt, or changed since")
    differences = together(lambda job: difference(job, results[job], recipe), results)
    again = {job: why for job, why in differences.items() if why}
    intact = together(lambda job: is_intact(job.destination), again)
    refuse([job.destination for job, is_own in intact.items() if not is_own], "changed since sanrt made it")
    done = differences.keys() - again.keys()
    to_do = [replace(job, replaces=Replaceable.RESULT) if job in again else job for job in jobs if job not in done]
    return Findings(to_do, [job for job in jobs if job in done], list(reasons(again)))


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
    now = recipe.provenance(made.source, Format.of_suffix(job.destination) or Format.PNG)
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


def refuse(paths: Sequence[Path], what: str) -> None:
    """UsageError that names the first ones, if there are any."""
    if paths:
        names, rest = ", ".join(map(str, paths[:NAMED])), len(paths) - NAMED
        more = f" and {rest} more" if rest > 0 else ""
        raise UsageError(
            f"{names}{more}: already there and {what}; nothing was done; "
            "name another OUTPUT (the last argument), or replace what is there with --overwrite"
        )


def reasons(again: Mapping[Job, str]) -> Iterator[str]:
    """A line for each reason to make results again."""
    for why, count in Counter(why for why in again.values() if why != UNREADABLE).items():
        first = next(job.destination for job, other in again.items() if other == why)
        yield f"{first}{f' and {count - 1} more' if count > 1 else ''}: {why}; made again"


def together(look: Callable[[Job], T], jobs: Collection[Job]) -> dict[Job, T]:
    """What a look at each job gives."""
    with ThreadPoolExecutor(THREADS, "sanrt-look") as pool:
        return dict(zip(jobs, pool.map(look, jobs), strict=True))
