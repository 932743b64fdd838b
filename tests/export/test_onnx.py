"""Export: the file's promises, and refusals that leave nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from sanrt.errors import CheckpointError, FileError, ParityError, UsageError
from sanrt.export import onnx as exporter
from sanrt.export import squareroot
from sanrt.export.onnx import ExportOptions, export_onnx
from sanrt.export.rounding import rounding_tolerance
from sanrt.export.scene import natural_scene
from sanrt.model import graph
from sanrt.model.checkpoint import load_checkpoint
from sanrt.runtime.artifacts.models import read_spec
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend

QUICK = ExportOptions(picture=natural_scene(40, 40))


@pytest.fixture
def checkpoint(exported):
    return load_checkpoint(exported.checkpoint)


def exact(checkpoint):
    return replace(checkpoint, architecture=replace(checkpoint.architecture, sqrt_iterations=None))


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_exported_golden_checkpoints_reproduce_the_recorded_outputs_in_onnxruntime(shared, tmp_path, scale):
    stem = shared / "golden" / f"san_x{scale}_g2m2c32r8"
    report = export_onnx(load_checkpoint(stem.with_suffix(".pt")), tmp_path / "golden.onnx", replace(QUICK, check=False))
    session = onnxruntime.InferenceSession(report.path)
    recorded = np.load(stem.with_suffix(".npz"))
    for i in range(3):
        output = session.run(None, {"input": recorded[f"x{i}"].astype(np.float32)})[0]
        assert np.abs(output - recorded[f"y{i}"]).max() <= 1e-3


def test_the_file_has_standard_operators_and_dynamic_sizes(checkpoint, tmp_path):
    model = onnx.load(export_onnx(checkpoint, tmp_path / "a.onnx", QUICK).path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version >= 18) for o in model.opset_import] == [("", True)]
    assert {node.domain for node in model.graph.node} == {""}
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 3, "height", "width"]


def test_the_metadata_says_what_was_exported_and_measured(checkpoint, tmp_path):
    report = export_onnx(checkpoint, tmp_path / "a.onnx", QUICK)
    spec = read_spec(report.path)
    assert spec == report.spec
    assert (spec.architecture, spec.weights_digest) == (checkpoint.architecture, checkpoint.digest)
    assert (spec.iterations, spec.min_side, spec.multiple) == (5, 4, 1)
    assert spec.version
    root, parity = spec.report["square_root"], spec.report["parity"]
    assert [row["group"] for row in root["groups"]] == [0, 1]
    assert all(0 < row["residual"] < 1 for row in root["groups"])
    assert 0 <= parity["max_abs"] <= parity["tolerance"]


def test_only_the_model_and_its_derived_variant_are_left(checkpoint, tmp_path):
    for _ in range(2):
        export_onnx(checkpoint, tmp_path / "new" / "a.onnx", QUICK)
    left = sorted(path.relative_to(tmp_path).parts for path in tmp_path.rglob("*") if path.is_file())
    assert left[1:] == [("new", "a.onnx")]
    assert left[0][:2] == ("new", ".derived")
    assert "multi-head" in left[0][2]


def test_weights_that_amplify_rounding_are_judged_by_how_far_pytorch_rounds(checkpoint):
    inputs = [np.full((1, 3, 8, 8), 100, np.float32)]
    net = checkpoint.network()
    assert rounding_tolerance(net, inputs).max_abs == 2e-3
    net.mean_out.register_forward_hook(lambda _, given, y: y + 0.5 * (y.dtype == torch.float32))
    assert rounding_tolerance(net, inputs).max_abs == pytest.approx(2.0, rel=1e-2)


@pytest.mark.parametrize("tensor", ["groups.1.soca.up.bias", "tail.weight", "attention.value.bias"])
def test_a_graph_that_differs_is_refused_with_the_figures_and_nothing_is_written(checkpoint, tmp_path, monkeypatch, tensor):
    written = exporter.san_model

    def flawed(spec, weights, options=None):
        wrong = weights[tensor].copy()
        wrong.flat[0] += 1.0
        return written(spec, {**weights, tensor: wrong}, options)

    monkeypatch.setattr(exporter, "san_model", flawed)
    with pytest.raises(ParityError, match=r"differs .* by [\d.e+]+ of 255 at most .* expected [\d.e-]+ or less"):
        export_onnx(checkpoint, tmp_path / "a.onnx", QUICK)
    assert list(tmp_path.iterdir()) == []


def test_the_variant_that_the_onnxruntime_backend_runs_is_checked_too(checkpoint, tmp_path, monkeypatch):
    written = graph.san_model

    def flawed(spec, weights, options):
        return written(spec, {**weights, "mean_out.bias": weights["mean_out.bias"] + 1}, options)

    monkeypatch.setattr(graph, "san_model", flawed)
    with pytest.raises(ParityError, match=r"as sanrt's onnxruntime backend runs it, .* by 1\b"):
        export_onnx(checkpoint, tmp_path / "a.onnx", QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_export_leaves_the_earlier_model_alone(checkpoint, tmp_path):
    export_onnx(checkpoint, tmp_path / "a.onnx", replace(QUICK, check=False))
    before = sorted((path, path.read_bytes()) for path in tmp_path.rglob("*.onnx"))
    tensors = {**checkpoint.tensors, "head.weight": checkpoint.tensors["head.weight"] * 1e38}
    with pytest.raises(CheckpointError, match="overflow"):
        export_onnx(replace(checkpoint, tensors=tensors), tmp_path / "a.onnx", QUICK)
    assert sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()) == before


def test_a_place_that_cannot_be_written_is_one_clear_line(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"cannot be written \((File exists|Not a directory)\); .*`models`$"):
        export_onnx(checkpoint, tmp_path / "file" / "a.onnx", QUICK)


@pytest.mark.parametrize("moment", ["check_parity", "write_whole", "derived_model"])
def test_a_killed_export_leaves_the_whole_model_or_nothing(exported, tmp_path, moment):
    code = (
        "import os, signal, sys; from pathlib import Path; from sanrt.export import onnx\n"
        f"onnx.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from sanrt.model.checkpoint import load_checkpoint\n"
        "options = onnx.ExportOptions(check='check_parity' in sys.argv)\n"
        "onnx.export_onnx(load_checkpoint(Path(sys.argv[1])), Path('a.onnx'), options)"
    )
    command = [sys.executable, "-c", code, exported.checkpoint, moment]
    assert subprocess.run(command, cwd=tmp_path).returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert [path.name for path in left] == (["a.onnx"] if moment == "derived_model" else [])
    for path in left:
        onnx.checker.check_model(onnx.load(path))


def test_an_export_forgets_what_was_made_of_the_model_that_it_replaces_and_nothing_else(checkpoint, tmp_path):
    for name in ("a", "a-b"):
        export_onnx(checkpoint, tmp_path / f"{name}.onnx", replace(QUICK, check=False, iterations=len(name)))
    other = next((tmp_path / ".derived").glob("a-b-*"))
    export_onnx(checkpoint, tmp_path / "a.onnx", replace(QUICK, check=False, iterations=2, overwrite=True))
    assert len(list((tmp_path / ".derived").iterdir())) == 2
    assert other.exists()


@pytest.mark.parametrize("trained", [5, None])
def test_every_backend_runs_the_steps_that_were_asked_for(checkpoint, tmp_path, trained):
    changed = replace(checkpoint, architecture=replace(checkpoint.architecture, sqrt_iterations=trained))
    path = export_onnx(changed, tmp_path / "a.onnx", replace(QUICK, iterations=2, check=False)).path
    picture = exporter.network_input(QUICK.picture, 255.0)
    outputs = []
    for name in ("torch", "onnxruntime"):
        with load_backend(name, path, RunOptions()) as backend:
            outputs.append(backend.infer(picture))
    assert np.abs(outputs[0] - outputs[1]).max() < 0.2
    five = checkpoint.network()(torch.from_numpy(picture)).numpy()
    assert np.abs(outputs[0] - five).max() > 1


def test_an_exact_root_checkpoint_gets_as_many_steps_as_its_spectra_need(checkpoint, tmp_path):
    report = export_onnx(exact(checkpoint), tmp_path / "a.onnx", QUICK)
    gates = {n: worst_gate(exact(checkpoint), n) for n in (report.spec.iterations, report.spec.iterations - 1)}
    assert gates[report.spec.iterations] <= squareroot.GATE_TOLERANCE < gates[report.spec.iterations - 1]
    assert report.square_root.trained is None


def worst_gate(checkpoint, iterations):
    pixels = torch.from_numpy(exporter.network_input(QUICK.picture, 255.0))
    net = checkpoint.network()
    _, sigmas = squareroot.with_covariances(net, pixels)
    return max(squareroot.gate_error(soca, s, iterations) for soca, s in zip(squareroot.socas(net), sigmas, strict=True))


def test_an_exact_root_out_of_reach_is_told_with_the_steps_that_come_nearest(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(squareroot, "GATE_TOLERANCE", 0.0)
    with pytest.raises(UsageError, match=r"sqrt_iterations=\d+"):
        export_onnx(exact(checkpoint), tmp_path / "a.onnx", QUICK)
    assert list(tmp_path.iterdir()) == []


def test_asked_for_steps_are_what_the_graph_has_and_more_come_nearer_to_the_exact_root(checkpoint, tmp_path):
    few, many = (export_onnx(checkpoint, tmp_path / f"{n}.onnx", replace(QUICK, iterations=n)).square_root for n in (2, 12))
    assert (few.iterations, many.iterations) == (2, 12)
    assert many.difference.psnr > few.difference.psnr
    for rough, fine in zip(few.groups, many.groups, strict=True):
        assert (fine.residual, fine.error) < (rough.residual, rough.error)
        assert fine.condition == pytest.approx(rough.condition, rel=0.2)
