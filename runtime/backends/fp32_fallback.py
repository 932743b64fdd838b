"""Watches for NaN and infinity: a tile that overflowed half precision is computed again in fp32, never written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from sanrt.arrays import Array
from sanrt.errors import BackendError
from sanrt.model.spec import Precision
from sanrt.runtime.artifacts.engines import SUFFIX, read_engine
from sanrt.runtime.backends.protocol import Backend, DeviceMaps, RunOptions, Stages
from sanrt.runtime.backends.registry import load_backend, status

log = logging.getLogger(__name__)


class Sentinel:
    """A backend whose results are finite, or an error: what is not is computed again by another one in fp32."""

    def __init__(self, backend: Backend, exact: Callable[[int], Backend]) -> None:
        """`exact` loads the fp32 backend for k x k regions, when it is first needed."""
        self.backend, self.load_exact = backend, exact
        self.loaded: dict[int, Backend] = {}
        self.name, self.device, self.spec, self.streams = backend.name, backend.device, backend.spec, backend.streams
        self.memory, self.limits, self.engine_digest = backend.memory, backend.limits, backend.engine_digest

    def exact(self, regions: int) -> Backend:
        """The fp32 backend for k x k regions; raises BackendError where this one is in fp32 already."""
        if self.spec.precision == Precision.FP32:
            raise BackendError(f"backend {self.name} gave NaN or infinity in fp32; the weights or the picture are unsound")
        if regions not in self.loaded:
            self.forget()
            self.loaded[regions] = self.load_exact(regions)
        return self.loaded[regions]

    def forget(self) -> None:
        """Close the fp32 backend: one at a time is held, whatever the regions."""
        for backend in self.loaded.values():
            backend.close()
        self.loaded.clear()

    def infer(self, pictures: Array) -> Array:
        return self.watched(self.backend.infer(pictures), pictures, self.spec.regions)

    @property
    def infer_with_regions(self) -> Callable[[Array, int], Array] | None:
        infer = self.backend.infer_with_regions
        return infer and (lambda pictures, regions: self.watched(infer(pictures, regions), pictures, regions))

    def watched(self, output: Array, pictures: Array, regions: int) -> Array:
        """The output where it is finite, or the fp32 backend's."""
        if np.isfinite(output).all():
            return output
        exact = self.exact(regions)
        self.tell(pictures, exact)
        return checked(exact, exact.infer(pictures))

    def stages(self) -> Stages:
        return SentinelStages(self)

    def tell(self, given: Array, exact: Backend) -> None:
        """Log what is computed again, and by what."""
        size, precision = f"{given.shape[-1]} x {given.shape[-2]}", self.spec.precision
        log.warning("%s: a %s tile overflowed in %s; computing it in fp32 on %s", self.name, size, precision, exact.name)

    def close(self) -> None:
        self.backend.close()
        self.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checked(exact: Backend, output: Array) -> Array:
    """The fp32 result; raises BackendError when that is not finite either."""
    if not np.isfinite(output).all():
        raise BackendError(f"backend {exact.name} gave NaN or infinity in fp32 too; the weights are unsound")
    return output


class SentinelStages:
    """The same for stages; they hand over fp32 arrays, so one overflowed stage leaves the others as they are."""

    def __init__(self, owner: Sentinel) -> None:
        self.owner, self.stages = owner, owner.backend.stages()
        self.maps = self.stages.maps

    @cached_property
    def exact(self) -> tuple[Backend, Stages]:
        """The fp32 backend and its stages, which are the same for all regions."""
        exact = self.owner.exact(self.owner.spec.regions)
        return exact, exact.stages()

    def run(self, stage: str, *inputs: Any) -> list[Any]:
        outputs = self.stages.run(stage, *inputs)
        if all(map(self.finite, outputs)):
            return outputs
        given = [array if isinstance(array, np.ndarray) else self.on_device.fetch(array) for array in inputs]
        backend, stages = self.exact
        self.owner.tell(given[0], backend)
        return [checked(backend, output) for output in stages.run(stage, *given)]

    def finite(self, output: Any) -> bool:
        """Whether an array, or a map on a GPU, is finite everywhere."""
        return bool(np.isfinite(output).all()) if isinstance(output, np.ndarray) else self.on_device.finite(output)

    @property
    def on_device(self) -> DeviceMaps:
        """What knows about parts that are no arrays."""
        assert self.maps
        return self.maps


def watched(backend: Backend, model: Path, options: RunOptions) -> Sentinel:
    """The backend of a model (ONNX, engine or checkpoint) with fp32 on the CPU behind it."""

    def exact(regions: int) -> Backend:
        onnx = read_engine(model).model_path if model.suffix == SUFFIX else model
        name = "onnxruntime" if onnx.suffix == ".onnx" and status("onnxruntime").usable else "torch"
        threads = RunOptions(threads=options.threads, precision=Precision.FP32, regions=regions)
        return load_backend(name, onnx, threads)

    return Sentinel(backend, exact)
