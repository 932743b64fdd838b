"""What a SAN is, in numbers: read off a checkpoint, written into an ONNX, carried beside an engine."""

from __future__ import annotations

from dataclasses import dataclass

SCALES = (2, 3, 4, 8)
MIN_SIDE = 4
"""Smallest height and width in pixels: each of the 2 x 2 regions pools its keys and values by 2."""


@dataclass(frozen=True)
class Architecture:
    """SAN's hyper-parameters (section 4 of the paper; its network is G=20, m=10, C=64, r=16)."""

    scale: int
    """Upscaling factor: 2, 3, 4 or 8."""
    groups: int
    """G, the number of local-source residual attention groups (LSRAG)."""
    blocks: int
    """m, the residual blocks of each group."""
    channels: int
    """C, the feature channels."""
    reduction: int
    """r, by which SOCA's hidden layer is narrower than C."""
    value_range: float = 255.0
    """Pixels run from 0 to this, in and out."""
    sqrt_iterations: int | None = 5
    """Newton-Schulz steps of SOCA's square root; None is the exact root (eigendecomposition)."""

    @property
    def attention_channels(self) -> int:
        """Inner channels of the region-level non-local module (C/8)."""
        return self.channels // 8

    @property
    def name(self) -> str:
        """Short name for people, such as `SAN x4 (G=4 m=4 C=64 r=16)`."""
        return f"SAN x{self.scale} (G={self.groups} m={self.blocks} C={self.channels} r={self.reduction})"
