"""What a server does with one picture, apart from HTTP: look at its header, resolve what is asked, upscale it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sanrt.errors import SanrtError
from sanrt.model.bundled import FOLDER, WeightsKind, has_bundled
from sanrt.model.spec import SCALES
from sanrt.request import ModelChoice, Part, Request
from sanrt.runtime.artifacts.models import exported_path, model_title
from sanrt.runtime.pictures.codec import open_picture
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.runs.pipeline import Listener, Written, nobody
from sanrt.serve.options import ServeOptions
from sanrt.serve.parameters import read_parameters
from sanrt.serve.queue import Queue
from sanrt.serve.uploads import Upload


@dataclass(frozen=True)
class Order:
    """One picture that can be upscaled as it was asked for, as far as its header tells."""

    request: Request
    part: Part
    stem: str
    """Of the picture's name, as its sender has it."""
    width: int
    height: int

    @property
    def name(self) -> str:
        """The result's name as a sender would write it, without its ending: `a_x4` for `a.png`."""
        return f"{self.stem}_{str(self.request.encoding.result_size) or f'x{self.part.recipe.scale}'}"

    @property
    def source(self) -> Path:
        """The picture's file; in its folder is nothing else but the result."""
        return self.part.jobs[0].source


@dataclass(frozen=True)
class Result:
    """A result that is complete on disk."""

    path: Path
    name: str
    """What the sender would call it."""
    media_type: str
    notes: tuple[str, ...]
    seconds: dict[str, float]
    model: str

    def to_json(self) -> dict[str, Any]:
        """Its facts, for clients."""
        return {
            "name": self.name,
            "type": self.media_type,
            "notes": self.notes,
            "seconds": self.seconds,
            "model": self.model,
        }


@dataclass(frozen=True)
class Service:
    """The pictures of one process."""

    options: ServeOptions
    queue: Queue

    async def order(self, upload: Upload) -> Order:
        """What is asked for a picture; raises SanrtError where it cannot be done, before any pixel is decoded."""
        with self.without_paths(upload.file.parent):
            return await asyncio.to_thread(self.examined, upload)

    def examined(self, upload: Upload) -> Order:
        """The same, blocking."""
        parameters, file = read_parameters(upload.pairs), upload.file
        info = open_picture(file, self.options.limits.pixels).info
        request = parameters.of(file, file.parent, self.options.choice, self.options.memory)
        (part,) = request.resolve().parts
        return Order(request, part, upload.stem, info.width, info.height)

    async def upscale(self, order: Order, listener: Listener = nobody) -> Result:
        """The result of an order, which has a place in line; raises as `Queue.upscale` does."""
        with self.without_paths(order.source.parent):
            written = await self.queue.upscale(order.part, order.request, listener)
        return self.result(order, written)

    def result(self, order: Order, written: Written) -> Result:
        """What to tell of a result."""
        path = written.job.destination
        reason = (order.part.reason,) if order.part.reason else ()
        model = model_title(order.part.choice.path).rpartition("/")[2]
        return Result(
            path,
            order.name + path.suffix,
            f"image/{Format.of_suffix(path)}",
            written.notes + reason,
            dict(written.seconds),
            model,
        )

    @contextmanager
    def without_paths(self, place: Path) -> Iterator[None]:
        """Errors of the body name files without this machine's folders."""
        choice = self.options.choice
        folders = (place, choice.models, FOLDER, *([choice.named.parent] if choice.named else []))
        try:
            yield
        except SanrtError as error:
            text = str(error)
            for folder in folders:
                text = text.replace(f"{folder}{os.sep}", "")
            error.args = (text,)
            raise


def available_weights(choice: ModelChoice) -> dict[int, list[str]]:
    """For each scale the kinds of weights that a request may name; `auto` is always one. A named model has its own."""
    found: dict[int, list[str]] = {}
    for scale in SCALES if choice.named is None else ():
        for kind in WeightsKind:
            if exported_path(choice.models, scale, kind).is_file() or has_bundled(scale, kind):
                found.setdefault(scale, ["auto"]).append(kind)
    return found
