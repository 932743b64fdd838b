"""Exported graphs by their own inputs and outputs: bytes or floats, of open or fixed sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from sanrt.arrays import Array
from sanrt.export.parity import Tolerance
from sanrt.export.tensors import input_type
from sanrt.model.spec import ModelSpec, PixelLayout

ROUNDED = Tolerance(max_abs=1.0, min_psnr=60.0, y_psnr_drop=0.0)
"""Outputs that were rounded to bytes may differ by one where the values before lay on either side of a half."""


def opened(model: onnx.ModelProto) -> bytes:
    """A graph with the same nodes, whose inputs and outputs are of any size: a fixed one may be too large to run here."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for value in (*made.graph.input, *made.graph.output):
        channels = 3 if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8 else 1
        for number, axis in enumerate(value.type.tensor_type.shape.dim):
            if number != channels:
                axis.dim_param = f"{value.name}.{number}"
    content: bytes = made.SerializeToString()
    return content


def call_graph(session: Any, spec: ModelSpec, x: Array) -> Array:
    """An ONNX Runtime session of a graph of this spec's layout, called with float32 (B, 3, H, W); its output likewise.

    x: 0..value_range; whole bytes where the layout is of bytes.
    """
    if spec.layout is PixelLayout.FLOAT_NCHW:
        y: Array = session.run(None, {"input": x.astype(input_type(session))})[0]
        return y.astype(np.float32)
    unit = spec.architecture.value_range / 255
    given = np.rint(x.transpose(0, 2, 3, 1) / unit).astype(np.uint8)
    made: Array = session.run(None, {"input": given})[0].transpose(0, 3, 1, 2).astype(np.float32) * np.float32(unit)
    return made


def as_given(y: Array, spec: ModelSpec) -> Array:
    """A reference output as a graph of this spec gives it: clipped and rounded where the layout is of bytes."""
    if spec.layout is PixelLayout.FLOAT_NCHW:
        return y
    unit = spec.architecture.value_range / 255
    rounded: Array = np.rint((y / unit).clip(0, 255)).astype(np.float32) * np.float32(unit)
    return rounded


def layout_tolerance(usual: Tolerance, spec: ModelSpec) -> Tolerance:
    """The tolerance of a type, or the wider one of bytes."""
    if spec.layout is PixelLayout.FLOAT_NCHW:
        return usual
    return replace(usual, max_abs=max(usual.max_abs, ROUNDED.max_abs), min_psnr=min(usual.min_psnr, ROUNDED.min_psnr))
