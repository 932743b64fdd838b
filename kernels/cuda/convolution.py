"""A 3 x 3 convolution, its bias and what is added to it as one kernel, by cuDNN's graph API. Never run on hardware."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from sanrt.errors import BackendError, first_line

INSTALL = "pip install 'nvidia-cudnn-frontend>=1.32,<2'"
VECTOR_BYTES = 16
"""cuDNN's fused kernels want pixels of whole 16 bytes, and maps that start there."""


@dataclass(frozen=True)
class ConvolutionShape:
    """What a graph is built for: y (B, K, H, W) = x (B, C, H, W) * weight + bias + the sum of maps like y."""

    batch: int
    inputs: int
    outputs: int
    height: int
    width: int
    sums: int
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, bias: Tensor, maps: Sequence[Tensor]) -> ConvolutionShape:
        """The shape for 16-bit tensors, channels-last; raises BackendError for what cuDNN's fused kernels do not take."""
        batch, inputs, height, width = x.shape
        outputs = len(weight)
        y = torch.Size((batch, outputs, height, width))
        last = all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight, *maps))
        whole = all(t.element_size() == 2 and t.data_ptr() % VECTOR_BYTES == 0 for t in (x, weight, bias, *maps))
        if not (last and whole and inputs % 8 == outputs % 8 == 0 and all(each.shape == y for each in maps)):
            raise BackendError(
                f"CUDA kernels: cuDNN's fused convolution of {list(x.shape)} {x.dtype} to {outputs} channels; expected "
                "channels-last maps of float16 or bfloat16, channels in multiples of 8, all starting on 16 bytes"
            )
        return cls(batch, inputs, outputs, height, width, len(maps), x.dtype)


@dataclass(frozen=True)
class ConvolutionGraph:
    """A built graph, the handles of its inputs in their order, and that of its output."""

    graph: Any
    inputs: tuple[Any, ...]
    output: Any

    def run(self, tensors: Sequence[Tensor], y: Tensor, handle: Any) -> Tensor:
        """Enqueue on the handle's stream; the workspace is the caching allocator's, which knows that stream."""
        workspace = torch.empty(max(1, self.graph.get_workspace_size()), dtype=torch.uint8, device=y.device)
        self.graph.execute({**dict(zip(self.inputs, tensors, strict=True)), self.output: y}, workspace, handle=handle)
        return y


def import_cudnn() -> Any:
    try:
        import cudnn
    except ImportError as error:
        raise BackendError(f"CUDA kernels: cuDNN's graph API is not installed ({first_line(error)}); {INSTALL}") from error
    return cudnn


def describe(cudnn: Any, shape: ConvolutionShape, **where: Any) -> ConvolutionGraph:
    """The graph of a shape, not built yet. `where`: a `handle`, or a `device_property` for a GPU that is not here."""
    kinds = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}
    kind, fp32 = kinds[shape.dtype], cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=kind, intermediate_data_type=fp32, compute_data_type=fp32, **where)

    def tensor(name: str, batch: int, channels: int, height: int, width: int) -> Any:
        strides = [channels * height * width, 1, channels * width, channels]
        return graph.tensor(name=name, dim=[batch, channels, height, width], stride=strides, data_type=kind)

    y = shape.batch, shape.outputs, shape.height, shape.width
    x = tensor("x", shape.batch, shape.inputs, shape.height, shape.width)
    weight = tensor("weight", shape.outputs, shape.inputs, 3, 3)
    bias = tensor("bias", 1, shape.outputs, 1, 1)
    maps = [tensor(f"map{i}", *y) for i in range(shape.sums)]
    total = graph.conv_fprop(image=x, weight=weight, padding=[1, 1], stride=[1, 1], dilation=[1, 1])
    total = graph.bias(input=total, bias=bias)
    for each in maps:
        total = graph.add(a=total, b=each)
    total.set_output(True).set_data_type(kind)
    return ConvolutionGraph(graph, (x, weight, bias, *maps), total)


@lru_cache(maxsize=64)
def built(shape: ConvolutionShape, device: int, thread: int) -> ConvolutionGraph:
    """The graph with the plan that cuDNN's heuristics put first of those that can be built, of a thread's handle."""
    cudnn = import_cudnn()
    made = describe(cudnn, shape, handle=cudnn_handle(device, thread))
    try:
        made.graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    except (RuntimeError, cudnn.cudnnGraphNotSupportedError) as error:
        raise BackendError(f"CUDA kernels: cuDNN has no fused convolution for {shape} ({first_line(error)})") from error
    return made


@cache
def cudnn_handle(device: int, thread: int) -> Any:
    """cuDNN's state for a GPU and a thread, which no two threads may use at once; kept with the process."""
    with torch.cuda.device(device):
        return import_cudnn().create_handle()


def summed_convolution(x: Tensor, weight: Tensor, bias: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """x * weight + bias + the sum of `maps`, summed in fp32 and rounded once, with zero padding, on the current stream."""
    shape, device = ConvolutionShape.of(x, weight, bias, maps), x.device.index
    thread = get_ident()
    with torch.cuda.device(device):
        handle = cudnn_handle(device, thread)
        import_cudnn().set_stream(handle, torch.cuda.current_stream().cuda_stream)
        size = shape.batch, shape.outputs, shape.height, shape.width
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        return built(shape, device, thread).run([x, weight, bias, *maps], y, handle)
