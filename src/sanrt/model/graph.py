"""SAN as an ONNX graph, written node by node from weights and an architecture. Imports onnx, no torch.

The graph is written rather than traced, so its tensors have stable names, its shapes stay dynamic, and the variants a
backend wants (precision, padded or fused attention, more regions, single stages for streaming) are options of one
writer instead of surgery on a file. `sanrt export` holds it against the PyTorch reference every time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from sanrt.model.contract import MIN_TRACE, STAGE_INPUTS, STAGE_MAPS
from sanrt.model.spec import (
    DESCRIPTION_DIGEST,
    MIN_SIDE,
    STAGE,
    TENSORS_DIGEST,
    Attention,
    GraphOptions,
    ModelSpec,
    PixelLayout,
    Precision,
    QuantisedType,
    description_digest,
)

OPSET = 22
"""The first opset whose convolutions take bfloat16."""
IR_VERSION = 10

TYPED_DIVISOR = 16.0
"""Divisor of queries and keys in fp16 and bf16: scores up to 16 million fit, and TensorRT still fuses the attention."""

ONNX_TYPES = {
    Precision.FP32: TensorProto.FLOAT,
    Precision.FP16: TensorProto.FLOAT16,
    Precision.BF16: TensorProto.BFLOAT16,
}

QUANTISED_TYPES = {QuantisedType.INT8: TensorProto.INT8, QuantisedType.FP8: TensorProto.FLOAT8E4M3FN}
QUANTISED_LARGEST = {QuantisedType.INT8: 127.0, QuantisedType.FP8: 448.0}
"""int8's -128 is left out: symmetric."""

Array = npt.NDArray[Any]
Weights = Mapping[str, Array]
"""float32 arrays by the reference network's parameter names."""


