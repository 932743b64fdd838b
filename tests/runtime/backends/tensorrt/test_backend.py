"""The tensorrt backend against a stand-in for TensorRT and for the GPU.

The stand-ins hold the backend to TensorRT's calling order, move real bytes and compute nearest-neighbour upscaling from
the addresses they were given. They show the backend's own logic; what TensorRT makes of it needs a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from itertools import count
from pathlib import Path
from threading import Barrier, Thread
from types import SimpleNamespace

import numpy as np
import pytest

from sanrt.errors import BackendError, ModelError, OutOfMemoryError, UsageError
from sanrt.model.spec import Architecture, ModelSpec, Precision
from sanrt.runtime.artifacts import engines
from sanrt.runtime.artifacts.engines import BuildOptions, EngineInfo, Identity, Proof, save_engine
from sanrt.runtime.artifacts.flavors import Flavor
from sanrt.runtime.artifacts.sizes import Profile, Size
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import automatic_choice, candidates, load_backend
from sanrt.runtime.backends.tensorrt import backend as tensorrt
from sanrt.runtime.backends.tensorrt.device import Corner, Grid
from sanrt.runtime.tiling.options import UpscaleOptions
from sanrt.upscaler import Upscaler

PLAN = b"a plan"
SPEC = ModelSpec(Architecture(2, 1, 1, 16, 8), "0" * 64, "nothing", 5, Precision.FP16)
PROOF = Proof("build log", 1, {"fp16": 1}, [], 1, [], 8, [], ["_gemm_mha_v2"])


class FakeDevice:
    """Device memory is host memory; graphs are lists of recorded calls."""

    name, capability = "NVIDIA Fake", "sm89"

    def __init__(self, graphs: bool = True, free_bytes: int = 2**30) -> None:
        self.graphs, self.free_bytes = graphs, free_bytes
        self.calls: list[str] = []
        self.memory: dict[int, object] = {}
        self.recorded: dict[int, list[Callable[[], None]]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.handles = count(1)
        self.followed: list[int] = []

    def activate(self) -> None:
        pass

    def allocate(self, size: int) -> int:
        block = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(block)] = block
        self.calls.append("allocate")
        return ctypes.addressof(block)

    def free(self, address: int) -> None:
        del self.memory[address]

    def free_memory(self) -> int:
        return self.free_bytes - sum(map(ctypes.sizeof, self.memory.values()))

    def copy_box(
        self, target: Grid, target_at: Corner, source: Grid, source_at: Corner, height: int, width: int, stream: int
    ) -> None:
        def part(grid: Grid, at: Corner) -> np.ndarray:
            assert at[0] + height <= grid.height
            assert at[1] + width <= grid.width
            values = floats(grid.address, (grid.channels, grid.height, grid.width))
            return values[:, at[0] : at[0] + height, at[1] : at[1] + width]

        part(target, target_at)[...] = part(source, source_at)

    def allocate_host(self, size: int) -> np.ndarray:
        self.calls.append("allocate_host")
        return np.zeros(size, np.uint8)

    def free_host(self, buffer: np.ndarray) -> None:
        pass

    def create_stream(self) -> int:
        return next(self.handles)

    def destroy_stream(self, stream: int) -> None:
        self.calls.append("destroy_stream")

    def to_device(self, address: int, source: np.ndarray, stream: int) -> None:
        self.calls.append("to_device")
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def to_host(self, target: np.ndarray, address: int, stream: int) -> None:
        self.calls.append("to_host")
        ctypes.memmove(target.ctypes.data, address, target.nbytes)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(target, source, size)

    def follow(self, stream: int, other: int) -> None:
        self.followed.append(other)

    def synchronize(self, stream: int) -> None:
        self.calls.append("synchronize")

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        self.recording = []
        try:
            work()
        except BackendError:
            self.recording = None
            self.calls.append("capture failed")
            raise
        handle = next(self.handles)
        self.recorded[handle], self.recording = self.recording, None
        self.calls.append("capture")
        return handle

    def launch(self, graph: int, stream: int) -> None:
        self.calls.append("launch")
        for call in self.recorded[graph]:
            call()

    def destroy_graph(self, graph: int) -> None:
        del self.recorded[graph]

    def close(self) -> None:
        pass

    def __enter__(self) -> FakeDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ErrorCode(IntEnum):
    INTERNAL_ERROR = 2
    FAILED_ALLOCATION = 5


class FakeContext:
    """Refuses calls in another order than TensorRT allows."""

    SCRATCH_PER_PIXEL = 8

    def __init__(self, gpu: FakeDevice) -> None:
        self.gpu, self.addresses, self.state = gpu, {}, "new"
        self.error_recorder = self.profile = self.shape = None
        self.scratch = (0, 0)
        self.fail: tuple[ErrorCode, str] | None = None
        self.refuses_memory: tuple[ErrorCode, str] | None = None
        self.refuses_capture = False
        self.while_running: Callable[[], None] = lambda: None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile, self.state = index, "profile"
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert (self.state, name) == ("profile", "input")
        self.shape, self.state = shape, "shape"
        return True

    def infer_shapes(self) -> list[str]:
        assert self.state == "shape"
        self.state = "inferred"
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert (self.state, name) == ("inferred", "output")
        n, c, h, w = self.shape
        return n, c, 2 * h, 2 * w

    def update_device_memory_size_for_shapes(self) -> int:
        assert self.state == "inferred"
        return self.SCRATCH_PER_PIXEL * int(np.prod(self.shape))

    def set_device_memory(self, address: int, size: int) -> None:
        """It returns nothing; only the recorder hears of a refusal."""
        if self.refuses_memory:
            self.error_recorder.report_error(*self.refuses_memory)
        self.scratch = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self.state == "inferred"
        assert self.scratch[0] in self.gpu.memory
        assert self.scratch[1] >= self.update_device_memory_size_for_shapes()
        if self.fail:
            self.error_recorder.report_error(*self.fail)
            return False
        if self.refuses_capture and self.gpu.recording is not None:
            self.error_recorder.report_error(ErrorCode.INTERNAL_ERROR, "not in a capture")
            return False
        shape, addresses = self.shape, dict(self.addresses)
        if self.gpu.recording is not None:
            self.gpu.recording.append(lambda: self.compute(shape, addresses))
        else:
            self.compute(shape, addresses)
        return True

    def compute(self, shape: tuple[int, ...], addresses: dict[str, int]) -> None:
        assert all(address in self.gpu.memory for address in addresses.values()), "memory was freed under a graph"
        self.while_running()
        n, c, h, w = shape
        source = floats(addresses["input"], shape)
        floats(addresses["output"], (n, c, 2 * h, 2 * w))[:] = source.repeat(2, 2).repeat(2, 3)


def floats(address: int, shape: tuple[int, ...]) -> np.ndarray:
    length = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * length).from_address(address)).reshape(shape)


class FakeEngine:
    device_memory_size_v2 = 1 << 20

    def __init__(self, gpu: FakeDevice) -> None:
        self.gpu, self.contexts, self.settings = gpu, [], None

    def create_runtime_config(self) -> SimpleNamespace:
        self.settings = SimpleNamespace(cuda_graph_strategy=None, strategy=None, cache=None)
        self.settings.set_execution_context_allocation_strategy = lambda s: setattr(self.settings, "strategy", s)
        self.settings.create_runtime_cache = lambda: SimpleNamespace(
            loaded=[], serialize=lambda: b"kernels", deserialize=lambda blob: self.settings.cache_loaded.append(blob)
        )
        self.settings.cache_loaded = []
        self.settings.set_runtime_cache = lambda cache: setattr(self.settings, "cache", cache)
        self.settings.get_runtime_cache = lambda: self.settings.cache
        return self.settings

    def create_execution_context(self, settings: SimpleNamespace) -> FakeContext:
        assert settings.strategy == "ours"
        self.contexts.append(FakeContext(self.gpu))
        return self.contexts[-1]


class FakeLogger:
    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)


class FakeRecorder:
    pass


def fake_tensorrt(engine: FakeEngine | None) -> SimpleNamespace:
    class Runtime:
        def __init__(self, logger: object) -> None:
            self.error_recorder: FakeRecorder

        def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
            assert plan == PLAN
            if engine is None:
                self.error_recorder.report_error(ErrorCode.INTERNAL_ERROR, "cannot\n read it")
            return engine

    return SimpleNamespace(
        ILogger=FakeLogger,
        IErrorRecorder=FakeRecorder,
        ErrorCodeTRT=ErrorCode,
        Runtime=Runtime,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="ours"),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
    )


class Rig:
    """A backend on the stand-ins."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch

    def info(
        self, flavor: Flavor = Flavor.TENSORRT, profiles: tuple[Profile, ...] = (Profile(max=Size(4, 1080, 1920)),)
    ) -> EngineInfo:
        options = BuildOptions(flavor, profiles=profiles, gpus=("sm89",) if flavor == Flavor.RTX else ())
        gpu = "sm89" if flavor == Flavor.RTX else "NVIDIA Fake sm89"
        identity = Identity("1" * 64, options, "9.9", gpu, "0")
        digest = hashlib.sha256(PLAN).hexdigest()
        info = EngineInfo(self.folder / "x.engine", SPEC, "x.onnx", identity, len(PLAN), digest, PROOF)
        save_engine(info, PLAN)
        return info

    def open(
        self, info: EngineInfo | None = None, gpu: FakeDevice | None = None, contexts: int = 1, broken: bool = False
    ) -> tensorrt.TensorRTBackend:
        self.gpu = gpu or FakeDevice()
        self.engine = FakeEngine(self.gpu)
        module = Hashable(fake_tensorrt(None if broken else self.engine))
        self.monkeypatch.setattr(tensorrt, "import_flavor", lambda flavor: module)
        self.monkeypatch.setattr(engines, "installed_version", lambda flavor: "9.9")
        return tensorrt.TensorRTBackend(info or self.info(), self.gpu, contexts)


