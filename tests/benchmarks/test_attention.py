"""The attention benchmark: its limits and its kernel's time are those of as many pairs."""

import pytest

pytest.importorskip("llvmlite")

from benchmarks import attention


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(attention, "LOOPS", 50)
    monkeypatch.setattr(attention, "ROUNDS", 1)
    monkeypatch.setattr(attention, "MAX_REGION_PIXELS", 512)


def test_limits_and_kernel_have_positive_times():
    found = attention.limits(4)
    assert found.both == found.powers + found.products
    assert min(found.powers, found.products, attention.kernel(4)) > 0


def test_attention_s_share_of_a_picture_is_measured_and_the_network_left_as_it_was(tiny_model):
    inner = attention.Network.attended
    seconds, inside = attention.share(tiny_model(), attention.Size(96, 80), 1)
    assert 0 < inside < seconds
    assert attention.Network.attended is inner
