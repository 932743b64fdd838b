"""The kernels as PyTorch operators (`torch.ops.sanrt`), seen by torch.compile and torch.export, and a SAN that uses them.

On the CPU the operators are plain PyTorch. On CUDA they are the kernels of soca.cu and region_attention.cu, or raise;
`residual` is that of residual.cu for the maps that it takes. With `experimental` they are what has never run on hardware.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanrt.errors import BackendError
from sanrt.kernels.cuda import convolution as convolution_kernels
from sanrt.kernels.cuda import region_attention as attention_kernels
from sanrt.kernels.cuda import residual as residual_kernels
from sanrt.kernels.cuda import soca as soca_kernels
from sanrt.kernels.cuda.experimental import Experiment
from sanrt.model.attention import RegionAttention
from sanrt.model.san import SAN, ResidualBlock, ResidualGroup
from sanrt.model.soca import SOCA, covariance, newton_schulz_sqrt


@torch.library.custom_op("sanrt::soca_gate", mutates_args=(), device_types="cpu")
def soca_gate(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, iterations: int, experimental: bool = False
) -> Tensor:
    """SOCA's gates (B, C, 1, 1) of maps (B, C, H, W); weights as the 1 x 1 convolutions have them, all of x's dtype."""
    z = newton_schulz_sqrt(covariance(x), iterations).mean(2)[:, :, None, None].to(x.dtype)
    gate: Tensor = torch.sigmoid(F.conv2d(torch.relu(F.conv2d(z, down, down_bias)), up, up_bias))
    return gate


@soca_gate.register_fake
def _(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, iterations: int, experimental: bool = False
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], 1, 1)


@soca_gate.register_kernel("cuda")
def _(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, iterations: int, experimental: bool = False
) -> Tensor:
    return soca_kernels.soca_gate(x, down, down_bias, up, up_bias, iterations, experimental)


@torch.library.custom_op("sanrt::region_attention", mutates_args=(), device_types="cpu")
def region_attention(maps: Tensor, regions: int, experimental: bool = False) -> Tensor:
    """Attention (B, I, H, W) over k x k regions of maps (B, 3 I, H, W): queries, keys and values; in the maps' layout."""
    rows, columns = (edges(size, regions) for size in maps.shape[2:])
    bands = [torch.cat([attend(maps[:, :, a:b, c:d]) for c, d in columns], 3) for a, b in rows]
    return torch.cat(bands, 2).contiguous(memory_format=layout(maps))


