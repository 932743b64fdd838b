"""Launches against a stand-in for the CUDA driver: which calls are made, in which order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from sanrt.kernels.cuda import launch
from sanrt.kernels.cuda.nvrtc import CudaSource


class FakeDriver:
    """cuda.bindings.driver, on a thread that has made no CUDA call yet: without a context nothing is launched or set."""

    OK, NO_CONTEXT = 0, SimpleNamespace(name="CUDA_ERROR_INVALID_CONTEXT")

    def __init__(self) -> None:
        self.current: object = None
        self.done: list[str] = []

    def cuDeviceGet(self, index: int) -> tuple[object, ...]:
        return self.OK, f"GPU {index}"

    def cuDevicePrimaryCtxRetain(self, gpu: str) -> tuple[object, ...]:
        return self.OK, f"context of {gpu}"

    def cuCtxSetCurrent(self, context: object) -> tuple[object, ...]:
        self.current = context
        return (self.OK,)

    def __getattr__(self, name: str) -> Callable[..., tuple[object, ...]]:
        def function(*_: object) -> tuple[object, ...]:
            self.done.append(name)
            return (self.OK if self.current else self.NO_CONTEXT,)

        return function


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    launch.primary_context.cache_clear()
    monkeypatch.setattr(launch, "import_driver", lambda: fake)
    monkeypatch.setattr(launch, "loaded_kernel", lambda *_: "kernel")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    yield fake
    launch.primary_context.cache_clear()


def test_a_kernel_is_launched_on_a_fresh_thread(driver: FakeDriver) -> None:
    launch.launch_kernel(CudaSource("soca", ()), "soca_gate", (1, 1, 1), 32, torch.zeros(4), 4)
    assert driver.done == ["cuLaunchKernel"]


def test_counters_are_zeroed_on_a_fresh_thread(driver: FakeDriver) -> None:
    launch.zeroed_counters(4, torch.device("cpu"))
    assert driver.done == ["cuMemsetD32Async"]
