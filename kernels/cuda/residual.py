"""The sum of a convolution's result, its bias and a residual on a GPU (residual.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from sanrt.kernels.cuda.launch import launch
from sanrt.kernels.cuda.nvrtc import Program, scalar

THREADS = 256
VECTOR = 16
"""Bytes of one thread."""


def takes(y: Tensor, bias: Tensor, x: Tensor) -> bool:
    """Whether the kernel takes them: channels-last maps of one shape, pixels in whole 16 bytes, all begin on 16 bytes."""
    whole = y.shape == x.shape and y.shape[1] * y.element_size() % VECTOR == 0
    last = all(each.is_contiguous(memory_format=torch.channels_last) for each in (y, x))
    return whole and last and all(each.data_ptr() % VECTOR == 0 for each in (y, bias, x))


def residual(y: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """y + bias + x for channels-last maps y, x (B, C, H, W) and bias (C,) of one number format, in one pass over memory.

    PyTorch spends a launch and a pass on the bias and another on the sum. Summed in fp32 and rounded once.
    """
    total = torch.empty_like(y)
    count = y.nbytes // VECTOR
    program = Program("residual", (f"SCALAR={scalar(y.dtype)}", f"CHANNELS={y.shape[1]}"))
    launch(program, "residual", (-(-count // THREADS), 1, 1), THREADS, y, bias, x, count, total)
    return total
