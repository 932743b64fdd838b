"""What would be refused of a run, by names, headers and options alone: told before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from sanrt.errors import PictureError
from sanrt.files import why_no_new_files
from sanrt.runtime.pictures.codec import Encoding, open_picture, plan_output
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.pictures.storage import RemotePath
from sanrt.runtime.runs.pipeline import Failed, Skipped, guarded
from sanrt.runtime.runs.results import together
from sanrt.runtime.runs.videos import settle
from sanrt.runtime.video.encoding import require_named
from sanrt.runtime.video.formats import Container

PICTURES = 100
"""Whose headers are read, at most: of thousands it would take minutes, and what spoils a whole run spoils the first ones."""


def refusals(jobs: Sequence[Job], scale: int, encoding: Encoding, here: bool = True) -> Mapping[Job, Failed | Skipped]:
    """Jobs of which nothing would come, and why, in their order: by all names, and all headers that are read for it.

    These are those of every video, and of the first PICTURES in formats whose header stands alone; none of sources in object
    stores, which would have to be fetched. The others are refused in their turn. here: whether this process writes results.
    """
    local = [job for job in jobs if not isinstance(job.source, RemotePath)]
    pictures = [job for job in local if not job.is_video and header_stands_alone(job.source)][:PICTURES]
    found = {job: guarded(job, partial(require_names, job, encoding, here)) for job in jobs}
    found |= together(lambda job: found[job] or guarded(job, partial(require_picture, job, scale, encoding)), pictures)
    for job in local:
        if job.is_video and not found[job]:  # one by one: a frame of each is decoded
            found[job] = guarded(job, partial(require_video, job, scale, encoding))
    return {job: refusal for job in jobs if (refusal := found[job])}


def require_names(job: Job, encoding: Encoding, here: bool) -> None:
    """Raise what a run would, of the result's place and name."""
    if here and not isinstance(job.destination, RemotePath) and (why := why_no_new_files(job.destination.parent)):
        raise PictureError(f"{job.destination}: cannot be written, {why}; name another OUTPUT")
    if Container.of_suffix(job.destination):
        require_named(job.destination, encoding.video)


def require_picture(job: Job, scale: int, encoding: Encoding) -> None:
    """Raise what a run would, of a picture's header."""
    with open_picture(job.source) as source:
        plan_output(source.info, job.destination, scale, encoding)


def require_video(job: Job, scale: int, encoding: Encoding) -> None:
    """Raise what a run would, of a video's header and first frame."""
    settle(job, job.source, scale, encoding)


def header_stands_alone(picture: Path) -> bool:
    """Whether a picture need not be decoded for its header, by its name: libvips reads it so."""
    form = Format.of_suffix(picture)
    return form is None or bool(form.facts.libvips)
