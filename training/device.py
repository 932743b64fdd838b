"""The device that trains."""

from __future__ import annotations

import torch


def training_device() -> torch.device:
    """The GPU if there is one, or the CPU; on a GPU cuDNN tries its kernels out, and float32 is float32."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")
