"""The reference network stage by stage, for exact streaming; the contract is `stage_model`'s in `sanrt.model.graph`."""

from __future__ import annotations

from torch import Tensor

from sanrt.model.san import SAN, ResidualGroup
from sanrt.model.soca import moments


def run_stage(net: SAN, stage: str, *inputs: Tensor) -> list[Tensor]:
    """Outputs of one stage (`head`, `body.3`, ...); the last input of a convolutional one is the box to return."""
    kind, _, number = stage.partition(".")
    group = net.groups[int(number or 0)]
    assert isinstance(group, ResidualGroup)
    match kind, inputs:
        case "head", (pixels, box):
            return [crop(net.head(net.mean_in(pixels)), box)]
        case "keys-values", (x,):
            return list(net.attention.keys_values(x))
        case "attend", (x, key, value):
            return [net.attention.attend(x, key, value)]
        case "body", (x, box):
            features = crop(group.blocks(x), box)
            return [features, *moments(features)]
        case "gate", (sigma,):
            return [group.soca.gate(sigma)]
        case "join", (features, gate, x, shared, box):
            return [crop(group.conv(features * gate), box) + x + net.gamma * shared]
        case "tail", (attended, first, box):
            return [crop(net.mean_out(net.tail(net.upsampler(attended + first))), box)]
    raise ValueError(f"no stage {stage} of {len(inputs)} inputs")


def crop(x: Tensor, box: Tensor) -> Tensor:
    """Rows and columns of x within box (top, left, bottom, right), as memory of its own."""
    top, left, bottom, right = box.tolist()
    return x[:, :, top:bottom, left:right].contiguous()
