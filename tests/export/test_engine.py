"""Engines built for real by TensorRT-RTX, which needs no GPU for that."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from zipfile import ZipFile

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from sanrt.cli import app
from sanrt.errors import BackendError, BuildError, FileError, ModelError, SanrtError, UsageError
from sanrt.export import engine
from sanrt.export.engine import build_engine, choose_flavor
from sanrt.extras import install_command
from sanrt.model.graph import san_model
from sanrt.model.spec import GRAPH_PRECISIONS, Architecture, ModelSpec, Precision
from sanrt.runtime.artifacts.engines import BuildOptions, EngineInfo, choose_engine, read_engine, read_engine_bytes
from sanrt.runtime.artifacts.flavors import Flavor
from sanrt.runtime.artifacts.sizes import TILES, Profile, Size
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.backends.tensorrt import backend as tensorrt
from sanrt.runtime.backends.tensorrt.device import open_device
from sanrt.runtime.backends.tensorrt.library import TensorRTLog, import_flavor

needs_rtx = pytest.mark.skipif(
    not (find_spec("tensorrt_rtx_bindings") and find_spec("polygraphy")),
    reason="TensorRT-RTX and Polygraphy are not installed (pip install 'sanrt[rtx]')",
)
OPTIONS = BuildOptions(Flavor.RTX, gpus=("sm89",))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    from sanrt.model.san import SAN

    torch.manual_seed(0)
    arch = Architecture(2, 1, 1, 32, 8)
    weights = {name: tensor.numpy() for name, tensor in SAN(arch).state_dict().items()}
    path = tmp_path_factory.mktemp("models") / "san_x2.onnx"
    path.write_bytes(san_model(ModelSpec(arch, "0" * 64, "random", 5), weights).SerializeToString())
    return path


class Watched:
    """Remembers the phases."""

    def __init__(self) -> None:
        self.phases: dict[str, str | None] = {}
        self.open: set[str] = set()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self.phases[phase] = parent
        self.open.add(phase)

    def step(self, phase: str, step: int) -> None:
        assert phase in self.open

    def finish(self, phase: str) -> None:
        self.open.discard(phase)


@pytest.fixture(scope="module")
def built_fp16(exported: Path) -> EngineInfo:
    info, built = build_engine(exported, OPTIONS)
    assert built
    return info


@needs_rtx
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_engines_are_what_was_asked_for(exported: Path, tmp_path: Path, precision: Precision):
    progress = Watched()
    info, built = build_engine(exported, replace(OPTIONS, precision=precision), tmp_path / "x.engine", progress)
    assert built
    assert read_engine(info.path) == info
    assert len(read_engine_bytes(info)) == info.size > 1_000_000
    assert info.spec.precision == precision
    assert info.proof.convolutions[str(precision)] > 30
    assert (info.proof.wrong_convolutions, info.proof.wrong_soca) == ([], [])
    assert info.proof.soca_layers > 10
    fused = 0 if precision == Precision.FP32 else 8
    assert info.proof.attention - len(info.proof.unfused_attention) == fused
    assert info.proof.memory
    assert None in progress.phases.values()
    assert not progress.open
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.engine", "x.engine.json"]


@needs_rtx
@pytest.mark.parametrize("precision", GRAPH_PRECISIONS)
def test_stage_engines_are_proved_as_a_whole_one_is(exported: Path, tmp_path: Path, precision: Precision):
    options = replace(OPTIONS, precision=precision, profiles=(TILES,), stages=True)
    info, built = build_engine(exported, options, tmp_path / "x.stages")
    assert built
    assert build_engine(exported, options, tmp_path / "x.stages") == (info, False)
    with ZipFile(BytesIO(read_engine_bytes(read_engine(info.path)))) as archive:
        assert archive.namelist() == ["head", "keys-values", "attend", "body.0", "gate.0", "join.0", "tail"]
        assert min(len(archive.read(name)) for name in archive.namelist()) > 100_000
    assert info.spec.precision == precision
    assert info.proof.convolutions[str(precision)] >= 8  # beside bf16 the first and last are fp32
    assert (info.proof.wrong_convolutions, info.proof.wrong_soca) == ([], [])
    assert info.proof.soca_layers > 10
    assert len(info.proof.unfused_attention) == (precision == Precision.FP32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.stages", "x.stages.json"]


@needs_rtx
def test_stage_engines_that_fail_their_proof_leave_nothing(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "FUSED_WIDTH", 0)
    with pytest.raises(BuildError, match="1 of 1 attention regions are not one fused kernel"):
        build_engine(exported, replace(OPTIONS, profiles=(TILES,), stages=True), tmp_path / "x.stages")
    assert not list(tmp_path.iterdir())


@needs_rtx
def test_the_command_builds_stage_engines_and_says_how_to_use_them(exported: Path, tmp_path: Path):
    model = tmp_path / "san_x2.onnx"
    model.write_bytes(exported.read_bytes())
    words = ["build", str(model), "--stages", "--flavor", "rtx", "--gpu", "sm89", "--max", "1x256x256"]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "x.stages")])
    assert done.exit_code == 0, done.output
    assert "1x1x1 .. 1x256x256 .. 1x256x256" in done.output
    assert "an engine of the whole network beside it" in done.output
    assert "stage engines" in CliRunner().invoke(app, ["info", str(tmp_path / "x.stages")]).output


@needs_rtx
def test_an_equal_engine_is_reused_and_any_other_is_built(
    exported: Path, built_fp16: EngineInfo, monkeypatch: pytest.MonkeyPatch
):
    info = built_fp16
    assert info.path.parent == exported.parent
    assert choose_engine(exported, "NVIDIA L4", "sm89") == info
    calls: list[BuildOptions] = []

    def stop(trt: object, graph: object, options: BuildOptions, *_: object) -> bytes:
        calls.append(options)
        raise BuildError("built again")

    monkeypatch.setattr(engine, "compile_engine", stop)
    assert build_engine(exported, OPTIONS) == (info, False)
    for options in (replace(OPTIONS, level=1), replace(OPTIONS, precision=Precision.BF16)):
        with pytest.raises(BuildError, match="built again"):
            build_engine(exported, options, info.path)
    plan = info.path.read_bytes()
    info.path.write_bytes(plan[:-1])
    with pytest.raises(BuildError, match="built again"):
        build_engine(exported, OPTIONS)
    info.path.write_bytes(plan)
    assert len(calls) == 3


@needs_rtx
def test_several_profiles_are_all_proven(exported: Path, built_fp16: EngineInfo, tmp_path: Path):
    assert built_fp16.proof.convolutions["fp16"] > 30
    assert not built_fp16.proof.unfused_attention
    profiles = (*OPTIONS.profiles, Profile(Size(1, 16, 16), Size(2, 270, 480), Size(4, 540, 960)))
    info, _ = build_engine(exported, replace(OPTIONS, profiles=profiles), tmp_path / "x.engine")
    assert info.proof.soca_layers == 2 * built_fp16.proof.soca_layers
    assert not info.proof.unfused_attention


@needs_rtx
def test_what_tensorrt_cannot_build_is_one_line_and_leaves_nothing(exported: Path, tmp_path: Path):
    with pytest.raises(BuildError, match=r"TensorRT-RTX cannot build the engine: .*workspace") as caught:
        build_engine(exported, replace(OPTIONS, workspace=1), tmp_path / "x.engine")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@needs_rtx
def test_a_failed_proof_leaves_nothing(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "FUSED_WIDTH", 0)  # four channels are too few for the fused kernel
    with pytest.raises(BuildError, match="8 of 8 attention regions are not one fused kernel"):
        build_engine(exported, OPTIONS, tmp_path / "x.engine")
    assert not list(tmp_path.iterdir())


@needs_rtx
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": ("rtx4090",)}, "`gpus` 'rtx4090': TensorRT-RTX builds for sm75, sm80"),
        ({"gpus": ("sm89", "sm90")}, "`gpus` 'sm90'"),
        ({"timing_cache": Path("x")}, "TensorRT-RTX has no timing cache"),
    ],
)
def test_options_that_the_flavor_does_not_have_are_refused(exported: Path, changes: dict[str, object], message: str):
    with pytest.raises(UsageError, match=message):
        build_engine(exported, replace(OPTIONS, **changes))


@needs_rtx
def test_models_that_are_not_ours_and_outputs_that_cannot_be_written_are_one_line(exported: Path, tmp_path: Path):
    foreign = onnx.load(exported)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    cases = [
        (tmp_path / "foreign.onnx", None, "not a sanrt model"),
        (tmp_path / "junk.onnx", None, "not an ONNX file"),
        (tmp_path / "none.onnx", None, "cannot be read"),
        (exported, tmp_path / "junk.onnx" / "x.engine", "cannot be written .*; choose another place with -o"),
    ]
    for model, output, message in cases:
        with pytest.raises((ModelError, FileError), match=message) as caught:
            build_engine(model, OPTIONS, output)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--min", "64x64"], "expected BATCHxHEIGHTxWIDTH"),
        (["--min", "1x300x300"], "expected min <= opt <= max"),
        (["--min", "1x4x4", "--min", "1x4x4", "--max", "1x999x999"], "expected one of each for every profile"),
    ],
)
def test_sizes_are_checked_before_anything_else(words: list[str], message: str):
    result = CliRunner().invoke(app, ["build", "none.onnx", "--flavor", "rtx", *words])
    assert isinstance(result.exception, SanrtError)
    assert message in str(result.exception)


@pytest.mark.parametrize("words", [["--fp16", "--bf16"], ["--flavor", "cuda"], ["--level", "6"]])
def test_wrong_usage_exits_with_2(words: list[str]):
    assert CliRunner().invoke(app, ["build", "none.onnx", *words]).exit_code == 2


def test_a_missing_flavor_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(BackendError, match=f"TensorRT-RTX .*{re.escape(install_command('rtx'))}"):
        build_engine(tmp_path / "x.onnx", OPTIONS)


def test_a_cancelled_monitor_stops_the_build():
    stand_in = Namespace(IProgressMonitor=object)
    cancel = Event()
    monitor = engine.monitor_class(stand_in)(None, cancel)
    assert monitor.step_complete("phase", 0)
    cancel.set()
    assert not monitor.step_complete("phase", 1)


@needs_rtx
@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        ("damaged", "x.cache: damaged, expected TensorRT's timings; remove it, or name another file"),
        ("foreign", "x.cache: TensorRT refuses these timings (of another GPU); name another file"),
    ],
)
def test_timings_that_tensorrt_cannot_use_are_told_by_name(
    exported: Path, breaks: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    """The bindings give a TypeError for what is no cache; for one of another GPU the log alone has an error."""
    trt = import_flavor(Flavor.RTX)
    trt_log = TensorRTLog(trt, keep=True)

    def configure(builder: object, network: object) -> object:
        if breaks == "damaged":
            raise TypeError("incompatible return value")
        trt_log.errors.append((0, "of another GPU"))
        return builder.create_builder_config()  # type: ignore[attr-defined]

    monkeypatch.setattr(engine, "builder_config", lambda *_: configure)
    _, graphs = engine.typed_graphs(exported, OPTIONS)
    with pytest.raises(BuildError) as caught:
        engine.compile_engine(trt, graphs[engine.WHOLE], OPTIONS, trt_log, None, "x.cache")
    assert str(caught.value) == message


@needs_rtx
def test_tensorrts_own_branch_builds_too_and_one_process_has_one_flavour(exported: Path):
    """In a process of its own, where TensorRT-RTX's bindings stand for TensorRT's."""
    script = """
