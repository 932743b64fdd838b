"""Kernels compiled anew, for this processor and for any other of its architecture."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def narrow(monkeypatch):
    """`narrow()`: from then on code is made in vectors of 128 bits, whatever the processor has."""
    from sanrt.kernels.cpu import attention, ir, network, schedule, soca, winograd
    from tests.kernels.cpu.references import NARROW

    def take():
        for module in (ir, winograd, attention, schedule, soca, network):
            monkeypatch.setattr(module, "this_processor", lambda: NARROW)
        for module in (schedule, attention, soca):
            monkeypatch.setattr(module, "kernels", module.kernels.__wrapped__)

    return take


@pytest.fixture(params=["this processor", "128-bit vectors"])
def processor(request, narrow):
    if request.param == "128-bit vectors":
        narrow()