class Hashable:
    """A namespace that can be a cache's key, as a module can."""

    def __init__(self, names: SimpleNamespace) -> None:
        self.__dict__.update(vars(names))


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


def picture(height: int, width: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(height * width).random((batch, 3, height, width), np.float32) * 255


def upscaled(x: np.ndarray) -> np.ndarray:
    return x.repeat(2, 2).repeat(2, 3)


@pytest.mark.parametrize("flavor", Flavor)
def test_pictures_go_through_the_engine_and_back(rig: Rig, flavor: Flavor):
    with rig.open(rig.info(flavor)) as backend:
        for x in (picture(8, 6), picture(5, 9, 2), picture(8, 6), picture(8, 6), picture(8, 6)):
            assert np.array_equal(backend.infer(x), upscaled(x))
        assert backend.infer(picture(8, 6)[:, ::-1].copy()[:, ::-1]).shape == (1, 3, 16, 12)


def test_memory_is_taken_once_and_grows_only_for_larger_pictures(rig: Rig):
    with rig.open() as backend:
        backend.infer(picture(16, 16))
        taken = rig.gpu.calls.count("allocate"), rig.gpu.calls.count("allocate_host")
        assert taken == (3, 2)
        for x in (picture(16, 16), picture(8, 8), picture(16, 16), picture(12, 20)):
            backend.infer(x)
        assert (rig.gpu.calls.count("allocate"), rig.gpu.calls.count("allocate_host")) == taken
        backend.infer(picture(32, 16))
        assert rig.gpu.calls.count("allocate") == 6


def test_a_size_that_repeats_becomes_a_cuda_graph(rig: Rig):
    with rig.open() as backend:
        x = picture(8, 8)
        backend.infer(x)
        assert "capture" not in rig.gpu.calls
        for _ in range(3):
            assert np.array_equal(backend.infer(x), upscaled(x))
        assert (rig.gpu.calls.count("capture"), rig.gpu.calls.count("launch")) == (1, 3)


def test_a_graph_keeps_its_own_context(rig: Rig):
    with rig.open() as backend:
        small, other = picture(8, 8), picture(6, 6)
        for x in (small, small, other, small, other):
            assert np.array_equal(backend.infer(x), upscaled(x))
        assert [context.shape[2] for context in rig.engine.contexts] == [8, 6]


def test_graphs_of_memory_that_moved_are_never_launched(rig: Rig):
    with rig.open() as backend:
        small, large = picture(8, 8), picture(32, 32)
        for x in (small, small, large, small, small, small):
            assert np.array_equal(backend.infer(x), upscaled(x))


def test_a_size_is_captured_only_from_a_context_that_ran_it(rig: Rig):
    with rig.open() as backend:
        a, b = picture(8, 8), picture(6, 6)
        backend.infer(a)
        context = rig.engine.contexts[0]
        context.fail = (ErrorCode.INTERNAL_ERROR, "once")
        with pytest.raises(BackendError, match="once"):
            backend.infer(b)
        context.fail = None
        backend.infer(a)
        assert "capture" not in rig.gpu.calls
        backend.infer(a)
        assert rig.gpu.calls.count("capture") == 1


def test_a_size_that_cannot_be_captured_is_queued_and_told_once(rig: Rig, caplog: pytest.LogCaptureFixture):
    with rig.open() as backend:
        x = picture(8, 8)
        backend.infer(x)
        rig.engine.contexts[0].refuses_capture = True
        for _ in range(3):
            assert np.array_equal(backend.infer(x), upscaled(x))
        assert rig.gpu.calls.count("capture failed") == 1
        assert [record.getMessage() for record in caplog.records] == [
            f"no CUDA graph for 1x8x8, each run is queued: {backend.info.path}: inference failed (not in a capture)"
        ]


def test_a_failed_question_for_memory_is_no_engine_without_activations(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FakeContext, "update_device_memory_size_for_shapes", lambda self: 0)
    with rig.open() as backend:
        with pytest.raises(BackendError, match="the size of its activations for 1x8x8 failed"):
            backend.infer(picture(8, 8))
        rig.engine.device_memory_size_v2 = 0
        assert np.array_equal(backend.infer(picture(8, 8)), upscaled(picture(8, 8)))


def test_memory_that_tensorrt_does_not_take_is_an_error_though_the_call_returns_nothing(rig: Rig):
    with rig.open() as backend:
        backend.infer(picture(8, 8))
        rig.engine.contexts[0].refuses_memory = (ErrorCode.INTERNAL_ERROR, "too small")
        with pytest.raises(BackendError, match=r"the memory of its activations failed \(too small\)"):
            backend.infer(picture(6, 6))


def test_only_a_few_graphs_are_kept(rig: Rig):
    with rig.open() as backend:
        backend.infer(picture(40, 40))
        for side in range(8, 8 + tensorrt.GRAPHS + 2):
            for _ in range(2):
                assert np.array_equal(backend.infer(picture(side, 8)), upscaled(picture(side, 8)))
        assert len(rig.gpu.recorded) == tensorrt.GRAPHS


def test_without_graphs_every_run_is_queued(rig: Rig):
    with rig.open(gpu=FakeDevice(graphs=False)) as backend:
        for _ in range(3):
            backend.infer(picture(8, 8))
        assert not {"capture", "launch"} & set(rig.gpu.calls)


def test_rtx_captures_graphs_itself_and_keeps_its_kernels(rig: Rig):
    info = rig.info(Flavor.RTX)
    with rig.open(info) as backend:
        for _ in range(3):
            backend.infer(picture(8, 8))
        assert rig.engine.settings.cuda_graph_strategy == "whole"
        assert rig.engine.settings.cache_loaded == []
        assert "capture" not in rig.gpu.calls
    with rig.open(info):
        assert rig.engine.settings.cache_loaded == [b"kernels"]


def test_the_profile_tuned_nearest_to_the_picture_is_chosen(rig: Rig):
    small = Profile(Size(1, 4, 4), Size(1, 8, 8), Size(1, 64, 64))
    large = Profile(Size(1, 4, 4), Size(1, 60, 60), Size(4, 64, 64))
    with rig.open(rig.info(profiles=(small, large))) as backend:
        for x, expected in ((picture(8, 8), 0), (picture(50, 60), 1), (picture(8, 8, 4), 1)):
            backend.infer(x)
            assert rig.engine.contexts[0].profile == expected


def test_sizes_outside_every_profile_are_refused_in_one_line(rig: Rig):
    with rig.open(rig.info(profiles=(Profile(Size(1, 4, 4), Size(1, 8, 8), Size(1, 16, 16)),))) as backend:
        with pytest.raises(BackendError, match="1x4x4 to 1x16x16, not 1x17x8") as caught:
            backend.infer(picture(17, 8))
        assert "\n" not in str(caught.value)


def test_a_plan_has_the_engines_own_estimate(rig: Rig):
    info = replace(rig.info(), proof=replace(PROOF, memory=10**6))
    with rig.open(info) as backend:
        assert backend.limits.activations(Size(1, 8, 8)) == 2 * 16 * (2 * 4 + 11) * 64
        assert backend.limits.activations(Size(1, 1080, 1920)) == 10**6


def test_the_smallest_profile_is_the_smallest_side(rig: Rig):
    with rig.open(rig.info(profiles=(Profile(Size(1, 32, 48), Size(1, 64, 64), Size(1, 64, 64)),))) as backend:
        assert backend.spec.min_side == 48


@pytest.mark.parametrize(("code", "kind"), [(ErrorCode.FAILED_ALLOCATION, OutOfMemoryError), (2, BackendError)])
def test_what_tensorrt_reports_is_raised_and_the_next_picture_runs(rig: Rig, code: ErrorCode, kind: type[BackendError]):
    with rig.open() as backend:
        x = picture(8, 8)
        backend.infer(x)
        context = rig.engine.contexts[0]
        context.fail = (code, "it broke\nbadly")
        with pytest.raises(BackendError, match="it broke badly") as caught:
            backend.infer(x)
        assert type(caught.value) is kind
        context.fail = None
        assert np.array_equal(backend.infer(x), upscaled(x))


def test_two_pictures_run_at_once_on_two_contexts(rig: Rig):
    backend = rig.open(contexts=2)
    meeting = Barrier(2, timeout=20)
    monkey = FakeContext.compute

    def meet(self: FakeContext, shape: tuple[int, ...], addresses: dict[str, int]) -> None:
        meeting.wait()
        monkey(self, shape, addresses)

    rig.monkeypatch.setattr(FakeContext, "compute", meet)
    results: dict[int, np.ndarray] = {}
    pictures = {0: picture(8, 8), 1: picture(6, 10)}
    threads = [Thread(target=lambda i=i: results.update({i: backend.infer(pictures[i])})) for i in pictures]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(results[i], upscaled(pictures[i])) for i in pictures)
    backend.close()


