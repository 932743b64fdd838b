"""Intermediate tensors of a graph, computed by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

Array = npt.NDArray[np.float32]


class Probe:
    """A session that gives the named tensors of a graph instead of its outputs."""

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
        content = exposed.SerializeToString()
        self.session: Any = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
        self.names = names

    def __call__(self, x: Array) -> dict[str, Array]:
        """float32 (B, 3, H, W) -> the tensors by name, as float32."""
        outputs = self.session.run(list(self.names), {"input": x})
        return {name: np.asarray(y, np.float32) for name, y in zip(self.names, outputs, strict=True)}
