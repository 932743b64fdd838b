"""Weights in sanrt's safetensors format, read without torch."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from sanrt.errors import CheckpointError
from sanrt.model import bundled
from sanrt.model.bundled import bundled_checkpoint, read_weights
from sanrt.model.checkpoint import load_checkpoint
from sanrt.model.spec import SCALES, Precision
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_unguarded, model_spec, status


@pytest.mark.parametrize("scale", SCALES)
def test_they_are_what_the_reference_network_loads(scale):
    path = bundled_checkpoint(scale)
    checkpoint, weights = load_checkpoint(path), read_weights(path)
    assert weights.spec.architecture == checkpoint.architecture
    assert (weights.spec.weights_digest, weights.spec.weights_origin) == (checkpoint.digest, checkpoint.origin)
    assert weights.tensors.keys() == checkpoint.tensors.keys()
    assert all(np.array_equal(tensor, checkpoint.tensors[name].numpy()) for name, tensor in weights.tensors.items())
    assert model_spec(path) == weights.spec


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["native", "onnxruntime", "openvino"])
def test_every_cpu_backend_runs_them_as_pytorch_does(name, scale, monkeypatch, tmp_path):
    if not status(name).usable:
        pytest.skip(status(name).reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, picture = bundled_checkpoint(scale), np.random.default_rng(0).uniform(0, 255, (1, 3, 17, 21)).astype(np.float32)
    options = RunOptions(threads=1, precision=Precision.FP32)
    with load_unguarded(name, path, options) as backend, load_unguarded("torch", path, RunOptions(threads=1)) as reference:
        assert np.abs(backend.infer(picture) - reference.infer(picture)).max() < 0.01
    assert not (path.parent / ".derived").exists()


def changed(path, tmp_path, change, **settings):
    """The bundled x2 weights, changed and written again."""
    tensors = load(path.read_bytes())
    change(tensors)
    header = {"value_range": 255.0, "sqrt_iterations": 5, "origin": "a test", **settings}
    (tmp_path / "w.safetensors").write_bytes(save(tensors, {"sanrt": json.dumps(header)}))
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize(
    ("change", "settings", "told"),
    [
        (lambda t: t.pop("tail.bias"), {}, "tail.bias is none"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), {}, "extra is \\[3\\], expected none"),
        (lambda t: t.update({"tail.bias": np.full(3, np.nan, np.float32)}), {}, "NaN"),
        (lambda t: t.update({"tail.bias": np.zeros(3, np.int32)}), {}, "no floats"),
        (lambda t: t.pop("head.weight"), {}, "no tensor head.weight"),
        (lambda t: None, {"sqrt_iterations": None}, "exact root"),
        (lambda t: None, {"sqrt_iterations": "five"}, "exact root"),
        (lambda t: None, {"value_range": "wide"}, "expected a number above 0"),
    ],
)
def test_what_is_no_sound_network_is_refused_in_one_line(change, settings, told, tmp_path):
    with pytest.raises(CheckpointError, match=told) as caught:
        read_weights(changed(bundled_checkpoint(2), tmp_path, change, **settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 64])
def test_what_is_no_safetensors_file_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged safetensors"):
        read_weights(tmp_path / "w.safetensors")


def test_weights_that_are_asked_for_again_are_read_once_and_read_anew_when_they_changed(tmp_path, monkeypatch):
    path, reads = tmp_path / "a.safetensors", []
    path.write_bytes(bundled_checkpoint(2).read_bytes())
    real = bundled.read_safetensors
    monkeypatch.setattr(bundled, "read_safetensors", lambda path: reads.append(path) or real(path))
    first = read_weights(path)
    assert read_weights(path) is first
    assert len(reads) == 1
    assert not any(tensor.flags.writeable for tensor in first.tensors.values())
    path.write_bytes(bundled_checkpoint(4).read_bytes())
    assert read_weights(path).spec.architecture.scale == 4
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(path)
