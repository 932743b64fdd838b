"""SOCA's channel gates on a GPU (soca.cu). Imports torch only to launch, so that engines are built without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sanrt.errors import BackendError
from sanrt.kernels.cuda.nvrtc import CudaSource, scalar_type

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHANNELS = (16, 32, 48, 64)
GATE_THREADS = 256
TILE_WORDS = 32
"""32-bit words of each channel in a tile of soca_statistics; as in soca.cu, like GATE_THREADS."""
GROUP_BLOCKS = 16
"""Blocks of soca_statistics whose results the last of them merges."""
MAX_BLOCKS = 256
"""Most blocks for a picture: enough to keep a GPU's memory busy, few enough to merge quickly."""


def soca_source(channels: int, dtype: torch.dtype) -> CudaSource:
    """soca.cu for maps of a number of channels and a dtype; raises BackendError for what it does not support."""
    if channels not in CHANNELS:
        raise BackendError(f"CUDA kernels: SOCA over {channels} channels; expected one of {', '.join(map(str, CHANNELS))}")
    return CudaSource("soca", (f"SCALAR={scalar_type(dtype)}", f"CHANNELS={channels}"))


def max_merged_rows(channels: int) -> int:
    """Most rows of partials that soca_gate merges: one block does it, with the deviations in two matrices' memory."""
    return min(64, 2 * channels)


def partial_size(channels: int) -> int:
    """Floats in a row of partials: scatter matrix, mean, number of pixels, and padding to whole 16 bytes."""
    return channels * channels + channels + 4


@dataclass(frozen=True)
class SocaLaunch:
    """How the two kernels are launched for a map.

    It depends on neither the GPU nor the batch, so a picture's result, down to the order of its sums, does not either.
    """

    batch: int
    channels: int
    pixels: int
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor) -> SocaLaunch:
        """The launch for a dense map (B, C, H, W)."""
        return cls(len(x), x.shape[1], x.shape[2] * x.shape[3], x.dtype, not x.is_contiguous())

    @property
    def source(self) -> CudaSource:
        return soca_source(self.channels, self.dtype)

    @property
    def blocks(self) -> int:
        """Blocks that share a picture: each of eight tiles or more, and where there are many, in whole groups."""
        tiles = -(-self.pixels // (TILE_WORDS * 4 // self.dtype.itemsize))
        blocks = max(1, min(tiles // 8, MAX_BLOCKS))
        return blocks if blocks < 2 * GROUP_BLOCKS else blocks // GROUP_BLOCKS * GROUP_BLOCKS

    @property
    def group(self) -> int:
        """Blocks in a group; 1 where the blocks are few, and soca_gate merges them all itself."""
        return 1 if self.blocks < 2 * GROUP_BLOCKS else GROUP_BLOCKS

    @property
    def merged(self) -> int:
        """Rows of the workspace that soca_gate merges, which are its last ones."""
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

    Where blocks are many, the last of every 16 to finish merges their results, by the formula that soca_gate begins with:
    soca_gate, which is one block, would otherwise spend its time on reading them.

    soca_gate, one block for each picture, in fp32:

        Sigma = (sum_b S_b + sum_b n_b (mean_b - mean)(mean_b - mean)^T) / HW       Chan's formula
        Y = Sigma / tr Sigma,  Z = I
        Y, Z <- Y (3 I - Z Y) / 2, (3 I - Z Y) Z / 2                                `iterations` times, the last on 1 only
        gate = sigmoid(W_U relu(W_D z + b_D) + b_U),  z = sqrt(tr Sigma) Y 1 / C

    x, weights, biases and the result have one number format: float16, bfloat16 or float32. For float16, no
    |x - shift| may exceed 65504. Compiled for every architecture, emulated on the CPU, and run on an H200.
    """
    import torch

    from sanrt.kernels.cuda.launch import dense, launch_kernel, zeroed_counters

    x = dense(x)
    launch = SocaLaunch.of(x)
    partials = torch.empty(launch.partials, dtype=torch.float32, device=x.device)
    counters = zeroed_counters(launch.batch * launch.merged, x.device)
    gates = torch.empty(launch.batch, launch.channels, 1, 1, dtype=x.dtype, device=x.device)
    weights = [w.detach().contiguous() for w in (down, down_bias, up, up_bias)]
    launch_kernel(
        launch.source, launch.statistics, (launch.blocks, launch.batch, 1), 4 * launch.channels,
        x, launch.pixels, launch.group, partials, counters,
    )  # fmt: skip
    launch_kernel(
        launch.source, "soca_gate", (launch.batch, 1, 1), GATE_THREADS,
        partials, *weights, launch.rows, launch.merged, iterations, len(down), gates,
    )  # fmt: skip
    return gates
