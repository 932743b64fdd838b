"""TensorRT and TensorRT-RTX engines, through one code path."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from queue import LifoQueue
from typing import Any, Self

import numpy as np

from sanrt.arrays import Array
from sanrt.errors import BackendError, ModelError, UsageError
from sanrt.extras import install_command
from sanrt.files import keep, kept
from sanrt.model.spec import GRAPH_PRECISIONS
from sanrt.runtime.artifacts.engines import (
    SUFFIX,
    EngineInfo,
    check_fresh,
    check_host,
    choose_engine,
    choose_stages,
    kernel_cache,
    read_engine,
    read_engine_bytes,
)
from sanrt.runtime.artifacts.flavors import EXTRAS, TITLES, Flavor, installed_version
from sanrt.runtime.artifacts.sizes import Limits, Size
from sanrt.runtime.backends.protocol import BackendStatus, RunOptions, Stages, require_precision
from sanrt.runtime.backends.tensorrt.device import FLOAT_BYTES, Buffer, Device, HostBuffer, open_device
from sanrt.runtime.backends.tensorrt.library import TensorRTLog, activation_bytes, engine_from_bytes, import_flavor
from sanrt.runtime.backends.tensorrt.stages import TensorRTStages
from sanrt.wording import option

log = logging.getLogger(__name__)

NAME = "tensorrt"
CONTEXTS = 2
"""Pictures under way at once: while one computes, the next is copied in and the one before is copied out."""
GRAPHS = 4
"""CUDA graphs kept per context, one per input size."""
DEFAULT_STREAM = 1
"""CUDA's handle of the legacy default stream."""


def status(device: int = 0) -> BackendStatus:
    """Whether a TensorRT is installed and that GPU is there; nothing is imported when none is installed."""
    versions = {flavor: found for flavor in Flavor if (found := installed_version(flavor))}
    if not versions:
        return BackendStatus(
            NAME, None, False, "neither TensorRT nor TensorRT-RTX is installed", install_command(EXTRAS[Flavor.RTX])
        )
    version = ", ".join(f"{TITLES[flavor]} {found}" for flavor, found in versions.items())
    try:
        with open_device(device) as gpu:
            return BackendStatus(NAME, version, True, f"runs on {gpu.name}")
    except BackendError as error:
        return BackendStatus(NAME, version, False, str(error))


def load(model: Path, options: RunOptions) -> TensorRTBackend:
    """Load an engine, or the newest one that was built from an exported ONNX and fits this GPU."""
    device = open_device(options.device)
    try:
        return TensorRTBackend(fitting_engine(model, options, device), device)
    except BaseException:
        device.close()
        raise


def refusal(model: Path, options: RunOptions) -> str | None:
    """Why `load` would refuse an engine, or all engines of a model, here; None if it would not."""
    with open_device(options.device) as device:
        try:
            fitting_engine(model, options, device)
        except (BackendError, ModelError) as error:
            return str(error)
    return None


def fitting_engine(model: Path, options: RunOptions, device: Device) -> EngineInfo:
    """The engine that runs a model; raises ModelError where none fits the GPU, BackendError where none fits the options."""
    if model.suffix == SUFFIX:
        info = read_engine(model)
        check_fresh(info)
        check_host(info, device.name, device.capability)
    else:
        info = choose_engine(model, device.name, device.capability)
    if info.spec.regions != options.regions:
        raise BackendError(
            f"{info.path}: attends within {info.spec.regions} x {info.spec.regions} regions, "
            f"not {options.regions} x {options.regions}; run it with those, or choose another backend"
        )
    require_precision(NAME, options, *GRAPH_PRECISIONS)
    if options.precision not in (None, info.spec.precision):
        raise BackendError(
            f"{info.path}: built in {info.spec.precision}, {options.precision} was asked for; "
            f"build it with `sanrt build --{options.precision}`, or leave {option('precision')} out"
        )
    return info


class DeviceArray:
    """A float32 result that stays on the GPU; CuPy, torch and pycuda take it through `__cuda_array_interface__`."""

    def __init__(self, device: Device, shape: tuple[int, ...]) -> None:
        self.device, self.shape = device, shape
        self.address = device.allocate(prod(shape) * FLOAT_BYTES)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": "<f4", "data": (self.address, False), "version": 3, "strides": None}

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self.device.activate()
            self.device.free(self.address)