def edges(size: int, regions: int) -> list[tuple[int, int]]:
    """Where each region starts and ends: cut at floor(i * size / regions)."""
    cuts = [size * i // regions for i in range(regions + 1)]
    return list(pairwise(cuts))


def attend(maps: Tensor) -> Tensor:
    """One region: queries to keys and values that are max-pooled 2 x 2."""
    query, key, value = maps.chunk(3, 1)
    q, k, v = (t.flatten(2).transpose(1, 2).unsqueeze(1) for t in (query, F.max_pool2d(key, 2), F.max_pool2d(value, 2)))
    y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return y.squeeze(1).transpose(1, 2).reshape(query.shape)


def layout(maps: Tensor) -> torch.memory_format:
    """Channels-last where `maps` are that and nothing else, as the kernels have it."""
    last = maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@region_attention.register_fake
def _(maps: Tensor, regions: int, experimental: bool = False) -> Tensor:
    batch, channels, height, width = maps.shape
    return torch.empty(
        (batch, channels // 3, height, width), dtype=maps.dtype, device=maps.device, memory_format=layout(maps)
    )


@region_attention.register_kernel("cuda")
def _(maps: Tensor, regions: int, experimental: bool = False) -> Tensor:
    return attention_kernels.region_attention(maps, regions, experimental)


@torch.library.custom_op("sanrt::residual", mutates_args=(), device_types="cpu")
def residual(y: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """y + bias + x of maps y, x (B, C, H, W) and bias (C,), in y's layout."""
    return y + bias[:, None, None] + x


@residual.register_fake
def _(y: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(y)


@residual.register_kernel("cuda")
def _(y: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    if residual_kernels.supports(y, bias, x):
        return residual_kernels.residual(y, bias, x)
    return y + bias[:, None, None] + x


@torch.library.custom_op("sanrt::rectified_convolution", mutates_args=(), device_types="cpu")
def rectified_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu of a 3 x 3 convolution with zero padding; on a GPU cuDNN's convolution does all of it."""
    return F.relu(F.conv2d(x, weight, bias, padding=1))


@rectified_convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


@rectified_convolution.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y: Tensor = torch.cudnn_convolution_relu(x, weight, bias, [1, 1], [1, 1], [1, 1], 1)
    return y


@torch.library.custom_op("sanrt::summed_convolution", mutates_args=(), device_types="cpu")
def summed_convolution(x: Tensor, weight: Tensor, bias: Tensor, maps: list[Tensor]) -> Tensor:
    """A 3 x 3 convolution with zero padding plus the sum of `maps`; on a GPU one kernel of cuDNN's."""
    y: Tensor = sum(maps, F.conv2d(x, weight, bias, padding=1))
    return y


@summed_convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, maps: list[Tensor]) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


@summed_convolution.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor, maps: list[Tensor]) -> Tensor:
    return convolution_kernels.summed_convolution(x, weight, bias, maps)


class KernelBlock(nn.Module):
    """A residual block without passes for biases and ReLU: cuDNN's convolution does the first, one kernel bias and sum."""

    def __init__(self, reference: ResidualBlock, fused_sums: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fused_sums = reference.conv1, reference.conv2, fused_sums

    def forward(self, x: Tensor) -> Tensor:
        hidden = rectified_convolution(x, self.conv1.weight, self.conv1.bias)
        return summed(self.conv2, hidden, None, [x], self.fused_sums)


def summed(conv: nn.Conv2d, x: Tensor, gate: Tensor | None, maps: list[Tensor], fused_sums: bool) -> Tensor:
    """The convolution of x * gate plus the sum of maps; `fused_sums`: all of it in one kernel of cuDNN's."""
    assert conv.bias is not None
    if fused_sums:
        x, weight = gated(conv, x, gate)
        return cast(Tensor, summed_convolution(x, weight, conv.bias, maps))
    y: Tensor = residual(unbiased(conv, x, gate), conv.bias, maps[0])
    return sum(maps[1:], y)


def gated(conv: nn.Conv2d, x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Input and weights of the convolution of x * gate; a single picture's gate scales the weights, which are fewer."""
    if gate is None:
        return x, conv.weight
    return (x, conv.weight * gate) if len(x) == 1 else (x * gate, conv.weight)


def unbiased(conv: nn.Conv2d, x: Tensor, gate: Tensor | None = None) -> Tensor:
    """The convolution of x * gate without its bias."""
    return F.conv2d(*gated(conv, x, gate), None, conv.stride, conv.padding)


class KernelSOCA(nn.Module):
    """A SOCA whose gate is one operator."""

    def __init__(self, reference: SOCA, exact_as: int | None = None, experimental: bool = False) -> None:
        super().__init__()
        iterations = reference.sqrt_iterations or exact_as
        if iterations is None:
            raise BackendError("CUDA kernels: an exact square root; say how many Newton-Schulz steps stand for it")
        self.iterations, self.experimental = iterations, experimental
        self.down, self.up = reference.down, reference.up

    def gate(self, features: Tensor) -> Tensor:
        """Channel gates in (0, 1): (B, C, H, W) -> (B, C, 1, 1)."""
        weights = self.down.weight, self.down.bias, self.up.weight, self.up.bias
        gates: Tensor = soca_gate(features, *weights, self.iterations, self.experimental)
        return gates

    def forward(self, features: Tensor) -> Tensor:
        return features * self.gate(features)


class KernelGroup(nn.Module):
    """A residual group whose gate is applied by the last convolution's weights: no pass over the features is spent on it."""

    def __init__(
        self, reference: ResidualGroup, exact_as: int | None = None, experiments: Collection[Experiment] = ()
    ) -> None:
        super().__init__()
        blocks = cast(Iterable[ResidualBlock], reference.blocks)
        self.fused_sums = Experiment.CUDNN in experiments
        self.blocks = nn.Sequential(*(KernelBlock(block, self.fused_sums) for block in blocks))
        self.conv = reference.conv
        self.soca = KernelSOCA(reference.soca, exact_as, Experiment.SOCA in experiments)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        features = self.blocks(x)
        skips = [x] if skip is None else [x, skip]
        return summed(self.conv, features, self.soca.gate(features), skips, self.fused_sums)


class KernelAttention(nn.Module):
    """A region-level non-local module: one convolution for queries, keys and values, and one operator."""

    def __init__(self, reference: RegionAttention, experimental: bool = False) -> None:
        super().__init__()
        parts = reference.query, reference.key, reference.value
        self.regions, self.experimental = reference.regions, experimental
        self.maps = nn.Conv2d(reference.query.in_channels, 3 * reference.query.out_channels, 1)
        self.maps.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        self.maps.bias = nn.Parameter(torch.cat([part.bias for part in parts if part.bias is not None]), requires_grad=False)
        self.out = reference.out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(region_attention(self.maps(x), self.regions, self.experimental)) + x
        return y


def use_kernels(net: SAN, exact_as: int | None = None, experiments: Collection[Experiment] = ()) -> SAN:
    """A copy of `net` for inference whose SOCA gates and region attention are the operators above; raises BackendError.

    Its results are the reference's but for rounding. Move it to another device or dtype afterwards as any module.
    exact_as: Newton-Schulz steps that stand for the exact square root, where `net` was trained with that.
    experiments: what goes the way that has never run on hardware.
    """
    fused = copy.deepcopy(net).eval().requires_grad_(False)
    groups = (group for group in fused.groups if isinstance(group, ResidualGroup))
    fused.groups = nn.ModuleList(KernelGroup(group, exact_as, experiments) for group in groups)
    fused.attention = KernelAttention(fused.attention, Experiment.ATTENTION in experiments)  # type: ignore[assignment]
    return fused