class GraphWriter:
    """Nodes, constants and weights of one graph; every method returns the name of the tensor it made."""

    def __init__(self, spec: ModelSpec, weights: Weights, options: GraphOptions) -> None:
        self.arch, self.iterations, self.quantisation = spec.architecture, spec.iterations, spec.quantisation
        self.weights, self.options = weights, options
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    # --- plumbing -----------------------------------------------------------------------------------------------

    def op(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Append one node whose only output carries the node's name."""
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A shared small constant; equal values share one initializer."""
        array = np.asarray(value, dtype)
        name = f"const.{array.dtype}." + "x".join(map(str, array.shape)) + "." + "_".join(f"{v:g}" for v in array.flat)
        self.initializers.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def eye(self, factor: float) -> str:
        """factor * I, C x C, fp32."""
        name = f"const.eye.{factor:g}"
        array = (factor * np.eye(self.arch.channels)).astype(np.float32)
        self.initializers.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, array: Array | None = None, precision: Precision | None = None) -> str:
        """A parameter (or a padded version of it) in the given precision, the graph's by default."""
        dtype = helper.tensor_dtype_to_np_dtype(ONNX_TYPES[precision or self.options.precision])
        return self.add((self.weights[name] if array is None else array).astype(dtype), name)

    def cast(self, x: str, precision: Precision, name: str) -> str:
        """x in `precision`; no node where the graph is that precision already."""
        if self.options.precision == Precision.FP32:
            return x
        return self.op("Cast", [x], name, to=ONNX_TYPES[precision])

    def conv(self, x: str, name: str, out: str | None = None, precision: Precision | None = None) -> str:
        """The convolution of parameters `name`.weight and `name`.bias, zero-padded to keep the size."""
        pad = self.weights[f"{name}.weight"].shape[-1] // 2
        bias = self.weight(f"{name}.bias", precision=precision)
        if self.quantisation is None or name not in self.quantisation.ranges:
            return self.op(
                "Conv", [x, self.weight(f"{name}.weight", precision=precision), bias], out or name, pads=[pad] * 4
            )
        after_relu = name.endswith(".conv2")
        operands = [
            self.rounded(x, f"{name}.input", self.quantisation.ranges[name], after_relu),
            self.rounded_weight(name, self.quantisation.type),
        ]
        y = self.op("Conv", [*operands, bias], out or name, pads=[pad] * 4)
        if self.requantised and not name.endswith(".conv1"):
            return self.rounded(y, f"{name}.output", self.quantisation.outputs[name])
        return y

    @property
    def requantised(self) -> bool:
        """Whether 8-bit convolutions are written in ONNX Runtime's form, which is int8's only."""
        return self.options.requantised and self.quantisation is not None and self.quantisation.type == QuantisedType.INT8

    def rounded(self, x: str, name: str, largest: float, positive: bool = False) -> str:
        """x rounded to 8 bits and back with one scale in the graph's precision: the zero point is 0, all of it symmetric.

        ONNX Runtime's form is unsigned: about 128, or from 0 where x is `positive`.
        """
        assert self.quantisation is not None
        kind, steps, zero = QUANTISED_TYPES[self.quantisation.type], QUANTISED_LARGEST[self.quantisation.type], 0
        if self.requantised:
            kind, steps, zero = TensorProto.UINT8, 255.0 if positive else steps, 0 if positive else 128
        dtype = helper.tensor_dtype_to_np_dtype(ONNX_TYPES[self.options.precision])
        scale = self.add(scale_for(np.asarray(largest), steps, dtype), f"{name}.scale")
        zero_point = self.add(np.array(zero, helper.tensor_dtype_to_np_dtype(kind)), f"{name}.zero")
        quantised = self.op("QuantizeLinear", [x, scale, zero_point], f"{name}.quantised")
        return self.op("DequantizeLinear", [quantised, scale, zero_point], f"{name}.restored")

    def rounded_weight(self, name: str, kind: QuantisedType) -> str:
        """A convolution's weight in 8 bits and restored, with one scale per output channel; the zero points are 0."""
        weight = self.weights[f"{name}.weight"]
        dtype = helper.tensor_dtype_to_np_dtype(ONNX_TYPES[self.options.precision])
        scales = scale_for(np.abs(weight).max((1, 2, 3)), QUANTISED_LARGEST[kind], dtype)
        zeros = np.zeros(scales.shape, helper.tensor_dtype_to_np_dtype(QUANTISED_TYPES[kind]))
        inputs = [
            self.add(quantised_weight(weight, scales, kind), f"{name}.weight"),
            self.add(scales, f"{name}.weight.scale"),
            self.add(zeros, f"{name}.weight.zero"),
        ]
        return self.op("DequantizeLinear", inputs, f"{name}.weight.restored", axis=0)

    def add(self, array: Array, name: str) -> str:
        """An array as an initializer."""
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    # --- pictures of bytes ----------------------------------------------------------------------------------------

    def pixels_of_bytes(self, x: str) -> str:
        """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), 0..value_range."""
        planes = self.op(
            "Transpose", [self.op("Cast", [x], f"{x}.wide", to=TensorProto.FLOAT)], f"{x}.planes", perm=[0, 3, 1, 2]
        )
        if self.arch.value_range == 255:
            return planes
        return self.op("Mul", [planes, self.constant(self.arch.value_range / 255, np.float32)], f"{x}.scaled")

    def bytes_of_pixels(self, x: str, out: str) -> str:
        """float32 (B, 3, H, W), 0..value_range -> uint8 (B, H, W, 3), clipped and rounded to the nearest."""
        if self.arch.value_range != 255:
            x = self.op("Mul", [x, self.constant(255 / self.arch.value_range, np.float32)], f"{x}.scaled")
        x = self.op("Clip", [x, self.constant(0, np.float32), self.constant(255, np.float32)], f"{x}.clipped")
        x = self.op("Cast", [self.op("Round", [x], f"{x}.rounded")], f"{x}.bytes", to=TensorProto.UINT8)
        return self.op("Transpose", [x], out, perm=[0, 2, 3, 1])

    # --- the network, part by part --------------------------------------------------------------------------------

    def head(self, pixels: str, out: str) -> str:
        """F0 = head(x - mean); the mean shift is fp32, and the convolution too in bf16, which is too coarse for pixels."""
        shifted = self.conv(pixels, "mean_in", precision=Precision.FP32)
        if self.options.precision == Precision.BF16:
            return self.cast(self.conv(shifted, "head", precision=Precision.FP32), Precision.BF16, out)
        return self.conv(self.cast(shifted, self.options.precision, "mean_in.typed"), "head", out)

    def attention(self, x: str, name: str, out: str) -> str:
        """Region-level non-local module: the picture cut into k x k regions, each attending to itself."""
        k = self.options.regions
        rows = [self.cut(x, axis=2, index=i, name=f"{name}.row{i}") for i in range(k)]
        done = []
        for i, row in enumerate(rows):
            cells = [self.cut(row, axis=3, index=j, name=f"{name}.region{i}-{j}") for j in range(k)]
            results = [self.region(cell, f"{cell}.") for cell in cells]
            done.append(self.op("Concat", results, f"{name}.row{i}.out", axis=3) if k > 1 else results[0])
        return self.op("Concat", done, out, axis=2)

    def cut(self, x: str, axis: int, index: int, name: str) -> str:
        """Part `index` of k along an axis: from floor(size * index / k) to floor(size * (index + 1) / k)."""
        k = self.options.regions
        size = self.op("Shape", [x], f"{name}.size", start=axis, end=axis + 1)

        def edge(i: int) -> str:
            scaled = self.op("Mul", [size, self.constant([i])], f"{name}.edge{i}.scaled") if i > 1 else size
            return self.op("Div", [scaled, self.constant([k])], f"{name}.edge{i}")

        start = edge(index) if index else self.constant([0])
        end = edge(index + 1) if index + 1 < k else self.constant([np.iinfo(np.int64).max])
        return self.op("Slice", [x, start, end, self.constant([axis])], name)

    def region(self, x: str, prefix: str) -> str:
        """W(softmax(theta(x) phi(x)^T) g(x)) + x of one whole region."""
        return self.attend(x, *self.keys_values(x, prefix), prefix, f"{prefix}out")

    def keys_values(self, x: str, prefix: str) -> tuple[str, str]:
        """phi(x) and g(x), max-pooled by 2: (B, d, h // 2, w // 2) each."""
        key, value = (
            self.op(
                "MaxPool", [self.inner_conv(x, part, prefix)], f"{prefix}{part}.pooled", kernel_shape=[2, 2], strides=[2, 2]
            )
            for part in ("key", "value")
        )
        return key, value

    @property
    def width(self) -> int:
        """Inner attention channels in the graph."""
        return max(self.arch.attention_channels, self.options.attention_width)

    def inner_conv(self, x: str, part: str, prefix: str) -> str:
        """theta, phi or g with its output channels padded with zeros to the graph's width."""
        name = f"attention.{part}"
        missing = self.width - self.arch.attention_channels
        divisor = 1.0 if part == "value" else self.inner_divisor
        weight = np.pad(self.weights[f"{name}.weight"] / divisor, ((0, missing), (0, 0), (0, 0), (0, 0)))
        bias = np.pad(self.weights[f"{name}.bias"] / divisor, (0, missing))
        inputs = [x, self.weight(f"{name}.weight", weight), self.weight(f"{name}.bias", bias)]
        return self.op("Conv", inputs, f"{prefix}{part}")

    def attend(self, x: str, key: str, value: str, prefix: str, out: str) -> str:
        """Any part x of a region attending to that region's pooled keys and values."""
        query = self.inner_conv(x, "query", prefix)
        shape = self.op("Shape", [query], f"{prefix}query.shape")
        q, k, v = (self.positions(t) for t in (query, key, value))
        if self.options.attention == Attention.MULTI_HEAD:
            y = self.op("MultiHeadAttention", [q, k, v], f"{prefix}attended", domain="com.microsoft", num_heads=1, scale=1.0)
            y = self.op("Transpose", [y], f"{prefix}attended.channels", perm=[0, 2, 1])
        else:
            transposed = self.op("Transpose", [k], f"{k}.transposed", perm=[0, 1, 3, 2])
            scores = self.full_scores(self.op("MatMul", [q, transposed], f"{prefix}scores"))
            weights = self.op("Softmax", [scores], f"{prefix}softmax", axis=-1)
            weights = self.cast(weights, self.options.precision, f"{prefix}softmax.typed")
            y = self.op("MatMul", [weights, v], f"{prefix}attended")
            y = self.op("Transpose", [y], f"{prefix}attended.channels", perm=[0, 1, 3, 2])
        y = self.op("Reshape", [y, shape], f"{prefix}attended.map")
        missing = self.width - self.arch.attention_channels
        weight = np.pad(self.weights["attention.out.weight"], ((0, 0), (0, missing), (0, 0), (0, 0)))
        y = self.op(
            "Conv", [y, self.weight("attention.out.weight", weight), self.weight("attention.out.bias")], f"{prefix}projected"
        )
        return self.op("Add", [y, x], out)

    def common(self, x: str, divisor: float) -> str:
        """Keys or values as every variant's stages exchange them: fp32, C/8 channels, divided by nothing."""
        wide = self.cast(x, Precision.FP32, f"{x}.fp32")
        return self.resized(wide, self.width, self.arch.attention_channels, divisor)

    def inner(self, x: str, divisor: float) -> str:
        """The opposite: as `keys_values` gives them."""
        return self.cast(
            self.resized(x, self.arch.attention_channels, self.width, 1 / divisor), self.options.precision, f"{x}.typed"
        )

    def resized(self, x: str, before: int, after: int, factor: float) -> str:
        """Channels of x times factor, cut or padded with zeros; no node where that changes nothing."""
        if before == after and factor == 1:
            return x
        weight = (factor * np.eye(after, before)).astype(np.float32)[..., None, None]
        return self.op("Conv", [x, self.add(weight, f"{x}.resized.weight")], f"{x}.resized")

    def full_scores(self, scores: str) -> str:
        """Typed scores in fp32, times what `inner_conv` divided queries and keys by; fp32 scores as they are."""
        if self.inner_divisor == 1:
            return scores
        wide = self.cast(scores, Precision.FP32, f"{scores}.fp32")
        return self.op("Mul", [wide, self.constant(self.inner_divisor**2, np.float32)], f"{scores}.full")

    @property
    def inner_divisor(self) -> float:
        """The divisor of queries and keys, a power of two, so that unscaled scores of 0..255 features fit fp16."""
        typed = self.options.precision != Precision.FP32 and self.options.attention == Attention.MATMUL
        return TYPED_DIVISOR if typed else 1.0

    def positions(self, x: str) -> str:
        """(B, d, h, w) -> (B, 1, h * w, d), or without the 1 for MultiHeadAttention."""
        if self.options.attention == Attention.MULTI_HEAD:
            flat = self.op("Reshape", [x, self.constant([0, self.width, -1])], f"{x}.flat")
            return self.op("Transpose", [flat], f"{x}.positions", perm=[0, 2, 1])
        flat = self.op("Reshape", [x, self.constant([0, 1, self.width, -1])], f"{x}.flat")
        return self.op("Transpose", [flat], f"{x}.positions", perm=[0, 1, 3, 2])

    def blocks(self, x: str, group: int, out: str) -> str:
        """The residual blocks of a group: x -> x + conv(relu(conv(x))), m times."""
        for index in range(self.arch.blocks):
            name = f"groups.{group}.blocks.{index}"
            hidden = self.op("Relu", [self.conv(x, f"{name}.conv1")], f"{name}.relu")
            last = index + 1 == self.arch.blocks
            x = self.op("Add", [x, self.conv(hidden, f"{name}.conv2")], out if last else f"{name}.out")
        return x

    def moments(self, x: str, prefix: str) -> tuple[str, str, str]:
        """X as (B, C, HW), its mean (B, C, 1) and its centred scatter (X - mean)(X - mean)^T (B, C, C), in fp32."""
        x = self.cast(x, Precision.FP32, f"{prefix}.features.fp32")
        flat = self.op("Reshape", [x, self.constant([0, 0, -1])], f"{prefix}.flat")
        mean = self.op("ReduceMean", [flat, self.constant([2])], f"{prefix}.mean", keepdims=1)
        centred = self.op("Sub", [flat, mean], f"{prefix}.centred")
        scatter = self.op(
            "MatMul",
            [centred, self.op("Transpose", [centred], f"{prefix}.centred.transposed", perm=[0, 2, 1])],
            f"{prefix}.scatter",
        )
        return flat, mean, scatter

    def covariance(self, x: str, prefix: str) -> str:
        """Centred X X^T / HW in fp32: (B, C, H, W) -> (B, C, C)."""
        flat, _, scatter = self.moments(x, prefix)
        count = self.op("Shape", [flat], f"{prefix}.count", start=2, end=3)
        count = self.op("Cast", [count], f"{prefix}.count.fp32", to=TensorProto.FLOAT)
        return self.op("Div", [scatter, count], f"{prefix}.covariance")

    def gate(self, sigma: str, group: int, out: str) -> str:
        """sigmoid(W_U relu(W_D z)), z the row means of Sigma^(1/2): (B, C, C) -> (B, C, 1, 1)."""
        prefix = f"groups.{group}.soca"
        root = self.newton_schulz(sigma, prefix)
        z = self.op("ReduceMean", [root, self.constant([2])], f"{prefix}.z", keepdims=1)
        z = self.op("Unsqueeze", [z, self.constant([3])], f"{prefix}.z.map")
        hidden = self.op("Relu", [self.conv(z, f"{prefix}.down", precision=Precision.FP32)], f"{prefix}.hidden")
        gate = self.op("Sigmoid", [self.conv(hidden, f"{prefix}.up", precision=Precision.FP32)], f"{prefix}.gate")
        return self.op("Identity", [self.cast(gate, self.options.precision, f"{prefix}.gate.typed")], out)

    def kernel_gate(self, features: str, group: int, out: str) -> str:
        """The same gates from the features themselves, by the two plugins of `sanrt.kernels.cuda.plugins`."""
        prefix = f"groups.{group}.soca"
        plugin: dict[str, Any] = {"domain": "sanrt", "plugin_namespace": "sanrt", "plugin_version": "1", "aot": 1}
        plugin["channels"] = self.arch.channels
        partials, unused = f"{prefix}.statistics", f"{prefix}.unused"
        self.nodes.append(helper.make_node("soca_statistics", [features], [partials, unused], name=partials, **plugin))
        weights = [self.weight(f"{prefix}.{name}") for name in ("down.weight", "down.bias", "up.weight", "up.bias")]
        hidden = len(self.weights[f"{prefix}.down.bias"])
        return self.op("soca_gate", [partials, *weights], out, **plugin, hidden=hidden, iterations=self.iterations)

    def newton_schulz(self, sigma: str, prefix: str) -> str:
        """Sigma^(1/2) by n coupled steps on Sigma / trace, in fp32."""
        eye = self.eye(1.0)
        diagonal = self.op("Mul", [sigma, eye], f"{prefix}.diagonal")
        trace = self.op("ReduceSum", [diagonal, self.constant([1, 2])], f"{prefix}.trace", keepdims=1)
        trace = self.op("Max", [trace, self.constant(MIN_TRACE, np.float32)], f"{prefix}.trace.safe")
        y, z = self.op("Div", [sigma, trace], f"{prefix}.step0.y"), eye
        for step in range(1, self.iterations + 1):
            name, first, last = f"{prefix}.step{step}", step == 1, step == self.iterations
            product = y if first else self.op("MatMul", [z, y], f"{name}.zy")
            half = self.op("Mul", [product, self.constant(0.5, np.float32)], f"{name}.half")
            factor = self.op("Sub", [self.eye(1.5), half], f"{name}.factor")
            if not last:
                z = factor if first else self.op("MatMul", [factor, z], f"{name}.z")
            y = self.op("MatMul", [y, factor], f"{name}.y")
        return self.op("Mul", [y, self.op("Sqrt", [trace], f"{prefix}.trace.root")], f"{prefix}.root")

    def join(self, features: str, gate: str, x: str, shared: str, group: int, out: str, crop: str | None = None) -> str:
        """The end of a group: conv(features * gate), cropped if asked, + x, and the share-source skip gamma * shared."""
        name = f"groups.{group}"
        gated = self.op("Mul", [features, gate], f"{name}.gated")
        last = self.conv(gated, f"{name}.conv")
        local = self.op("Add", [self.crop(last, crop) if crop else last, x], f"{name}.local")
        return self.op("Add", [local, self.op("Mul", [shared, self.weight("gamma")], f"{name}.skip")], out)

    def tail(self, trunk: str, out: str) -> str:
        """Sub-pixel upscaling, the last convolution (fp32 in bf16 graphs, as the first), and the mean shift back in fp32."""
        x, layer = trunk, 0
        for factor in self.arch.upsampling:
            name = f"upsampler.{layer}"
            x = self.op("DepthToSpace", [self.conv(x, name)], f"{name}.shuffled", blocksize=factor, mode="CRD")
            layer += 2
        if self.requantised and self.quantisation and name in self.quantisation.ranges:
            x = self.rounded(x, x, self.quantisation.outputs[name])  # changes nothing, but 8 bits are shuffled faster
        if self.options.precision == Precision.BF16:
            x = self.conv(self.cast(x, Precision.FP32, "upsampled.fp32"), "tail", precision=Precision.FP32)
        else:
            x = self.cast(self.conv(x, "tail"), Precision.FP32, "tail.fp32")
        return self.conv(x, "mean_out", out, precision=Precision.FP32)

    def crop(self, x: str, box: str) -> str:
        """Rows and columns of x within box, an int64 tensor (top, left, bottom, right)."""
        start, end = (self.op("Slice", [box, self.constant([i]), self.constant([i + 2])], f"{x}.crop{i}") for i in (0, 2))
        return self.op("Slice", [x, start, end, self.constant([2, 3])], f"{x}.cropped")

    # --- models ---------------------------------------------------------------------------------------------------

    def model(
        self, name: str, inputs: Mapping[str, tuple[int, list[Any]]], outputs: Mapping[str, tuple[int, list[Any]]]
    ) -> onnx.ModelProto:
        """The nodes so far as a checked model; inputs and outputs map names to (element type, shape)."""
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info(n, t, shape) for n, (t, shape) in inputs.items()],
            [helper.make_tensor_value_info(n, t, shape) for n, (t, shape) in outputs.items()],
            list(self.initializers.values()),
        )
        opsets = [helper.make_opsetid("", OPSET)]
        if self.options.attention == Attention.MULTI_HEAD:
            opsets.append(helper.make_opsetid("com.microsoft", 1))
        if self.options.kernels:
            opsets.append(helper.make_opsetid("sanrt", 1))
        model = helper.make_model(graph, opset_imports=opsets, producer_name="sanrt", ir_version=IR_VERSION)
        onnx.checker.check_model(model)
        return model


