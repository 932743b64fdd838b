"""An exported ONNX, read and held against its own description: the one check behind every backend and command.

Backends run an ONNX's weights in graphs that sanrt writes, other tools run the file's own graph. Both give the same
picture only if the file's graph computes what `sanrt.model.graph` writes for the description in its metadata, so nodes,
types, shapes and constants are compared with that. fp32 that a tool made fp16 or fp64 is let through, and taken back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from sanrt.errors import ModelError, first_line, system_reason
from sanrt.model.bundled import shipped_weights
from sanrt.model.contract import STAGE_INPUTS
from sanrt.model.graph import Array, Weights, made_of_weights, san_model, stage_model, tensors_digest
from sanrt.model.spec import (
    DESCRIPTION_DIGEST,
    GRAPH_PRECISIONS,
    MIN_SIDE,
    STAGE,
    TENSORS_DIGEST,
    Attention,
    GraphOptions,
    ModelSpec,
    Precision,
    description_digest,
)

REMEDY = "make it again with `sanrt export`"
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
"""The types that fp32 weights may have been converted to, fp32 among them."""
HALF_ROUNDING, HALF_LEAST = 2.0**-10, 2.0**-23
"""Distance of fp16 from the fp32 value that it was made of: relatively, and near zero, where converters write 1e-7."""
PADDED_WIDTH = 16
"""Width of the inner attention in engines' graphs (`GraphOptions.attention_width`)."""


@dataclass(frozen=True)
class ExportedModel:
    """The content of an ONNX that was found to be what its description says."""

    spec: ModelSpec
    tensors: Mapping[str, Array]
    """Weights in the types in which sanrt writes them, by initializer."""
    halved: frozenset[str]
    """Those that the file has in fp16 in place of fp32."""
    precision: Precision
    """The precision that the file's own graph computes in: the spec's, or fp16 after a conversion."""

    def weights(self) -> dict[str, Array]:
        """float32 by the reference network's names; 8-bit weights as what they stand for."""
        return {name: self.restored(name) for name in self.tensors if not name.endswith(".scale")}

    def differing(self, weights: Weights) -> str | None:
        """The first initializer that is not what sanrt writes for these float32 weights; None where all are."""
        graph = san_model(self.spec, weights).graph
        made = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if made_of_weights(tensor.name)}
        for name, array in made.items():
            found = self.tensors[name]
            if not (near_in_half(found, array) if name in self.halved else np.array_equal(found, array)):
                return str(name)
        return None

    def restored(self, name: str) -> Array:
        """A weight as float32."""
        stored, scales = self.tensors[name], self.tensors.get(f"{name}.scale")
        return stored if scales is None else stored.astype(np.float32) * scales[:, None, None, None]


@dataclass(frozen=True)
class GraphTensor:
    """An input or output of an ONNX's graph."""

    name: str
    type: str
    """By NumPy's name: `float32`."""
    shape: tuple[int | str, ...]
    """Names stand for sides that are free."""


@dataclass(frozen=True)
class Interface:
    """What a program that runs an ONNX needs to know of its graph."""

    inputs: Sequence[GraphTensor]
    outputs: Sequence[GraphTensor]
    opsets: Mapping[str, int]
    """Versions of the operators by domain; the standard's domain is empty."""


class Unlike(Exception):
    """Something in an ONNX that its description does not allow, or something that it lacks."""


def read_model(path: Path) -> tuple[ModelSpec, dict[str, Array]]:
    """Spec and float32 weights of an exported fp32 ONNX; raises ModelError when it is not what it says.

    Weights that are stored in 8 bits come as what they stand for, and are stored as the same 8 bits when written again.
    The spec is that of graphs with float32 pictures of any size, whatever the file's own graph takes.
    """
    exported = read_exported(path)
    if exported.spec.precision != Precision.FP32:
        raise ModelError(
            f"{path}: its weights are {exported.spec.precision}, expected the fp32 model that `sanrt export` writes"
        )
    return exported.spec.open, exported.weights()


