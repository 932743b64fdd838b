"""What has never run on hardware and is used only where its name is in an environment variable."""

from __future__ import annotations

import os
from enum import StrEnum

from sanrt.errors import UsageError

VARIABLE = "SANRT_CUDA_EXPERIMENTAL"


class Experiment(StrEnum):
    """A part of the network on a GPU that there is a measured and an experimental way of."""

    CUDNN = "cudnn"
    """Convolution, bias and residual sums as one kernel of cuDNN's graph API."""
    SOCA = "soca"
    """SOCA's square root on tensor cores, and its statistics merged by a launch of their own."""
    ATTENTION = "attention"
    """Attention with fewer instructions for each score, and tiles that are loaded ahead."""


def requested(text: str | None = None) -> frozenset[Experiment]:
    """The experiments that the text, or else the environment variable, names: by commas, or `all`; raises UsageError."""
    text = os.environ.get(VARIABLE, "") if text is None else text
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return frozenset(Experiment)
    unknown = [name for name in names if name not in list(Experiment)]
    if unknown:
        raise UsageError(f"{VARIABLE}={text}: no experiment {unknown[0]!r}; expected {', '.join(Experiment)}, or all")
    return frozenset(map(Experiment, names))
