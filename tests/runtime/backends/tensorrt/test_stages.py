"""Streaming through stage engines, on stand-ins for TensorRT and the GPU that compute each stage with ONNX Runtime.

As in test_tensorrt.py they show the backend's own logic, and that the graphs the engines are built from fit together.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from sanrt.errors import BackendError, ModelError, OutOfMemoryError, UsageError
from sanrt.export.engine import typed_graphs
from sanrt.export.stages import input_ranges
from sanrt.model.spec import Precision
from sanrt.runtime.artifacts.engines import STAGES_SUFFIX, BuildOptions, EngineInfo, save_engine, stage_archive
from sanrt.runtime.artifacts.flavors import Flavor
from sanrt.runtime.artifacts.sizes import TILES, Profile, Size
from sanrt.runtime.backends.fp32_fallback import FP32Fallback
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.backends.tensorrt.backend import TensorRTBackend
from sanrt.runtime.backends.tensorrt.stages import TensorRTStages
from sanrt.runtime.tiling.options import MEMORY_SHARE, Tiling, UpscaleOptions
from sanrt.runtime.tiling.plan import TilingPlan, network_bytes, plan_tiling, result_bytes, warn_once
from sanrt.runtime.tiling.upscaling import upscale
from tests.runtime.backends.tensorrt.test_backend import ErrorCode, FakeContext, FakeDevice, FakeEngine, Rig, floats

SMALL = Profile(Size(1, 1, 1), Size(1, 16, 16), Size(1, 32, 32))


class StageEngine(FakeEngine):
    """An engine whose plan is the ONNX it would be built from."""

    def __init__(self, gpu: FakeDevice, plan: bytes) -> None:
        super().__init__(gpu)
        self.graph = onnx.load_from_string(plan)
        self.ranges = input_ranges(self.graph, SMALL)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(plan, settings)
        self.names = [node.name for node in (*self.session.get_outputs(), *self.session.get_inputs())]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_execution_context(self, settings: SimpleNamespace) -> StageContext:
        assert settings.strategy == "ours"
        self.contexts.append(StageContext(self))
        return self.contexts[-1]


class StageContext(FakeContext):
    """Refuses what the engine's profile does not cover, and crops whose values it could not read on the host."""

    def __init__(self, engine: StageEngine) -> None:
        super().__init__(engine.gpu)
        self.engine, self.shapes = engine, {}

    def within(self, name: str, values: tuple[int, ...]) -> bool:
        low, _, high = self.engine.ranges[name]
        return len(low) == len(values) and all(a <= v <= b for a, v, b in zip(low, values, high, strict=True))

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.state != "new"
        self.shapes[name], self.state = shape, "shape"
        if not self.within(name, shape):
            self.error_recorder.report_error(ErrorCode.INTERNAL_ERROR, f"{shape} is outside the profile")
        return self.within(name, shape)

    def infer_shapes(self) -> list[str]:
        assert self.state == "shape"
        feed = {name: np.zeros(shape, np.float32) for name, shape in self.shapes.items()}
        if "crop" in self.engine.ranges:
            address = self.addresses["crop"]
            assert address not in self.gpu.memory
            feed["crop"] = np.ctypeslib.as_array((ctypes.c_int64 * 4).from_address(address)).copy()
            assert self.within("crop", tuple(feed["crop"]))
        self.feed, self.state = feed, "inferred"
        outputs = self.engine.session.run(None, feed)
        self.made = {node.name: y.shape for node, y in zip(self.engine.session.get_outputs(), outputs, strict=True)}
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.state == "inferred"
        return self.made[name]

    def update_device_memory_size_for_shapes(self) -> int:
        return max(int(np.prod(shape)) for shape in self.shapes.values())

    def execute_async_v3(self, stream: int) -> bool:
        assert self.state == "inferred"
        assert self.scratch[0] in self.gpu.memory
        assert self.scratch[1] >= self.update_device_memory_size_for_shapes()
        if self.fail:
            self.error_recorder.report_error(*self.fail)
            return False
        feed = self.feed | {name: floats(self.addresses[name], shape).copy() for name, shape in self.shapes.items()}
        for node, value in zip(self.engine.session.get_outputs(), self.engine.session.run(None, feed), strict=True):
            floats(self.addresses[node.name], value.shape)[...] = value
        return True


