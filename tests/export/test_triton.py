"""`sanrt triton`: repositories that Triton's own schema accepts, and whose names and shapes the models run with."""

from __future__ import annotations

import hashlib
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tritonclient", reason="needs the triton extra")

import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as schema

from sanrt.cli import main
from sanrt.errors import FileError, ModelError, UsageError
from sanrt.export.triton import TritonOptions, write_repository
from sanrt.model.spec import Architecture, ModelSpec, Precision
from sanrt.runtime.artifacts.engines import BuildOptions, EngineInfo, Identity, Proof, save_engine
from sanrt.runtime.artifacts.flavors import Flavor
from sanrt.runtime.artifacts.sizes import Profile, Size
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.tiling.upscaling import upscale


def config_of(repository: Path, name: str) -> schema.ModelConfig:
    """The configuration, read as Triton reads it."""
    return text_format.Parse((repository / name / "config.pbtxt").read_text(), schema.ModelConfig())


def test_the_onnx_runs_with_the_names_types_and_shapes_of_its_configuration(tiny_model, tmp_path):
    made = write_repository(tmp_path, tiny_model(2), TritonOptions(instances=2, kind="cpu", batch=4))
    config = config_of(tmp_path, "san_x2")
    assert made.model == tmp_path / "san_x2" / "1" / config.default_model_filename
    assert made.model.read_bytes() == tiny_model(2).read_bytes()
    assert (config.backend, config.max_batch_size, config.HasField("dynamic_batching")) == ("onnxruntime", 4, True)
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, schema.ModelInstanceGroup.KIND_CPU)
    (given,), (expected,) = config.input, config.output
    assert list(given.dims) == list(expected.dims) == [3, -1, -1]
    assert given.data_type == expected.data_type == schema.TYPE_FP32
    session = onnxruntime.InferenceSession(made.model, providers=["CPUExecutionProvider"])
    (warm,) = config.model_warmup
    for shape in [(4, 3, 24, 36), (1, *warm.inputs[given.name].dims)]:
        (result,) = session.run([expected.name], {given.name: np.zeros(shape, np.float32)})
        assert result.shape == (shape[0], 3, 2 * shape[2], 2 * shape[3])


def test_the_client_makes_what_sanrt_makes(tiny_model, tmp_path):
    made = write_repository(tmp_path, tiny_model(2))
    client = runpy.run_path(str(made.client))
    session = onnxruntime.InferenceSession(made.model, providers=["CPUExecutionProvider"])
    with load_backend("onnxruntime", tiny_model(2), RunOptions(threads=1)) as backend:
        for height, width in [(20, 30), (1, 5)]:
            pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
            facts = client["facts_of"](config_of(tmp_path, "san_x2"))
            found = client["upscale"](pixels, facts, lambda planes: session.run(["output"], {"input": planes})[0])
            expected = upscale(backend, pixels)
            assert found.shape == expected.shape
            assert np.abs(found.astype(int) - expected).max() <= 1


def test_the_same_model_is_no_new_version_and_another_one_is(tiny_model, tmp_path):
    first = write_repository(tmp_path, tiny_model(2), TritonOptions("san"))
    again = write_repository(tmp_path, tiny_model(2), TritonOptions("san", batch=2))
    assert (first.new, again.new, again.model) == (True, False, first.model)
    assert config_of(tmp_path, "san").max_batch_size == 2
    other = write_repository(tmp_path, tiny_model(4), TritonOptions("san"))
    assert (other.new, other.model.parent.name) == (True, "2")
    assert sorted(path.name for path in (tmp_path / "san").iterdir()) == ["1", "2", "config.pbtxt"]
    assert config_of(tmp_path, "san").parameters["sanrt.scale"].string_value == "4"


def test_weights_beside_an_onnx_travel_with_it(tiny_model, tmp_path):
    import onnx

    model = onnx.load(tiny_model(2))
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "big.onnx"
    onnx.save(model, path, save_as_external_data=True, location="big.bin")
    made = write_repository(tmp_path / "repository", path)
    session = onnxruntime.InferenceSession(made.model, providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": np.zeros((1, 3, 16, 16), np.float32)})[0].shape == (1, 3, 32, 32)


def engine(folder: Path, flavor: Flavor) -> Path:
    """An engine of bytes that nothing runs, with two profiles."""
    profiles = (
        Profile(Size(1, 8, 8), Size(1, 90, 120), Size(4, 99, 199)),
        Profile(Size(1, 9, 9), Size(2, 9, 9), Size(2, 9, 9)),
    )
    identity = Identity("0" * 64, BuildOptions(flavor, profiles=profiles), "11.0", "a GPU", "0.2")
    spec = ModelSpec(Architecture(4, 1, 1, 16, 8), "0" * 64, "nothing", 5, Precision.FP16)
    path, digest = folder / "san_x4.engine", hashlib.sha256(b"engine").hexdigest()
    save_engine(EngineInfo(path, spec, "a.onnx", identity, 6, digest, Proof("log", 1, {}, [], 1, [], 1, [], [])), b"engine")
    return path


def test_an_engine_goes_with_its_profiles_onto_gpus(tmp_path):
    made = write_repository(tmp_path / "repository", engine(tmp_path, Flavor.TENSORRT))
    assert made.model.name == "model.plan"
    assert made.model.read_bytes() == b"engine"
    config = config_of(tmp_path / "repository", "san_x4")
    (group,) = config.instance_group
    assert (config.backend, config.max_batch_size, list(group.profile)) == ("tensorrt", 2, ["0", "1"])
    assert group.kind == schema.ModelInstanceGroup.KIND_GPU
    assert list(config.model_warmup[0].inputs["input"].dims) == [3, 90, 120]
    assert config.parameters["sanrt.sizes"].string_value == "1x8x8 .. 1x90x120 .. 4x99x199; 1x9x9 .. 2x9x9 .. 2x9x9"


def test_what_triton_cannot_run_is_refused_in_one_line(tiny_model, tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="not an ONNX file"):
        write_repository(tmp_path / "repository", tmp_path / "a.onnx")
    for name in ("a/b", "..", ".hidden", " "):
        with pytest.raises(UsageError, match="expected a name for a folder"):
            write_repository(tmp_path / "repository", tiny_model(2), TritonOptions(name))
    with pytest.raises(ModelError, match="TensorRT-RTX, whose engines Triton does not load"):
        write_repository(tmp_path / "repository", engine(tmp_path, Flavor.RTX))
    with pytest.raises(UsageError, match="the engine takes at most 2 pictures at once"):
        write_repository(tmp_path / "repository", engine(tmp_path, Flavor.TENSORRT), TritonOptions(batch=3))
    with pytest.raises(UsageError, match="an engine runs on a GPU"):
        write_repository(tmp_path / "repository", engine(tmp_path, Flavor.TENSORRT), TritonOptions(kind="cpu"))
    assert not (tmp_path / "repository").exists()


def test_the_command_says_what_it_wrote_and_how_to_use_it(tiny_model, tmp_path, monkeypatch, capfd):
    words = ["sanrt", "triton", str(tmp_path), "--models", str(tiny_model(2).parent), "--scale", "2"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert "1/model.onnx is new" in out
    assert f"python {tmp_path}/upscale_by_triton.py san_x2 SOURCE RESULT" in out


def test_a_repository_below_a_folder_that_is_not_there_is_refused(tiny_model, tmp_path):
    with pytest.raises(FileError, match="there is no folder"):
        write_repository(tmp_path / "no" / "where" / "triton", tiny_model(2))
    assert not list(tmp_path.iterdir())
