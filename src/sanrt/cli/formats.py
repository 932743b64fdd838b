"""Picture formats as a person names them on the command line."""

from __future__ import annotations

import typer

from sanrt.runtime.pictures.formats import Format

FORMATS = f"[{'|'.join(form for form in Format if form.written_as is form)}]"
"""Those that results can have, for help texts."""


def written_format(text: str) -> Format:
    """A typer parser: wrong usage for what is no format, or one that is only read."""
    form = Format.named(text)
    if form is None:
        raise typer.BadParameter(f"{text}: expected one of {FORMATS.strip('[]').replace('|', ', ')}")
    if form.written_as is not form:
        raise typer.BadParameter(f"{text}: sanrt reads it, and writes {form.written_as} instead")
    return form
