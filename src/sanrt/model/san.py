"""Second-order Attention Network (SAN): Dai et al., CVPR 2019, with the habits of its official checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sanrt.model.attention import RegionAttention
from sanrt.model.soca import SOCA
from sanrt.model.spec import Architecture

RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean colour of the official training set, as a share of the value range."""


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResidualBlock(nn.Module):
    """x -> x + conv(relu(conv(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.conv2 = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv2(torch.relu(self.conv1(x)))
        return y


class ResidualGroup(nn.Module):
    """Local-source residual attention group (LSRAG): x -> conv(SOCA(blocks(x))) + x, and the share-source skip if given."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualBlock(arch.channels) for _ in range(arch.blocks)))
        self.soca = SOCA(arch.channels, arch.reduction, arch.sqrt_iterations)
        self.conv = conv3x3(arch.channels, arch.channels)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y: Tensor = self.conv(self.soca(self.blocks(x))) + x
        return y if skip is None else y + skip


class Upsampler(nn.Sequential):
    """Sub-pixel upscaling: one 3x3 convolution and pixel shuffle by 3, or one by 2 for every doubling."""

    def __init__(self, arch: Architecture) -> None:
        c = arch.channels
        super().__init__(*(layer for f in arch.upsampling for layer in (conv3x3(c, c * f * f), nn.PixelShuffle(f))))


class MeanShift(nn.Conv2d):
    """1 x 1 convolution that starts by adding sign * mean; the official training was free to move it."""

    def __init__(self, value_range: float, sign: int) -> None:
        super().__init__(3, 3, 1)
        with torch.no_grad():
            self.weight.copy_(torch.eye(3)[:, :, None, None])
            assert self.bias is not None
            self.bias.copy_(sign * value_range * torch.tensor(RGB_MEAN))


class SAN(nn.Module):
    """RGB pictures (B, 3, H, W), float, 0..value_range -> (B, 3, scale * H, scale * W), same dtype, not clipped.

    H and W are at least MIN_SIDE. The output may leave the value range by a little; whoever stores it clips it.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.mean_in = MeanShift(arch.value_range, -1)
        self.head = conv3x3(3, arch.channels)
        self.attention = RegionAttention(arch.channels)
        self.groups = nn.ModuleList(ResidualGroup(arch) for _ in range(arch.groups))
        self.gamma = nn.Parameter(torch.zeros(1))
        self.upsampler = Upsampler(arch)
        self.tail = conv3x3(arch.channels, 3)
        self.mean_out = MeanShift(arch.value_range, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.head(self.mean_in(x))
        shared = self.attention(first)
        skip, features = self.gamma * shared, shared
        for group in self.groups:
            features = group(features, skip)
        features = self.attention(features) + first
        y: Tensor = self.mean_out(self.tail(self.upsampler(features)))
        return y
