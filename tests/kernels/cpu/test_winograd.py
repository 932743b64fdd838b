"""Convolutions by Winograd's transform against their definition, on this processor and in vectors of 128 bits."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from sanrt.kernels.cpu import winograd
from sanrt.kernels.cpu.schedule import ConvolutionSchedule, Step
from sanrt.kernels.cpu.winograd import Convolution, PaddedMap, winograd_transform
from sanrt.kernels.cpu.workers import Workers
from tests.kernels.cpu.references import ARITHMETIC, INT16, assert_close, expected, filled, random


@pytest.mark.parametrize(
    ("inputs", "outputs", "taps", "height", "width"),
    [
        (64, 64, 3, 9, 14),
        (3, 32, 3, 8, 8),
        (32, 3, 3, 5, 6),
        (48, 48, 3, 1, 1),
        (20, 12, 5, 6, 5),
        (64, 48, 5, 13, 30),
        (32, 32, 3, 70, 66),
    ],
)
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_convolution_gives_what_its_definition_gives(processor, inputs, outputs, taps, height, width, arithmetic, threads):
    weight, bias = random(outputs, inputs, taps, taps, seed=1) / 10, random(outputs, seed=2)
    gate = np.zeros(winograd.whole_vectors(inputs), np.float32)
    gate[:inputs] = random(inputs, seed=3)
    source = filled(height, width, inputs, arithmetic, taps=taps)
    output, added, also = (filled(height, width, outputs, arithmetic, seed, taps) for seed in (4, 5, 6))
    conv, workers = Convolution(weight, bias, arithmetic), Workers(threads)
    pixels = source.pixels[..., :inputs]
    plain, gated = expected(pixels, weight, bias), expected(pixels * gate[:inputs], weight, bias)

    def check(want, **options):
        ConvolutionSchedule([Step(conv, source, output, **options)], workers).run()
        assert_close(output.pixels[..., :outputs], want, arithmetic)
        inside = np.count_nonzero(output.pixels[..., :outputs])
        assert np.count_nonzero(output.array) <= inside, "written outside of the picture or of its channels"

    output.array[..., outputs:] = 0
    check(plain)
    check(np.maximum(plain, 0), relu=True)
    check(gated + added.pixels[..., :outputs], added=added, gate=gate)
    check(plain + added.pixels[..., :outputs] + also.pixels[..., :outputs], added=added, also=also)
    output.array[:] = added.array
    check(plain + added.pixels[..., :outputs], added=output)
    workers.close()


@pytest.mark.parametrize("arithmetic", [INT16])
def test_sums_of_rounded_products_come_close_to_32_bits_and_not_beyond(arithmetic):
    """All products of one point have the largest magnitude and the same sign."""
    transform = winograd_transform(arithmetic)
    row = np.poly([q for q in transform.finite_points if q != 1])[::-1]  # of B^T, for the point 1
    signs = np.where(np.append(row, np.zeros(transform.side - len(row))) < 0, -1, 1)
    weight, bias = np.ones((16, 64, 3, 3), np.float32), np.zeros(16, np.float32)
    tile = transform.tile
    source, output = (PaddedMap.zeros(3 * tile, 3 * tile, n, transform) for n in (64, 16))
    source.array[tile : 2 * tile + 2, tile : 2 * tile + 2] = 1e4 * np.outer(signs, signs)[..., None]
    conv = Convolution(weight, bias, arithmetic)
    largest = conv.weight.reshape(transform.points, -1, 16, 2).astype(np.int64)[transform.side + 1].sum((0, 2)).max()
    assert 0.99 * 2**31 < abs(largest) * winograd.INT16_LIMIT < 2**31
    ConvolutionSchedule([Step(conv, source, output)], Workers(1)).run()
    want = expected(source.pixels[..., :64], weight, bias)
    errors = output.pixels[..., :16] - want  # all channels round alike here, so they are large; a wrapped sum's are larger
    assert np.sqrt(np.mean(errors**2)) < 0.1 * np.sqrt(np.mean(want**2))


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_values_that_are_no_numbers_stay_visible(arithmetic, value):
    source, output = filled(6, 6, 16, arithmetic), PaddedMap.zeros(6, 6, 16, winograd_transform(arithmetic))
    source.pixels[2, 2, 0] = value
    conv = Convolution(random(16, 16, 3, 3), random(16), arithmetic)
    ConvolutionSchedule([Step(conv, source, output)], Workers(1)).run()
    assert not np.isfinite(output.pixels[2, 2]).any()


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_a_map_of_zeros_gives_the_bias(arithmetic):
    source, output = (PaddedMap.zeros(6, 6, 16, winograd_transform(arithmetic)) for _ in range(2))
    bias = random(16)
    ConvolutionSchedule([Step(Convolution(random(16, 16, 3, 3), bias, arithmetic), source, output)], Workers(1)).run()
    np.testing.assert_array_equal(output.pixels, np.broadcast_to(bias, (6, 6, 16)))
