"""What the kernels are held to: the network's own formulas, in any precision."""

from __future__ import annotations

import torch
from torch import Tensor

from sanrt.kernels.operators import edges


def attention(maps: Tensor, regions: int) -> Tensor:
    """Region attention by plain matrix products and a softmax, in the maps' precision."""
    y = torch.empty_like(maps[:, : maps.shape[1] // 3])
    for top, bottom in edges(maps.shape[2], regions):
        for left, right in edges(maps.shape[3], regions):
            query, key, value = maps[:, :, top:bottom, left:right].chunk(3, 1)
            k, v = (torch.nn.functional.max_pool2d(t, 2).flatten(2) for t in (key, value))
            weights = (query.flatten(2).transpose(1, 2) @ k).softmax(2)
            y[:, :, top:bottom, left:right] = (weights @ v.transpose(1, 2)).transpose(1, 2).reshape(query.shape)
    return y


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()
