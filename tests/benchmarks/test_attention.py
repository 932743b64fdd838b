"""The attention benchmark: its limits and its kernel's time are those of as many pairs."""

import pytest

pytest.importorskip("llvmlite")

from benchmarks import attention
from sanrt.runtime.tiling.plan import choose_regions


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
    found = attention.share(tiny_model(), attention.Size(96, 80), 1)
    assert 0 < found.inside < found.seconds
    assert found.computed == attention.Size(96, 80)
    assert attention.Network.attended is inner


def test_of_a_large_picture_a_part_with_regions_as_large_as_its_own_is_computed():
    size = attention.Size(8000, 6000)
    computed, regions = attention.part(size)
    assert computed.pixels < attention.WHOLE_PIXELS < size.pixels
    of_all = choose_regions(size.height, size.width)
    assert (computed.width // regions, computed.height // regions) == (-(-size.width // of_all), -(-size.height // of_all))
