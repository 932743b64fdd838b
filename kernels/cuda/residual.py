"""The sum of a convolution's result, its bias and a residual on a GPU (residual.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from sanrt.kernels.cuda.launch import launch_kernel
from sanrt.kernels.cuda.nvrtc import CudaSource, scalar_type

THREADS = 256
VECTOR_BYTES = 16
"""Bytes that one thread computes: one vector load from each map."""


def supports(y: Tensor, bias: Tensor, x: Tensor) -> bool:
    """Whether the kernel supports these: channels-last maps of one shape, pixels of whole 16 bytes, all starting on 16."""
    whole = y.shape == x.shape and y.shape[1] * y.element_size() % VECTOR_BYTES == 0
    last = all(each.is_contiguous(memory_format=torch.channels_last) for each in (y, x))
    return whole and last and all(each.data_ptr() % VECTOR_BYTES == 0 for each in (y, bias, x))


def residual(y: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """y + bias + x for channels-last maps y, x (B, C, H, W) and bias (C,) of one number format, in one pass over memory.

    PyTorch would spend a launch and a pass on the bias and another on the sum. Summed in fp32, rounded once.
    """
    total = torch.empty_like(y)
    count = y.nbytes // VECTOR_BYTES
    source = CudaSource("residual", (f"SCALAR={scalar_type(y.dtype)}", f"CHANNELS={y.shape[1]}"))
    launch_kernel(source, "residual", (-(-count // THREADS), 1, 1), THREADS, y, bias, x, count, total)
    return total
