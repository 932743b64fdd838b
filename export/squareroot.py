"""The distance of n Newton-Schulz steps from the exact matrix square root, and what it costs a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sanrt.errors import UsageError
from sanrt.export.parity import Difference, compare
from sanrt.model.checkpoint import Checkpoint
from sanrt.model.san import SAN
from sanrt.model.soca import SOCA, covariance, exact_sqrt, newton_schulz_sqrt
from sanrt.model.spec import MAX_SQRT_ITERATIONS
from sanrt.wording import option

GATE_TOLERANCE = 1e-3
"""Largest error of a gate, which lies in (0, 1), with the number of steps that an exact-root checkpoint is given."""


@dataclass(frozen=True)
class RootConvergence:
    """One SOCA's square root Y of its covariance S after n steps; norms are Frobenius's."""

    group: int
    condition: float
    """Largest eigenvalue of S over its smallest, or over what float32 tells from zero."""
    residual: float
    """|Y^2 - S| / |S|: 0 when converged."""
    error: float
    """|Y - S^(1/2)| / |S^(1/2)|."""
    gate: float
    """Largest difference of a channel's gate, which lies in (0, 1), from the exact root's."""


@dataclass(frozen=True)
class SquareRootReport:
    """The square root in one exported model, measured on one picture."""

    iterations: int
    """Newton-Schulz steps in the graph."""
    trained: int | None
    """Steps that the network was trained with; None is the exact root."""
    picture: str
    difference: Difference
    """The upscaled picture against the exact root's."""
    groups: tuple[RootConvergence, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON, for the model's metadata."""
        return {**asdict(self), "difference": self.difference.to_json(), "groups": [asdict(group) for group in self.groups]}


def square_root_report(checkpoint: Checkpoint, iterations: int, pixels: Tensor, picture: str) -> SquareRootReport:
    """Run a checkpoint with n steps and with the exact root on pixels (1, 3, H, W), 0..value_range, float32."""
    net = checkpoint.network()
    exact = with_root(net, None)(pixels)
    output, sigmas = with_covariances(with_root(net, iterations), pixels)
    groups = tuple(convergence(g, soca, s, iterations) for g, (soca, s) in enumerate(zip(socas(net), sigmas, strict=True)))
    arch = checkpoint.architecture
    difference = compare(exact.numpy(), output.numpy(), arch.value_range)
    return SquareRootReport(iterations, arch.sqrt_iterations, picture, difference, groups)


def with_root(net: SAN, iterations: int | None) -> SAN:
    """The same network, its SOCAs set to n Newton-Schulz steps or (None) to the exact root."""
    for soca in socas(net):
        soca.sqrt_iterations = iterations
    return net


def socas(net: SAN) -> list[SOCA]:
    """Every group's SOCA, in order."""
    return [module for module in net.modules() if isinstance(module, SOCA)]


def with_covariances(net: SAN, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the covariance (B, C, C) that each group's SOCA met on the way."""
    sigmas: list[Tensor] = []
    hooks = [soca.register_forward_pre_hook(lambda _, inputs: sigmas.append(covariance(inputs[0]))) for soca in socas(net)]
    output = net(pixels)
    for hook in hooks:
        hook.remove()
    return output, sigmas


def convergence(group: int, soca: SOCA, sigma: Tensor, iterations: int) -> RootConvergence:
    """The convergence of n float32 steps on one covariance (1, C, C), judged in float64."""
    wide = sigma.double()
    root, exact = newton_schulz_sqrt(sigma, iterations).double(), exact_sqrt(wide)
    eigenvalues = torch.linalg.eigvalsh(wide)
    largest = eigenvalues.max()
    smallest = eigenvalues.min().clamp_min(torch.finfo(torch.float32).eps * largest)
    return RootConvergence(
        group,
        condition=float(largest / smallest),
        residual=float((root @ root - wide).norm() / wide.norm()),
        error=float((root - exact).norm() / exact.norm()),
        gate=gate_error(soca, sigma, iterations),
    )


def gate_error(soca: SOCA, sigma: Tensor, iterations: int) -> float:
    """Largest difference of a gate after n steps from the exact root's."""
    gates = []
    for soca.sqrt_iterations in (iterations, None):
        gates.append(soca.gate(sigma))
    return float((gates[0] - gates[1]).abs().max())


def iterations_for(checkpoint: Checkpoint, pixels: Tensor) -> int:
    """Newton-Schulz steps for the graph: as trained, or as many as the spectra on this picture need for an exact root.

    Raises UsageError when no number up to MAX_SQRT_ITERATIONS brings every gate within GATE_TOLERANCE.
    """
    trained = checkpoint.architecture.sqrt_iterations
    if trained is not None:
        return trained
    net = checkpoint.network()
    _, sigmas = with_covariances(net, pixels)
    pairs = list(zip(socas(net), sigmas, strict=True))
    worst = {n: max(gate_error(soca, sigma, n) for soca, sigma in pairs) for n in range(1, MAX_SQRT_ITERATIONS + 1)}
    enough = next((n for n, error in worst.items() if error <= GATE_TOLERANCE), None)
    if enough is None:
        best = min(worst, key=lambda n: worst[n])
        raise UsageError(
            f"{checkpoint.path}: trained with the exact root; {best} Newton-Schulz steps come nearest, with gates"
            f" {worst[best]:.2g} off, expected {GATE_TOLERANCE:g}; accept that with {option('sqrt-iterations', best)}"
        )
    return enough
