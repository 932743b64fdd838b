"""The graph of a fused convolution, computed by a stand-in that knows what each of cuDNN's operations does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sanrt.errors import BackendError
from sanrt.kernels.cuda import convolution
from sanrt.kernels.cuda.convolution import ConvolutionShape, describe, import_cudnn


class Symbol:
    """A tensor of the stand-in's graph: given, or computed of others."""

    def __init__(self, compute: Any = None, dim: Sequence[int] = (), stride: Sequence[int] = (), dtype: Any = None) -> None:
        self.compute, self.dim, self.stride, self.dtype, self.output = compute, dim, stride, dtype, False

    def set_output(self, output: bool) -> Symbol:
        self.output = output
        return self

    def set_data_type(self, dtype: Any) -> Symbol:
        self.dtype = dtype
        return self

    def value(self, given: dict[Symbol, Tensor]) -> Tensor:
        if self.compute is None:
            assert list(given[self].shape) == list(self.dim) or given[self].ndim == 1
            return given[self].float().reshape(list(self.dim))
        result: Tensor = self.compute(given)
        return result


class Graph:
    """The operations of cudnn.pygraph that are used, with its names of their arguments (1.32), in fp32."""

    def __init__(self, *, io_data_type: Any, intermediate_data_type: Any, compute_data_type: Any, **where: Any) -> None:
        assert intermediate_data_type == compute_data_type == torch.float32

    def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: Any) -> Symbol:
        return Symbol(None, dim, stride, data_type)

    def conv_fprop(
        self, *, image: Symbol, weight: Symbol, padding: list[int], stride: list[int], dilation: list[int]
    ) -> Symbol:
        return Symbol(lambda given: F.conv2d(image.value(given), weight.value(given), None, stride, padding, dilation))

    def bias(self, *, input: Symbol, bias: Symbol) -> Symbol:
        return Symbol(lambda given: input.value(given) + bias.value(given))

    def add(self, *, a: Symbol, b: Symbol) -> Symbol:
        return Symbol(lambda given: a.value(given) + b.value(given))

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, given: dict[Symbol, Tensor], workspace: Tensor, *, handle: Any) -> None:
        (output,) = (symbol for symbol in given if symbol.output)
        given[output].copy_(output.value(given))


CUDNN = SimpleNamespace(
    pygraph=Graph, data_type=SimpleNamespace(HALF=torch.float16, BFLOAT16=torch.bfloat16, FLOAT=torch.float32)
)


def tensors(dtype: torch.dtype, sums: int, channels: int = 16) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(8)

    def last(*size: int) -> Tensor:
        return torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)

    x, weight, bias = last(2, channels, 9, 11), last(24, channels, 3, 3), torch.randn(24).to(dtype)
    return x, weight, bias, [last(2, 24, 9, 11) for _ in range(sums)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sums", [1, 2])
def test_the_graph_is_the_convolution_its_bias_and_the_sums_rounded_once(dtype: torch.dtype, sums: int) -> None:
    x, weight, bias, maps = tensors(dtype, sums)
    graph = describe(CUDNN, ConvolutionShape.of(x, weight, bias, maps))
    y = graph.run([x, weight, bias, *maps], torch.empty_like(maps[0]), None)
    exact = F.conv2d(x.float(), weight.float(), bias.float(), padding=1) + sum(each.float() for each in maps)
    assert torch.equal(y, exact.to(dtype))
    for symbol, tensor in zip(graph.inputs, [x, weight, bias[None, :, None, None], *maps], strict=True):
        last = tensor.expand(symbol.dim).contiguous(memory_format=torch.channels_last)
        sizes = zip(symbol.dim, symbol.stride, last.stride(), strict=True)
        assert all(ours == theirs for size, ours, theirs in sizes if size > 1)
        assert symbol.dtype == dtype


def test_maps_that_cudnns_fused_kernels_do_not_take_are_refused() -> None:
    x, weight, bias, maps = tensors(torch.float16, 1)
    for wrong in (x.contiguous(), x.float(), x[:, :12].contiguous(memory_format=torch.channels_last)):
        with pytest.raises(BackendError, match="channels-last maps of float16 or bfloat16, channels in multiples of 8"):
            ConvolutionShape.of(wrong, weight, bias, maps)
    with pytest.raises(BackendError, match="fused convolution"):
        ConvolutionShape.of(x, weight, bias, [maps[0][:1]])


def test_a_missing_graph_api_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(BackendError, match=r"graph API is not installed .*pip install 'nvidia-cudnn-frontend") as error:
        import_cudnn()
    assert "\n" not in str(error.value)


def test_a_graph_that_cudnn_cannot_build_is_told_with_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsupported(Exception):
        pass

    class Refusing(Graph):
        def build(self, heuristics: list[Any]) -> None:
            raise Unsupported("no plan in the list could be built:\nengine 4")

    cudnn = SimpleNamespace(
        **{**vars(CUDNN), "pygraph": Refusing},
        heur_mode=SimpleNamespace(A=0, FALLBACK=1),
        cudnnGraphNotSupportedError=Unsupported,
    )
    monkeypatch.setattr(convolution, "import_cudnn", lambda: cudnn)
    monkeypatch.setattr(convolution, "cudnn_handle", lambda device, thread: None)
    x, weight, bias, maps = tensors(torch.float16, 1)
    with pytest.raises(BackendError, match=r"no fused convolution for .*outputs=24.*\(no plan in the list could be built"):
        convolution.built(ConvolutionShape.of(x, weight, bias, maps), 0, 0)
