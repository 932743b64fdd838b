"""How many frames a GIF or WebP file has. Imports little, as it is asked wherever results are named."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sanrt.errors import PictureError
from sanrt.runtime.pictures import libvips
from sanrt.runtime.pictures.formats import ANIMATED, Format
from sanrt.runtime.pictures.libvips import vips
from sanrt.runtime.pictures.storage import RemotePath, fetched

if TYPE_CHECKING:
    import pyvips


def pages(path: Path) -> int:
    """How many frames a GIF or WebP file has; 0 for any other, and for one that cannot be read.

    One in an object store is fetched, where its name stands for one of these.
    """
    if Format.of_suffix(path) not in (None, *ANIMATED) or (isinstance(path, RemotePath) and not Format.of_suffix(path)):
        return 0
    with suppress(OSError, PictureError), fetched(path) as local:
        if local.is_file() and (form := format_of(local)):
            return libvips.read(f"{path}: damaged", lambda: count(loaded(local, form, fail_on="none")))
    return 0


def format_of(path: Path) -> Format | None:
    """GIF or WebP, by the first bytes of a file; None for any other."""
    with path.open("rb") as file:
        form = Format.of_content(file.read(256))
    return form if form in ANIMATED else None


def loaded(path: Path, form: Format, fail_on: str = "error") -> pyvips.Image:
    """All frames, composed, one below the other; decoded from top to bottom."""
    load = getattr(vips().Image, f"{form.facts.libvips}load_source")
    return load(vips().Source.new_from_file(os.fsencode(path)), n=-1, access="sequential", fail_on=fail_on)


def count(image: pyvips.Image) -> int:
    """How many frames an opened file has."""
    return image.get("n-pages") if image.get_typeof("n-pages") else 1
