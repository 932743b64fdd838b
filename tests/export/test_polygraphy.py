"""NVIDIA's Polygraphy on what sanrt makes: it replays validations, inspects models and runs every backend."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sanrt.export.quantise.calibration import RangeMethod, measure_ranges
from sanrt.export.samples import Sample
from sanrt.export.scene import natural_scene
from sanrt.export.validate import ValidateOptions, validate
from sanrt.model.bundled import bundled_checkpoint
from sanrt.model.exported import read_model
from sanrt.model.graph import san_model
from sanrt.model.spec import Precision, Quantisation, QuantisedType
from sanrt.runtime.artifacts.flavors import Flavor
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_unguarded

pytest.importorskip("polygraphy", reason="Polygraphy is not installed (pip install 'sanrt[rtx]')")

TOOL = """
import sys
from importlib.metadata import EntryPoint
from polygraphy.tools import main
from polygraphy.tools.run import run

PLUGIN = sys.argv.pop(1)

class Metadata:
    entry_points = staticmethod(lambda: {run.PLUGIN_ENTRY_POINT: [EntryPoint("sanrt", PLUGIN, run.PLUGIN_ENTRY_POINT)]})

run.metadata = Metadata
sys.argv[0] = "polygraphy"
sys.exit(main())
"""
"""The `polygraphy` command, with the plugin that pyproject.toml names, installed or not."""
PLUGIN = "sanrt.export.polygraphy:argument_groups"


def polygraphy(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", TOOL, PLUGIN, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


def bundled(folder: Path, kind: QuantisedType | None = None) -> Path:
    """The bundled x4 as exported, or with all its residual convolutions in 8 bits."""
    from sanrt.export.onnx import ExportOptions, export_onnx
    from sanrt.model.checkpoint import load_checkpoint

    path = export_onnx(load_checkpoint(bundled_checkpoint(4)), folder / "san_x4.onnx", ExportOptions(check=False)).path
    if kind:
        spec, weights = read_model(path)
        ranges = measure_ranges(spec, weights, [Sample("scene", natural_scene(48, 48, 1), None)], RangeMethod.MIN_MAX)
        path = folder / f"san_x4.{kind}.onnx"
        onnx.save(san_model(replace(spec, quantisation=Quantisation(kind, ranges.inputs, ranges.outputs)), weights), path)
    return path


def replayed(model: Path) -> list[list[str]]:
    """The commands that `validate --polygraphy` wrote for a model, in words."""
    pictures = lambda scale: [Sample(f"scene {seed}", natural_scene(40, 36, seed), None) for seed in range(2)]  # noqa: E731
    folder = model.with_name("replay")
    validate(model, pictures, ValidateOptions(backend="onnxruntime", polygraphy=folder))
    shell, place, *commands = (folder / "replay.sh").read_text().splitlines()
    assert (shell, place) == ("#!/bin/sh -e", 'cd "$(dirname "$0")"')
    assert (folder / "replay.sh").stat().st_mode & 0o111
    return [shlex.split(command) for command in commands]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, QuantisedType.INT8])
def test_polygraphy_passes_the_sound_model_and_fails_one_with_a_convolution_times_1_2(kind, tmp_path):
    model = bundled(tmp_path, kind)
    own, backend = replayed(model)
    assert own[:3] == backend[:3] == ["polygraphy", "run", f"../{model.name}"]
    assert (own[3], backend[3:6]) == ("--onnxrt", ["--sanrt", "--sanrt-backend", "onnxruntime"])
    for command in (own, backend):
        done = polygraphy(command[1:], tmp_path / "replay")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "PASSED | PSNR" in done.stdout
    spoilt = onnx.load(bundled(tmp_path / "spoilt"))
    weight = next(tensor for tensor in spoilt.graph.initializer if tensor.name == "groups.0.blocks.0.conv1.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.2), weight.name))
    onnx.save(spoilt, tmp_path / "spoilt.onnx")
    if kind is None:
        done = polygraphy(["run", "../spoilt.onnx", *own[3:]], tmp_path / "replay")
        assert done.returncode == 1
        assert "FAILED | Output: 'output'" in done.stdout


def test_polygraphy_inspects_an_exported_model(exported, tmp_path):
    done = polygraphy(["inspect", "model", str(exported.onnx), "--show", "layers"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "input [dtype=float32, shape=('batch', 3, 'height', 'width')]" in done.stdout
    assert "groups.1.blocks.0.conv2" in done.stdout


def test_the_plugin_is_the_one_that_the_package_declares():
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared == {"polygraphy.run.plugins": {"sanrt": PLUGIN}}
    module, _, name = PLUGIN.partition(":")
    (group,) = getattr(import_module(module), name)()
    assert group.get_name_opt() == ("sanrt", "sanrt")


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "native"])
def test_its_comparator_runs_any_backend(backend, exported):
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator, SimpleCompareFunc

    from sanrt.export.polygraphy import SanrtRunner

    feed = [{"input": np.random.default_rng(0).random((1, 3, 3, 9), np.float32) * 255}]
    options = RunOptions(threads=1, precision=Precision.FP32)
    runners = [SanrtRunner(exported.onnx, backend, options), SanrtRunner(exported.onnx, "torch", options)]
    compared = Comparator.compare_accuracy(
        Comparator.run(runners, data_loader=feed), compare_func=SimpleCompareFunc(atol=1, rtol=0)
    )
    assert bool(compared)
    feed = [{"input": np.random.default_rng(0).random((2, 3, 8, 9), np.float32) * 255}]
    with OnnxrtRunner(SessionFromOnnx(str(exported.onnx))) as own, SanrtRunner(exported.onnx, backend, options) as ours:
        assert np.abs(own.infer(feed[0])["output"] - ours.infer(feed[0])["output"]).max() < 1
        assert ours.last_inference_time() > 0
        with load_unguarded(backend, exported.onnx, options) as same:
            assert np.array_equal(ours.infer(feed[0])["output"], same.infer(feed[0]["input"]))


def test_an_engines_replay_names_its_flavour(tmp_path, monkeypatch):
    from sanrt.export import polygraphy as module
    from sanrt.export.parity import TOLERANCES

    outputs = [np.full((1, 3, 8, 8), 127.5, np.float32)]
    replay = module.Replay(
        tmp_path / "x.engine", "tensorrt", 1.0, [], [y / 255 for y in outputs], TOLERANCES[Precision.FP16], None
    )
    for flavor, environment in ((Flavor.RTX, ["POLYGRAPHY_USE_TENSORRT_RTX=1"]), (Flavor.TENSORRT, [])):
        facts = type("Facts", (), {"identity": type("I", (), {"options": type("O", (), {"flavor": flavor})})})
        monkeypatch.setattr(module, "read_engine", lambda path, facts=facts: facts)
        engine, backend = (shlex.split(command) for command in replay.commands(tmp_path))
        start = len(environment)
        assert engine[: start + 6] == [*environment, "polygraphy", "run", "x.engine", "--trt", "--model-type", "engine"]
        assert backend[:6] == ["polygraphy", "run", "x.engine", "--sanrt", "--sanrt-backend", "tensorrt"]
        # 0.5 of 255, and 80 dB below a peak of half the range
        assert engine[-6:] == ["--atol", "0.00196078", "--rtol", "0", "--psnr-threshold", "73.9"]
