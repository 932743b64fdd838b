"""SOCA's channel gates on a GPU (soca.cu). Imports torch only to launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sanrt.errors import BackendError
from sanrt.kernels.cuda.nvrtc import Program, scalar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHANNELS = (16, 32, 48, 64)
GATE_THREADS = 256
WORDS = 32
"""32-bit words of each channel in a tile of soca_statistics."""
GROUP = 16
"""Blocks of soca_statistics in a group."""
MOST_BLOCKS = 256
"""For a picture: enough to keep a GPU's memory busy."""


def program(channels: int, dtype: torch.dtype) -> Program:
    """soca.cu for maps of `channels` channels of a number format."""
    if channels not in CHANNELS:
        raise BackendError(f"CUDA kernels: SOCA over {channels} channels; expected one of {', '.join(map(str, CHANNELS))}")
    return Program("soca", (f"SCALAR={scalar(dtype)}", f"CHANNELS={channels}"))


def most_merged(channels: int) -> int:
    """Most rows that soca_gate merges: it does so in the memory of its matrices, and alone."""
    return min(64, 2 * channels)


def partial_size(channels: int) -> int:
    """Floats that a block hands on: its scatter matrix, its mean, its number of pixels; in whole 16 bytes."""
    return channels * channels + channels + 4


@dataclass(frozen=True)
class SocaLaunch:
    """How the two kernels are launched. Neither the GPU nor the batch matters to it, nor so to a picture's result."""

    batch: int
    channels: int
    pixels: int
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor) -> SocaLaunch:
        """For a dense map (B, C, H, W)."""
        return cls(len(x), x.shape[1], x.shape[2] * x.shape[3], x.dtype, not x.is_contiguous())

    @property
    def program(self) -> Program:
        return program(self.channels, self.dtype)

    @property
    def blocks(self) -> int:
        """Blocks that share a picture, of eight tiles of pixels or more; in whole groups where they are many."""
        tiles = -(-self.pixels // (WORDS * 4 // self.dtype.itemsize))
        blocks = max(1, min(tiles // 8, MOST_BLOCKS))
        return blocks if blocks < 2 * GROUP else blocks // GROUP * GROUP

    @property
    def group(self) -> int:
        """Blocks whose results the last of them merges; 1 where all are left to soca_gate."""
        return 1 if self.blocks < 2 * GROUP else GROUP

    @property
    def merged(self) -> int:
        """Rows of the workspace that soca_gate merges: its last ones."""
        return self.blocks // self.group

    @property
    def rows(self) -> int:
        """Rows of the workspace for each picture: one for every block, then one for every group."""
        return self.blocks if self.group == 1 else self.blocks + self.merged

    @property
    def partials(self) -> tuple[int, int, int]:
        """Shape of the float32 workspace."""
        return self.batch, self.rows, partial_size(self.channels)

    @property
    def statistics(self) -> str:
        return "soca_statistics_nhwc" if self.channels_last else "soca_statistics_nchw"


def soca_gate(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, iterations: int) -> Tensor:
    """Gates (B, C, 1, 1) of maps (B, C, H, W) on a GPU, in two launches (and the clearing of a few counters).

    soca_statistics: each block reads its pixels x_p once and keeps their mean and S = sum (x_p - mean)(x_p - mean)^T, on
    tensor cores: x_p - shift = h + l, two numbers of the map's format (TF32 for fp32), and h h^T + h l^T + l h^T is summed
    in fp32; shift is the mean of the block's first tile, so that large means cancel before they are squared.

    Where blocks are many, the last of every 16 to finish merges their results, by the formula that soca_gate begins with.

    soca_gate, one block for each picture, in fp32:

        Sigma = (sum_b S_b + sum_b n_b (mean_b - mean)(mean_b - mean)^T) / HW       Chan's formula
        Y = Sigma / tr Sigma,  Z = I
        Y, Z <- Y (3 I - Z Y) / 2, (3 I - Z Y) Z / 2                                `iterations` times, the last on 1 only
        gate = sigmoid(W_U relu(W_D z + b_D) + b_U),  z = sqrt(tr Sigma) Y 1 / C

    x, weights, biases and the result have one number format: float16, bfloat16 or float32. For float16, no
    |x - shift| may exceed 65504. Compiled for every architecture, emulated on the CPU, and run on an H200.
    """
    import torch

    from sanrt.kernels.cuda.launch import cleared, dense, launch

    x = dense(x)
    plan = SocaLaunch.of(x)
    partials = torch.empty(plan.partials, dtype=torch.float32, device=x.device)
    counters = cleared(plan.batch * plan.merged, x.device)
    gates = torch.empty(plan.batch, plan.channels, 1, 1, dtype=x.dtype, device=x.device)
    weights = [w.detach().contiguous() for w in (down, down_bias, up, up_bias)]
    launch(
        plan.program, plan.statistics, (plan.blocks, plan.batch, 1), 4 * plan.channels,
        x, plan.pixels, plan.group, partials, counters,
    )  # fmt: skip
    launch(
        plan.program, "soca_gate", (plan.batch, 1, 1), GATE_THREADS,
        partials, *weights, plan.rows, plan.merged, iterations, len(down), gates,
    )  # fmt: skip
    return gates
