"""The sum of a convolution's result, its bias and a residual on a GPU (residual.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from sanrt.kernels.compile import Program, scalar
from sanrt.kernels.launch import launch

THREADS = 256
VECTOR = 16
"""Bytes of one thread."""


def takes(y: Tensor) -> bool:
    """Whether the kernel takes such maps: channels-last, a pixel's channels in whole 16 bytes."""
    whole = y.shape[1] * y.element_size() % VECTOR == 0
    return whole and y.is_contiguous(memory_format=torch.channels_last)


def residual(y: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """y + bias + x for channels-last maps y, x (B, C, H, W) and bias (C,) of one number format, in one pass over memory.

    PyTorch spends a launch and a pass on the bias and another on the sum. Summed in fp32 and rounded once.
    """
    total = torch.empty_like(y)
    count = y.nbytes // VECTOR
    program = Program("residual", (f"SCALAR={scalar(y.dtype)}", f"CHANNELS={y.shape[1]}"))
    launch(program, "residual", (-(-count // THREADS), 1, 1), THREADS, y, bias, x, count, total)
    return total
