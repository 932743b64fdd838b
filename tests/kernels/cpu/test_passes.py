"""Pictures of which memory holds some rows at a time, against whole ones: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from sanrt.kernels.cpu import passes, soca
from sanrt.kernels.cpu.network import Bands, Network
from sanrt.model.spec import ModelSpec
from tests.kernels.cpu.references import ARITHMETIC


class Rows:
    """Rows of a map outside of memory; never written, they are NaN."""

    made = 0

    def __init__(self, count, row_bytes):
        self.data = np.full((count, row_bytes // 4), np.nan, np.float32)
        Rows.made += 1

    def read(self, first, rows):
        rows[:] = self.data[first : first + len(rows)].reshape(rows.shape)

    def write(self, first, rows):
        self.data[first : first + len(rows)] = rows.reshape(len(rows), -1)


@pytest.fixture
def network(live_network):
    made = []

    def make(arithmetic, threads=2, **sizes):
        net = live_network(**sizes)
        weights = {name: t.detach().numpy() for name, t in net.state_dict().items()}
        made.append(Network(ModelSpec(net.arch, "0" * 64, "random", 5), weights, threads, arithmetic))
        return made[-1]

    yield make
    for each in made:
        each.close()


def picture(height, width):
    return np.random.default_rng(height).random((1, 3, height, width), np.float32) * 255


def streamed(network, pixels, regions, rows, memory, shares=None):
    height, width = pixels.shape[2:]
    scale = network.arch.scale
    made, done = np.full((1, 3, height * scale, width * scale), np.nan, np.float32), 0

    def sink(box, part):
        nonlocal done
        assert (box.top, box.left, box.right) == (done, 0, width * scale)
        done = box.bottom
        made[:, :, box.top : box.bottom] = part

    def read(top, bottom):
        assert 0 <= top < bottom <= min(height, top + rows + 20)
        return np.ascontiguousarray(pixels[:, :, top:bottom])

    progress = shares.append if shares is not None else lambda share: None
    passes.stream(network, read, (height, width), regions, Bands(rows, memory, Rows), sink, progress)
    return made


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize(
    ("size", "regions"), [((97, 131), 2), ((300, 53), 7), ((61, 300), 3), ((40, 17), 1), ((5, 90), 2), ((90, 5), 2)]
)
def test_bands_of_any_height_give_the_whole_picture_s_numbers(network, arithmetic, size, regions):
    net, pixels = network(arithmetic, blocks=2), picture(*size)
    whole = passes.upscale(net, pixels, regions)
    assert np.isfinite(whole).all()
    for rows in 16, 31, 64, 96:
        np.testing.assert_array_equal(streamed(net, pixels, regions, rows, 0), whole, err_msg=f"bands of {rows}")


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("sizes", [{"groups": 1}, {"groups": 3, "blocks": 3, "channels": 64}, {"scale": 3, "channels": 24}])
@pytest.mark.parametrize("threads", [1, 3])
def test_networks_of_any_depth_and_width_do_on_any_number_of_threads(network, arithmetic, sizes, threads):
    pixels = picture(123, 75)
    whole = passes.upscale(network(arithmetic, 2, **sizes), pixels, 4)
    np.testing.assert_array_equal(streamed(network(arithmetic, threads, **sizes), pixels, 4, 32, 0), whole)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_statistics_of_many_strips_are_merged_alike(network, arithmetic, monkeypatch):
    monkeypatch.setattr(soca, "MERGED_STRIPS", 3)
    net, pixels = network(arithmetic), picture(150, 91)
    whole = passes.upscale(net, pixels, 2)
    assert len(net.trunk.moments.found) < net.trunk.moments.strips / 2
    for rows in 16, 50:
        np.testing.assert_array_equal(streamed(net, pixels, 2, rows, 0), whole)


def test_maps_are_kept_in_memory_as_far_as_it_goes(network):
    net, pixels = network(ARITHMETIC[0]), picture(200, 40)
    whole = passes.upscale(net, pixels, 2)
    least, everything = (passes.needed(net, 200, 40, rows).memory for rows in (16, None))
    assert least < everything
    files = []
    for memory in 0, least + (everything - least) // 3, everything:
        before = Rows.made
        np.testing.assert_array_equal(streamed(net, pixels, 2, 16, memory), whole)
        files.append(Rows.made - before)
    assert files[0] == 3
    assert 0 < files[1] < 3
    assert files[2] == 0


def test_pictures_of_great_width_go_through_the_tail_in_lower_bands(network, monkeypatch):
    assert passes.tail_rows(4096) == 256 == 2 * passes.tail_rows(8192)
    net, pixels = network(ARITHMETIC[0]), picture(61, 70)
    whole = passes.upscale(net, pixels, 2)
    monkeypatch.setattr(passes, "TAIL_BAND_PIXELS", 70 * 20)
    lower = passes.upscale(net, pixels, 2)
    np.testing.assert_allclose(lower, whole, atol=0.01)
    for rows in 16, 64:
        np.testing.assert_array_equal(streamed(net, pixels, 2, rows, 0), lower)


@pytest.mark.parametrize("rows", [16, 1000])
def test_progress_adds_up_to_one_and_comes_in_parts(network, rows):
    shares = []
    streamed(network(ARITHMETIC[0]), picture(90, 20), 2, rows, 0, shares)
    assert sum(shares) == pytest.approx(1)
    assert len(shares) > (10 if rows == 16 else 3)


def test_a_picture_that_fails_leaves_nothing_behind_for_the_next(network):
    net, pixels = network(ARITHMETIC[0]), picture(60, 44)
    expected = streamed(net, pixels, 2, 16, 0)
    assert not np.isfinite(streamed(net, np.full_like(pixels, np.inf), 2, 16, 0)).all()
    with pytest.raises(MemoryError):
        passes.stream(net, lambda top, bottom: pixels[:, :, top:bottom], (60, 44), 2, Bands(16, 0, Rows), refuse)
    np.testing.assert_array_equal(streamed(net, pixels, 2, 16, 0), expected)
    np.testing.assert_array_equal(passes.upscale(net, pixels, 2), expected)


def refuse(box, part):
    raise MemoryError