class OnDevice:
    """An array as CuPy or torch offer it."""

    def __init__(self, gpu: FakeDevice, x: np.ndarray, **facts: object) -> None:
        self.address = gpu.allocate(x.nbytes)
        ctypes.memmove(self.address, x.ctypes.data, x.nbytes)
        facts = {"shape": x.shape, "typestr": x.dtype.str, "data": (self.address, True), "version": 3, **facts}
        self.__cuda_array_interface__ = facts


def test_device_arrays_never_touch_the_host(rig: Rig):
    with rig.open() as backend:
        x = picture(8, 6)
        result = backend.infer_on_device(OnDevice(rig.gpu, x, stream=77))
        interface = result.__cuda_array_interface__
        assert np.array_equal(floats(interface["data"][0], interface["shape"]), upscaled(x))
        assert rig.gpu.followed == [77]
        assert not {"to_device", "to_host", "allocate_host"} & set(rig.gpu.calls)
        del result, interface


def test_the_library_passes_device_arrays_through(rig: Rig):
    with Upscaler(rig.open(), UpscaleOptions(), None, Path()) as upscaler:
        x = picture(8, 6)
        interface = (result := upscaler.on_device(OnDevice(rig.gpu, x))).__cuda_array_interface__
        assert np.array_equal(floats(interface["data"][0], result.shape), upscaled(x))
        assert rig.gpu.followed == [tensorrt.DEFAULT_STREAM]
    with pytest.raises(UsageError, match="backend torch takes no GPU arrays"):
        Upscaler(SimpleNamespace(name="torch"), UpscaleOptions(), None, Path()).on_device(None)