def read_exported(path: Path) -> ExportedModel:
    """Any ONNX that sanrt wrote, variants for backends among them; raises ModelError when it is not what its metadata says.

    fp32 may have been converted to fp16 or fp64, and weights moved to files beside it (ONNX's external data).
    """
    model = load_onnx(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    spec = ModelSpec.from_metadata(metadata, str(path))
    try:
        require_description(spec, metadata)
        sort_nodes(model.graph)
        stored = named_initializers(model.graph)
        expected = as_described(model.graph, stored, spec, metadata)
        tensors = taken_back(stored, expected.graph, spec)
        require_same_graph(model, stored, expected, spec)
        halved = frozenset(
            name
            for name, array in tensors.items()
            if array.dtype == np.float32 and stored[name].data_type == TensorProto.FLOAT16
        )
        if TENSORS_DIGEST in metadata and not halved and metadata[TENSORS_DIGEST] != json.dumps(tensors_digest(tensors)):
            raise Unlike("its weights are not those that it was exported with")
        converted = halved or any(casts_to(node) == TensorProto.FLOAT16 for node in model.graph.node)
        exported = ExportedModel(spec, tensors, halved, Precision.FP16 if converted else spec.precision)
        if TENSORS_DIGEST not in metadata or halved:
            require_shipped(exported, metadata)
        return exported
    except Unlike as error:
        raise ModelError(f"{path}: {error}; {REMEDY}") from error
    except Exception as error:  # onnx has many kinds for what is no valid graph, and no public base
        raise ModelError(f"{path}: not a valid ONNX graph ({first_line(error)}); {REMEDY}") from error


def read_interface(path: Path) -> Interface:
    """Inputs, outputs and opsets, as they stand in the file; raises ModelError when it cannot be read."""
    model = load_onnx(path)
    inputs, outputs = ([graph_tensor(value) for value in values] for values in (model.graph.input, model.graph.output))
    return Interface(inputs, outputs, {each.domain: each.version for each in model.opset_import})


def graph_tensor(value: onnx.ValueInfoProto) -> GraphTensor:
    """The facts of an input or output."""
    kind = value.type.tensor_type
    sides = tuple(side.dim_param or side.dim_value for side in kind.shape.dim)
    return GraphTensor(value.name, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, sides)


def load_onnx(path: Path) -> onnx.ModelProto:
    """An ONNX with its external data; raises ModelError when it cannot be read, or is none."""
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({system_reason(error)}); make a model with `sanrt export --scale 4`"
        ) from error
    except Exception as error:  # protobuf's DecodeError has no public home
        raise ModelError(
            f"{path}: not an ONNX file, or a damaged one; make it again with `sanrt export --scale 4`"
        ) from error
    for tensor in model.graph.initializer:
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), None)
        if tensor.data_location == TensorProto.EXTERNAL and location and not (path.parent / location).is_file():
            raise ModelError(
                f"{path}: its external data {location}, with the weights, is missing; expected it in the same folder"
            )
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise ModelError(f"{path}: its external data cannot be read ({first_line(error)}); {REMEDY}") from error
    return model


def require_shipped(exported: ExportedModel, metadata: Mapping[str, str]) -> None:
    """Raise Unlike for weights that no digest vouches for and that are not the bundled ones that the description names."""
    spec = exported.spec
    if spec.precision is not Precision.FP32 or STAGE in metadata or not (shipped := shipped_weights(spec.weights_digest)):
        return
    if shipped.spec.architecture == spec.architecture and (name := exported.differing(shipped.tensors)):
        raise Unlike(f"tensor {name} is not that of the bundled weights, of which it says it is made")