@dataclass(frozen=True)
class Graph:
    """A captured run of one input size, and the context it was captured from, which nothing else may use."""

    handle: int
    context: Any


class Lane:
    """What one picture needs while it is under way: a stream, an execution context and memory."""

    def __init__(self, gpu: Device, trt_log: TensorRTLog) -> None:
        self.gpu, self.trt_log = gpu, trt_log
        self.stream = gpu.create_stream()
        self.context: Any = None
        self.size: Size | None = None
        """What the context is set up for."""
        self.graphs: OrderedDict[Size, Graph] = OrderedDict()
        """The least recently used first."""
        self.warm: Size | None = None
        """The size of the run before, if the context is as it left it: one that repeats is worth a graph."""
        self.uncaptured: set[Size] = set()
        """Sizes of which no graph could be made."""
        self.scratch, self.input, self.output = (Buffer(gpu.allocate, gpu.free) for _ in range(3))
        """Device memory; the first is for TensorRT's activations, sized for the input that runs, not for the largest."""
        self.host_input, self.host_output = (Buffer(gpu.allocate_host, gpu.free_host) for _ in range(2))

    def host_bytes(self, buffer: Buffer, size: int) -> HostBuffer:
        """The first `size` bytes of a page-locked buffer."""
        buffer.grow(size)
        view: HostBuffer = buffer.memory[:size]
        return view

    def drop_graphs(self, keep: int = 0) -> None:
        """Destroy the least recently used graphs until `keep` are left."""
        while len(self.graphs) > keep:
            self.gpu.destroy_graph(self.graphs.popitem(last=False)[1].handle)

    def close(self) -> None:
        self.drop_graphs()
        self.context = None
        for buffer in (self.scratch, self.input, self.output, self.host_input, self.host_output):
            buffer.close()
        self.gpu.destroy_stream(self.stream)


