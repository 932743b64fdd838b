"""Kernels compiled anew, for this processor and for any other of its family."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=["this processor", "narrow vectors"])
def processor(request, monkeypatch):
    from sanrt.kernels.cpu import attention, ir, schedule, soca, winograd
    from tests.kernels.cpu.references import NARROW

    if request.param == "narrow vectors":
        for module in (ir, winograd, attention, schedule, soca):
            monkeypatch.setattr(module, "this_processor", lambda: NARROW)
        for module in (schedule, attention, soca):
            monkeypatch.setattr(module, "kernels", module.kernels.__wrapped__)
