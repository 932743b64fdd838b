"""Region-level non-local module (RL-NL): section 3.2 of the paper, formula 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RegionAttention(nn.Module):
    """x -> W(softmax(theta(x) phi(x)^T) g(x)) + x within each of k x k regions; (B, C, H, W) in and out.

    As in the official code the keys phi(x) and values g(x) are max-pooled 2 x 2 first, scores are not scaled, and
    regions are cut at floor(i * H / k), so odd sizes give unequal regions. No L x L matrix is formed.
    """

    def __init__(self, channels: int, regions: int = 2) -> None:
        super().__init__()
        inner = channels // 8
        self.regions = regions
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1)

    def keys_values(self, region: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled keys and values of a region: (B, C, h, w) -> two (B, C/8, h // 2, w // 2)."""
        return F.max_pool2d(self.key(region), 2), F.max_pool2d(self.value(region), 2)

    def attend(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of any part x (B, C, h, w) of a region to that region's keys and values; (B, C, h, w)."""
        # Contiguous, or PyTorch's fused kernel steps aside for one that forms the L x L matrix.
        q, k, v = (t.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for t in (self.query(x), key, value))
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        y = y.squeeze(1).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])
        attended: Tensor = self.out(y) + x
        return attended

    def forward(self, x: Tensor) -> Tensor:
        rows = (torch.cat([self.region(cell) for cell in self.cut(row, 3)], 3) for row in self.cut(x, 2))
        return torch.cat(list(rows), 2)

    def cut(self, x: Tensor, axis: int) -> tuple[Tensor, ...]:
        """The k parts of x along an axis."""
        return x.tensor_split([x.shape[axis] * i // self.regions for i in range(1, self.regions)], axis)

    def region(self, x: Tensor) -> Tensor:
        """One region attending to itself."""
        return self.attend(x, *self.keys_values(x))
