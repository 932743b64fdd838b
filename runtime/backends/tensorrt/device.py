"""The CUDA device: memory, streams, copies and graphs behind one Protocol, over cuda-python or pycuda."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from sanrt.errors import BackendError, OutOfMemoryError
from sanrt.extras import install_command

HostBuffer = npt.NDArray[np.uint8]
"""Page-locked host memory; only copies from and to it overlap with kernels."""

FLOAT_BYTES = 4
Corner = tuple[int, int]
"""Row and column."""
PROVIDER = "SANRT_CUDA"
"""Environment variable: `cuda-python` or `pycuda`, where both are installed."""


class Device(Protocol):
    """One GPU. Addresses, streams and graphs are plain integers; every call may raise BackendError or OutOfMemoryError."""

    name: str
    capability: str
    """Such as `sm89`."""
    graphs: bool
    """Whether `capture` works."""

    def activate(self) -> None:
        """Make the GPU's primary context current in this thread; once per thread, before anything else."""
        ...

    def allocate(self, size: int) -> int: ...

    def free(self, address: int) -> None: ...

    def free_memory(self) -> int:
        """Bytes of device memory that nobody has."""
        ...

    def allocate_host(self, size: int) -> HostBuffer: ...

    def free_host(self, buffer: HostBuffer) -> None: ...

    def create_stream(self) -> int: ...

    def destroy_stream(self, stream: int) -> None: ...

    def to_device(self, address: int, source: HostBuffer, stream: int) -> None:
        """Queue a copy of all of `source`."""
        ...

    def to_host(self, target: HostBuffer, address: int, stream: int) -> None:
        """Queue a copy that fills all of `target`."""
        ...

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy within device memory."""
        ...

    def copy_box(
        self, target: Grid, target_at: Corner, source: Grid, source_at: Corner, height: int, width: int, stream: int
    ) -> None:
        """Queue a copy of rows and columns of all channels within device memory."""
        ...

    def follow(self, stream: int, other: int) -> None:
        """Let `stream` wait for what `other` was given so far."""
        ...

    def synchronize(self, stream: int) -> None: ...

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Record what `work` queues on `stream` as a graph, without running it."""
        ...

    def launch(self, graph: int, stream: int) -> None: ...

    def destroy_graph(self, graph: int) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class Grid:
    """(C, H, W) float32 values in device memory, without gaps."""

    address: int
    channels: int
    height: int
    width: int

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return FLOAT_BYTES * self.width


@dataclass
class Buffer:
    """Memory that only grows, so that pictures of one size never allocate twice."""

    allocate: Callable[[int], Any]
    release: Callable[[Any], None]
    memory: Any = None
    size: int = 0

    def grow(self, size: int) -> None:
        """Hold at least `size` bytes."""
        if size > self.size:
            self.close()
            self.memory, self.size = self.allocate(size), size

    def close(self) -> None:
        if self.memory is not None:
            self.release(self.memory)
        self.memory, self.size = None, 0


def open_device(index: int) -> Device:
    """The GPU of that index, through cuda-python, or pycuda where that is what is installed or `SANRT_CUDA` says so."""
    providers: dict[str, tuple[str, Callable[[int], Device]]] = {
        "cuda-python": ("cuda.bindings", CudaPython),
        "pycuda": ("pycuda", PyCuda),
    }
    asked = os.environ.get(PROVIDER)
    if asked is not None and asked not in providers:
        raise BackendError(f"{PROVIDER}={asked}: expected {' or '.join(providers)}")
    for name, (module, provider) in providers.items():
        if asked in (None, name) and installed(module):
            return provider(index)
    raise BackendError(
        f"{asked or 'cuda-python'} is not installed; {install_command('pycuda' if asked == 'pycuda' else 'trt')}"
    )


