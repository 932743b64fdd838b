"""The stage engines of a network on TensorRT, for exact streaming."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from math import prod
from typing import Any
from zipfile import ZipFile

import numpy as np
import numpy.typing as npt

from sanrt.arrays import Array
from sanrt.errors import ModelError
from sanrt.files import keep, kept
from sanrt.geometry import Box
from sanrt.model.contract import STAGE_INPUTS, STAGE_MAPS
from sanrt.runtime.artifacts.engines import EngineInfo, kernel_cache, read_engine_bytes, stage_archive
from sanrt.runtime.artifacts.flavors import Flavor
from sanrt.runtime.backends.protocol import FeatureMap
from sanrt.runtime.backends.tensorrt.device import FLOAT_BYTES, Buffer, Device, Grid, HostBuffer
from sanrt.runtime.backends.tensorrt.library import TensorRTLog, activation_bytes, engine_from_bytes

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


@dataclass(frozen=True)
class Part:
    """A part of a map on the GPU, or of a stage's output: read when it is used."""

    grid: Grid
    box: Box
    finite: bool = True

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, self.grid.channels, self.box.height, self.box.width


@dataclass(frozen=True)
class GpuMap:
    """A feature map on the GPU."""

    stages: TensorRTStages
    grid: Grid

    def read(self, box: Box) -> Part:
        return Part(self.grid, box)

    def write(self, box: Box, part: Part | Array) -> None:
        self.stages.put(part, self.grid, box)

    def close(self) -> None:
        self.stages.gpu.free(self.grid.address)


