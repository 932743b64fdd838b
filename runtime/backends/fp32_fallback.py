"""A loaded backend that is safe to use.

NaN and infinity never reach a picture: what overflowed half precision is computed again in fp32, or is an error. In a
process forked from the one that loaded it, it works or is an error too.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NoReturn, Self, cast
from weakref import WeakSet

import numpy as np

from sanrt.arrays import Array
from sanrt.errors import BackendError
from sanrt.model.spec import Precision
from sanrt.runtime.backends.protocol import Backend, DeviceMaps, Progress, ReportsProgress, Stages, Strips, fork_error
from sanrt.runtime.host import call_after_fork

log = logging.getLogger(__name__)

SURVIVES_FORK = ("native",)
"""Backends that notice a fork and start their threads again."""


class FP32Fallback:
    """A backend whose results are finite, or an error: what is not finite is computed again by another one in fp32."""

    def __init__(self, backend: Backend, load_fp32: Callable[[int], Backend]) -> None:
        """`load_fp32` loads the fp32 backend for k x k regions, when it is first needed."""
        self.backend, self.load_fp32 = backend, load_fp32
        self.loaded: dict[int, Backend] = {}
        self.name, self.device, self.spec, self.streams = backend.name, backend.device, backend.spec, backend.streams
        self.memory, self.limits, self.engine_digest = backend.memory, backend.limits, backend.engine_digest
        LOADED.add(self)

    def after_fork(self) -> None:
        """Called in a process that was just forked: the threads of libraries exist in its parent alone.

        To run a model would wait for them for ever, and so would freeing it, at the latest when the process ends. So it is
        neither run nor freed.
        """
        for backend in self.loaded.values():
            never_free(backend)
        self.loaded.clear()
        if self.name not in SURVIVES_FORK:
            never_free(self.backend)
            self.backend = cast(Backend, UnusableBackend(partial(fork_error, self.name)))

    def fp32(self, regions: int) -> Backend:
        """The fp32 backend for k x k regions; raises BackendError where this one is in fp32 already."""
        if self.spec.precision == Precision.FP32:
            raise BackendError(f"backend {self.name} gave NaN or infinity in fp32; the weights or the picture are unsound")
        if regions not in self.loaded:
            self.close_fp32()
            self.loaded[regions] = self.load_fp32(regions)
        return self.loaded[regions]

    def close_fp32(self) -> None:
        """Close the fp32 backend: one at a time is held, whatever the regions."""
        for backend in self.loaded.values():
            backend.close()
        self.loaded.clear()

    def infer(self, pictures: Array) -> Array:
        return self.finite(self.backend.infer(pictures), pictures, self.spec.regions)

    @property
    def infer_with_regions(self) -> Callable[[Array, int], Array] | None:
        infer = self.backend.infer_with_regions
        return infer and (lambda pictures, regions: self.finite(infer(pictures, regions), pictures, regions))

    def infer_reporting(self, pictures: Array, regions: int, progress: Progress) -> Array:
        """With progress where the backend tells it; without other regions than its own where it takes none."""
        if isinstance(self.backend, ReportsProgress):
            return self.finite(self.backend.infer_reporting(pictures, regions, progress), pictures, regions)
        return infer(pictures, regions) if (infer := self.infer_with_regions) else self.infer(pictures)

    def finite(self, output: Array, pictures: Array, regions: int) -> Array:
        """The output where it is finite, or the fp32 backend's."""
        if np.isfinite(output).all():
            return output
        fp32 = self.fp32(regions)
        self.warn(pictures, fp32)
        return require_finite(fp32, fp32.infer(pictures))

    @property
    def strips(self) -> Strips | None:
        return self.backend.strips

    def stages(self) -> Stages:
        return FP32FallbackStages(self)

    def warn(self, given: Array, fp32: Backend) -> None:
        """Log what is computed again, and by what."""
        size, precision = f"{given.shape[-1]} x {given.shape[-2]}", self.spec.precision
        log.warning("%s: a %s tile overflowed in %s; computing it in fp32 on %s", self.name, size, precision, fp32.name)

    def close(self) -> None:
        self.backend.close()
        self.close_fp32()
        self.backend = cast(Backend, UnusableBackend(partial(closed_error, self.name)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class UnusableBackend:
    """In the place of a backend that was closed, or that a process has from before it was forked: every use raises."""

    def __init__(self, error: Callable[[], BackendError]) -> None:
        """`error` makes what is raised."""
        self.error = error

    def __getattr__(self, _: str) -> NoReturn:
        raise self.error()

    def close(self) -> None:
        """Does nothing: there is nothing to free, or nothing that may be."""


def closed_error(name: str) -> BackendError:
    """For the use of a backend after `close`."""
    return BackendError(f"backend {name}: the model was closed; load it again")


LOADED: WeakSet[FP32Fallback] = WeakSet()
"""Every one there is, for a fork to reach."""


def after_fork() -> None:
    """Called in a process that was just forked."""
    for loaded in LOADED:
        loaded.after_fork()


call_after_fork(after_fork)


def never_free(kept: object) -> None:
    """Keep an object, with all that it refers to, beyond the end of the interpreter."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def require_finite(fp32: Backend, output: Array) -> Array:
    """The fp32 result; raises BackendError when that is not finite either."""
    if not np.isfinite(output).all():
        raise BackendError(f"backend {fp32.name} gave NaN or infinity in fp32 too; the weights are unsound")
    return output


class FP32FallbackStages:
    """The same for stages; they hand over fp32 arrays, so one overflowed stage leaves the others as they are."""

    def __init__(self, owner: FP32Fallback) -> None:
        self.owner, self.stages = owner, owner.backend.stages()
        self.maps = self.stages.maps

    @cached_property
    def fp32(self) -> tuple[Backend, Stages]:
        """The fp32 backend and its stages, which are the same for all regions."""
        backend = self.owner.fp32(self.owner.spec.regions)
        return backend, backend.stages()

    def run(self, stage: str, *inputs: Any) -> list[Any]:
        outputs = self.stages.run(stage, *inputs)
        if all(map(self.finite, outputs)):
            return outputs
        given = [array if isinstance(array, np.ndarray) else self.device_maps.fetch(array) for array in inputs]
        backend, stages = self.fp32
        self.owner.warn(given[0], backend)
        return [require_finite(backend, output) for output in stages.run(stage, *given)]

    def finite(self, output: Any) -> bool:
        """Whether an array, or a map on a GPU, is finite everywhere."""
        return bool(np.isfinite(output).all()) if isinstance(output, np.ndarray) else self.device_maps.finite(output)

    @property
    def device_maps(self) -> DeviceMaps:
        """What knows about parts that are no arrays."""
        assert self.maps
        return self.maps
