"""The CPU's channel gate against its formulas, and those against the reference network's."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from sanrt.kernels.cpu import ir, winograd
from sanrt.kernels.cpu.soca import Gate, StripMoments, empty_moments
from tests.kernels.cpu.references import random, soca_gate

SIZES = [(16, 4), (24, 3), (64, 16)]
ITERATIONS = [1, 5, 12]


def layers(channels, reduction):
    """down, its bias, up, its bias."""
    hidden = channels // reduction
    shapes = (hidden, channels), (hidden,), (channels, hidden), (channels,)
    return [random(*shape, seed=seed) / 4 for seed, shape in enumerate(shapes)]


def features(channels):
    """(C, 600) in float64, correlated."""
    x = random(channels, 20, 30).astype(np.float64) @ random(30, 30, seed=1) + 3
    return x.reshape(channels, -1)


@pytest.mark.parametrize(("channels", "reduction"), SIZES)
@pytest.mark.parametrize("iterations", ITERATIONS)
def test_the_gate_is_that_of_the_formulas(processor, channels, reduction, iterations):
    x, (down, down_bias, up, up_bias) = features(channels), layers(channels, reduction)
    padded = winograd.whole_vectors(channels)
    moments, parts = empty_moments(3, padded), np.split(x, [70, 500], axis=1)
    for row, part in zip(moments, parts, strict=True):
        row[0], row[1, :channels] = part.shape[1], part.mean(1)
        row[2 : 2 + channels, :channels] = np.triu(np.cov(part, bias=True) * part.shape[1])

    def pad(values):
        return np.ascontiguousarray(np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padded - channels)]))

    out = ir.aligned((padded,))
    Gate(channels, iterations, pad(down), down_bias, pad(up.T), pad(up_bias))(moments, out)
    want = soca_gate(np.cov(x, bias=True), iterations, down, down_bias, up, up_bias)
    np.testing.assert_allclose(out[:channels], want, atol=2e-6)


@pytest.mark.parametrize(("channels", "reduction"), SIZES)
@pytest.mark.parametrize("iterations", ITERATIONS)
def test_the_formulas_give_what_the_reference_network_gives(channels, reduction, iterations):
    torch = pytest.importorskip("torch")
    from sanrt.model.soca import SOCA

    x, (down, down_bias, up, up_bias) = features(channels), layers(channels, reduction)
    reference = SOCA(channels, reduction, iterations).double().requires_grad_(False)
    for layer, weight, bias in ((reference.down, down, down_bias), (reference.up, up, up_bias)):
        layer.weight.copy_(torch.from_numpy(weight[:, :, None, None]))
        layer.bias.copy_(torch.from_numpy(bias))
    sigma = np.cov(x, bias=True)
    got = reference.gate(torch.from_numpy(sigma)[None]).numpy().ravel()
    np.testing.assert_allclose(got, soca_gate(sigma, iterations, down, down_bias, up, up_bias), rtol=1e-9)


@pytest.mark.parametrize("bands", [[700], [300, 300, 100], [10] * 70])
def test_moments_of_groups_of_strips_are_those_of_their_pixels(bands):
    rng, channels, each = np.random.default_rng(0), 16, 5
    pixels = rng.normal(100, 1, (700, each, channels)).astype(np.float32)
    moments = StripMoments(len(pixels), channels)
    moments.allocate(max(bands))
    done = 0
    for band in bands:
        for strip in range(done, done + band):
            row, part = moments.array[strip - moments.first], pixels[strip]
            row[0], row[1] = each, part.mean(0)
            row[2:] = (part - part.mean(0)).T @ (part - part.mean(0))
        done += band
        moments.merge(done)
    counts, means = moments.found[:, 0, 0], moments.found[:, 1]
    assert counts.tolist() == [256 * each, 256 * each, 188 * each]
    for number, mean in enumerate(means):
        part = pixels[256 * number :][:256].reshape(-1, channels).astype(np.float64)
        np.testing.assert_allclose(mean, part.mean(0), rtol=1e-5)
        np.testing.assert_allclose(moments.found[number, 2:], np.cov(part.T, bias=True) * len(part), atol=0.5)
