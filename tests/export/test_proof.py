"""Layer lists in the forms that TensorRT-RTX logs and TensorRT's inspector writes, for the graph of one small network."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

from sanrt.errors import BuildError
from sanrt.export.proof import Layer, check_proof, layers_from_inspector, layers_from_log, prove
from sanrt.model.graph import san_model
from sanrt.model.spec import Architecture, GraphOptions, ModelSpec, Precision

ARCH = Architecture(2, 1, 1, 16, 8)
LOG = "\n".join(
    [
        "Layers:",
        "Name: conv_U1_myl1_4, LayerType: correlation, "
        "Inputs: [ { Name: a, Dimensions: [-1,16,-1,-1], Strides: [1,1], Datatype: Half, Format: (NHWC) Channel major }], "
        "Constants: [ { Name: w, Dimensions: [16,16,3,3], Datatype: BFloat16, Format: (NHWC) x }, "
        "{ Name: one, Dimensions: [1], Datatype: Float, Format: y }, { Name: b, Dimensions: [1,16,1,1], Datatype: Half }], "
        "Outputs: [ { Name: o, Dimensions: [-1], Datatype: Float, Format: q }], TacticName: t, StreamId: 0, "
        "Metadata: [ONNX Layer: first][ONNX Layer: first.relu]",
        "Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], "
        "Outputs: [ { Name: n, Location: Device }], Metadata: ",
        "",
        "Bindings:",
        "Name: input, Shape: x",
    ]
)


def test_layers_are_read_from_a_build_log():
    layers = layers_from_log(["Building", "a LayerType: mentioned, LayerType: elsewhere", LOG])
    assert layers == [
        Layer("conv_U1_myl1_4", frozenset({"first", "first.relu"}), ("fp16",), ("bf16",), ("fp32",)),
        Layer("[ShapeHostToDeviceCopy 0]", frozenset(), (), (), ()),
    ]


@pytest.mark.parametrize(
    "tensor",
    [
        {"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"},
        {"Format/Datatype": "Half"},
        {"Format": "Channel major format", "Datatype": "Half"},
    ],
)
@pytest.mark.parametrize(
    "weights",
    [{"Weights": {"Type": "Half", "Count": 9}}, {"Constants": [{"Dimensions": [16, 16, 3, 3], "Datatype": "Half"}]}, {}],
)
def test_layers_are_read_from_the_inspector_of_every_version(tensor: dict[str, str], weights: dict[str, object]):
    metadata = "[ONNX Layer: first]\u001e[ONNX Layer: first.relu]"
    facts = {"Name": "conv", "LayerType": "x", "Inputs": [tensor], "Outputs": [tensor], "Metadata": metadata, **weights}
    (layer,) = layers_from_inspector(json.dumps({"Layers": [facts, "a name only"], "Bindings": []}))
    assert layer.nodes == {"first", "first.relu"}
    assert (layer.inputs, layer.outputs, layer.convolves_in) == (("fp16",), ("fp16",), ("fp16",))


def typed_model(precision: Precision = Precision.FP16) -> onnx.ModelProto:
    torch = pytest.importorskip("torch")
    from sanrt.model.san import SAN

    torch.manual_seed(0)
    weights = {name: tensor.numpy() for name, tensor in SAN(ARCH).state_dict().items()}
    assert all(np.isfinite(w).all() for w in weights.values())
    return san_model(ModelSpec(ARCH, "", "", 5), weights, GraphOptions(precision=precision, attention_width=16))


def faithful_layers(model: onnx.ModelProto) -> list[Layer]:
    """One layer for each node, the three of an attention region together, as a good build has them."""
    types = {t.name: {1: "fp32", 10: "fp16", 16: "bf16"}.get(t.data_type, "") for t in model.graph.initializer}
    layers: dict[str, Layer] = {}
    for node in model.graph.node:
        region, _, part = node.name.rpartition(".")
        if part in ("scores", "softmax", "attended"):
            name = f"_gemm_mha_v2_myl1_{region}"
            nodes = layers[name].nodes if name in layers else frozenset()
            layers[name] = Layer(name, nodes | {node.name}, ("fp16",), (), ("fp16",))
        else:
            kind = types[node.input[1]] if node.op_type == "Conv" else "fp32"
            weights = (kind,) if node.op_type == "Conv" else ()
            layers[node.name] = Layer(node.name, frozenset({node.name}), (kind,), weights, (kind,))
    return list(layers.values())


def altered(layers: list[Layer], name: str, **changes: object) -> list[Layer]:
    assert any(layer.name == name for layer in layers)
    return [replace(layer, **changes) if layer.name == name else layer for layer in layers]


def test_a_faithful_engine_is_proven():
    model = typed_model()
    proof = check_proof(prove(model, faithful_layers(model), "test"), Precision.FP16, False, False)
    assert proof.attention == 8
    assert proof.kernels == ["_gemm_mha_v2"]
    assert proof.convolutions["fp16"] > 30
    assert proof.soca_layers > 10
    assert not proof.remarks


CONV = "groups.0.blocks.0.conv1"
STEP = "groups.0.soca.step3.y"


@pytest.mark.parametrize(
    ("name", "changes", "message", "allowed"),
    [
        (CONV, {"weights": ("fp32",)}, rf"1 convolutions not in fp16: {CONV}; .*allow_precision=True", "precision"),
        (STEP, {"outputs": ("fp16",)}, rf"1 layers of SOCA's square root not in fp32: {STEP}", "precision"),
    ],
)
def test_another_precision_fails_unless_it_is_allowed(name: str, changes: dict[str, object], message: str, allowed: str):
    model = typed_model()
    proof = prove(model, altered(faithful_layers(model), name, **changes), "test")
    with pytest.raises(BuildError, match=message):
        check_proof(proof, Precision.FP16, False, True)
    assert check_proof(proof, Precision.FP16, True, False).remarks


def split_attention(layers: list[Layer]) -> list[Layer]:
    """The first region's attention in two layers."""
    whole = next(layer for layer in layers if "mha" in layer.name)
    scores = {node for node in whole.nodes if node.endswith(".scores")}
    parts = [
        replace(whole, name="gemm_1", nodes=frozenset(scores)),
        replace(whole, name="gemm_2", nodes=whole.nodes - scores),
    ]
    return [*(layer for layer in layers if layer is not whole), *parts]


