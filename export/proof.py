"""The proof of a built engine: its layer list, held against the graph that it was built from."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx

from sanrt.errors import BuildError
from sanrt.model.spec import Precision
from sanrt.runtime.artifacts.engines import Proof
from sanrt.wording import option

DATATYPES = {
    "Half": "fp16",
    "FP16": "fp16",
    "BFloat16": "bf16",
    "BF16": "bf16",
    "Float": "fp32",
    "FP32": "fp32",
    "Int8": "int8",
    "INT8": "int8",
    "FP8": "fp8",
}
"""TensorRT's words for element types, in its log and in the inspector of each version."""
DATATYPE = re.compile(r"\b(" + "|".join(DATATYPES) + r")\b")
NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
ONNX_NAMES = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.FLOAT8E4M3FN: "fp8",
}
SOCA_ROOT = re.compile(r"groups\.\d+\.soca\.(flat|mean|centred|scatter|covariance|diagonal|trace.*|step.*|root|z)$")
"""Nodes of SOCA's statistics and square root."""
FUSED_PARTS = ("scores", "softmax", "attended")
"""The three nodes that one attention kernel replaces, after the region's prefix."""


@dataclass(frozen=True)
class Layer:
    """One layer of an engine; element types in our words (`fp16`)."""

    name: str
    nodes: frozenset[str]
    """ONNX nodes it came from."""
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    """Types of constants with four dimensions: convolution weights."""
    outputs: tuple[str, ...]

    @property
    def convolves_in(self) -> tuple[str, ...]:
        """Types that a convolution in this layer may have: its weights', or where none are listed its inputs'."""
        return self.weights or self.inputs


def layers_from_log(messages: Iterable[str]) -> list[Layer]:
    """Layers of every profile, from the detailed layer list in a verbose build log."""
    lists = [message for message in messages if message.lstrip().startswith("Layers:")]
    lines = [line for message in lists for line in message.splitlines() if ", LayerType: " in line]
    return [layer_from_line(line) for line in lines]


def layer_from_line(line: str) -> Layer:
    """`Name: N, LayerType: T, Inputs: [{...}, ...], Constants: [...], Outputs: [...], ..., Metadata: [ONNX Layer: x]...`."""

    def tensors(part: str) -> list[str]:
        listed = re.search(part + r": \[((?:[ ,]*\{[^{}]*\})*)\]", line)
        return re.findall(r"\{([^{}]*)\}", listed[1]) if listed else []

    def types(descriptions: Iterable[str]) -> tuple[str, ...]:
        return tuple(filter(None, map(datatype, descriptions)))

    weights = [t for t in tensors("Constants") if re.search(r"Dimensions: \[(?!1,)\d+,\d+,\d+,\d+\]", t)]
    name = line.partition(", LayerType: ")[0].removeprefix("Name: ")
    return Layer(name, frozenset(NODE.findall(line)), types(tensors("Inputs")), types(weights), types(tensors("Outputs")))


def datatype(text: str) -> str | None:
    """The element type that a tensor's description names, in our words."""
    stated = re.search(r"Datatype: (\w+)", text)
    found = DATATYPE.search(stated[1] if stated else text)
    return DATATYPES[found[1]] if found else None


def layers_from_inspector(text: str) -> list[Layer]:
    """Layers from an engine inspector's JSON; both the layout of TensorRT 10 and that of 11."""
    layers = [layer for layer in json.loads(text).get("Layers", []) if isinstance(layer, dict)]
    return [layer_from_json(layer) for layer in layers]


