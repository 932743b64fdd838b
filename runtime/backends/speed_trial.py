"""Which of several backends is the fastest for a model on this machine: measured in a second or two, and kept."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from sanrt.errors import SanrtError
from sanrt.files import keep, kept
from sanrt.runtime.artifacts.models import model_title
from sanrt.runtime.artifacts.variants import cache_folders, cache_name
from sanrt.runtime.backends.protocol import Backend
from sanrt.wording import NOTICE

log = logging.getLogger(__name__)

SIDE, ROUNDS = 192, 3
"""Side of the picture, in pixels, and runs in turns of which each backend's fastest counts, after one that does not."""
CODE = ("sanrt.model", "sanrt.runtime.backends", "sanrt.kernels")
"""The packages whose speed is measured."""


def fastest(loaders: Mapping[str, Callable[[], Backend]], model: Path, identity: Iterable[str]) -> str:
    """Name of the backend that takes least time; the first one where none runs, so that its error is told.

    The times are kept once all were measured: what fails now may run the next time.
    loaders: by name what loads the model. identity: all that the times depend on beside the model and sanrt's code.
    """
    folders, name = cache_folders(model), cache_name(model, "fastest.json", identity, CODE)
    content = kept(folders, name)
    if content is None:
        log.log(NOTICE, "measuring which is the fastest here for %s: %s; once", model_title(model), " or ".join(loaders))
    found: dict[str, float] = json.loads(content) if content else seconds(loaders)
    if content is None and found.keys() == loaders.keys():
        keep(folders, name, json.dumps(found).encode())
    log.info("a picture of %d x %d takes %s", SIDE, SIDE, ", ".join(f"{name} {s:.3f} s" for name, s in found.items()))
    return min(found, key=found.__getitem__, default=next(iter(loaders)))


def seconds(loaders: Mapping[str, Callable[[], Backend]]) -> dict[str, float]:
    """Each backend's time for one picture, those left out that do not load, or run, as they are asked to."""
    picture = np.zeros((1, 3, SIDE, SIDE), np.float32)
    with ExitStack() as stack:
        loaded = {}
        for name, load in loaders.items():
            try:
                backend = stack.enter_context(load())
                timed(backend, picture)
                loaded[name] = backend
            except SanrtError as error:
                log.info("%s is not measured: %s", name, error)
        rounds = [{name: timed(backend, picture) for name, backend in loaded.items()} for _ in range(ROUNDS)]
    return {name: min(each[name] for each in rounds) for name in loaded}


def timed(backend: Backend, picture: np.ndarray) -> float:
    """Seconds of one run."""
    started = time.perf_counter()
    backend.infer(picture)
    return time.perf_counter() - started
