"""Holds what is experimental against the measured kernels, on the GPU at hand and before it is used."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from sanrt.errors import BackendError
from sanrt.extras import tracker
from sanrt.kernels.cuda.experimental import VARIABLE, Experiment
from sanrt.kernels.cuda.operators import region_attention, soca_gate, summed_convolution

ROUNDINGS = 4
"""How many roundings of the number format the two may lie apart, as root mean squares."""

Random = Callable[..., Tensor]
"""Normally distributed numbers of a shape, channels-last where there are four axes."""


def gates(random: Random, channels: int) -> tuple[Tensor, Tensor]:
    """Of two pictures so large that their blocks are merged by a launch of their own."""
    hidden = max(1, channels // 16)
    down, up = random(hidden, channels, 1, 1), random(channels, hidden, 1, 1)
    arguments = random(2, channels, 131, 133), down, random(hidden), up, random(channels), 5
    return soca_gate(*arguments, experimental=True), soca_gate(*arguments)


def attention(random: Random, channels: int) -> tuple[Tensor, Tensor]:
    maps = random(2, 3 * channels // 8, 67, 129)
    return region_attention(maps, 2, experimental=True), region_attention(maps, 2)


def convolution(random: Random, channels: int) -> tuple[Tensor, Tensor]:
    x, weight, bias = random(1, channels, 33, 65), random(channels, channels, 3, 3) / (9 * channels) ** 0.5, random(channels)
    maps = [random(1, channels, 33, 65) for _ in range(2)]
    exact = sum((each.float() for each in maps), F.conv2d(x.float(), weight.float(), bias.float(), padding=1))
    return summed_convolution(x, weight, bias, maps), exact


COMPARISONS = {Experiment.CUDNN: convolution, Experiment.SOCA: gates, Experiment.ATTENTION: attention}


def check_experiments(
    experiments: Collection[Experiment], channels: int, device: torch.device, dtype: torch.dtype
) -> dict[Experiment, float]:
    """How far each experiment's result is from the measured one's, relative.

    Raises BackendError where that is too much, and for one that is not for `dtype`.
    """
    if dtype == torch.float32 and (wrong := {Experiment.CUDNN, Experiment.ATTENTION} & set(experiments)):
        raise BackendError(f"{VARIABLE}={min(wrong)}: not in fp32; expected fp16 or bf16")
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        x = torch.randn(size, generator=generator, device=device).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if len(size) == 4 else x

    errors, allowed = {}, ROUNDINGS * torch.finfo(dtype).eps
    for experiment in sorted(experiments):
        ours, measured = (x.double() for x in COMPARISONS[experiment](random, channels))
        errors[experiment] = float((ours - measured).norm() / measured.norm())
        if not errors[experiment] <= allowed:
            raise BackendError(
                f"{VARIABLE}={experiment}: on this GPU its result is {errors[experiment]:.2g} from the measured kernels'; "
                f"expected at most {allowed:.2g}; leave it out, and please report it {tracker()}"
            )
    return errors