def scale_for(largest: Array, steps: float, dtype: Any) -> Array:
    """The value of one step of an 8-bit type whose last step is `largest`; rounded to dtype, and never 0."""
    smallest = float(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]
    scales: Array = np.maximum(largest / steps, smallest).astype(dtype)
    return scales


def quantised_weight(weight: Array, scales: Array, kind: QuantisedType) -> Array:
    """A convolution's weight in steps of its output channels' scales."""
    steps = weight / scales.astype(np.float32)[:, None, None, None]
    steps = steps.clip(-QUANTISED_LARGEST[kind], QUANTISED_LARGEST[kind])
    dtype = helper.tensor_dtype_to_np_dtype(QUANTISED_TYPES[kind])
    return (np.rint(steps) if kind == QuantisedType.INT8 else steps).astype(dtype)


def san_model(spec: ModelSpec, weights: Weights, options: GraphOptions | None = None) -> onnx.ModelProto:
    """The whole network: `input` (B, 3, H, W) float32 0..value_range -> `output` (B, 3, sH, sW) float32, not clipped.

    With the spec's layout UINT8_NHWC it is uint8 (B, H, W, 3) -> uint8 (B, sH, sW, 3); the spec's shape fixes B, H and W.
    The metadata is the spec's, with the options' precision and regions, and digests by which later edits are seen.
    """
    options = options or GraphOptions()
    arch = spec.architecture
    w = GraphWriter(spec, weights, options)
    bytes_in_out = spec.layout is PixelLayout.UINT8_NHWC
    first = w.head(w.pixels_of_bytes("input") if bytes_in_out else "input", "first")
    shared = w.attention(first, "attention.in", "shared")
    x = shared
    for g in range(arch.groups):
        features = w.blocks(x, g, f"groups.{g}.features")
        if options.kernels:
            gate = w.kernel_gate(features, g, f"groups.{g}.gate")
        else:
            gate = w.gate(w.covariance(features, f"groups.{g}.soca"), g, f"groups.{g}.gate")
        x = w.join(features, gate, x, shared, g, f"groups.{g}.out")
    trunk = w.op("Add", [w.attention(x, "attention.out", "attended"), first], "trunk")
    if bytes_in_out:
        w.bytes_of_pixels(w.tail(trunk, "pixels"), "output")
    else:
        w.tail(trunk, "output")
    kind = TensorProto.UINT8 if bytes_in_out else TensorProto.FLOAT
    batch, height, width = spec.shape or ("batch", "height", "width")
    large = [spec.shape[1] * arch.scale, spec.shape[2] * arch.scale] if spec.shape else ["out_height", "out_width"]
    taken, given = ([batch, *sides, 3] if bytes_in_out else [batch, 3, *sides] for sides in ([height, width], large))
    model = w.model(arch.name, {"input": (kind, taken)}, {"output": (kind, given)})
    metadata = {**spec.to_metadata(), "sanrt.precision": f'"{options.precision}"', "sanrt.regions": str(options.regions)}
    metadata["sanrt.min_side"] = str(options.regions * MIN_SIDE // 2)
    weights_written = {name: numpy_helper.to_array(t) for name, t in w.initializers.items() if made_of_weights(name)}
    metadata[TENSORS_DIGEST] = json.dumps(tensors_digest(weights_written))
    metadata[DESCRIPTION_DIGEST] = json.dumps(description_digest(metadata))
    helper.set_model_props(model, metadata)
    return model


def tensors_digest(tensors: Weights) -> str:
    """SHA-256 of a graph's weights, in the order of their names: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def made_of_weights(initializer: str) -> bool:
    """Whether an initializer holds weights; the others follow from the description alone."""
    return initializer == "gamma" or (
        initializer.endswith((".weight", ".bias", ".weight.scale")) and not initializer.endswith(".resized.weight")
    )


def stage_model(spec: ModelSpec, weights: Weights, options: GraphOptions) -> onnx.ModelProto:
    """The stage `options.stage` of the network as a model; the stages in their order are the network.

    Inputs are STAGE_INPUTS', float32 whatever the precision, and so are `output0`, ...; maps are (B, C, h, w).
    `crop` is int64 (top, left, bottom, right) in the output's pixels: the part that is returned, the halo left out.

    head         pixels -> first feature map
    keys-values  part of a region, cut at even rows and columns -> its pooled keys and values, C/8 channels each
    attend       any part of a region, all of that region's keys and values (of any shape) -> its attention + itself
    body.g       x -> features, their mean (B, C, 1) and centred scatter (B, C, C)
    gate.g       covariance (B, C, C) -> gate (B, C, 1, 1)
    join.g       features; gate; x and shared without the halo -> the group's output
    tail         what attended, the first feature map -> pixels

    In half precision head, attend and join also give `sum`, of all of `output0`: it is finite where all of that is.
    """
    kind, _, number = options.stage.partition(".")
    w = GraphWriter(spec, weights, options)
    made = write_stage(w, kind, int(number or 0))
    outputs = [w.op("Cast", [name], f"output{i}", to=TensorProto.FLOAT) for i, name in enumerate(made)]
    ranks = (4, 3, 3) if kind == "body" else (4,) * len(made)
    shapes = {name: (TensorProto.FLOAT, axes(name, rank)) for name, rank in zip(outputs, ranks, strict=True)}
    if options.precision != Precision.FP32 and kind in STAGE_MAPS and kind != "body":
        shapes[w.op("ReduceSum", ["output0"], "sum", keepdims=0)] = (TensorProto.FLOAT, [])
    model = w.model(
        f"{spec.architecture.name} {options.stage}", {name: stage_input(name) for name in STAGE_INPUTS[kind]}, shapes
    )
    helper.set_model_props(model, {**spec.to_metadata(), STAGE: json.dumps(options.stage)})
    return model


def write_stage(w: GraphWriter, kind: str, group: int) -> list[str]:
    """The nodes of one stage; returns the tensors it gives."""

    def typed(name: str) -> str:
        return w.cast(name, w.options.precision, f"{name}.typed")

    match kind:
        case "head":
            return [w.crop(w.head("pixels", "first"), "crop")]
        case "keys-values":
            key, value = w.keys_values(typed("x"), "")
            return [w.common(key, w.inner_divisor), w.common(value, 1.0)]
        case "attend":
            key, value = w.inner("key", w.inner_divisor), w.inner("value", 1.0)
            return [w.attend(typed("x"), key, value, "attention.", "out")]
        case "body":
            features = w.crop(w.blocks(typed("x"), group, "features"), "crop")
            return [features, *w.moments(features, f"groups.{group}.soca")[1:]]
        case "gate":
            return [w.gate("sigma", group, "gate")]
        case "join":
            features, gate, x, shared = map(typed, ("features", "gate", "x", "shared"))
            return [w.join(features, gate, x, shared, group, "joined", "crop")]
        case _:
            trunk = w.op("Add", [typed("attended"), typed("first")], "trunk")
            return [w.crop(w.tail(trunk, "pixels"), "crop")]


def stage_input(name: str) -> tuple[int, list[Any]]:
    """Element type and shape of a stage's input."""
    if name == "crop":
        return TensorProto.INT64, [4]
    return TensorProto.FLOAT, axes(name, 3 if name == "sigma" else 4)


def axes(name: str, rank: int) -> list[str]:
    """Dynamic axes of a stage's tensor."""
    return ["batch", *(f"{name}.{axis}" for axis in range(1, rank))]
