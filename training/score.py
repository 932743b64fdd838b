"""How good a network is on held-out pictures, on the device it is on."""

from __future__ import annotations

import torch
from torch import Tensor

from sanrt.model.san import SAN
from training.network import upscale
from training.tiles import Tiles

TOGETHER = 8
"""Pictures that are upscaled at once."""


@torch.inference_mode()
def scores(net: SAN, held_out: Tiles, half: bool) -> list[float]:
    """Mean Y-PSNR in dB for each version of the held-out tiles, `scale` pixels shaved off every side."""
    values = []
    for version in held_out.low:
        errors = [
            luma_errors(upscale(net, floats(low), half), floats(high), held_out.scale)
            for low, high in zip(torch.split(version, TOGETHER), torch.split(held_out.high, TOGETHER), strict=True)
        ]
        values.append((10 * (255**2 / torch.cat(errors)).log10()).mean().item())
    return values


def floats(pictures: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), channels last in memory."""
    return pictures.permute(0, 3, 1, 2).float()


def luma_errors(output: Tensor, truth: Tensor, shave: int) -> Tensor:
    """Mean squared error of luma (BT.601) of each picture once the output is rounded: (B, 3, H, W) twice -> (B), float64."""
    weights = torch.tensor([65.481, 128.553, 24.966], device=output.device, dtype=torch.float64)[:, None, None] / 255
    difference = (output.clamp(0, 255).round() - truth).double()
    return (difference * weights).sum(1)[:, shave:-shave, shave:-shave].square().mean((1, 2))
