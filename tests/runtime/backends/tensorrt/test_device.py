"""Both providers of the CUDA layer against stand-ins for the libraries: which calls are made, and what errors become."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from threading import Thread, get_ident
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from sanrt.errors import BackendError, OutOfMemoryError
from sanrt.runtime.backends.tensorrt import device
from sanrt.runtime.backends.tensorrt.device import PROVIDER, CudaPython, Device, Grid, PyCuda, open_device


class FakeRuntime(ModuleType):
    """cuda.bindings.runtime: functions return an error code and their results."""

    OK, NO_MEMORY, BROKEN = 0, 2, 999

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.codes: dict[str, int] = {}
        self.results: dict[str, object] = {
            "cudaGetDeviceCount": 1,
            "cudaGetDeviceProperties": SimpleNamespace(name=b"NVIDIA Fake\0", major=12, minor=0),
            "cudaMalloc": 4096,
            "cudaStreamCreateWithFlags": 7,
            "cudaEventCreateWithFlags": "event",
            "cudaStreamEndCapture": "recorded",
            "cudaGraphInstantiate": 11,
            "cudaMemGetInfo": 5 << 30,
        }
        self.calls: list[tuple[object, ...]] = []
        self.cudaError_t = SimpleNamespace(cudaSuccess=self.OK, cudaErrorMemoryAllocation=self.NO_MEMORY)
        self.cudaMemcpyKind = SimpleNamespace(
            cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="within"
        )
        for structure in ("cudaMemcpy3DParms", "cudaExtent", "cudaPitchedPtr", "cudaPos"):
            setattr(self, structure, SimpleNamespace)
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="local")
        self.cudaStreamNonBlocking, self.cudaEventDisableTiming = "independent", "untimed"

    def __getattr__(self, name: str) -> Callable[..., tuple[object, ...]]:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def function(*arguments: object) -> tuple[object, ...]:
            self.calls.append((name, *arguments))
            code = self.codes.get(name, self.OK)
            if name == "cudaGetErrorString":
                return self.OK, b"out of memory" if arguments[0] == self.NO_MEMORY else b"no driver"
            return (code, self.results[name]) if name in self.results else (code,)

        return function


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    return fake


def test_the_gpu_is_described(cuda: FakeRuntime):
    gpu = CudaPython(0)
    assert (gpu.name, gpu.capability, gpu.graphs) == ("NVIDIA Fake", "sm120", True)
    with pytest.raises(BackendError, match="GPU 1: expected an index below 1"):
        CudaPython(1)


def test_without_a_driver_there_is_one_line(cuda: FakeRuntime):
    cuda.codes["cudaGetDeviceCount"] = cuda.BROKEN
    with pytest.raises(BackendError, match=r"^no NVIDIA GPU can be used here \(no driver\)$"):
        CudaPython(0)


def test_a_lack_of_memory_is_told_from_other_failures(cuda: FakeRuntime):
    gpu = CudaPython(0)
    cuda.codes["cudaMalloc"] = cuda.NO_MEMORY
    with pytest.raises(OutOfMemoryError, match="cudaMalloc failed"):
        gpu.allocate(1 << 50)
    cuda.codes["cudaMalloc"] = cuda.BROKEN
    with pytest.raises(BackendError) as caught:
        gpu.allocate(1)
    assert not isinstance(caught.value, OutOfMemoryError)


def test_copies_go_the_right_way_and_are_queued(cuda: FakeRuntime):
    gpu, host = CudaPython(0), np.zeros(12, np.uint8)
    gpu.to_device(64, host, 7)
    gpu.to_host(host, 64, 7)
    assert cuda.calls[-2:] == [
        ("cudaMemcpyAsync", 64, host.ctypes.data, 12, "up", 7),
        ("cudaMemcpyAsync", host.ctypes.data, 64, 12, "down", 7),
    ]


BOX = Grid(4096, 8, 30, 20), (5, 6), Grid(8192, 8, 100, 50), (70, 40), 3, 4, 7
"""Rows 70 to 73, columns 40 to 44 of a map of 100 x 50, to row 5, column 6 of one of 30 x 20; on stream 7."""


def test_a_box_is_one_copy_with_rows_in_bytes(cuda: FakeRuntime):
    gpu = CudaPython(0)
    gpu.copy_box(*BOX)
    name, request, stream = cuda.calls[-1]
    assert (name, stream, request.kind) == ("cudaMemcpy3DAsync", 7, "within")
    assert vars(request.dstPtr) == {"ptr": 4096, "pitch": 80, "xsize": 80, "ysize": 30}
    assert vars(request.srcPtr) == {"ptr": 8192, "pitch": 200, "xsize": 200, "ysize": 100}
    assert (vars(request.dstPos), vars(request.srcPos)) == ({"x": 24, "y": 5}, {"x": 160, "y": 70})
    assert vars(request.extent) == {"width": 16, "height": 3, "depth": 8}
    assert gpu.free_memory() == 5 << 30


@pytest.mark.skipif(not find_spec("cuda"), reason="cuda-python is not installed (pip install 'sanrt[rtx]')")
def test_cuda_python_takes_the_request_of_a_box():
    from cuda.bindings import runtime

    gpu = object.__new__(CudaPython)
    gpu.cuda, taken = runtime, []
    gpu.call = lambda *arguments: taken.append(arguments)
    gpu.copy_box(*BOX)
    request = taken[0][1]
    assert (request.srcPtr.pitch, request.dstPos.x, request.extent.depth) == (200, 24, 8)


def test_a_stream_follows_another_through_an_event(cuda: FakeRuntime):
    CudaPython(0).follow(7, 1)
    assert cuda.calls[-3:-1] == [("cudaEventRecord", "event", 1), ("cudaStreamWaitEvent", 7, "event", 0)]


def test_a_capture_ends_even_when_the_work_fails(cuda: FakeRuntime):
    gpu = CudaPython(0)
    assert gpu.capture(7, lambda: None) == 11

    def broken() -> None:
        raise BackendError("no")

    cuda.calls.clear()
    with pytest.raises(BackendError, match="no"):
        gpu.capture(7, broken)
    assert [call[0] for call in cuda.calls] == ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphDestroy"]


def test_the_reason_of_a_failed_capture_is_the_works_own(cuda: FakeRuntime):
    """A failure within a capture fails its end too, and a graph that cannot be instantiated is not left behind."""
    gpu = CudaPython(0)

    def broken() -> None:
        cuda.codes["cudaStreamEndCapture"] = cuda.BROKEN
        raise BackendError("the work failed")

    with pytest.raises(BackendError, match="the work failed"):
        gpu.capture(7, broken)
    cuda.codes = {"cudaGraphInstantiate": cuda.BROKEN}
    with pytest.raises(BackendError, match="cudaGraphInstantiate"):
        gpu.capture(7, lambda: None)
    assert ("cudaGraphDestroy", "recorded") in cuda.calls


def cuda_names() -> set[str]:
    """Every name of the CUDA runtime in the source."""
    tree = ast.parse(Path(device.__file__).read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in texts | attributes if name.startswith("cuda") and name.isidentifier() and name != "cuda"}


@pytest.mark.skipif(not find_spec("cuda"), reason="cuda-python is not installed (pip install 'sanrt[rtx]')")
def test_cuda_python_has_every_function_and_constant():
    from cuda.bindings import runtime

    enums = [runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode, runtime.cudaError_t]
    names = cuda_names()
    assert len(names) > 25
    assert not [name for name in names if not any(hasattr(owner, name) for owner in (runtime, *enums))]


class Abort(BaseException):
    """What pycuda does to the process."""


class FakePyCuda:
    """What pycuda.driver has, as far as it is used: its objects work only while a context is on the thread's stack."""

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    def __init__(self) -> None:
        self.log: list[object] = []
        self.stacks: defaultdict[int, list[object]] = defaultdict(list)
        context = SimpleNamespace(
            push=lambda: self.stack.append("context"), pop=lambda: self.stack.pop(), handle=0xC0DE, synchronize=None
        )
        gpu = SimpleNamespace(
            retain_primary_context=lambda: context, name=lambda: "NVIDIA Fake", compute_capability=lambda: (8, 9)
        )
        self.Device = type("Device", (), {"__new__": lambda cls, index: gpu, "count": staticmethod(lambda: 1)})
        self.Stream = self.in_context(lambda: SimpleNamespace(handle=7, synchronize=self.in_context(lambda: None)))
        self.Context = SimpleNamespace(synchronize=self.in_context(lambda: self.log.append("all waited for")))
        self.mem_get_info = self.in_context(lambda: (5 << 30, 8 << 30))
        self.mem_alloc = self.in_context(self.allocation)

    @property
    def stack(self) -> list[object]:
        return self.stacks[get_ident()]

    def in_context(self, function: Callable[..., object]) -> Callable[..., object]:
        def checked(*arguments: object) -> object:
            if not self.stack:
                raise Abort("no context on the stack")
            return function(*arguments)

        return checked

    def init(self) -> None: ...

    def Memcpy3D(self) -> FakeCopy:
        return FakeCopy(self.log)

    def allocation(self, size: int) -> FakeAllocation:
        if size > 1 << 40:
            raise self.MemoryError("cuMemAlloc failed: out of memory")
        return FakeAllocation(self)

    def pagelocked_empty(self, size: int, dtype: object) -> np.ndarray:
        owner = FakePageLocked(size)
        owner.free = self.in_context(lambda: self.log.append("unlocked"))
        return np.asarray(owner)


