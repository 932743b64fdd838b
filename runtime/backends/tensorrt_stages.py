"""The stage engines of a network on TensorRT, for exact streaming."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import numpy.typing as npt

from sanrt.errors import ModelError
from sanrt.model.spec import STAGE_INPUTS
from sanrt.runtime.backends import Array
from sanrt.runtime.derived import replace_file
from sanrt.runtime.device import Buffer, Device, HostBuffer
from sanrt.runtime.engines import EngineInfo, read_plan, stage_archive
from sanrt.runtime.flavors import Flavor, Watch, engine_from_plan

FLOAT_BYTES = 4
MOST_TENSORS = 4
"""Arrays that a stage takes or gives."""


@dataclass(frozen=True)
class Stage:
    """One opened engine."""

    engine: Any
    settings: Any
    context: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    crop: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(4, np.int64))
    """TensorRT reads it on the host, as it decides the output's shape."""


class TensorRTStages:
    """Engines that are opened when they are first run, sharing a stream and buffers; not for two threads at once."""

    def __init__(self, info: EngineInfo, gpu: Device, trt: Any) -> None:
        self.info, self.gpu, self.trt = info, gpu, trt
        self.plans = ZipFile(BytesIO(read_plan(info)))
        self.rtx = info.identity.options.flavor == Flavor.RTX
        self.watch, self.opened = Watch(trt), dict[str, Stage]()
        self.kernels = self.kept_kernels()
        gpu.activate()
        self.stream = gpu.create_stream()
        self.scratch = Buffer(gpu.allocate, gpu.free)
        self.inputs, self.outputs = ([Buffer(gpu.allocate, gpu.free) for _ in range(MOST_TENSORS)] for _ in range(2))
        self.host = [Buffer(gpu.allocate_host, gpu.free_host) for _ in range(MOST_TENSORS)]

    def run(self, stage: str, *inputs: npt.NDArray[Any]) -> list[Array]:
        self.gpu.activate()
        self.watch.errors.clear()
        try:
            opened = self.opened.get(stage) or self.open(stage)
            self.set_inputs(opened, inputs)
            shapes = self.set_up(opened)
            self.check(opened.context.execute_async_v3(self.stream), stage)
            return self.results(shapes)
        except RuntimeError as error:  # TensorRT's bindings raise it for a failed shape inference
            raise self.watch.failure(self.info.path, f"stage {stage}") from error

    def open(self, stage: str) -> Stage:
        """Deserialise an engine and make its context."""
        engine = engine_from_plan(self.trt, self.watch, self.plans.read(stage))
        if engine is None:
            raise ModelError(f"{self.info.path}: {stage}: {self.watch.first}; rebuild with `{self.info.command}`")
        settings = engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.rtx:
            cache = settings.create_runtime_cache()
            if stage in self.kernels:
                cache.deserialize(self.kernels[stage])
            settings.set_runtime_cache(cache)
        context = engine.create_execution_context(settings)
        self.check(context is not None, f"execution context of {stage}")
        context.error_recorder = self.watch.recorder
        self.check(context.set_optimization_profile_async(0, self.stream), f"profile of {stage}")
        inputs = STAGE_INPUTS[stage.partition(".")[0]]
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        outputs = tuple(sorted(set(names) - set(inputs)))
        self.opened[stage] = Stage(engine, settings, context, inputs, outputs)
        return self.opened[stage]

    def set_inputs(self, stage: Stage, inputs: tuple[npt.NDArray[Any], ...]) -> None:
        """Shapes and addresses; what is on the host is copied."""
        context = stage.context
        for index, (name, given) in enumerate(zip(stage.inputs, inputs, strict=True)):
            if name == "crop":
                stage.crop[:] = given
                self.check(context.set_tensor_address(name, stage.crop.ctypes.data), "address of crop")
                continue
            self.check(context.set_input_shape(name, tuple(given.shape)), f"shape {given.shape} of {name}")
            self.inputs[index].grow(given.size * FLOAT_BYTES)
            source = self.staged(index, given.size)
            np.copyto(source.view(np.float32).reshape(given.shape), given)
            self.gpu.to_device(self.inputs[index].memory, source, self.stream)
            self.check(context.set_tensor_address(name, self.inputs[index].memory), f"address of {name}")

    def set_up(self, stage: Stage) -> dict[str, tuple[int, ...]]:
        """Memory for activations and outputs, whose shapes are returned."""
        context = stage.context
        self.check(not context.infer_shapes(), "shape inference")
        shapes = {name: tuple(context.get_tensor_shape(name)) for name in stage.outputs}
        for buffer, (name, shape) in zip(self.outputs, shapes.items(), strict=False):
            buffer.grow(prod(shape) * FLOAT_BYTES)
            self.check(context.set_tensor_address(name, buffer.memory), f"address of {name}")
        self.scratch.grow(max(1, context.update_device_memory_size_for_shapes()))
        context.set_device_memory(self.scratch.memory, self.scratch.size)
        return shapes

    def results(self, shapes: dict[str, tuple[int, ...]]) -> list[Array]:
        """The outputs, on the host."""
        wanted = [shape for name, shape in shapes.items() if name.startswith("output")]
        views = [self.staged(index, prod(shape)) for index, shape in enumerate(wanted)]
        for view, buffer in zip(views, self.outputs, strict=False):
            self.gpu.to_host(view, buffer.memory, self.stream)
        self.gpu.synchronize(self.stream)
        return [view.view(np.float32).reshape(shape).copy() for view, shape in zip(views, wanted, strict=True)]

    def staged(self, index: int, values: int) -> HostBuffer:
        """Page-locked bytes for so many float32 values."""
        self.host[index].grow(values * FLOAT_BYTES)
        view: HostBuffer = self.host[index].memory[: values * FLOAT_BYTES]
        return view

    def check(self, done: bool, what: str) -> None:
        """Raise what TensorRT told the recorder, where a call did not succeed."""
        if not done:
            raise self.watch.failure(self.info.path, what)

    @property
    def kernel_cache(self) -> Path:
        """Kernels that TensorRT-RTX compiled on this GPU, by stage; it checks by itself that they fit."""
        return self.info.path.with_name(f"{self.info.path.name}.kernels")

    def kept_kernels(self) -> dict[str, bytes]:
        """What an earlier run kept; nothing where that is damaged."""
        try:
            with ZipFile(self.kernel_cache) as archive:
                return {name: archive.read(name) for name in archive.namelist()}
        except (OSError, BadZipFile):
            return {}

    def close(self) -> None:
        """Free everything."""
        if self.rtx and self.opened:
            caches = {name: stage.settings.get_runtime_cache() for name, stage in self.opened.items()}
            kernels = {name: bytes(cache.serialize()) for name, cache in caches.items()}
            replace_file(self.kernel_cache, stage_archive(self.kernels | kernels))
        self.opened.clear()
        for buffer in (self.scratch, *self.inputs, *self.outputs, *self.host):
            buffer.close()
        self.gpu.destroy_stream(self.stream)
