"""`--auto`: what is tried, what is not and why, and what is chosen; with stand-ins for TensorRT and its GPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from sanrt.cli import app
from sanrt.errors import BuildError
from sanrt.export.quantise import automatic, calibration, trials
from sanrt.export.quantise.trials import BackendTrial, compare_backends, fastest
from sanrt.model.spec import GRAPH_PRECISIONS, Precision, QuantisedType
from sanrt.runtime.artifacts.engines import SUFFIX
from sanrt.runtime.backends import default_variant as preference
from sanrt.runtime.backends import registry as backends
from sanrt.runtime.backends.default_variant import preferred
from sanrt.runtime.backends.protocol import BackendStatus


@pytest.fixture(autouse=True)
def small_crops(monkeypatch):
    monkeypatch.setattr(calibration, "CROP", 24)
    monkeypatch.setattr(calibration, "SCENES", 3)
    monkeypatch.setattr(trials, "TIMED_SIDE", 16)
    monkeypatch.setattr(trials, "ROUNDS", 1)


@pytest.fixture
def model(exported, tmp_path):
    path = tmp_path / "san_x2.onnx"
    path.write_bytes(exported.onnx.read_bytes())
    return path


def auto(model, *words):
    return CliRunner().invoke(app, ["build", str(model), "--auto", "--max-psnr-drop", "50", *words], env={"COLUMNS": "300"})


def test_without_a_gpu_the_cpus_ways_are_compared_and_the_others_are_told_with_their_reasons(model):
    done = auto(model)
    assert done.exit_code == 0, done.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.output.splitlines() if "│" in line]
    compared_rows = {(row[1], row[2]) for row in rows if row[0].startswith("san_x2") and len(row) == 6}
    assert {("onnxruntime", "fp32"), ("onnxruntime", "int8 + fp32"), ("torch", "fp32")} <= compared_rows
    untried = {row[0]: row[1] for row in rows if len(row) == 2}
    assert "only TensorRT computes in it" in untried["fp8"]
    assert "fp16 was asked for" in untried["fp16 on onnxruntime"]
    assert "torch runs no int8 model" in untried["int8 on torch"]
    assert {"tensorrt", "torch-cuda"} <= untried.keys()
    assert preferred(model) is not None


@pytest.fixture
def gpu(monkeypatch):
    """TensorRT is usable; engines are copies of their graphs, run by ONNX Runtime, and quick."""
    usable = BackendStatus("tensorrt", "11", True, "runs on a stand-in")
    asked = []

    def status(name):
        return usable if name == "tensorrt" else backends.status(name)

    def build_engine(path, options, output, progress):
        asked.append((path.name, options.precision))
        if ".fp8." in path.name:
            raise BuildError("fp8 needs sm89")
        path.with_name(f"{path.stem}-{options.precision}{SUFFIX}").write_bytes(path.read_bytes())
        return SimpleNamespace(), True

    def engines_of(path):
        return [SimpleNamespace(path=p) for p in sorted(path.parent.glob(f"{path.stem}-*{SUFFIX}"))]

    def load_unguarded(name, path, options):
        if name != "tensorrt":
            return backends.load_unguarded(name, path, options)
        backend = backends.load_unguarded("onnxruntime", path.with_name(f"{path.stem.rpartition('-')[0]}.onnx"), options)
        backend.name = "tensorrt"
        backend.spec = replace(backend.spec, precision=Precision(path.stem.rpartition("-")[2]))
        return backend

    for module in (automatic, trials, preference):
        monkeypatch.setattr(module, "status", status)
    monkeypatch.setattr(trials, "AUTO_ORDER", ("tensorrt", "onnxruntime"))
    monkeypatch.setattr(automatic, "build_engine", build_engine)
    monkeypatch.setattr(automatic, "choose_flavor", lambda: "rtx")
    monkeypatch.setattr("sanrt.runtime.artifacts.engines.engines_of", engines_of)
    monkeypatch.setattr(trials, "load_unguarded", load_unguarded)
    monkeypatch.setattr(trials, "run_seconds", lambda backend, _: 0.1 if backend.name == "tensorrt" else 1.0)
    return asked


def test_with_a_gpu_engines_of_every_type_are_built_and_the_fastest_is_taken(model, gpu):
    done = auto(model)
    assert done.exit_code == 0, done.output
    assert gpu == [*(("san_x2.onnx", p) for p in GRAPH_PRECISIONS)] + [
        (f"san_x2.{kind}.onnx", Precision.FP16) for kind in QuantisedType
    ]
    assert "fp16 engine of san_x2.fp8.onnx" in done.output
    assert "fp8 needs sm89" in done.output
    assert preferred(model).backend == "tensorrt"
    assert preferred(model).model.endswith(SUFFIX)


def test_an_engine_that_does_not_load_is_told_and_the_rest_is_compared(model, monkeypatch):
    broken = model.with_name("other.engine")
    broken.write_bytes(b"nothing")
    usable = BackendStatus("tensorrt", "11", True, "")
    monkeypatch.setattr(trials, "status", lambda name: usable if name == "tensorrt" else backends.status(name))
    held_out = calibration.calibration_set(None, 2).held_out
    comparison = compare_backends([model, broken], held_out)
    assert broken.name in comparison.untried
    assert {t.model for t in comparison.trials} == {model}


def test_the_fastest_within_the_budget_is_taken_and_8_bits_only_where_they_gain(model):
    fp32 = BackendTrial(model, "onnxruntime", None, "fp32", 30.0, 2.0)
    int8 = replace(fp32, computes="int8 + fp32", y_psnr=29.95, seconds=1.0)
    assert fastest([fp32, int8], 0.1) == int8
    assert fastest([fp32, int8], 0.01) == fp32
    assert fastest([fp32, replace(int8, seconds=1.95)], 0.1) == fp32