class TensorRTStages:
    """Engines that are opened when they are first run, sharing a stream and buffers; not for two threads at once."""

    def __init__(self, info: EngineInfo, gpu: Device, trt: Any) -> None:
        self.info, self.gpu, self.trt = info, gpu, trt
        self.engine_files = ZipFile(BytesIO(read_engine_bytes(info)))
        self.rtx = info.identity.options.flavor == Flavor.RTX
        self.trt_log, self.opened = TensorRTLog(trt), dict[str, Stage]()
        self.kernels = self.kept_kernels()
        gpu.activate()
        self.stream = gpu.create_stream()
        self.scratch = Buffer(gpu.allocate, gpu.free)
        self.inputs, self.outputs, self.spare_outputs = (
            [Buffer(gpu.allocate, gpu.free) for _ in range(MOST_TENSORS)] for _ in range(3)
        )
        self.host_inputs, self.host_outputs = (
            [Buffer(gpu.allocate_host, gpu.free_host) for _ in range(MOST_TENSORS)] for _ in range(2)
        )
        self.transfer = Buffer(gpu.allocate, gpu.free)

    @property
    def maps(self) -> TensorRTStages:
        """They make their own maps."""
        return self

    def new(self, channels: int, height: int, width: int) -> FeatureMap:
        self.gpu.activate()
        address = self.gpu.allocate(channels * height * width * FLOAT_BYTES)
        return GpuMap(self, Grid(address, channels, height, width))

    def finite(self, part: Part) -> bool:
        return part.finite

    def fetch(self, part: Part) -> Array:
        _, channels, height, width = part.shape
        self.transfer.grow(prod(part.shape) * FLOAT_BYTES)
        self.put(part, Grid(self.transfer.memory, channels, height, width), Box(0, 0, height, width))
        view = staged(self.host_outputs[0], prod(part.shape))
        self.gpu.to_host(view, self.transfer.memory, self.stream)
        self.gpu.synchronize(self.stream)
        return view.view(np.float32).reshape(part.shape).copy()

    def put(self, part: Part | Array, grid: Grid, box: Box) -> None:
        """Queue a copy of a part into a box of a grid."""
        if isinstance(part, np.ndarray):
            self.transfer.grow(part.nbytes)
            self.upload(part, self.transfer.memory, 0)
            self.gpu.synchronize(self.stream)
            part = Part(Grid(self.transfer.memory, *part.shape[1:]), Box(0, 0, *part.shape[2:]))
        source, corner = part.box, (box.top, box.left)
        self.gpu.copy_box(grid, corner, part.grid, (source.top, source.left), box.height, box.width, self.stream)

    def upload(self, array: npt.NDArray[Any], address: int, index: int) -> None:
        """Queue a copy of a host array, through the page-locked buffer of that index."""
        source = staged(self.host_inputs[index], array.size)
        np.copyto(source.view(np.float32).reshape(array.shape), array)
        self.gpu.to_device(address, source, self.stream)

    def run(self, stage: str, *inputs: Any) -> list[Any]:
        self.gpu.activate()
        self.trt_log.errors.clear()
        # What the stage before gave may be an input, and is wanted again if this one overflows.
        self.outputs, self.spare_outputs = self.spare_outputs, self.outputs
        try:
            opened = self.opened.get(stage) or self.open(stage)
            self.set_inputs(opened, inputs)
            shapes = self.set_up(opened)
            self.check(opened.context.execute_async_v3(self.stream), stage)
            return self.results(shapes, stage.partition(".")[0] in STAGE_MAPS)
        except RuntimeError as error:  # TensorRT's bindings raise it for a failed shape inference
            raise self.trt_log.failure(self.info.path, f"stage {stage}") from error

    def open(self, stage: str) -> Stage:
        """Deserialise an engine and make its context."""
        engine = engine_from_bytes(self.trt, self.trt_log, self.engine_files.read(stage))
        if engine is None:
            raise ModelError(f"{self.info.path}: {stage}: {self.trt_log.first}; rebuild with `{self.info.command}`")
        settings = engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.rtx:
            cache = settings.create_runtime_cache()
            if stage in self.kernels:
                cache.deserialize(self.kernels[stage])
            settings.set_runtime_cache(cache)
        context = engine.create_execution_context(settings)
        self.check(context is not None, f"execution context of {stage}")
        context.error_recorder = self.trt_log.recorder
        self.check(context.set_optimization_profile_async(0, self.stream), f"profile of {stage}")
        inputs = STAGE_INPUTS[stage.partition(".")[0]]
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        outputs = tuple(sorted(set(names) - set(inputs)))
        self.opened[stage] = Stage(engine, settings, context, inputs, outputs)
        return self.opened[stage]

    def set_inputs(self, stage: Stage, inputs: tuple[Any, ...]) -> None:
        """Shapes and addresses; arrays are copied from the host, parts of maps within the GPU."""
        context = stage.context
        for index, (name, given) in enumerate(zip(stage.inputs, inputs, strict=True)):
            if name == "crop":
                stage.crop[:] = given
                self.check(context.set_tensor_address(name, stage.crop.ctypes.data), "address of crop")
                continue
            self.check(context.set_input_shape(name, tuple(given.shape)), f"shape {given.shape} of {name}")
            self.inputs[index].grow(prod(given.shape) * FLOAT_BYTES)
            address = self.inputs[index].memory
            if isinstance(given, Part):
                _, channels, height, width = given.shape
                self.put(given, Grid(address, channels, height, width), Box(0, 0, height, width))
            else:
                self.upload(given, address, index)
            self.check(context.set_tensor_address(name, address), f"address of {name}")

    def set_up(self, stage: Stage) -> dict[str, tuple[int, ...]]:
        """Memory for activations and outputs, whose shapes are returned."""
        context = stage.context
        self.check(not context.infer_shapes(), "shape inference")
        shapes = {name: tuple(context.get_tensor_shape(name)) for name in stage.outputs}
        for buffer, (name, shape) in zip(self.outputs, shapes.items(), strict=False):
            buffer.grow(prod(shape) * FLOAT_BYTES)
            self.check(context.set_tensor_address(name, buffer.memory), f"address of {name}")
        size = activation_bytes(stage.engine, context)
        self.check(size is not None, "the size of its activations")
        self.scratch.grow(max(1, size or 0))
        context.set_device_memory(self.scratch.memory, self.scratch.size)
        self.check(not self.trt_log.errors, "the memory of its activations")  # the call itself says nothing
        return shapes

    def results(self, shapes: dict[str, tuple[int, ...]], gives_map: bool) -> list[Any]:
        """The outputs: a map as it is, in its buffer, the others on the host."""
        wanted = dict(enumerate(shapes.items()))
        made = wanted.pop(0)[1] if gives_map else ()
        views = {index: staged(self.host_outputs[index], prod(shape)) for index, (_, shape) in wanted.items()}
        for index, view in views.items():
            self.gpu.to_host(view, self.outputs[index].memory, self.stream)
        self.gpu.synchronize(self.stream)
        arrays = {name: views[index].view(np.float32).reshape(shape).copy() for index, (name, shape) in wanted.items()}
        if not gives_map:
            return list(arrays.values())
        finite = bool(np.isfinite(arrays.pop("sum", 0.0)))
        _, channels, height, width = made
        grid = Grid(self.outputs[0].memory, channels, height, width)
        return [Part(grid, Box(0, 0, height, width), finite), *arrays.values()]

    def check(self, done: bool, what: str) -> None:
        """Raise what TensorRT told the recorder, where a call did not succeed."""
        if not done:
            raise self.trt_log.failure(self.info.path, what)

    def kept_kernels(self) -> dict[str, bytes]:
        """Kernels that an earlier run compiled, by stage."""
        content = kept(*kernel_cache(self.info))
        if content is None:
            return {}
        with ZipFile(BytesIO(content)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    def close(self) -> None:
        """Free everything."""
        if self.rtx and self.opened:
            caches = {name: stage.settings.get_runtime_cache() for name, stage in self.opened.items()}
            kernels = {name: bytes(cache.serialize()) for name, cache in caches.items()}
            keep(*kernel_cache(self.info), stage_archive(self.kernels | kernels))
        self.opened.clear()
        device = self.scratch, self.transfer, *self.inputs, *self.outputs, *self.spare_outputs
        for buffer in (*device, *self.host_inputs, *self.host_outputs):
            buffer.close()
        self.gpu.destroy_stream(self.stream)


def staged(buffer: Buffer, values: int) -> HostBuffer:
    """Page-locked bytes for so many float32 values."""
    buffer.grow(values * FLOAT_BYTES)
    view: HostBuffer = buffer.memory[: values * FLOAT_BYTES]
    return view