def test_unfused_attention_fails_unless_it_is_allowed_or_fp32():
    model = typed_model()
    proof = prove(model, split_attention(faithful_layers(model)), "test")
    with pytest.raises(BuildError, match=r"1 of 8 attention regions are not one fused kernel: attention\.in\.region\d-\d"):
        check_proof(proof, Precision.FP16, True, False)
    assert "allowed" in check_proof(proof, Precision.FP16, False, True).remarks[0]
    assert "none for fp32" in check_proof(proof, Precision.FP32, False, False).remarks[0]


@pytest.mark.parametrize("lost", [CONV, STEP])
def test_a_list_that_does_not_cover_the_graph_proves_nothing_and_is_a_remark_only_where_allowed(lost: str):
    model = typed_model()
    layers = [layer for layer in faithful_layers(model) if layer.name != lost]
    proof = prove(model, layers, "engine inspector")
    with pytest.raises(
        BuildError, match=rf"has 1 .*its list of {len(layers)} layers \(engine inspector\) does not name: {lost};"
    ):
        check_proof(proof, Precision.FP16, False, True)
    (remark,) = check_proof(proof, Precision.FP16, True, False).remarks
    assert "does not name (allowed)" in remark


def test_one_bad_profile_is_enough():
    model = typed_model()
    layers = faithful_layers(model)
    second = [replace(layer, name=f"{layer.name}.2") for layer in altered(layers, CONV, weights=("bf16",))]
    assert prove(model, [*layers, *second], "test").wrong_convolutions == [CONV]
