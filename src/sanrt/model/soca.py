"""Second-order channel attention (SOCA): section 3.3 of the paper, formulas 6 to 13."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sanrt.model.contract import MIN_TRACE


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, C, 1) over pixels and centred scatter (B, C, C) of features (B, C, H, W), in float32 at least."""
    x = features.flatten(2)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(2, keepdim=True)
    x = x - mean
    return mean, x @ x.transpose(1, 2)


def covariance(features: Tensor) -> Tensor:
    """Channel covariance Sigma = X Ibar X^T of each picture: (B, C, H, W) -> (B, C, C), in float32 at least.

    X is C x HW and Ibar = (I - 11^T / HW) / HW. The centred product equals it without the HW x HW matrix.
    """
    return moments(features)[1] / features.shape[2:].numel()


def newton_schulz_step(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """One coupled step: y -> the square root, z -> the inverse square root; both (B, C, C)."""
    half = 1.5 * torch.eye(y.shape[-1], dtype=y.dtype, device=y.device) - 0.5 * (z @ y)
    return y @ half, half @ z


def newton_schulz_sqrt(sigma: Tensor, iterations: int) -> Tensor:
    """Square root of symmetric positive semi-definite matrices by coupled Newton-Schulz steps (formulas 8 to 10).

    sigma: (B, C, C), float32 or float64. It is divided by its trace first and multiplied by the trace's root last.
    """
    trace = sigma.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(MIN_TRACE)[:, None, None]
    y = sigma / trace
    # z starts as the identity, so the first step needs no product with it.
    z = 1.5 * torch.eye(y.shape[-1], dtype=y.dtype, device=y.device) - 0.5 * y
    y = y @ z
    for _ in range(iterations - 2):
        y, z = newton_schulz_step(y, z)
    if iterations > 1:
        y = 1.5 * y - 0.5 * (y @ (z @ y))
    return y * trace.sqrt()


def exact_sqrt(sigma: Tensor) -> Tensor:
    """Square root of symmetric positive semi-definite matrices by eigendecomposition (formula 7), in sigma's dtype."""
    values, vectors = torch.linalg.eigh(sigma)
    root: Tensor = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.transpose(-2, -1)
    return root


class SOCA(nn.Module):
    """F -> F * sigmoid(W_U relu(W_D z)), z_c the mean of row c of Sigma^(1/2); features are (B, C, H, W).

    sqrt_iterations: Newton-Schulz steps, or None for the exact root in float64.
    """

    def __init__(self, channels: int, reduction: int, sqrt_iterations: int | None) -> None:
        super().__init__()
        self.sqrt_iterations = sqrt_iterations
        self.down = nn.Conv2d(channels, channels // reduction, 1)
        self.up = nn.Conv2d(channels // reduction, channels, 1)

    def sqrt(self, sigma: Tensor) -> Tensor:
        """The square root this module was trained with: (B, C, C) -> (B, C, C), sigma's dtype."""
        if self.sqrt_iterations is None:
            return exact_sqrt(sigma.double()).to(sigma.dtype)
        return newton_schulz_sqrt(sigma, self.sqrt_iterations)

    def gate(self, sigma: Tensor) -> Tensor:
        """Channel gates in (0, 1) from a covariance: (B, C, C) -> (B, C, 1, 1)."""
        z = self.sqrt(sigma).mean(2)[:, :, None, None].to(self.down.weight.dtype)
        return torch.sigmoid(self.up(torch.relu(self.down(z))))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.gate(covariance(features))