@pytest.mark.parametrize("facts", [{"typestr": "<f2"}, {"strides": (4, 4, 4, 4)}, {"shape": (3, 8, 6)}])
def test_device_arrays_of_another_layout_are_refused(rig: Rig, facts: dict[str, object]):
    with rig.open() as backend, pytest.raises(UsageError, match="expected"):
        backend.infer_on_device(OnDevice(rig.gpu, picture(8, 6), **facts))


def test_closing_frees_everything(rig: Rig):
    backend = rig.open(contexts=2)
    for side in (8, 8, 8, 16):
        backend.infer(picture(side, side))
    backend.close()
    backend.close()
    assert not rig.gpu.memory
    assert not rig.gpu.recorded
    assert rig.gpu.calls.count("destroy_stream") == 2


def test_an_engine_that_tensorrt_cannot_read_is_one_line(rig: Rig):
    with pytest.raises(ModelError, match=r"x\.engine: cannot read it; rebuild with `sanrt build") as caught:
        rig.open(broken=True)
    assert "\n" not in str(caught.value)


def test_loading_refuses_other_regions_and_gpus_and_closes_the_device(rig: Rig):
    info = rig.info()
    rig.open(info).close()
    closed: list[bool] = []
    rig.monkeypatch.setattr(FakeDevice, "close", lambda self: closed.append(True))
    rig.monkeypatch.setattr(tensorrt, "open_device", lambda index: rig.gpu)
    with pytest.raises(BackendError, match="2 x 2 regions, not 4 x 4"):
        tensorrt.load(info.path, RunOptions(regions=4))
    assert closed == [True]
    rig.gpu.name = "NVIDIA Other"
    with pytest.raises(ModelError, match="built for NVIDIA Fake sm89, but this GPU is NVIDIA Other sm89"):
        tensorrt.load(info.path, RunOptions())


