"""The device that trains."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def training_device() -> torch.device:
    """The GPU if there is one, or the CPU; on a GPU cuDNN tries its kernels out.

    Convolutions in float32 may be in TF32 (a step is an eighth shorter, mostly in the tail's gradients) but where `exact`
    is entered.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    return torch.device("cuda")


def exact() -> AbstractContextManager[None]:
    """The context in which float32 convolutions are float32; their gradients are what is allowed elsewhere."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False)
