"""Region-level non-local attention on a GPU (region_attention.cu)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sanrt.errors import BackendError
from sanrt.kernels.cuda.launch import dense, launch
from sanrt.kernels.cuda.nvrtc import Program, scalar

DEPTH = 8
"""Inner channels that the kernels compute; fewer are padded with zeros."""
KEYS = 128
THREADS = 256
QUERIES = THREADS // 2
"""Queries of a block."""
MOST_REGIONS = 255
"""k: a grid has no more than 65,535 blocks along its second axis, and a region is one of them."""


def program(inner: int, dtype: torch.dtype) -> Program:
    """region_attention.cu for maps of `inner` queries, keys and values each."""
    if not 1 <= inner <= DEPTH:
        raise BackendError(f"CUDA kernels: attention over {inner} inner channels; expected 1 to {DEPTH} (C/8 of C up to 64)")
    return Program("region_attention", (f"SCALAR={scalar(dtype)}", f"INNER={inner}"))


@dataclass(frozen=True)
class AttentionLaunch:
    """How the two kernels are launched for k x k regions."""

    batch: int
    inner: int
    height: int
    width: int
    regions: int
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def of(cls, maps: Tensor, regions: int) -> AttentionLaunch:
        """For dense maps (B, 3 I, H, W): queries, keys and values."""
        batch, channels, height, width = maps.shape
        if regions > MOST_REGIONS:
            raise BackendError(
                f"CUDA kernels: {regions} x {regions} regions; expected at most {MOST_REGIONS} x {MOST_REGIONS}"
            )
        if channels % 3 or min(height, width) < 2 * regions:
            raise BackendError(
                f"CUDA kernels: attention over {regions} x {regions} regions of maps {list(maps.shape)}; "
                "expected channels in three equal parts and regions of 2 x 2 pixels or more"
            )
        return cls(batch, channels // 3, height, width, regions, maps.dtype, not maps.is_contiguous())

    @property
    def program(self) -> Program:
        return program(self.inner, self.dtype)

    @property
    def largest(self) -> tuple[int, int]:
        """Height and width that no region exceeds."""
        return -(-self.height // self.regions), -(-self.width // self.regions)

    @property
    def padded(self) -> int:
        """Keys kept for each region, in whole tiles; zeros beyond its own."""
        height, width = self.largest
        return -(-(height // 2) * (width // 2) // KEYS) * KEYS

    @property
    def workspace(self) -> tuple[int, int, int, int]:
        """Shape of the pooled keys (padded x 8 each) and of the pooled values (8 x padded each)."""
        return self.batch, self.regions**2, DEPTH, self.padded

    @property
    def pool_grid(self) -> tuple[int, int, int]:
        return self.padded * DEPTH // THREADS, self.regions**2, self.batch

    @property
    def grid(self) -> tuple[int, int, int]:
        height, width = self.largest
        return -(-height * width // QUERIES), self.regions**2, self.batch

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def region_attention(maps: Tensor, regions: int) -> Tensor:
    """Attention (B, I, H, W) over k x k regions of maps (B, 3 I, H, W) on a GPU, in two launches; no score matrix is kept.

    With q, k, v the three parts of `maps` in a region, and P(.) the 2 x 2 maximum, stride 2:

        y_i = sum_j exp(q_i . P(k)_j) P(v)_j / sum_j exp(q_i . P(k)_j)

    region_pool writes P(k) and P(v). region_attention takes 128 queries to all keys of their region, 64 keys at a time, with
    a running maximum m and sum l (online softmax): m' = max(m, s), l <- l 2^(m - m') + sum 2^(s - m'), and so y; scores
    s = q . k log2(e) and sums in fp32. Products are on tensor cores, in the maps' format; each of fp32 is three of TF32.

    Regions are cut at floor(i H / k), floor(i W / k). Compiled for every architecture, emulated on the CPU, run on an H200.
    """
    maps = dense(maps)
    plan = AttentionLaunch.of(maps, regions)
    keys, values = (torch.empty(plan.workspace, dtype=maps.dtype, device=maps.device) for _ in range(2))
    size = (plan.batch, plan.inner, plan.height, plan.width)
    y = torch.empty(size, dtype=maps.dtype, device=maps.device, memory_format=plan.memory_format)
    shape = (plan.height, plan.width, regions, plan.padded, int(plan.channels_last))
    launch(plan.program, "region_pool", plan.pool_grid, THREADS, maps, *shape, keys, values)
    launch(plan.program, "region_attention", plan.grid, THREADS, maps, keys, values, *shape, y)
    return y