class StageRig(Rig):
    """Stage engines of an exported model beside a whole engine that is never run."""

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(model.parent, monkeypatch)
        self.model, self.stage_engines = model, []

    def whole(self, precision: Precision, flavor: Flavor = Flavor.RTX, largest: Size | None = None) -> EngineInfo:
        info = self.info(flavor, (replace(SMALL, max=largest) if largest else Profile(),))
        spec, _ = typed_graphs(self.model, replace(info.identity.options, precision=precision))
        options = replace(info.identity.options, precision=precision)
        onnx_digest = hashlib.sha256(self.model.read_bytes()).hexdigest()
        identity = replace(info.identity, options=options, onnx=onnx_digest)
        info = replace(info, spec=spec, model=self.model.name, identity=identity)
        save_engine(info, b"a plan")
        return info

    def build_stages(self, whole: EngineInfo, tiles: Profile = SMALL, name: str = "x") -> EngineInfo:
        options = replace(whole.identity.options, profiles=(tiles,), stages=True)
        _, graphs = typed_graphs(self.model, options)
        content = stage_archive({stage: graph.SerializeToString() for stage, graph in graphs.items()})
        info = replace(
            whole,
            path=self.folder / f"{name}{STAGES_SUFFIX}",
            identity=replace(whole.identity, options=options),
            size=len(content),
            digest=hashlib.sha256(content).hexdigest(),
        )
        save_engine(info, content)
        return info

    def open(self, *arguments: object, **options: object) -> TensorRTBackend:
        backend = super().open(*arguments, **options)
        real = backend.trt.Runtime.deserialize_cuda_engine

        def deserialized(runtime: object, plan: bytes) -> object:
            if plan == b"a plan":
                return real(runtime, plan)
            self.stage_engines.append(StageEngine(self.gpu, plan))
            return self.stage_engines[-1]

        self.monkeypatch.setattr(backend.trt.Runtime, "deserialize_cuda_engine", deserialized)
        return backend


@pytest.fixture
def rig(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageRig:
    model = tmp_path / "x.onnx"
    model.write_bytes(tiny_model(2).read_bytes())
    return StageRig(model, monkeypatch)


def picture(height: int = 45, width: int = 38) -> np.ndarray:
    return np.random.default_rng(0).random((height, width, 3), np.float32)


EXACT = UpscaleOptions(tiling=Tiling.EXACT, tile=32, memory=2**30)


@pytest.mark.parametrize("flavor", Flavor)
@pytest.mark.parametrize(("precision", "most"), [(Precision.FP32, 1e-6), (Precision.FP16, 1e-3)])
def test_a_streamed_picture_is_the_whole_one(rig: StageRig, flavor: Flavor, precision: Precision, most: float):
    whole = rig.whole(precision, flavor)
    rig.build_stages(whole)
    expected, lone = (whole_run(whole, rig.model, x) for x in (picture(), picture()[:32, :32].copy()))
    with rig.open(whole) as backend:
        for options in EXACT, replace(EXACT, tile=17):
            result = upscale(backend, picture(), options)
            assert np.abs(result - expected).mean() <= most
        assert len(rig.stage_engines) == len(whole.spec.architecture.stages), "each is opened once"
    assert np.abs(lone[:40, :40] - expected[:40, :40]).mean() > 10 * most, "tiles must matter, or this shows nothing"
    assert not rig.gpu.memory


def whole_run(info: EngineInfo, model: Path, pixels: np.ndarray) -> np.ndarray:
    """The graph that the whole engine is built from, computed by ONNX Runtime."""
    _, graphs = typed_graphs(model, info.identity.options)
    session = onnxruntime.InferenceSession(graphs["network"].SerializeToString())
    (y,) = session.run(None, {"input": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None] * np.float32(255))})
    return (y[0].transpose(1, 2, 0) / 255).clip(0, 1)


