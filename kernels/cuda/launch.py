"""Loads compiled kernels onto GPUs, once for each, and launches them on PyTorch's current stream by the CUDA driver."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sanrt.errors import BackendError
from sanrt.extras import install_command
from sanrt.kernels.cuda.nvrtc import CudaSource, check_cuda


def import_driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(f"CUDA kernels: cuda-python is not installed ({error}); {install_command('kernels')}") from error
    return driver


@cache
def loaded_kernel(source: CudaSource, kernel: str, device: int) -> Any:
    """The driver's handle of a kernel, compiled for a GPU and loaded there; its module stays loaded with the process."""
    driver = import_driver()
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise BackendError(f"CUDA kernels: GPU {device} has compute capability {major}.{minor}; they need 8.0 or later")
    module = check_cuda(driver.cuModuleLoadData(source.cubin(10 * major + minor)))
    return check_cuda(driver.cuModuleGetFunction(module, kernel.encode()))


@cache
def primary_context(device: int) -> Any:
    """A GPU's primary context, which PyTorch works in too; it stays retained with the process."""
    driver = import_driver()
    return check_cuda(driver.cuDevicePrimaryCtxRetain(check_cuda(driver.cuDeviceGet(device))))


def activate(device: int) -> None:
    """Make a GPU's primary context current: PyTorch leaves a thread without one until its own first call in it."""
    check_cuda(import_driver().cuCtxSetCurrent(primary_context(device)))


def launch_kernel(
    source: CudaSource, kernel: str, grid: tuple[int, int, int], threads: int, *arguments: Tensor | int
) -> None:
    """Launch on the current stream of the first tensor's device; tensors go as pointers, numbers as 32-bit integers."""
    driver = import_driver()
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    values = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    kinds = tuple(ctypes.c_void_p if isinstance(a, Tensor) else ctypes.c_int for a in arguments)
    with torch.cuda.device(device):
        # PyTorch's allocator knows that stream: memory freed in Python is used again only by work after the kernel.
        activate(device.index)
        stream = torch.cuda.current_stream().cuda_stream
        function = loaded_kernel(source, kernel, device.index)
        check_cuda(driver.cuLaunchKernel(function, *grid, threads, 1, 1, 0, stream, (values, kinds), 0))


def zeroed_counters(count: int, device: torch.device) -> Tensor:
    """`count` 32-bit zeros, set on the current stream by the driver: torch.zeros would launch a kernel."""
    counters = torch.empty(count, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        activate(device.index)
        stream = torch.cuda.current_stream().cuda_stream
        check_cuda(import_driver().cuMemsetD32Async(counters.data_ptr(), 0, count, stream))
    return counters


def dense(x: Tensor) -> Tensor:
    """`x` where it is dense (NCHW or NHWC) and starts on 16 bytes, as the kernels' vector loads require; else a copy."""
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.preserve_format)
