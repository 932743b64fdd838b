"""Region-level non-local attention on a GPU (region_attention.cu)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sanrt.errors import BackendError
from sanrt.kernels.cuda.launch import dense, launch_kernel
from sanrt.kernels.cuda.nvrtc import CudaSource, scalar_type

DEPTH = 8
"""Inner channels that the kernels compute; fewer are padded with zeros."""
TILE_KEYS = 128
"""Keys that a block has in shared memory at a time; this and the other constants are as in region_attention.cu."""
THREADS = 256
BLOCK_QUERIES = THREADS // 2
"""Queries that a block takes to all keys of their region."""
WARP_TILES = 2
"""How many times as many a block of region_attention_ahead takes."""
MAX_REGIONS = 255
"""Most regions along one axis: a grid has at most 65,535 blocks along its second axis, and each region is one there."""


def attention_source(inner: int, dtype: torch.dtype, ahead: bool = False) -> CudaSource:
    """region_attention.cu for a number of inner channels and a dtype; raises BackendError for what it does not support."""
    if not 1 <= inner <= DEPTH:
        raise BackendError(f"CUDA kernels: attention over {inner} inner channels; expected 1 to {DEPTH} (C/8 of C up to 64)")
    if ahead and dtype == torch.float32:
        raise BackendError("CUDA kernels: experimental attention of float32 maps; expected float16 or bfloat16")
    defines = f"SCALAR={scalar_type(dtype)}", f"INNER={inner}", *["EXPERIMENTAL"] * ahead
    return CudaSource("region_attention", defines)


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
    ahead: bool = False
    """By region_attention_ahead."""

    @classmethod
    def of(cls, maps: Tensor, regions: int, ahead: bool = False) -> AttentionLaunch:
        """The launch for dense maps (B, 3 I, H, W) of queries, keys and values; raises BackendError where there is none."""
        batch, channels, height, width = maps.shape
        if regions > MAX_REGIONS:
            raise BackendError(
                f"CUDA kernels: {regions} x {regions} regions; expected at most {MAX_REGIONS} x {MAX_REGIONS}"
            )
        if channels % 3 or min(height, width) < 2 * regions:
            raise BackendError(
                f"CUDA kernels: attention over {regions} x {regions} regions of maps {list(maps.shape)}; "
                "expected channels in three equal parts and regions of 2 x 2 pixels or more"
            )
        return cls(batch, channels // 3, height, width, regions, maps.dtype, not maps.is_contiguous(), ahead)

    @property
    def source(self) -> CudaSource:
        return attention_source(self.inner, self.dtype, self.ahead)

    @property
    def kernel(self) -> str:
        return "region_attention_ahead" if self.ahead else "region_attention"

    @property
    def largest(self) -> tuple[int, int]:
        """Height and width that no region exceeds."""
        return -(-self.height // self.regions), -(-self.width // self.regions)

    @property
    def padded(self) -> int:
        """Keys kept for each region: those of the largest, rounded up to whole tiles; zeros beyond a region's own."""
        height, width = self.largest
        return -(-(height // 2) * (width // 2) // TILE_KEYS) * TILE_KEYS

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
        queries = BLOCK_QUERIES * WARP_TILES if self.ahead else BLOCK_QUERIES
        return -(-height * width // queries), self.regions**2, self.batch

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def region_attention(maps: Tensor, regions: int, experimental: bool = False) -> Tensor:
    """Attention (B, I, H, W) over k x k regions of maps (B, 3 I, H, W) on a GPU, in two launches; no score matrix is kept.

    With q, k, v the three parts of `maps` in a region, and P(.) the 2 x 2 maximum, stride 2:

        y_i = sum_j exp(q_i . P(k)_j) P(v)_j / sum_j exp(q_i . P(k)_j)

    region_pool writes P(k) and P(v). region_attention takes 128 queries to all keys of their region, 64 keys at a time, with
    a running maximum m and sum l (online softmax): m' = max(m, s), l <- l 2^(m - m') + sum 2^(s - m'), and so y; scores
    s = q . k log2(e) and sums in fp32. Products are on tensor cores, in the maps' format; each of fp32 is three of TF32.

    Regions are cut at floor(i H / k), floor(i W / k). Compiled for every architecture, emulated on the CPU, run on an H200.

    `experimental`, 16-bit types only, never run on hardware: m follows the largest score no closer than 8, so it is hardly
    ever raised; l is the sum of the weights rounded as they are multiplied, by tensor cores; tiles are loaded ahead.
    """
    maps = dense(maps)
    launch = AttentionLaunch.of(maps, regions, experimental)
    keys, values = (torch.empty(launch.workspace, dtype=maps.dtype, device=maps.device) for _ in range(2))
    size = (launch.batch, launch.inner, launch.height, launch.width)
    y = torch.empty(size, dtype=maps.dtype, device=maps.device, memory_format=launch.memory_format)
    shape = (launch.height, launch.width, regions, launch.padded, int(launch.channels_last))
    launch_kernel(launch.source, "region_pool", launch.pool_grid, THREADS, maps, *shape, keys, values)
    launch_kernel(launch.source, launch.kernel, launch.grid, THREADS, maps, keys, values, *shape, y)
    return y
