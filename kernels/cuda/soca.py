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
FEW_BLOCKS = 2 * GROUP_BLOCKS
"""Fewer blocks than this are merged by soca_gate alone."""
MAX_BLOCKS = 256
"""Most blocks for a picture: enough to keep a GPU's memory busy, few enough to merge quickly."""
MERGE_THREADS, MERGE_ELEMENTS = 256, 32
"""Threads of a block of soca_merge, and elements of the matrix that it merges; as in soca.cu."""
MOST_TENSOR_STEPS = 24
"""Most steps of soca_gate_tensor: 1.5 to their power must stay below fp16's 65504."""


def soca_source(channels: int, dtype: torch.dtype, experimental: bool = False) -> CudaSource:
    """soca.cu for maps of a number of channels and a dtype; raises BackendError for what it does not support."""
    if channels not in CHANNELS:
        raise BackendError(f"CUDA kernels: SOCA over {channels} channels; expected one of {', '.join(map(str, CHANNELS))}")
    defines = f"SCALAR={scalar_type(dtype)}", f"CHANNELS={channels}", *["EXPERIMENTAL"] * experimental
    return CudaSource("soca", defines)


def max_merged_rows(channels: int) -> int:
    """Most rows of partials that soca_gate merges: one block does it, with the deviations in two matrices' memory."""
    return min(64, 2 * channels)


def partial_size(channels: int) -> int:
    """Floats in a row of partials: scatter matrix, mean, number of pixels, and padding to whole 16 bytes."""
    return channels * channels + channels + 4


@dataclass(frozen=True)
class SocaLaunch:
    """How the kernels are launched for a map.

    It depends on neither the GPU nor the batch, so a picture's result, down to the order of its sums, does not either.
    """

    batch: int
    channels: int
    pixels: int
    dtype: torch.dtype
    channels_last: bool
    experimental: bool = False
    """By soca_merge and soca_gate_tensor."""

    @classmethod
    def of(cls, x: Tensor, experimental: bool = False) -> SocaLaunch:
        """The launch for a dense map (B, C, H, W)."""
        return cls(len(x), x.shape[1], x.shape[2] * x.shape[3], x.dtype, not x.is_contiguous(), experimental)

    @property
    def source(self) -> CudaSource:
        return soca_source(self.channels, self.dtype, self.experimental)

    @property
    def blocks(self) -> int:
        """Blocks that share a picture: each of eight tiles or more, and where there are many, in whole groups."""
        tiles = -(-self.pixels // (TILE_WORDS * 4 // self.dtype.itemsize))
        blocks = max(1, min(tiles // 8, MAX_BLOCKS))
        if self.experimental and blocks >= FEW_BLOCKS:
            return -(-blocks // MERGE_ELEMENTS) * MERGE_ELEMENTS  # whole rounds of soca_merge's loads
        return blocks if blocks < FEW_BLOCKS else blocks // GROUP_BLOCKS * GROUP_BLOCKS

    @property
    def group(self) -> int:
        """Blocks that the last one of them merges; 1 where they are few, or soca_merge does it."""
        return 1 if self.experimental or self.blocks < FEW_BLOCKS else GROUP_BLOCKS

    @property
    def merge_grid(self) -> tuple[int, int, int] | None:
        """The grid of soca_merge; None where it is not launched."""
        many = self.experimental and self.blocks >= FEW_BLOCKS
        return (self.channels**2 // MERGE_ELEMENTS, self.batch, 1) if many else None

    @property
    def merged(self) -> int:
        """Rows that soca_gate merges: the last ones of the workspace, or the one that soca_merge makes of it."""
        return 1 if self.merge_grid else self.blocks // self.group

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

    @property
    def gate(self) -> str:
        return "soca_gate_tensor" if self.experimental else "soca_gate"


def soca_gate(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, iterations: int, experimental: bool = False
) -> Tensor:
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

    `experimental`, never run on hardware: many blocks' results are merged by soca_merge, a launch more, without groups and
    counters; Y and Z are multiplied on tensor cores, each number as the sum of two of fp16, which keep 22 bits. Raises
    BackendError for more steps than fp16's range suffices for.
    """
    import torch

    from sanrt.kernels.cuda.launch import dense, launch_kernel, zeroed_counters

    if experimental and iterations > MOST_TENSOR_STEPS:
        raise BackendError(f"CUDA kernels: {iterations} steps of the square root; expected at most {MOST_TENSOR_STEPS}")
    x = dense(x)
    launch = SocaLaunch.of(x, experimental)
    partials = torch.empty(launch.partials, dtype=torch.float32, device=x.device)
    # Without groups nothing is counted, and the argument not read.
    counters = partials if launch.group == 1 else zeroed_counters(launch.batch * launch.merged, x.device)
    gates = torch.empty(launch.batch, launch.channels, 1, 1, dtype=x.dtype, device=x.device)
    weights = [w.detach().contiguous() for w in (down, down_bias, up, up_bias)]
    launch_kernel(
        launch.source, launch.statistics, (launch.blocks, launch.batch, 1), 4 * launch.channels,
        x, launch.pixels, launch.group, partials, counters,
    )  # fmt: skip
    if launch.merge_grid:
        blocks, partials = partials, partials.new_empty(launch.batch, 1, partial_size(launch.channels))
        launch_kernel(launch.source, "soca_merge", launch.merge_grid, MERGE_THREADS, blocks, launch.blocks, partials)
    launch_kernel(
        launch.source, launch.gate, (launch.batch, 1, 1), GATE_THREADS,
        partials, *weights, partials.shape[1], launch.merged, iterations, len(down), gates,
    )  # fmt: skip
    return gates
