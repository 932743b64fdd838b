"""An ONNX is what its description says, or is refused in one line; conversions to fp16 and fp64 are taken back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sanrt.errors import ModelError
from sanrt.model.exported import read_exported, read_model
from sanrt.model.graph import san_model, stage_model
from sanrt.model.spec import Attention, GraphOptions, Precision, Quantisation, QuantisedType
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend

RANGES = {"groups.0.blocks.0.conv1": 9.0, "upsampler.0": 7.0}
NEW = ("sanrt.tensors_digest", "sanrt.description_digest")
OLD = Path(__file__).with_name("san_x2_of_0.1.onnx")
CPU_BACKENDS = ("native", "onnxruntime", "openvino", "torch")


def weight(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def change(model, name, edit):
    tensor = weight(model, name)
    tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor)), name))


def node(model, name):
    return next(node for node in model.graph.node if node.name == name)


def metadata(model, key, value):
    next(entry for entry in model.metadata_props if entry.key == key).value = json.dumps(value)


def architecture(model, **changes):
    entry = next(entry for entry in model.metadata_props if entry.key == "sanrt.architecture")
    entry.value = json.dumps({**json.loads(entry.value), **changes})


def without_digests(model):
    kept = [entry for entry in model.metadata_props if entry.key not in NEW]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)


def swapped(model):
    first, second = (weight(model, f"groups.0.blocks.0.conv{i}.weight") for i in (1, 2))
    first.raw_data, second.raw_data = second.raw_data, first.raw_data


def swapped_names(model):
    first, second = (weight(model, f"groups.0.blocks.0.conv{i}.weight") for i in (1, 2))
    first.name, second.name = second.name, first.name


SPOILT = {
    "a tensor is missing": (lambda m: m.graph.initializer.remove(weight(m, "gamma")), "no tensor gamma"),
    "a tensor is unknown": (
        lambda m: m.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "other")),
        "unknown tensor other",
    ),
    "a short bias": (
        lambda m: change(m, "head.bias", lambda b: b[:-1]),
        r"head.bias is \[15\], expected \[16\]",
    ),
    "a bias of one": (lambda m: change(m, "head.bias", lambda b: b[:1]), r"head.bias is \[1\], expected \[16\]"),
    "a weight of integers": (lambda m: change(m, "head.bias", lambda b: b.astype(np.int32)), "head.bias is INT32"),
    "fp16 without a Cast": (lambda m: change(m, "head.bias", lambda b: b.astype(np.float16)), "inconsistent type"),
    "a weight cut short": (lambda m: setattr(weight(m, "head.bias"), "raw_data", b"1234"), "head.bias is damaged"),
    "a mislabelled type": (lambda m: setattr(weight(m, "head.bias"), "data_type", TensorProto.FLOAT16), "damaged"),
    "a weight that is no number": (lambda m: change(m, "head.bias", lambda b: b * np.nan), "head.bias holds NaN"),
    "two tensors change their names": (swapped_names, "weights are not those"),
    "two tensors change places": (swapped, "weights are not those"),
    "a weight moved a little": (lambda m: change(m, "tail.bias", lambda b: b + np.float32(1e-6)), "weights are not those"),
    "another scale": (lambda m: architecture(m, scale=4), "metadata was changed"),
    "another value range": (lambda m: architecture(m, value_range=1.0), "metadata was changed"),
    "another constant": (lambda m: change(m, "const.float32..1e-10", lambda c: c * 1e17), "constant const.float32..1e-10"),
    "another node": (lambda m: setattr(node(m, "groups.0.blocks.0.relu"), "op_type", "Sigmoid"), "does not compute"),
    "another attribute": (lambda m: node(m, "first").attribute[0].ints.__setitem__(0, 2), "does not compute|valid ONNX"),
    "another input": (lambda m: node(m, "trunk").input.__setitem__(1, "shared"), "does not compute trunk"),
    "a node is missing": (lambda m: m.graph.node.remove(node(m, "trunk")), "valid ONNX graph"),
    "another opset": (lambda m: setattr(m.opset_import[0], "version", 21), "opset"),
}


def saved(model, folder):
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_not_as_described_is_one_line(what, tiny_model, tmp_path):
    spoil, message = SPOILT[what]
    model = onnx.load(tiny_model())
    spoil(model)
    with pytest.raises(ModelError, match=message) as error:
        read_exported(saved(model, tmp_path))
    assert str(error.value).startswith(f"{tmp_path / 'model.onnx'}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: architecture(m, scale=4), r"no tensor upsampler.2.weight, expected \[64, 16, 3, 3\] for SAN x4"),
        (lambda m: architecture(m, scale=3), "upsampler.0.weight is"),
        (lambda m: architecture(m, groups=2), "no tensor groups.1"),
        (lambda m: architecture(m, blocks=10**9), "metadata cannot be read"),
        (lambda m: architecture(m, scale=5), "metadata cannot be read"),
        (lambda m: architecture(m, channels="16"), "metadata cannot be read"),
        (lambda m: architecture(m, value_range=float("nan")), "metadata cannot be read"),
        (lambda m: metadata(m, "sanrt.iterations", 6), "does not compute"),
        (lambda m: metadata(m, "sanrt.regions", 3), "sides of 4 px"),
        (lambda m: metadata(m, "sanrt.min_side", 400), "sides of 400 px"),
        (lambda m: metadata(m, "sanrt.multiple", 64), "multiples of 64"),
        (lambda m: metadata(m, "sanrt.precision", "int16"), "metadata says int16"),
        (lambda m: metadata(m, "sanrt.architecture", [1]), "metadata cannot be read"),
    ],
)
def test_a_description_that_does_not_fit_is_seen_without_digests_too(spoil, message, tiny_model, tmp_path):
    model = onnx.load(tiny_model())
    without_digests(model)
    spoil(model)
    with pytest.raises(ModelError, match=message):
        read_exported(saved(model, tmp_path))


def test_a_model_that_sanrt_0_1_exported_is_taken():
    exported = read_exported(OLD)
    assert not any(entry.key in NEW for entry in onnx.load(OLD).metadata_props)
    assert exported.weights()["head.weight"].shape == (8, 3, 3, 3)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.BF16])
@pytest.mark.parametrize("kind", [None, *QuantisedType])
def test_every_variant_that_sanrt_writes_is_taken(precision, kind, tiny_model, tmp_path):
    spec, weights = read_model(tiny_model())
    spec = replace(spec, quantisation=kind and Quantisation(kind, RANGES, RANGES))
    forms = [GraphOptions(precision, attention_width=16 if precision != Precision.FP32 else 0)]
    forms += [GraphOptions(precision, Attention.MULTI_HEAD, regions=k, requantised=True) for k in (1, 3)]
    models = [san_model(spec, weights, form) for form in forms]
    stages = ("head", "keys-values", "attend", "body.0", "gate.0", "join.0", "tail")
    models += [stage_model(replace(spec, precision=precision), weights, replace(forms[0], stage=each)) for each in stages]
    for model in models:
        read_exported(saved(model, tmp_path))


def halved(model):
    """Every float in fp16, the graph's input and output too."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            change(
                model, tensor.name, lambda a: a.clip(1e-7, None).astype(np.float16) if a.size == 1 else a.astype(np.float16)
            )
    for each in model.graph.node:
        for attribute in each.attribute:
            if each.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16