class TensorRTBackend:
    """An engine with a few lanes: that many `infer` calls from different threads run at once."""

    name = NAME
    infer_with_regions = None
    strips = None

    def __init__(self, info: EngineInfo, gpu: Device, contexts: int = CONTEXTS) -> None:
        flavor = info.identity.options.flavor
        self.info, self.gpu, self.contexts = info, gpu, contexts
        self.device = f"{gpu.name}, {TITLES[flavor]}"
        self.memory: int | None = gpu.free_memory()
        self.engine_digest: str | None = info.digest
        self.rtx = flavor == Flavor.RTX
        self.trt = import_flavor(flavor)
        self.profiles = info.identity.options.profiles
        smallest = min(max(profile.min.height, profile.min.width) for profile in self.profiles)
        self.spec = replace(info.spec, min_side=max(info.spec.min_side, smallest))
        self.trt_log = TensorRTLog(self.trt)
        self.engine = self.deserialize(read_engine_bytes(info))
        self.settings = self.runtime_settings()
        self.opened_stages: TensorRTStages | None = None
        self.lanes: LifoQueue[Lane] = LifoQueue()
        for _ in range(contexts):
            self.lanes.put(Lane(gpu, TensorRTLog(self.trt)))

    def deserialize(self, engine_bytes: bytes) -> Any:
        """The engine, ready to run; raises ModelError with TensorRT's reason."""
        engine = engine_from_bytes(self.trt, self.trt_log, engine_bytes)
        if engine is None:
            raise ModelError(f"{self.info.path}: {self.trt_log.first}; rebuild with `{self.info.command}`")
        return engine

    def runtime_settings(self) -> Any:
        """Activations in our memory; TensorRT-RTX captures CUDA graphs itself, and keeps compiled kernels in a file."""
        settings = self.engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.rtx:
            settings.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            cache = settings.create_runtime_cache()
            if kernels := kept(*kernel_cache(self.info)):
                cache.deserialize(kernels)
            settings.set_runtime_cache(cache)
        return settings

    def infer(self, pictures: Array) -> Array:
        size = self.checked_size(pictures.shape)
        with self.lane(size) as lane:
            source = lane.host_bytes(lane.host_input, pictures.nbytes)
            np.copyto(source.view(np.float32).reshape(pictures.shape), pictures)
            self.gpu.to_device(lane.input.memory, source, lane.stream)
            self.execute(lane, size)
            shape = self.output_shape(size)
            result = lane.host_bytes(lane.host_output, prod(shape) * FLOAT_BYTES)
            self.gpu.to_host(result, lane.output.memory, lane.stream)
            self.gpu.synchronize(lane.stream)
            return result.view(np.float32).reshape(shape).copy()

    def infer_on_device(self, pictures: Any) -> DeviceArray:
        """As `infer`, for anything with `__cuda_array_interface__`; nothing is copied to the host.

        pictures: float32 (B, 3, H, W), contiguous. Work queued on the stream it names, or on the default stream where it
        names none, is waited for on the GPU; the result is complete when this returns.
        """
        interface = pictures.__cuda_array_interface__
        shape, strides = tuple(interface["shape"]), interface.get("strides")
        contiguous = strides in (None, tuple(FLOAT_BYTES * prod(shape[i + 1 :]) for i in range(len(shape))))
        if interface["typestr"] != "<f4" or not contiguous:
            raise UsageError(f"array {interface['typestr']} {shape}, strides {strides}: expected contiguous float32 (<f4)")
        size = self.checked_size(shape)
        with self.lane(size) as lane:
            self.gpu.follow(lane.stream, interface.get("stream") or DEFAULT_STREAM)
            self.gpu.copy(lane.input.memory, interface["data"][0], prod(shape) * FLOAT_BYTES, lane.stream)
            self.execute(lane, size)
            result = DeviceArray(self.gpu, self.output_shape(size))
            self.gpu.copy(result.address, lane.output.memory, prod(result.shape) * FLOAT_BYTES, lane.stream)
            self.gpu.synchronize(lane.stream)
            return result

    def checked_size(self, shape: tuple[int, ...]) -> Size:
        """Batch, height and width; raises UsageError for another layout, BackendError for a size no profile takes."""
        if len(shape) != 4 or shape[1] != 3:
            raise UsageError(f"array of shape {shape}: expected (B, 3, H, W)")
        size = Size(shape[0], shape[2], shape[3])
        if not any(profile.takes(size) for profile in self.profiles):
            raise BackendError(
                f"{self.info.path}: takes {', '.join(f'{p.min} to {p.max}' for p in self.profiles)}, not {size}; "
                f"use smaller tiles, or rebuild with other {option('min')} and {option('max')}"
            )
        return size

    def output_shape(self, size: Size) -> tuple[int, int, int, int]:
        scale = self.spec.architecture.scale
        return size.batch, 3, size.height * scale, size.width * scale

    @contextmanager
    def lane(self, size: Size) -> Iterator[Lane]:
        """A free lane, set up for a size; waits while all are taken."""
        lane = self.lanes.get()
        try:
            self.gpu.activate()
            lane.trt_log.errors.clear()
            if lane.size != size and size not in lane.graphs:
                self.set_up(lane, size)
            yield lane
        except RuntimeError as error:  # TensorRT's bindings raise it for a failed shape inference
            raise self.failure(lane, f"inference for {size}") from error
        finally:
            self.lanes.put(lane)

    def set_up(self, lane: Lane, size: Size) -> None:
        """Profile, shapes, memory, addresses, in the order that TensorRT wants them."""
        lane.size = lane.warm = None
        context = lane.context = lane.context or self.new_context(lane)
        index = min((i for i, p in enumerate(self.profiles) if p.takes(size)), key=lambda i: self.profiles[i].distance(size))
        self.check(context.set_optimization_profile_async(index, lane.stream), lane, "profile")
        self.check(context.set_input_shape("input", size.input_shape), lane, "input shape")
        self.check(not context.infer_shapes(), lane, "shape inference")
        found, expected = tuple(context.get_tensor_shape("output")), self.output_shape(size)
        if found != expected:
            raise BackendError(f"{self.info.path}: its output is {found} for {size}, expected {expected}; rebuild it")
        activations = activation_bytes(self.engine, context)
        self.check(activations is not None, lane, f"the size of its activations for {size}")
        needs = (
            (lane.scratch, max(1, activations or 0)),
            (lane.input, prod(size.input_shape) * FLOAT_BYTES),
            (lane.output, prod(expected) * FLOAT_BYTES),
        )
        if any(buffer.size < need for buffer, need in needs):
            # Captured graphs hold addresses of memory that is about to move.
            lane.drop_graphs()
        for buffer, need in needs:
            buffer.grow(need)
        context.set_device_memory(lane.scratch.memory, lane.scratch.size)
        self.check(not lane.trt_log.errors, lane, "the memory of its activations")  # the call itself says nothing
        self.check(context.set_tensor_address("input", lane.input.memory), lane, "input address")
        self.check(context.set_tensor_address("output", lane.output.memory), lane, "output address")
        lane.size = size

    def new_context(self, lane: Lane) -> Any:
        """An execution context that reports to the lane."""
        context = self.engine.create_execution_context(self.settings)
        self.check(context is not None, lane, "execution context")
        context.error_recorder = lane.trt_log.recorder
        return context

    def execute(self, lane: Lane, size: Size) -> None:
        """Queue one run: the first of a size as it is, the second as a capture, the others as that CUDA graph."""
        if size in lane.graphs:
            lane.graphs.move_to_end(size)
        elif lane.warm != size or size in lane.uncaptured or self.rtx or not self.gpu.graphs or not self.capture(lane, size):
            self.enqueue(lane)
            lane.warm = size
            return
        self.gpu.launch(lane.graphs[size].handle, lane.stream)

    def enqueue(self, lane: Lane) -> None:
        self.check(lane.context.execute_async_v3(lane.stream), lane, "inference")

    def capture(self, lane: Lane, size: Size) -> bool:
        """Turn the lane's context, warm from a run of this size, into a graph; the next other size gets a new context.

        False where that fails, which is logged and not tried again: the size is queued as it is.
        """
        try:
            handle = self.gpu.capture(lane.stream, lambda: self.enqueue(lane))
        except BackendError as error:
            log.warning("no CUDA graph for %s, each run is queued: %s", size, error)
            lane.uncaptured.add(size)
            lane.trt_log.errors.clear()
            return False
        lane.graphs[size] = Graph(handle, lane.context)
        lane.context = lane.size = lane.warm = None
        lane.drop_graphs(keep=GRAPHS)
        return True

    def check(self, done: bool, lane: Lane, what: str) -> None:
        """Raise what TensorRT told the lane's recorder, where a call did not succeed."""
        if not done:
            raise self.failure(lane, what)

    def failure(self, lane: Lane, what: str) -> BackendError:
        """OutOfMemoryError or BackendError, in TensorRT's words."""
        return lane.trt_log.failure(self.info.path, what)

    @cached_property
    def stage_info(self) -> EngineInfo | str:
        """The stage engines of this network that run here, or why there are none."""
        try:
            return choose_stages(self.info, self.gpu.name, self.gpu.capability)
        except ModelError as error:
            return str(error)

    @property
    def streams(self) -> bool:
        return isinstance(self.stage_info, EngineInfo)

    @property
    def limits(self) -> Limits:
        tiles = None if isinstance(self.stage_info, str) else self.stage_info.identity.options.profiles[0]
        return Limits(self.profiles, tiles, self.info.activations)

    def stages(self) -> Stages:
        """The stage engines, opened once; BackendError with the command that builds them where there are none."""
        if isinstance(self.stage_info, str):
            raise BackendError(self.stage_info)
        if self.opened_stages is None:
            self.opened_stages = TensorRTStages(self.stage_info, self.gpu, self.trt)
        return self.opened_stages

    def close(self) -> None:
        """Free everything, once the pictures under way are done."""
        if self.engine is None:
            return
        self.gpu.activate()
        if self.opened_stages:
            self.opened_stages.close()
        for _ in range(self.contexts):
            self.lanes.get().close()
        if self.rtx:
            keep(*kernel_cache(self.info), bytes(self.settings.get_runtime_cache().serialize()))
        self.settings = self.engine = None
        self.gpu.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
