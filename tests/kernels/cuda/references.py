"""What the kernels are held to: the network's own formulas, in any precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sanrt.kernels.cuda.operators import edges


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


def allowed_error(maps: Tensor, regions: int) -> tuple[Tensor, float]:
    """Attention in float64, and the root mean square error that a kernel may have: twice PyTorch's own, or a few roundings.

    Of a float32 weight 2^s these are one for s as three TF32 products and two for the fast exponential, and one for the sum;
    in 16 bits only the result's own shows. Where PyTorch overflows, as float16 scores do, nothing else is allowed.
    """
    exact = attention(maps.double(), regions)
    plain = rms(attention(maps, regions) - exact)
    roundings = 4 if maps.dtype == torch.float32 else 1
    return exact, max(0 if math.isnan(plain) else 2 * plain, roundings * torch.finfo(maps.dtype).eps * rms(exact))
