"""Intermediate tensors of a graph, computed by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sanrt.arrays import Array


class Probe:
    """A session that gives the named tensors of a graph instead of its outputs; a bf16 graph is emulated."""

    def __init__(self, model: onnx.ModelProto, names: Sequence[str]) -> None:
        import onnxruntime

        exposed = onnx.ModelProto()
        exposed.CopyFrom(model)
        del exposed.graph.output[:]
        exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        # Rewriting graphs for speed changes 8-bit rounding (and drops Relu before fp8, see the backend).
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        if any(tensor.data_type == TensorProto.BFLOAT16 for tensor in model.graph.initializer):
            exposed = computed_in_fp32(exposed)
            # Optimisers take the pairs of casts that do the rounding for redundant.
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        content = exposed.SerializeToString()
        self.session: Any = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
        self.names, self.input_type = names, input_type(self.session)

    def __call__(self, x: Array) -> dict[str, Array]:
        """float32 (B, 3, H, W) -> the tensors by name, as float32."""
        outputs = self.session.run(list(self.names), {"input": x.astype(self.input_type)})
        return {name: np.asarray(y, np.float32) for name, y in zip(self.names, outputs, strict=True)}


def input_type(session: Any) -> Any:
    """NumPy's type of a graph's input: float32, unless a tool converted the whole graph."""
    return {"tensor(float16)": np.float16, "tensor(double)": np.float64}.get(session.get_inputs()[0].type, np.float32)


def computed_in_fp32(model: onnx.ModelProto) -> onnx.ModelProto:
    """A bf16 graph for ONNX Runtime, whose CPU has no kernels for it: nodes compute in fp32, results are rounded."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    rounded = {v.name for v in inferred.graph.value_info if v.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    nodes = []
    for node in model.graph.node:
        name = node.output[0]
        nodes.append(node)
        if node.op_type == "Cast":
            node.attribute[0].i = TensorProto.FLOAT
        if name in rounded:
            node.output[0] = f"{name}.exact"
            nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.bf16"], to=TensorProto.BFLOAT16))
            nodes.append(helper.make_node("Cast", [f"{name}.bf16"], [name], to=TensorProto.FLOAT))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    return model