def stored_in_fp16(model):
    """fp16 weights, each turned to fp32 by a Cast that bears the weight's name."""
    for tensor in list(model.graph.initializer):
        if tensor.data_type == TensorProto.FLOAT and not tensor.name.startswith("const."):
            name, half = tensor.name, numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_fp16"))
            model.graph.node.append(helper.make_node("Cast", [f"{name}_fp16"], [name], to=TensorProto.FLOAT))


def converted_by_onnxruntime(model):
    """By the converter that comes with ONNX Runtime, as in onnxconverter-common."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model.CopyFrom(convert_float_to_float16(model, keep_io_types=True))


CONVERSIONS = (halved, stored_in_fp16, converted_by_onnxruntime)


@pytest.mark.parametrize("convert", CONVERSIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.filterwarnings("ignore")
def test_a_conversion_to_fp16_runs_as_the_fp32_model_does(convert, backend, tiny_model, tmp_path):
    model = onnx.load(tiny_model())
    convert(model)
    path, pixels = saved(model, tmp_path), np.random.default_rng(0).uniform(0, 255, (1, 3, 12, 17)).astype(np.float32)
    options = RunOptions(threads=1, precision=Precision.FP32)
    with load_backend(backend, tiny_model(), options) as usual, load_backend(backend, path, options) as half:
        assert 0 < np.abs(usual.infer(pixels) - half.infer(pixels)).max() < 3
    assert read_exported(path).precision == Precision.FP16


def test_fp64_is_taken_back_exactly(tiny_model, tmp_path):
    model = onnx.load(tiny_model())
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            change(model, tensor.name, lambda a: a.astype(np.float64))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for each in model.graph.node:
        if each.op_type == "Cast":
            each.attribute[0].i = TensorProto.DOUBLE
    _, weights = read_model(saved(model, tmp_path))
    for name, usual in read_model(tiny_model())[1].items():
        np.testing.assert_array_equal(weights[name], usual, strict=True)


def external(tiny_model, folder):
    path = folder / "model.onnx"
    onnx.save_model(onnx.load(tiny_model()), path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    return path


def test_weights_beside_the_file_are_taken_and_missing_ones_called_so(tiny_model, tmp_path):
    path = external(tiny_model, tmp_path)
    _, weights = read_model(path)
    for name, usual in read_model(tiny_model())[1].items():
        np.testing.assert_array_equal(weights[name], usual)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"external data weights.bin, with the weights, is missing"):
        read_model(path)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_weights_changed_behind_the_file_are_seen_in_the_next_run(backend, tiny_model, tmp_path):
    path = external(tiny_model, tmp_path)
    load_backend(backend, path, RunOptions(threads=1)).close()
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[4::64] = bytes(len(data[4::64]))
    (tmp_path / "weights.bin").write_bytes(data)
    with pytest.raises(ModelError, match="weights are not those"):
        load_backend(backend, path, RunOptions(threads=1))
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"weights\.bin"):
        load_backend(backend, path, RunOptions(threads=1))


def test_the_described_parameters_are_the_reference_network_s(live_network):
    for scale in (2, 3, 4, 8):
        net = live_network(scale)
        assert dict(net.arch.parameters()) == {name: tuple(t.shape) for name, t in net.state_dict().items()}


@pytest.fixture(scope="module")
def bundled_x2(tmp_path_factory):
    from sanrt.export.onnx import ExportOptions, export_onnx
    from sanrt.model.checkpoint import bundled_checkpoint, load_checkpoint

    path = tmp_path_factory.mktemp("bundled") / "san_x2.onnx"
    return export_onnx(load_checkpoint(bundled_checkpoint(2)), path, ExportOptions(check=False)).path


@pytest.mark.parametrize("convert", [lambda model: None, stored_in_fp16], ids=["fp32", "fp16"])
def test_bundled_weights_that_moved_are_seen_without_digests_too(convert, bundled_x2, tmp_path):
    for moved in (False, True):
        model = onnx.load(bundled_x2)
        without_digests(model)
        if moved:
            change(model, "groups.1.blocks.0.conv1.weight", lambda array: array * np.float32(1.01))
        convert(model)
        path = saved(model, tmp_path)
        if moved:
            with pytest.raises(
                ModelError, match=r"tensor groups\.1\.blocks\.0\.conv1\.weight is not that of the bundled weights"
            ):
                read_exported(path)
        else:
            assert read_exported(path).spec.architecture.scale == 2


def test_weights_that_16_bits_do_not_hold_are_no_int16(tiny_model, tmp_path, caplog, monkeypatch):
    from sanrt.errors import BackendError
    from sanrt.runtime.backends import native

    model = onnx.load(tiny_model(2))
    without_digests(model)

    def flipped(array):
        array = array.copy()
        array.reshape(-1)[7] = 2.0**16  # as by a bit of its exponent
        return array

    change(model, "groups.0.blocks.0.conv1.weight", flipped)
    path = saved(model, tmp_path)
    with pytest.raises(BackendError, match=r"groups\.0\.blocks\.0\.conv1\.weight has a weight more than 2048 times"):
        load_backend("native", path, RunOptions(threads=1, precision=Precision.INT16))
    monkeypatch.setattr(native, "chosen_precision", lambda: Precision.INT16)
    with load_backend("native", path, RunOptions(threads=1)) as backend:
        assert backend.spec.precision == Precision.FP32
    assert "computed in fp32" in caplog.text
    with load_backend("native", tiny_model(2), RunOptions(threads=1)) as backend:
        assert backend.spec.precision == Precision.INT16