def require_description(spec: ModelSpec, metadata: Mapping[str, str]) -> None:
    """Raise Unlike for metadata that sanrt did not write so, or that was edited since."""
    if DESCRIPTION_DIGEST in metadata and metadata[DESCRIPTION_DIGEST] != json.dumps(description_digest(metadata)):
        raise Unlike("its sanrt.* metadata was changed after the export")
    if spec.precision not in GRAPH_PRECISIONS:
        raise Unlike(f"its metadata says {spec.precision}, expected {', '.join(GRAPH_PRECISIONS)}")
    if (spec.min_side, spec.multiple) != (max(1, spec.regions * MIN_SIDE // 2), 1):
        raise Unlike(
            f"its metadata says sides of {spec.min_side} px or more, multiples of {spec.multiple},"
            f" with {spec.regions} x {spec.regions} regions; expected {spec.regions * MIN_SIDE // 2} and 1"
        )


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put nodes after those that they read from; converters append theirs at the end, and ONNX Runtime does not mind."""
    maker = {output: i for i, node in enumerate(graph.node) for output in node.output}
    order = TopologicalSorter({i: [maker[name] for name in n.input if name in maker] for i, n in enumerate(graph.node)})
    nodes = [graph.node[i] for i in order.static_order()]
    del graph.node[:]
    graph.node.extend(nodes)


def named_initializers(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    """A graph's initializers by sanrt's names: one of any name that a Cast turns into a weight counts as that weight."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    if len(stored) < len(graph.initializer):
        raise Unlike("two of its tensors have the same name")
    for node in graph.node:
        if casts_to(node) in FLOATS and node.input[0] in stored and made_of_weights(node.output[0]):
            stored[node.output[0]] = stored.pop(node.input[0])
    return stored


def require_parameters(graph: onnx.GraphProto, stored: Mapping[str, TensorProto], spec: ModelSpec) -> None:
    """Raise Unlike unless the whole network is there, before anything of the described size is made."""
    for name, shape in spec.architecture.parameters():
        if name not in stored:
            raise Unlike(f"no tensor {name}, expected {list(shape)} for {spec.architecture.name}")
        require_shape(stored[name], shape, name, spec)
    if len(graph.node) < spec.regions**2 + spec.iterations:
        raise Unlike(f"{len(graph.node)} nodes, too few for {spec.regions} x {spec.regions} regions")


def require_shape(tensor: TensorProto, shape: Sequence[int], name: str, spec: ModelSpec) -> None:
    """Raise Unlike for a tensor of another shape."""
    if list(tensor.dims) != list(shape):
        raise Unlike(f"tensor {name} is {list(tensor.dims)}, expected {list(shape)} for {spec.architecture.name}")


def as_described(
    graph: onnx.GraphProto, stored: Mapping[str, TensorProto], spec: ModelSpec, metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """The graph that sanrt writes for a description, with zeros for weights; the variant is read off the graph."""
    stage = json.loads(metadata.get(STAGE, '""'))
    kind, _, group = str(stage).partition(".")
    if stage and not (kind in STAGE_INPUTS and int(group or 0) < spec.architecture.groups):
        raise Unlike(f"its metadata says stage {stage!r}, which the network has not")
    if not stage and spec.precision == Precision.FP32:
        require_parameters(graph, stored, spec)
    kinds = {node.op_type for node in graph.node}
    inner = [stored[name].dims[:1] for name in ("attention.query.bias", "attention.value.bias") if name in stored]
    options = GraphOptions(
        precision=spec.precision,
        attention=Attention.MULTI_HEAD if "MultiHeadAttention" in kinds else Attention.MATMUL,
        attention_width=PADDED_WIDTH if [PADDED_WIDTH] in inner else 0,
        regions=spec.regions,
        kernels="soca_gate" in kinds,
        requantised=any(tensor.data_type == TensorProto.UINT8 for tensor in stored.values()),
        stage=stage,
    )
    zeros = {name: np.zeros(shape, np.float32) for name, shape in spec.architecture.parameters()}
    return (stage_model if stage else san_model)(spec, zeros, options)


def taken_back(stored: Mapping[str, TensorProto], expected: onnx.GraphProto, spec: ModelSpec) -> dict[str, Array]:
    """The weights in the types that sanrt writes; raises Unlike for any initializer that is missing, unknown or wrong."""
    wanted = {tensor.name: tensor for tensor in expected.initializer}
    if unknown := sorted(stored.keys() - wanted.keys()):
        raise Unlike(f"unknown tensor {unknown[0]}, expected none of that name for {spec.architecture.name}")
    weights = {}
    for name, model in wanted.items():
        if name not in stored:
            raise Unlike(f"no tensor {name}, expected {list(model.dims)} for {spec.architecture.name}")
        tensor = stored[name]
        require_shape(tensor, model.dims, name, spec)
        if tensor.data_type != model.data_type and not (model.data_type == TensorProto.FLOAT and tensor.data_type in FLOATS):
            types = [TensorProto.DataType.Name(each) for each in (tensor.data_type, model.data_type)]
            raise Unlike(f"tensor {name} is {types[0]}, expected {types[1]}")
        try:
            found, constant = numpy_helper.to_array(tensor), numpy_helper.to_array(model)
        except (ValueError, TypeError) as error:
            raise Unlike(f"tensor {name} is damaged ({first_line(error)})") from error
        if made_of_weights(name):
            weights[name] = found.astype(constant.dtype)
            if not np.isfinite(weights[name]).all():
                raise Unlike(f"tensor {name} holds NaN or infinity, expected numbers")
        elif not same_values(found, constant):
            raise Unlike(f"the constant {name} has another value, expected what sanrt writes for {spec.architecture.name}")
    return weights


def same_values(found: Array, expected: Array) -> bool:
    """Whether an array holds the expected values, as exactly as its own type can."""
    if found.dtype == np.float16 != expected.dtype:
        return near_in_half(found.astype(np.float32), expected)
    return np.array_equal(found, expected)


def near_in_half(found: Array, expected: Array) -> bool:
    """Whether fp32 that was fp16 may have been made of the expected fp32."""
    return np.allclose(found, expected, HALF_ROUNDING, HALF_LEAST)


def require_same_graph(model: onnx.ModelProto, stored: Collection[str], expected: onnx.ModelProto, spec: ModelSpec) -> None:
    """Raise Unlike unless a model's graph computes the expected one's outputs, by the same nodes from the same tensors."""
    onnx.checker.check_model(model, full_check=True)
    opsets, known = ({(o.domain, o.version) for o in each.opset_import} for each in (model, expected))
    if model.ir_version != expected.ir_version or not known <= opsets or model.functions:
        raise Unlike(f"its opsets are {sorted(opsets)}, expected {sorted(known)} with IR version {expected.ir_version}")
    if (found := signature(model.graph, stored)) != (usual := signature(expected.graph, stored)):
        raise Unlike(f"its inputs and outputs are {found}, expected {usual}")
    marks, wanted = fingerprints(model.graph, stored), fingerprints(expected.graph, stored)
    if any(marks[output.name] != wanted[output.name] for output in expected.graph.output):
        there = set(marks.values())
        first = next(name for name, mark in wanted.items() if mark not in there)
        raise Unlike(f"its graph does not compute {first} as sanrt writes it for {spec.architecture.name}")


def signature(graph: onnx.GraphProto, stored: Collection[str]) -> tuple[Any, ...]:
    """Names of a graph's inputs and outputs, the fixed sizes of its inputs, and whether all of their types are floats."""
    inputs = [value for value in graph.input if value.name not in stored]
    types = {value.name: value.type.tensor_type.elem_type for value in (*inputs, *graph.output)}
    sizes = [[axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in inputs]
    return {name: "float" if kind in FLOATS else kind for name, kind in types.items()}, sizes


def fingerprints(graph: onnx.GraphProto, stored: Collection[str]) -> dict[str, str]:
    """Every tensor of a graph -> what it is computed by: digests of node and inputs, initializers and inputs by name.

    Names and the order of nodes do not count, nor do Casts between floats, which conversions to fp16 strew about.
    """
    marks = {"": "", **{value.name: f"input {value.name}" for value in graph.input}, **{name: name for name in stored}}
    for node in graph.node:
        inputs = [marks.get(name, "nothing") for name in node.input]
        if casts_to(node) in FLOATS:
            marks.setdefault(node.output[0], inputs[0])
            continue
        attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
        facts = repr((node.domain, node.op_type, node.overload, attributes, inputs))
        digest = hashlib.sha256(facts.encode()).hexdigest()
        marks.update((name, f"{digest}.{i}") for i, name in enumerate(node.output))
    return marks


def casts_to(node: onnx.NodeProto) -> int | None:
    """The type that a Cast gives; None for other nodes."""
    return next((a.i for a in node.attribute if a.name == "to"), None) if node.op_type == "Cast" else None