class FakePageLocked:
    """The base of a page-locked array."""

    free: Callable[..., object]

    def __init__(self, size: int) -> None:
        self.content = np.zeros(size, np.uint8)
        self.__array_interface__ = self.content.__array_interface__


class FakeCopy:
    def __init__(self, log: list[object]) -> None:
        self.log, self.set_src_device, self.set_dst_device = log, self.src.append, self.dst.append

    src: ClassVar[list[int]] = []
    dst: ClassVar[list[int]] = []

    def __call__(self, stream: object) -> None:
        self.log.append(self)


class FakeAllocation:
    def __init__(self, cuda: FakePyCuda) -> None:
        self.free = cuda.in_context(lambda: cuda.log.append("free"))

    def __int__(self) -> int:
        return 4096


@pytest.fixture
def pycuda(monkeypatch: pytest.MonkeyPatch) -> FakePyCuda:
    fake = FakePyCuda()
    package = ModuleType("pycuda")
    package.driver = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", fake)
    driver = SimpleNamespace(cuCtxSetCurrent=lambda handle: fake.log.append(("current", handle.value)))
    monkeypatch.setattr(device, "driver_library", lambda: driver)
    return fake


def test_pycuda_is_a_provider_without_graphs(pycuda: FakePyCuda, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(PROVIDER, "pycuda")
    monkeypatch.setattr(device, "installed", lambda module: True)
    gpu: Device = open_device(0)
    assert (type(gpu), gpu.capability, gpu.graphs) == (PyCuda, "sm89", False)
    with pytest.raises(BackendError, match="pycuda has no CUDA graphs"):
        gpu.capture(1, lambda: None)


def test_pycuda_keeps_what_it_allocated_until_it_is_freed(pycuda: FakePyCuda):
    gpu = PyCuda(0)
    gpu.free(gpu.allocate(16))
    assert pycuda.log[-1] == "free"
    with pytest.raises(OutOfMemoryError, match="out of memory"):
        gpu.allocate(1 << 50)
    host = gpu.allocate_host(16)
    assert host.shape == (16,)
    gpu.free_host(host)
    assert pycuda.log[-1] == "unlocked"


def test_pycuda_copies_a_box_at_once(pycuda: FakePyCuda):
    gpu = PyCuda(0)
    assert gpu.create_stream() == 7
    gpu.copy_box(*BOX)
    copy = pycuda.log[-1]
    assert (copy.src[-1], copy.dst[-1]) == (8192, 4096)
    assert (copy.src_pitch, copy.src_height, copy.src_y, copy.src_x_in_bytes) == (200, 100, 70, 160)
    assert (copy.dst_pitch, copy.dst_height, copy.dst_y, copy.dst_x_in_bytes) == (80, 30, 5, 24)
    assert (copy.width_in_bytes, copy.height, copy.depth) == (16, 3, 8)
    assert gpu.free_memory() == 5 << 30


def test_no_call_leaves_a_context_on_pycudas_stack_in_any_thread(pycuda: FakePyCuda):
    """pycuda aborts the process where a thread ends with one there; what TensorRT needs is set by the driver itself."""
    gpu = PyCuda(0)

    def work() -> None:
        gpu.activate()
        stream = gpu.create_stream()
        gpu.synchronize(stream)
        with pytest.raises(OutOfMemoryError):
            gpu.allocate(1 << 50)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    gpu.close()
    assert len(pycuda.stacks) == 2
    assert not any(pycuda.stacks.values())
    assert pycuda.log == [("current", 0xC0DE)] * 2


def test_pycuda_waits_for_everything_where_it_should_follow_a_stream_that_is_not_its_own(pycuda: FakePyCuda):
    gpu = PyCuda(0)
    gpu.follow(gpu.create_stream(), 77)
    assert pycuda.log[-1] == "all waited for"


@pytest.mark.parametrize(
    ("asked", "message"), [("cupy", "expected cuda-python or pycuda"), ("pycuda", r"install .*pycuda\]")]
)
def test_providers_that_are_unknown_or_missing_are_told(asked: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(PROVIDER, asked)
    monkeypatch.setattr(device, "installed", lambda module: False)
    with pytest.raises(BackendError, match=message):
        open_device(0)
