"""Exports for programs that call the graph themselves: bytes in and out, one fixed size."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from sanrt.cli import app
from sanrt.errors import ModelError, ParityError, UsageError
from sanrt.export import onnx as exporting
from sanrt.export.layout import opened
from sanrt.export.locate import locate
from sanrt.export.onnx import ExportOptions, export_onnx
from sanrt.export.samples import samples
from sanrt.export.scene import natural_scene
from sanrt.export.validate import ValidateOptions, validate
from sanrt.model.checkpoint import load_checkpoint, save_checkpoint
from sanrt.model.exported import read_exported
from sanrt.model.spec import PixelLayout, Precision
from sanrt.runtime.artifacts.models import read_spec
from sanrt.runtime.artifacts.sizes import Size
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_unguarded, status
from sanrt.runtime.tiling.upscaling import network_input, network_output

BYTES = PixelLayout.UINT8_NHWC
SCENE = natural_scene(28, 24, 3)


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory) -> Path:
    import torch

    from sanrt.model.san import SAN
    from sanrt.model.spec import Architecture

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SAN(
            Architecture(scale=2, groups=2, blocks=2, channels=16, reduction=4, value_range=getattr(request, "param", 255.0))
        )
    torch.nn.init.constant_(net.gamma, 0.3)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_checkpoint(path, net, "seeded random weights", torch.float32)
    return path


def export(checkpoint: Path, path: Path, **options: object) -> Path:
    return export_onnx(load_checkpoint(checkpoint), path, ExportOptions(picture=SCENE, **options)).path


@pytest.mark.parametrize("checkpoint", [255.0, 1.0], indirect=True)
def test_bytes_give_the_bytes_that_sanrt_would_write(checkpoint, tmp_path):
    own = onnxruntime.InferenceSession(export(checkpoint, tmp_path / "b.onnx", layout=BYTES))
    given = np.stack([SCENE, SCENE[:, ::-1]])
    (made,) = own.run(None, {"input": given})
    assert (made.shape, made.dtype) == ((2, 56, 48, 3), np.uint8)
    floats = export(checkpoint, tmp_path / "f.onnx")
    spec = read_spec(floats)
    with load_unguarded("torch", floats, RunOptions()) as reference:
        for picture, found in zip(given, made, strict=True):
            picture = np.ascontiguousarray(picture)
            x = network_input(picture, spec.architecture.value_range)
            expected = network_output(reference.infer(x), picture, spec.architecture.value_range)
            wrong = np.abs(expected.astype(int) - found)
            assert wrong.max() <= 1
            assert (wrong > 0).mean() < 0.001


def test_a_fixed_shape_is_the_only_one_that_the_graph_takes(checkpoint, tmp_path):
    path = export(checkpoint, tmp_path / "s.onnx", shape=Size(3, 20, 24))
    own = onnxruntime.InferenceSession(path)
    assert (own.get_inputs()[0].shape, own.get_outputs()[0].shape) == ([3, 3, 20, 24], [3, 3, 40, 48])
    with pytest.raises(Exception, match="Got invalid dimensions"):
        own.run(None, {"input": np.zeros((1, 3, 20, 24), np.float32)})
    free = onnxruntime.InferenceSession(opened(onnx.load(path)))
    x = np.random.default_rng(0).random((3, 3, 20, 24), np.float32)
    np.testing.assert_allclose(own.run(None, {"input": x})[0], free.run(None, {"input": x})[0], rtol=0, atol=1e-3)
    assert free.run(None, {"input": x[:1, :, :8, :9]})[0].shape == (1, 3, 16, 18)


def test_the_graph_is_compared_with_pytorch_as_it_is(checkpoint, tmp_path, monkeypatch):
    written = exporting.san_model

    def truncating(spec, weights):
        """Bytes cut off where they should be rounded."""
        model = written(spec, weights)
        node = next(node for node in model.graph.node if node.op_type == "Round")
        node.op_type = "Floor"
        return model

    monkeypatch.setattr(exporting, "san_model", truncating)
    with pytest.raises(ParityError, match="as exported"):
        export(checkpoint, tmp_path / "b.onnx", layout=BYTES)
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino", "native"])
def test_every_backend_runs_such_a_file_as_the_model_that_it_holds(backend, checkpoint, tmp_path):
    if not status(backend).usable:
        pytest.skip(status(backend).reason)
    files = [export(checkpoint, tmp_path / "f.onnx")]
    files += [export(checkpoint, tmp_path / "b.onnx", layout=BYTES, shape=Size(1, 16, 16))]
    x = np.random.default_rng(0).random((2, 3, 13, 17), np.float32)
    options, outputs = RunOptions(threads=1, precision=Precision.FP32), []
    for path in files:
        with load_unguarded(backend, path, options) as loaded:
            outputs.append(loaded.infer(x))
            assert loaded.spec == loaded.spec.open
    assert np.array_equal(*outputs)


def test_such_files_are_checked_as_strictly_as_others(checkpoint, tmp_path):
    path = export(checkpoint, tmp_path / "b.onnx", layout=BYTES, shape=Size(1, 16, 16))
    spec = read_exported(path).spec
    assert (spec.layout, spec.shape) == (BYTES, (1, 16, 16))
    model = onnx.load(path)
    for changed in ("shape", "layout"):
        edited = onnx.ModelProto()
        edited.CopyFrom(model)
        for entry in edited.metadata_props:
            if entry.key == f"sanrt.{changed}":
                entry.value = {"shape": "[1, 16, 32]", "layout": '"float32-nchw"'}[changed]
            if entry.key == "sanrt.description_digest":
                entry.value = ""
        props = [entry for entry in edited.metadata_props if entry.value]
        del edited.metadata_props[:]
        edited.metadata_props.extend(props)
        onnx.save(edited, tmp_path / "edited.onnx")
        with pytest.raises(ModelError, match=r"edited\.onnx: (its inputs and outputs are|unknown tensor const)"):
            read_exported(tmp_path / "edited.onnx")


def test_validate_runs_the_files_own_graph_and_finds_it_spoilt(checkpoint, tmp_path):
    path = export(checkpoint, tmp_path / "b.onnx", layout=BYTES, shape=Size(1, 16, 16))
    pictures = partial(samples, None, None)
    options = ValidateOptions(backend="torch", checkpoint=checkpoint)
    checked = validate(path, lambda scale: [next(pictures(scale))], options)
    assert checked.passed
    assert checked.own_graph is not None
    assert checked.own_graph.difference.max_abs <= 1
    model = onnx.load(path)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "groups.0.blocks.0.conv1.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.2), weight.name))
    onnx.save(model, path)
    with pytest.raises(ModelError, match="its weights are not those"):
        validate(path, lambda scale: [next(pictures(scale))], options)
    fresh = export(checkpoint, tmp_path / "c.onnx", layout=BYTES)
    with pytest.raises(UsageError, match="`polygraphy` needs float32 pictures"):
        validate(fresh, pictures, replace(options, polygraphy=tmp_path / "replay"))
    with pytest.raises(UsageError, match="--locate needs float32 pictures"):
        locate(fresh, SCENE, checkpoint)


def test_the_command_names_such_files_by_what_they_take(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["export", "--checkpoint", str(checkpoint), "--io", "uint8-nhwc", "--shape", "1x16x24"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    path = Path("models/tiny-uint8-nhwc-1x16x24.onnx")
    told = CliRunner().invoke(app, ["info", str(path)], env={"COLUMNS": "200"}).output
    assert "uint8-nhwc, 1x16x24 alone (sanrt runs its weights at any size)" in told
    assert "1 x 16 x 24 x 3" in told
    assert "bytes, channels last (NHWC)" in told
    assert re.search(r"against PyTorch: at most [01] of 255 apart, tolerance 1\n", done.output), (
        "whole levels, as the bytes are"
    )
    for wrong, message in ((["--shape", "16x24"], "expected BATCHxHEIGHTxWIDTH"), (["--shape", "1x3x9"], "of 4 or more")):
        refused = CliRunner().invoke(app, ["export", "--checkpoint", str(checkpoint), *wrong])
        assert isinstance(refused.exception, UsageError)
        assert message in str(refused.exception)
    assert CliRunner().invoke(app, ["export", "--scale", "4", "--io", "nhwc"]).exit_code == 2