def installed(module: str) -> bool:
    """Whether a module could be imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


class CudaPython:
    """cuda-python's binding of the CUDA runtime, on the primary context that every other library uses."""

    graphs = True

    def __init__(self, index: int) -> None:
        from cuda.bindings import runtime

        self.cuda = runtime
        code, count = runtime.cudaGetDeviceCount()
        if code != runtime.cudaError_t.cudaSuccess:
            raise BackendError(f"no NVIDIA GPU can be used here ({runtime.cudaGetErrorString(code)[1].decode()})")
        if index >= count:
            raise BackendError(f"GPU {index}: expected an index below {count}, the number of GPUs here")
        self.index = index
        self.activate()
        properties = self.call("cudaGetDeviceProperties", index)
        self.name = properties.name.decode().rstrip("\0")
        self.capability = f"sm{properties.major}{properties.minor}"

    def call(self, function: str, *arguments: Any) -> Any:
        """Call the CUDA runtime; what it returns beside the error code, which is raised."""
        code, *results = getattr(self.cuda, function)(*arguments)
        if code != self.cuda.cudaError_t.cudaSuccess:
            kind = OutOfMemoryError if code == self.cuda.cudaError_t.cudaErrorMemoryAllocation else BackendError
            raise kind(f"CUDA: {function} failed ({self.cuda.cudaGetErrorString(code)[1].decode()})")
        return results[0] if results else None

    def activate(self) -> None:
        self.call("cudaSetDevice", self.index)

    def allocate(self, size: int) -> int:
        return int(self.call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self.call("cudaFree", address)

    def free_memory(self) -> int:
        return int(self.call("cudaMemGetInfo"))

    def allocate_host(self, size: int) -> HostBuffer:
        address = int(self.call("cudaHostAlloc", size, self.cuda.cudaHostAllocDefault))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_host(self, buffer: HostBuffer) -> None:
        self.call("cudaFreeHost", buffer.ctypes.data)

    def create_stream(self) -> int:
        return int(self.call("cudaStreamCreateWithFlags", self.cuda.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self.call("cudaStreamDestroy", stream)

    def to_device(self, address: int, source: HostBuffer, stream: int) -> None:
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, stream)

    def to_host(self, target: HostBuffer, address: int, stream: int) -> None:
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpyAsync", target, source, size, kind, stream)

    def copy_box(
        self, target: Grid, target_at: Corner, source: Grid, source_at: Corner, height: int, width: int, stream: int
    ) -> None:
        request, extent = self.cuda.cudaMemcpy3DParms(), self.cuda.cudaExtent()
        request.srcPtr, request.srcPos = self.placed(source, source_at)
        request.dstPtr, request.dstPos = self.placed(target, target_at)
        extent.width, extent.height, extent.depth = FLOAT_BYTES * width, height, source.channels
        request.extent, request.kind = extent, self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpy3DAsync", request, stream)

    def placed(self, grid: Grid, at: Corner) -> tuple[Any, Any]:
        """A place in a grid as CUDA wants it: rows in bytes."""
        pointer, position = self.cuda.cudaPitchedPtr(), self.cuda.cudaPos()
        pointer.ptr, pointer.pitch, pointer.xsize, pointer.ysize = grid.address, grid.row, grid.row, grid.height
        position.y, position.x = at[0], FLOAT_BYTES * at[1]
        return pointer, position

    def follow(self, stream: int, other: int) -> None:
        event = self.call("cudaEventCreateWithFlags", self.cuda.cudaEventDisableTiming)
        self.call("cudaEventRecord", event, other)
        self.call("cudaStreamWaitEvent", stream, event, 0)
        self.call("cudaEventDestroy", event)

    def synchronize(self, stream: int) -> None:
        self.call("cudaStreamSynchronize", stream)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        # Thread-local: other threads may go on allocating and launching meanwhile.
        self.call("cudaStreamBeginCapture", stream, self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        except BaseException:
            with suppress(BackendError):  # what ended the work ended the capture too, and is the reason
                self.call("cudaGraphDestroy", self.call("cudaStreamEndCapture", stream))
            raise
        recorded = self.call("cudaStreamEndCapture", stream)
        try:
            return int(self.call("cudaGraphInstantiate", recorded, 0))
        finally:
            self.call("cudaGraphDestroy", recorded)

    def launch(self, graph: int, stream: int) -> None:
        self.call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self.call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """The primary context is shared with other libraries and stays."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PyCuda:
    """pycuda's driver interface on the primary context; it binds neither CUDA graphs nor other libraries' streams."""

    graphs = False

    def __init__(self, index: int) -> None:
        try:
            import pycuda.driver
        except ImportError as error:
            raise BackendError(f"pycuda cannot be imported ({error}); it needs an NVIDIA driver") from error
        self.cuda = pycuda.driver
        with self.errors():
            self.cuda.init()
            if index >= (count := self.cuda.Device.count()):
                raise BackendError(f"GPU {index}: expected an index below {count}, the number of GPUs here")
            gpu = self.cuda.Device(index)
            self.context = gpu.retain_primary_context()
            self.name = gpu.name()
            major, minor = gpu.compute_capability()
        self.capability = f"sm{major}{minor}"
        self.owned: dict[int, Any] = {}
        """pycuda frees what is no longer referenced, so its objects are kept here by address or handle."""
        self.activate()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """pycuda's errors as ours."""
        try:
            yield
        except self.cuda.MemoryError as error:
            raise OutOfMemoryError(f"CUDA: {error}") from error
        except self.cuda.Error as error:
            raise BackendError(f"CUDA: {error}") from error

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call pycuda with the context on its own stack, which every call leaves empty.

        pycuda aborts the process when a thread ends with a context on that stack, and it frees nothing for a context that
        is not on it.
        """
        with self.errors():
            self.context.push()
            try:
                return function(*arguments)
            finally:
                self.context.pop()

    def own(self, handle: int, thing: Any) -> int:
        self.owned[handle] = thing
        return handle

    def activate(self) -> None:
        # For TensorRT, by the driver itself: pycuda has only its stack for that.
        if code := driver_library().cuCtxSetCurrent(ctypes.c_void_p(self.context.handle)):
            raise BackendError(f"CUDA: cuCtxSetCurrent failed (error {code})")

    def allocate(self, size: int) -> int:
        memory = self.call(self.cuda.mem_alloc, size)
        return self.own(int(memory), memory)

    def free(self, address: int) -> None:
        self.call(self.owned.pop(address).free)

    def free_memory(self) -> int:
        free, _ = self.call(self.cuda.mem_get_info)
        return int(free)

    def allocate_host(self, size: int) -> HostBuffer:
        buffer: HostBuffer = self.call(self.cuda.pagelocked_empty, size, np.uint8)
        return buffer

    def free_host(self, buffer: HostBuffer) -> None:
        allocation: Any = buffer.base
        self.call(allocation.free)

    def create_stream(self) -> int:
        stream = self.call(self.cuda.Stream)
        return self.own(int(stream.handle), stream)

    def destroy_stream(self, stream: int) -> None:
        self.call(self.owned.pop, stream)

    def to_device(self, address: int, source: HostBuffer, stream: int) -> None:
        self.call(self.cuda.memcpy_htod_async, address, source, self.owned[stream])

    def to_host(self, target: HostBuffer, address: int, stream: int) -> None:
        self.call(self.cuda.memcpy_dtoh_async, target, address, self.owned[stream])

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self.call(self.cuda.memcpy_dtod_async, target, source, size, self.owned[stream])

    def copy_box(
        self, target: Grid, target_at: Corner, source: Grid, source_at: Corner, height: int, width: int, stream: int
    ) -> None:
        request = self.cuda.Memcpy3D()
        request.set_src_device(source.address)
        request.src_pitch, request.src_height = source.row, source.height
        request.src_y, request.src_x_in_bytes = source_at[0], FLOAT_BYTES * source_at[1]
        request.set_dst_device(target.address)
        request.dst_pitch, request.dst_height = target.row, target.height
        request.dst_y, request.dst_x_in_bytes = target_at[0], FLOAT_BYTES * target_at[1]
        request.width_in_bytes, request.height, request.depth = FLOAT_BYTES * width, height, source.channels
        self.call(request, self.owned[stream])

    def follow(self, stream: int, other: int) -> None:
        # pycuda has no object for a stream that is not its own: everything on the GPU is waited for.
        self.call(self.cuda.Context.synchronize)

    def synchronize(self, stream: int) -> None:
        self.call(self.owned[stream].synchronize)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        raise BackendError("pycuda has no CUDA graphs; use cuda-python")

    def launch(self, graph: int, stream: int) -> None:
        raise BackendError("pycuda has no CUDA graphs; use cuda-python")

    def destroy_graph(self, graph: int) -> None:
        raise BackendError("pycuda has no CUDA graphs; use cuda-python")

    def close(self) -> None:
        self.call(self.owned.clear)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@cache
def driver_library() -> Any:
    """The CUDA driver's own library."""
    return ctypes.CDLL("libcuda.so.1")