@pytest.mark.parametrize(("fitting", "on_gpu"), [(0, 0), (1.5, 1), (3.5, 3)])
def test_maps_live_on_the_gpu_as_far_as_its_free_memory_goes(rig: StageRig, tmp_path: Path, fitting: float, on_gpu: int):
    whole = rig.whole(Precision.FP32)
    rig.build_stages(whole)
    expected, arch = whole_run(whole, rig.model, picture()), whole.spec.architecture
    tile, a_map = 32**2 * network_bytes(arch), 4 * arch.channels * 45 * 38
    gpu = FakeDevice(free_bytes=int((tile + fitting * a_map) / MEMORY_SHARE) + 1)
    # And nothing fits the host's memory: what is not on the GPU is in scratch files.
    options = replace(EXACT, scratch=tmp_path, memory=2**30)
    rig.monkeypatch.setattr(UpscaleOptions, "budget", 45 * 38 * result_bytes(arch))
    with rig.open(whole, gpu=gpu) as backend:
        made = []
        new = TensorRTStages.new
        rig.monkeypatch.setattr(TensorRTStages, "new", lambda *shape: made.append(shape) or new(*shape))
        assert np.abs(upscale(backend, picture(), options) - expected).max() < 1e-5
        assert len(made) == on_gpu
        copies = gpu.calls.count("to_host")
    assert not gpu.memory
    groups, tiles = arch.groups, 4
    # Without a map on the GPU every stage's map is copied to the host; with all three, only statistics and pixels are.
    assert copies >= (3 * groups + 2) * tiles
    assert (copies < (2 * groups + 2) * tiles + 8 + 2 * groups * tiles) == (on_gpu == 3)


def test_a_tile_that_overflows_on_the_gpu_is_computed_in_fp32(rig: StageRig, caplog: pytest.LogCaptureFixture):
    whole = rig.whole(Precision.FP16)
    rig.build_stages(whole)
    with load_backend("onnxruntime", rig.model, RunOptions(threads=1)) as exact, rig.open(whole) as backend:
        watched = FP32Fallback(backend, lambda _: exact)
        plain = upscale(watched, picture(), EXACT)
        assert not caplog.records
        real = StageContext.execute_async_v3

        def overflowing(self: StageContext, stream: int) -> bool:
            done = real(self, stream)
            if "sum" in self.addresses and self.engine.graph.graph.name.endswith(spoilt):
                # As the overflowed graph would: an infinity in the map, and so in its sum.
                floats(self.addresses["output0"], (1,))[0] = np.inf
                floats(self.addresses["sum"], (1,))[0] = np.inf
            return done

        rig.monkeypatch.setattr(StageContext, "execute_async_v3", overflowing)
        for spoilt in ("head", "attend", "join.0"):
            result = upscale(watched, picture(), EXACT)
            assert "overflowed in fp16; computing it in fp32 on onnxruntime" in caplog.text, spoilt
            assert np.abs(result - plain).mean() < 1e-3
            caplog.clear()


def test_sums_of_half_precision_maps_tell_whether_they_are_finite(rig: StageRig):
    options = BuildOptions(Flavor.RTX, profiles=(TILES,), stages=True)
    _, graphs = typed_graphs(rig.model, options)
    summed = [name for name, graph in graphs.items() if "sum" in [output.name for output in graph.graph.output]]
    assert summed == ["head", "attend", "join.0"]
    session = onnxruntime.InferenceSession(graphs["head"].SerializeToString())
    crop = np.array([1, 1, 6, 6])
    for bright in (200.0, 3e38):
        pixels = np.full((1, 3, 7, 7), 100, np.float32)
        pixels[..., 3, 3] = bright
        made, total = session.run(["output0", "sum"], {"pixels": pixels, "crop": crop})
        assert np.isfinite(total) == np.isfinite(made).all() == (bright == 200)


def test_a_picture_larger_than_the_engine_takes_is_streamed_in_tiles_that_the_stages_take(rig: StageRig):
    whole = rig.whole(Precision.FP32, largest=Size(1, 40, 64))
    rig.build_stages(whole)
    expected = whole_run(whole, rig.model, picture())
    with rig.open(whole) as backend:
        assert plan_tiling(backend, 45, 38, UpscaleOptions(memory=2**30)) == TilingPlan(Tiling.EXACT, 32, 2)
        assert plan_tiling(backend, 40, 64, UpscaleOptions(memory=2**30)).tiling is Tiling.WHOLE
        assert np.abs(upscale(backend, picture(), UpscaleOptions(memory=2**30)) - expected).max() < 1e-5
        with pytest.raises(UsageError, match="tiles of 33 pixels: the engines take 32"):
            upscale(backend, picture(), replace(EXACT, tile=33))
        # Other regions than the engine's go through the stages, whole or not.
        upscale(backend, picture(), UpscaleOptions(memory=2**30, regions=3, tiling=Tiling.WHOLE))
        rig.monkeypatch.setattr("sanrt.runtime.artifacts.sizes.MAX_KEYS", 400)
        with pytest.raises(UsageError, match="1 x 1 regions: 427 keys each, the stage engines take 400; use regions='auto'"):
            upscale(backend, picture(), replace(EXACT, regions=1))


