"""Fixtures that several packages' tests share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure() -> None:
    """Let interrupts end what the tests start, also where the tests run as a shell's background job, which ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden outputs and test pictures that CI has beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (golden outputs, test pictures), which a user's clone does not have")
    return SHARED


@pytest.fixture
def small_disk() -> Callable[[], AbstractContextManager[None]]:
    """`with small_disk():` no file grows beyond 4096 bytes, as on a full disk; not longer, as pytest's own log is a file."""
    resource = pytest.importorskip("resource", reason="this system cannot limit the size of files")

    @contextmanager
    def limited() -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)

    return limited


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(scale=2)`: an exported ONNX of a small SAN with seeded random weights and every part live.

    All scales lie in one folder under the names that `--models` looks for.
    """
    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(scale: int = 2, channels: int = 16) -> Path:
        import torch

        from sanrt.model.graph import san_model
        from sanrt.model.san import SAN
        from sanrt.model.spec import Architecture, ModelSpec

        arch = Architecture(scale=scale, groups=1, blocks=1, channels=channels, reduction=4)
        with torch.random.fork_rng():
            torch.manual_seed(scale)
            net = SAN(arch)
        torch.nn.init.constant_(net.gamma, 0.5)
        weights = {name: t.detach().numpy() for name, t in net.state_dict().items()}
        path = folder / (f"san_x{scale}.onnx" if channels == 16 else f"san_x{scale}_c{channels}.onnx")
        path.write_bytes(san_model(ModelSpec(arch, "0" * 64, "seeded random weights", 5), weights).SerializeToString())
        return path

    return make


@pytest.fixture(scope="session")
def live_network() -> Callable[..., Any]:
    """`live_network(scale=2, ...)`: a small reference network, its weights random from a seed and every part of it live."""

    def make(scale: int = 2, groups: int = 2, blocks: int = 1, channels: int = 16, reduction: int = 4, **rest: Any) -> Any:
        import torch

        from sanrt.model.san import SAN
        from sanrt.model.spec import Architecture

        with torch.random.fork_rng():
            torch.manual_seed(scale)
            net = SAN(Architecture(scale, groups, blocks, channels, reduction, **rest)).eval().requires_grad_(False)
            net.gamma.fill_(0.7)
            for name, parameter in net.named_parameters():
                if name.startswith("attention."):
                    parameter.copy_(torch.randn(parameter.shape) * 0.1)
        return net

    return make
