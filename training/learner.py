"""A network, the average of its weights and its optimiser on flat vectors, and one step of training."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from sanrt.model.san import SAN
from training.network import upscale

AVERAGE = 0.999
"""Weight of the past in the moving average of the weights, which is what ships."""

OUTLIER = 3.0
"""A gradient is clipped when its norm is this many times the usual one."""

TEACHING = 0.5
"""Share of the loss that a teacher's output has, where there is one; the rest is the true picture's."""


BLOCK_SIDE = 16
"""Side of the blocks whose mean errors are part of the loss, high-resolution pixels."""


class Learner:
    """All trained weights in one vector, so that optimiser, average, clipping and state are each one operation."""

    def __init__(self, net: SAN, device: torch.device, half: bool, teacher: SAN | None = None) -> None:
        self.half = half
        self.net = on_device(net, device)
        self.teacher = on_device(teacher, device).requires_grad_(False) if teacher else None
        for shift in (net.mean_in, net.mean_out):
            shift.requires_grad_(False)
        self.flat, self.gradient = flattened(self.net)
        self.average = self.flat.detach().clone()
        self.rate = torch.zeros((), device=device)
        self.usual_norm = torch.full((), torch.nan, device=device)
        """Running mean of the gradient norm's logarithm; NaN before the first step."""
        self.capturable = device.type == "cuda"
        self.optimiser = Adam([self.flat], lr=self.rate, betas=(0.9, 0.99), fused=True, capturable=self.capturable)
        self.updates, self.moment1, self.moment2 = adam_state(self.optimiser, self.flat, self.capturable)

    def step(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Learn from one batch, at `self.rate`; returns loss (a share of the value range) and gradient norm."""
        loss = self.loss(low, high)
        self.gradient.zero_()
        loss.backward()  # type: ignore[no-untyped-call]
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.gradient)
            self.gradient.div_(torch.distributed.get_world_size())
        norm = torch.linalg.vector_norm(self.gradient)
        self.guard(norm)
        self.optimiser.step()
        self.average.lerp_(self.flat.detach(), 1 - AVERAGE)
        return loss.detach(), norm

    def loss(self, low: Tensor, high: Tensor) -> Tensor:
        """How far a batch's outputs are from the pictures, and from the teacher's if there is one.

        SOCA takes half of the batch for parts of one picture: gates that knew patches alone were wrong on whole photographs,
        whose statistics are those of many patches.
        """
        output = upscale(self.net, low, self.half, together=len(low) // 2)
        error = distance(output, high)
        if self.teacher:
            with torch.no_grad():
                taught = upscale(self.teacher, low, self.half)
            error = error.lerp(distance(output, taught), TEACHING)
        return error / self.net.arch.value_range

    def guard(self, norm: Tensor) -> None:
        """Clip a gradient that is an outlier; let one that is not finite change no weight."""
        finite = norm.isfinite()
        log = torch.where(finite, norm, 1).clamp_min(1e-12).log()
        usual = torch.where(self.usual_norm.isnan(), log, self.usual_norm)
        limit = usual.exp() * OUTLIER
        self.usual_norm.copy_(usual.lerp(torch.minimum(log, limit.log()), 0.01))
        self.gradient.nan_to_num_(0, 0, 0).mul_(torch.where(finite, (limit / norm).clamp_max(1), 0))
        self.rate.mul_(finite)

    def vectors(self) -> dict[str, Tensor]:
        """The large parts of the state, by the names of their files; each (parameters), float32."""
        return {"weights": self.flat.detach(), "average": self.average, "moment1": self.moment1, "moment2": self.moment2}

    def scalars(self) -> dict[str, Tensor]:
        """The small parts of the state."""
        return {"usual_norm": self.usual_norm, "updates": self.updates}

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """The parts of a vector of `vectors` by the parameters' names, in their shapes; they share its memory."""
        found, offset = {}, 0
        for name, parameter in self.net.named_parameters():
            if parameter.requires_grad:
                found[name] = vector.as_strided(parameter.shape, parameter.stride(), offset)
                offset += parameter.numel()
        return found

    def weights(self, averaged: bool) -> dict[str, Tensor]:
        """Every tensor of the network, with the averaged weights or the raw ones, by name, on the CPU."""
        trained = self.named(self.average if averaged else self.flat.detach())
        return {name: t.detach().cpu().clone() for name, t in (self.net.state_dict() | trained).items()}


def distance(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of pixels, and of blocks' means beside it: (B, 3, H, W) twice -> ().

    Pixel by pixel a grey level that a whole picture is off is hardly felt among the errors of edges; PSNR feels it.
    """
    error = output - target
    blocks = F.avg_pool2d(error, min(BLOCK_SIDE, *error.shape[2:]))
    return error.abs().mean() + blocks.abs().mean()


def on_device(net: SAN, device: torch.device) -> SAN:
    """The network on a device, its convolutions channels last."""
    moved: SAN = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def flattened(net: SAN) -> tuple[nn.Parameter, Tensor]:
    """Move all trained parameters of `net` into one vector and their gradients into another; the network keeps views."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    flat = nn.Parameter(torch.cat([p.detach().as_strided((p.numel(),), (1,)) for p in parameters]))
    gradient = torch.zeros_like(flat.detach())
    flat.grad = gradient
    offset = 0
    for p in parameters:
        shape, stride = p.shape, p.stride()
        p.data = flat.detach().as_strided(shape, stride, offset)
        p.grad = gradient.as_strided(shape, stride, offset)
        offset += p.numel()
    return flat, gradient


def adam_state(optimiser: Adam, flat: nn.Parameter, capturable: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's count of updates and its two moments, made before its first step so that a state can be loaded into them."""
    state: dict[str, Any] = optimiser.state[flat]
    state["step"] = torch.zeros((), device=flat.device if capturable else "cpu")
    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat.detach()), torch.zeros_like(flat.detach())
    return state["step"], state["exp_avg"], state["exp_avg_sq"]