def layer_from_json(facts: Mapping[str, Any]) -> Layer:
    """One entry of the inspector's `Layers`."""

    def types(tensors: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
        words = (str(t.get("Datatype") or t.get("Format/Datatype") or "") for t in tensors)
        return tuple(filter(None, map(datatype, words)))

    weights = [t for t in facts.get("Constants", []) if len(t.get("Dimensions", [])) == 4 and t["Dimensions"][0] > 1]
    listed = datatype(str(facts.get("Weights", {}).get("Type", "")))
    return Layer(
        facts["Name"],
        frozenset(NODE.findall(facts.get("Metadata", ""))),
        types(facts.get("Inputs", [])),
        (listed,) if listed else types(weights),
        types(facts.get("Outputs", [])),
    )


def prove(model: onnx.ModelProto, layers: Sequence[Layer], source: str, memory: int | None = None) -> Proof:
    """Hold an engine's layers against the typed graph."""
    by_node: dict[str, list[Layer]] = {}
    for layer in layers:
        for node in layer.nodes:
            by_node.setdefault(node, []).append(layer)
    convolutions = convolution_types(model)
    needed = [node.name for node in model.graph.node if node.op_type in ("Conv", "MatMul")]
    wrong = [name for name, kind in convolutions.items() if name in by_node and not convolves(kind, by_node[name])]
    soca = {layer.name: layer for name, group in by_node.items() if SOCA_ROOT.match(name) for layer in group}
    regions = [
        n.name.removesuffix("scores") for n in model.graph.node if n.op_type == "MatMul" and n.name.endswith(".scores")
    ]
    fused = {region: fused_kernel(region, by_node) for region in regions}
    return Proof(
        source=source,
        layers=len(layers),
        convolutions=dict(Counter(convolutions.values())),
        wrong_convolutions=wrong,
        soca_layers=len(soca),
        wrong_soca=[name for name, layer in soca.items() if not computes_fp32(layer)],
        attention=len(regions),
        unfused_attention=[region.rstrip(".") for region, kernel in fused.items() if kernel is None],
        kernels=sorted({kernel for kernel in fused.values() if kernel}),
        memory=memory,
        unlisted=[name for name in needed if name not in by_node],
    )


def merge_proofs(proofs: Sequence[Proof]) -> Proof:
    """The findings of all stages as one; the stages run one after another, so the largest one's memory counts."""
    if len(proofs) == 1:
        return proofs[0]

    def joined(name: str) -> list[str]:
        return [layer for each in proofs for layer in getattr(each, name)]

    return Proof(
        source=proofs[0].source,
        layers=sum(each.layers for each in proofs),
        convolutions=dict(sum((Counter(each.convolutions) for each in proofs), Counter())),
        wrong_convolutions=joined("wrong_convolutions"),
        soca_layers=sum(each.soca_layers for each in proofs),
        wrong_soca=joined("wrong_soca"),
        attention=sum(each.attention for each in proofs),
        unfused_attention=joined("unfused_attention"),
        kernels=sorted(set(joined("kernels"))),
        unlisted=joined("unlisted"),
        memory=max((each.memory for each in proofs if each.memory is not None), default=None),
    )


def convolves(kind: str, layers: Sequence[Layer]) -> bool:
    """Whether a convolution runs in its type: in every layer that has it, or in 8 bits in one, whose sums others scale."""
    ran = [kind in layer.convolves_in for layer in layers]
    return any(ran) if kind in ("int8", "fp8") else all(ran)


def convolution_types(model: onnx.ModelProto) -> dict[str, str]:
    """The type of each convolution in the graph, by node name: its weight's, as it is stored."""
    types = {t.name: ONNX_NAMES.get(t.data_type, "other") for t in model.graph.initializer}
    restored = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in types]
    types |= {node.output[0]: types[node.input[0]] for node in restored}
    return {node.name: types[node.input[1]] for node in model.graph.node if node.op_type == "Conv"}


def fused_kernel(region: str, by_node: Mapping[str, Sequence[Layer]]) -> str | None:
    """The kernel that computes all of a region's attention in every profile; None where several layers do."""
    groups = [by_node.get(region + part, []) for part in FUSED_PARTS]
    layers = {layer.name: layer for group in groups for layer in group}
    nodes = {region + part for part in FUSED_PARTS}
    if not layers or any(not nodes <= layer.nodes for layer in layers.values()):
        return None
    return re.sub(r"_myl\d+.*", "", next(iter(layers)))


def computes_fp32(layer: Layer) -> bool:
    """Whether everything a layer of SOCA's root puts out is fp32 (the first one reads the features' type).

    A layer that ends a residual block too, as those after 8-bit convolutions do, or that cuts off a tile's halo, also puts
    out the features themselves.
    """
    ends_block = any(re.search(r"\.(features|out|cropped)$", node) for node in layer.nodes)
    return "fp32" in layer.outputs if ends_block else all(kind == "fp32" for kind in layer.outputs)


def check_proof(proof: Proof, precision: Precision, allow_precision: bool, allow_unfused_attention: bool) -> Proof:
    """Raise BuildError naming the layers that are not as asked for; what is allowed, or cannot be, becomes a remark."""
    remarks = []
    for layers, what in (
        (proof.wrong_convolutions, f"convolutions not in {precision}"),
        (proof.wrong_soca, "layers of SOCA's square root not in fp32"),
        (proof.unlisted, f"convolutions and products that its list of {proof.layers} layers ({proof.source}) does not name"),
    ):
        if layers and not allow_precision:
            raise BuildError(
                f"the engine has {len(layers)} {what}: {shorten(layers)}; accept them with {option('allow-precision', True)}"
            )
        remarks += [f"{len(layers)} {what} (allowed)"] if layers else []
    if proof.unfused_attention:
        unfused = f"{len(proof.unfused_attention)} of {proof.attention} attention regions are not one fused kernel"
        if precision == Precision.FP32:
            remarks.append(f"{unfused}: TensorRT has none for fp32")
        elif not allow_unfused_attention:
            raise BuildError(
                f"{unfused}: {shorten(proof.unfused_attention)}; TensorRT fuses only large ones: give a larger "
                f"{option('max')}, "
                f"or accept the memory they need with {option('allow-unfused-attention', True)}"
            )
        else:
            remarks.append(f"{unfused} (allowed)")
    return replace(proof, remarks=remarks)


def shorten(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