import sys, tensorrt_rtx_bindings as trt
from pathlib import Path
from sanrt.errors import BackendError
from sanrt.export import engine
from sanrt.runtime.artifacts.engines import BuildOptions
from sanrt.runtime.artifacts.flavors import Flavor
from sanrt.runtime.backends.tensorrt.library import TensorRTLog

options = BuildOptions(Flavor.TENSORRT)
_, graphs = engine.typed_graphs(Path(sys.argv[1]), options)
print(len(engine.compile_engine(trt, graphs[engine.WHOLE], options, TensorRTLog(trt, keep=True), None, None)) > 1000)
try:
    engine.choose_polygraphy(trt, Flavor.RTX)
except BackendError as error:
    print(error)
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "True",
        "TensorRT-RTX: this process has built for the other TensorRT; build in another process",
    ]


class Namespace(SimpleNamespace):
    """A namespace that can be a cache's key, as a module can."""

    __hash__ = object.__hash__


@needs_rtx
def test_ctrl_c_stops_the_build_and_leaves_no_file(exported: Path, tmp_path: Path):
    model = tmp_path / "san_x2.onnx"
    model.write_bytes(exported.read_bytes())
    code = (
        "import sys; from sanrt.export import engine; real = engine.compile_engine\n"
        "def noisy(*a):\n    print('building', flush=True); return real(*a)\n"
        "engine.compile_engine = noisy; from sanrt.cli import main; sys.argv = ['sanrt', *sys.argv[1:]]; main()"
    )
    profiles = [word for _ in range(8) for word in ("--max", "1x1080x1920")]
    command = [sys.executable, "-c", code, "build", str(model), "--flavor", "rtx", *profiles]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("up to 1x1080x1920 (--max): about ")
        assert process.stdout.readline() == "building\n"
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["san_x2.onnx"]


