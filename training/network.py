"""The network in training: how its weights start, and a forward pass that is bf16 only where that costs nothing."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanrt.model.san import RGB_MEAN, SAN, ResidualBlock, ResidualGroup
from sanrt.model.soca import SOCA
from training.device import exact

INNER_RANGE = 8.0
"""The mean shifts map 0..255 to a range of this width, in which Adam's steps suit every layer alike."""

SOCA_GAIN = 128.0
"""SOCA's first layer starts positive and this much larger: then its hidden units are alive and the gates differ between
pictures from the start (with the usual start they stay all but constant, see training/README.md)."""

OPEN_GATE = 2.0
"""SOCA's last biases: its gates start near sigmoid(2) = 0.88."""


def initialise(net: SAN) -> None:
    """Start as a bilinear upscaler: colours pass through head and tail, every residual branch starts small."""
    with torch.no_grad():
        ratio = INNER_RANGE / net.arch.value_range
        net.mean_in.weight.mul_(ratio)
        biases(net.mean_in).copy_(-INNER_RANGE * torch.tensor(RGB_MEAN))
        net.mean_out.weight.div_(ratio)
        for group in cast(Iterable[ResidualGroup], net.groups):
            group.conv.weight.mul_(0.1)
            group.soca.down.weight.abs_().mul_(SOCA_GAIN)
            nn.init.constant_(biases(group.soca.up), OPEN_GATE)
            for block in cast(Iterable[ResidualBlock], group.blocks):
                block.conv2.weight.mul_(0.1)
        nn.init.zeros_(net.attention.out.weight)
        nn.init.zeros_(biases(net.attention.out))
        pass_channels(net.head, identity_kernel())
        for conv in enlarging(net):
            pass_channels(conv, bilinear_kernels(round((conv.out_channels / conv.in_channels) ** 0.5)))
        nn.init.zeros_(biases(net.tail))
        net.tail.weight.mul_(0.1)
        # The head's output reaches the tail twice: through the groups and past them.
        pass_channels(net.tail, identity_kernel() / 2)


def biases(conv: nn.Conv2d) -> Tensor:
    """A convolution's biases, which all of SAN's have."""
    assert conv.bias is not None
    return conv.bias


def identity_kernel() -> Tensor:
    """(1, 3, 3) with its centre set."""
    kernel = torch.zeros(1, 3, 3)
    kernel[0, 1, 1] = 1
    return kernel


def bilinear_kernels(factor: int) -> Tensor:
    """(factor^2, 3, 3): what each sub-pixel of a bilinear upscaling by 2 or 3 takes from its 3 x 3 neighbours."""
    offset = (torch.arange(factor) + 0.5) / factor - 0.5
    taps = (1 - (offset[:, None] - torch.tensor([-1.0, 0.0, 1.0])).abs()).clamp_min(0)
    return torch.einsum("ay,bx->abyx", taps, taps).flatten(0, 1)


def pass_channels(conv: nn.Conv2d, kernels: Tensor, channels: int = 3) -> None:
    """Let each of the first input channels (three: colours) come out as `kernels` (n, 3, 3) of itself and nothing else."""
    n = len(kernels)
    conv.weight[: channels * n] = 0
    biases(conv)[: channels * n] = 0
    for channel in range(channels):
        conv.weight[channel * n : (channel + 1) * n, channel] = kernels


def enlarging(net: SAN) -> list[nn.Conv2d]:
    """The convolutions that upscale, in order."""
    return [layer for layer in net.upsampler if isinstance(layer, nn.Conv2d)]


def upscale(net: SAN, low: Tensor, half: bool, together: int = 0) -> Tensor:
    """`net(low)` in float32, its convolutions and attention in bf16 if `half`: (B, 3, H, W) -> (B, 3, sH, sW).

    SOCA's statistics stay in float32, where the root needs them, and so do the mean shifts and the tail: at 128..255 bf16
    knows whole grey levels alone, and the first shift's 8 / 255 would be 0.4 % too large.
    together: how many of the last pictures SOCA takes for parts of a single one.
    """
    with exact():
        shifted = net.mean_in(low)
    with autocast(low.device.type, half):
        first = channels_last(net.head(shifted))
        shared = net.attention(first)
        scaled = net.gamma.to(shared.dtype) * shared
        features = shared
        for group in cast(Iterable[ResidualGroup], net.groups):
            body = group.blocks(features)
            gated = body * soca_gate(group.soca, body, together).to(body.dtype)
            features = group.conv(gated) + features + scaled
        features = net.attention(channels_last(features)) + first
        for conv in enlarging(net):
            features = enlarged(conv, features, round((conv.out_channels / conv.in_channels) ** 0.5))
    with exact():
        output: Tensor = net.mean_out(net.tail(features.float()))
    return output


def channels_last(features: Tensor) -> Tensor:
    """The same features, whose gradient will be channels last too: attention's is not, and mixed layouts are slow."""
    if features.requires_grad:
        features.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))  # type: ignore[no-untyped-call]
    return features


def soca_gate(soca: SOCA, features: Tensor, together: int) -> Tensor:
    """Channel gates (B, C, 1, 1) of features (B, C, H, W), in float32 throughout; the last `together` share theirs."""
    with torch.autocast(features.device.type, enabled=False):
        x = features.permute(0, 2, 3, 1).flatten(1, 2).float()
        if not together:
            return soca.gate(covariance(x))
        common = covariance(x[-together:].flatten(0, 1)[None]).expand(together, -1, -1)
        return soca.gate(torch.cat([covariance(x[:-together]), common]))


def covariance(x: Tensor) -> Tensor:
    """`sanrt.model.soca.covariance` of pixels (B, HW, C), so that gradients too are channels last: it saves a tenth."""
    x = x - x.mean(1, keepdim=True)
    return x.transpose(1, 2) @ x / x.shape[1]


def enlarged(conv: nn.Conv2d, features: Tensor, factor: int) -> Tensor:
    """Convolution and `F.pixel_shuffle`: (B, C, H, W) -> (B, C, rH, rW).

    The convolution's outputs are ordered so that the shuffle moves whole pixels, a third of the work on a CPU.
    """
    batch, channels, height, width = features.shape
    weight = conv.weight.view(channels, factor**2, channels, 3, 3).transpose(0, 1).flatten(0, 1)
    bias = biases(conv).view(channels, factor**2).t().flatten()
    x = F.conv2d(features, weight.contiguous(memory_format=torch.channels_last), bias, padding=1)
    x = x.permute(0, 2, 3, 1).reshape(batch, height, width, factor, factor, channels)
    return x.transpose(2, 3).reshape(batch, height * factor, width * factor, channels).permute(0, 3, 1, 2)


def autocast(device: str, half: bool) -> AbstractContextManager[object]:
    """The context in which convolutions compute in bf16, if `half`."""
    return torch.autocast(device, torch.bfloat16) if half else nullcontext()