def test_rtx_keeps_the_kernels_of_every_stage(rig: StageRig):
    whole = rig.whole(Precision.FP32)
    rig.build_stages(whole)
    for kept in ([], [b"kernels"]):
        with rig.open(whole) as backend:
            upscale(backend, picture(), EXACT)
            engines = rig.stage_engines[-7:]
            assert all(engine.settings.cache_loaded == kept for engine in engines)
    (rig.folder / f"x{STAGES_SUFFIX}.kernels").write_bytes(b"damaged")
    with rig.open(whole) as backend:
        upscale(backend, picture(), EXACT)


def test_without_stage_engines_one_line_names_the_command(rig: StageRig, caplog: pytest.LogCaptureFixture):
    whole = rig.whole(Precision.FP16)
    command = f"sanrt build {rig.model} --fp16 --flavor rtx --stages --gpu sm89"
    with rig.open(whole) as backend:
        assert not backend.streams
        with pytest.raises(BackendError, match="exact streaming needs its stages") as caught:
            upscale(backend, picture(), EXACT)
        assert f"build them with `{command}`" in str(caught.value)
        assert "\n" not in str(caught.value)
        warn_once.cache_clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                upscale(backend, picture(), UpscaleOptions(tile=32, memory=2**30))
        (told,) = caplog.records
        assert "overlapped tiles" in told.getMessage()
        assert command in told.getMessage()


def test_stage_engines_of_another_model_precision_or_gpu_are_not_taken(rig: StageRig):
    whole = rig.whole(Precision.FP16)
    foreign = replace(whole, identity=replace(whole.identity, onnx="2" * 64))
    for other, reason in (
        (foreign, "needs its stages"),
        (replace(whole, spec=whole.spec, identity=replace(whole.identity, version="1.0")), "built by TensorRT-RTX 1.0"),
    ):
        rig.build_stages(other)
        with rig.open(whole) as backend:
            assert not backend.streams
            with pytest.raises(BackendError, match=reason):
                backend.stages()
    rig.build_stages(rig.whole(Precision.FP32))
    with rig.open(rig.whole(Precision.FP16)) as backend:
        assert not backend.streams


@pytest.mark.parametrize("backend", ["auto", "tensorrt", "torch"])
def test_stage_engines_are_no_model_by_themselves(rig: StageRig, backend: str):
    stages = rig.build_stages(rig.whole(Precision.FP16))
    with pytest.raises(UsageError, match=r"x\.stages: stage engines run beside a whole one; name its \.engine"):
        load_backend(backend, stages.path, RunOptions())


def test_damaged_stage_engines_are_refused(rig: StageRig):
    whole = rig.whole(Precision.FP32)
    stages = rig.build_stages(whole)
    stages.path.write_bytes(stages.path.read_bytes()[:-1] + b"!")
    with rig.open(whole) as backend, pytest.raises(ModelError, match=r"altered .*rebuild with `sanrt build .*--stages"):
        backend.stages()


def test_what_tensorrt_reports_of_a_stage_is_raised_and_the_next_picture_streams(rig: StageRig):
    whole = rig.whole(Precision.FP32)
    rig.build_stages(whole, TILES)
    with rig.open(whole) as backend:
        expected = upscale(backend, picture(), EXACT)
        context = rig.stage_engines[0].contexts[0]
        context.fail = (ErrorCode.FAILED_ALLOCATION, "no room\nleft")
        with pytest.raises(OutOfMemoryError, match=r"head failed \(no room left\)"):
            backend.stages().run("head", np.zeros((1, 3, 9, 9), np.float32), np.array([0, 0, 9, 9]))
        context.fail = None
        assert np.array_equal(upscale(backend, picture(), EXACT), expected)