@pytest.mark.gpu
def test_engines_agree_with_onnxruntime_on_a_gpu(exported: Path, tmp_path: Path):
    try:
        with open_device(0) as gpu:
            flavor = choose_flavor()
            targets = (gpu.capability,) if flavor == Flavor.RTX else ()
    except BackendError as error:
        pytest.skip(str(error))
    if flavor == Flavor.RTX and not hasattr(import_flavor(flavor).ComputeCapability, gpu.capability.upper()):
        pytest.skip(f"TensorRT-RTX does not support {gpu.name} ({gpu.capability}), and TensorRT is not installed")
    info, _ = build_engine(exported, BuildOptions(flavor, gpus=targets), tmp_path / "x.engine")
    with tensorrt.load(info.path, RunOptions()) as engines, load_backend("onnxruntime", exported, RunOptions()) as reference:
        for height, width in ((48, 64), (48, 64), (33, 47), (48, 64)):
            x = 255 * np.random.default_rng(width).random((1, 3, height, width), np.float32)
            error = np.sqrt(np.mean((engines.infer(x) - reference.infer(x)) ** 2))
            assert error < 0.5


@needs_rtx
def test_sanrts_kernels_are_refused_on_tensorrt_rtx(exported: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="takes no plugins"):
        build_engine(exported, BuildOptions(Flavor.RTX, kernels=True), tmp_path / "x.engine")