def test_auto_only_considers_tensorrt_for_models_with_engines(rig: Rig, tmp_path: Path):
    model, options = tmp_path / "x.onnx", RunOptions()
    assert "tensorrt" not in candidates(model, options)
    info = rig.info()
    assert candidates(model, options)[0] == "tensorrt"
    assert candidates(info.path, options) == ("tensorrt",)
    assert "tensorrt" not in candidates(tmp_path / "y.onnx", options)


def test_auto_passes_over_engines_that_do_not_run_here_and_says_why(rig: Rig, caplog: pytest.LogCaptureFixture):
    info = rig.info()
    rig.open(info).close()
    rig.monkeypatch.setattr(tensorrt, "installed_version", lambda flavor: "9.9")
    rig.monkeypatch.setattr(tensorrt, "open_device", lambda index: rig.gpu)
    model = info.model_path

    def taken(precision: Precision | None = None) -> str:
        options = RunOptions(precision=precision)
        chosen = automatic_choice(["tensorrt", "torch"], model, options)
        assert chosen
        return chosen.name

    assert taken() == "tensorrt"
    assert taken(Precision.FP32) == "torch"
    rig.gpu.name = "NVIDIA Other"
    assert taken() == "torch"
    rig.gpu.name = FakeDevice.name
    model.write_bytes(b"exported again")
    assert taken() == "torch"
    reasons = ("built in fp16, fp32 was asked for", "this GPU is NVIDIA Other", "x.onnx has changed since")
    assert all(reason in record.getMessage() for reason, record in zip(reasons, caplog.records, strict=True))


def test_engines_that_vanish_while_they_are_listed_are_left_out(rig: Rig, tmp_path: Path):
    info = rig.info()
    (tmp_path / "gone.engine").symlink_to(tmp_path / "nowhere")
    assert [found.path for found in engines.engines_of(info.model_path)] == [info.path]


def test_without_a_gpu_asking_for_tensorrt_is_one_line(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    def no_device(index: int) -> FakeDevice:
        raise BackendError("no NVIDIA GPU can be used here (no driver)")

    monkeypatch.setattr(tensorrt, "open_device", no_device)
    monkeypatch.setattr(tensorrt, "installed_version", lambda flavor: "9.9")
    info = replace(rig.info())
    with pytest.raises(BackendError, match="no driver"):
        load_backend("tensorrt", info.path, RunOptions())
    with pytest.raises(BackendError, match=r"no backend can run .*no driver"):
        load_backend("auto", info.path, RunOptions())
