"""What the CPU kernels are held to, in float64 by NumPy, which runs everywhere; and how close they have to come."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from sanrt.kernels.cpu import ir
from sanrt.kernels.cpu.schedule import Step, moments_of
from sanrt.kernels.cpu.winograd import Arithmetic, Convolution, PaddedMap, winograd_transform

PMADD = ir.this_processor().pmadd and ir.PMADD[4]
NARROW = ir.Processor("", "", lanes=4, registers=16, pmadd=PMADD)
"""Any processor of this architecture: SSE2 on x86-64, NEON on aarch64."""
INT16 = pytest.param(Arithmetic.INT16, marks=pytest.mark.skipif(not PMADD, reason="no 16-bit products on this processor"))
ARITHMETIC = (Arithmetic.FP32, INT16)
CLOSE = {Arithmetic.FP32: 2e-5, Arithmetic.INT16: 0.02}
"""Root mean square of the error, of the values'; of noise, which is the worst that 16-bit products can meet."""
WORST = 10
"""The largest error, of that: a tile's corners are coarser than its middle."""


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def filled(height, width, channels, arithmetic, seed=0, taps=3):
    made = PaddedMap.zeros(height, width, channels, winograd_transform(arithmetic, taps))
    made.pixels[..., :channels] = random(height, width, channels, seed=seed)
    return made


def expected(source, weight, bias):
    """The convolution of (height, width, channels) with zero padding, by its definition in float64."""
    taps = weight.shape[-1]
    padded = np.pad(source.astype(np.float64), [(taps // 2, taps // 2), (taps // 2, taps // 2), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (taps, taps), axis=(0, 1))
    return np.tensordot(windows, weight.astype(np.float64), axes=([2, 3, 4], [1, 2, 3])) + bias


def soca_gate(sigma, iterations, down, down_bias, up, up_bias):
    """The channels' gate of a covariance (C, C) by section 3.3 of the paper, in float64."""
    trace, one = np.trace(sigma), np.eye(len(sigma))
    y, z = sigma / trace, one
    for _ in range(iterations):
        half = 1.5 * one - 0.5 * z @ y
        y, z = y @ half, half @ z
    hidden = np.maximum(down @ (y * np.sqrt(trace)).mean(1) + down_bias, 0)
    return 1 / (1 + np.exp(-(up @ hidden + up_bias)))


def assert_close(got, want, arithmetic):
    allowed = CLOSE[arithmetic] * max(np.sqrt(np.mean(want**2)), 1)
    errors = got - want
    assert np.sqrt(np.mean(errors**2)) < allowed
    assert np.abs(errors).max() < WORST * allowed


def block_steps(height, width, arithmetic, channels=16):
    """Two residual blocks in place and a last convolution, as a group of the network; and what they give by definition."""
    x, transform = filled(height, width, channels, arithmetic), winograd_transform(arithmetic)
    hidden, features = (PaddedMap.zeros(height, width, channels, transform) for _ in range(2))
    spread = 15 * (channels / 16) ** 0.5
    weights = [random(channels, channels, 3, 3, seed=seed) / spread for seed in range(5)]
    bias = random(channels) / 10
    conv = [Convolution(weight, bias, arithmetic) for weight in weights]
    moments = moments_of(features, arithmetic)
    moments.allocate(moments.strips)
    f = want = np.array(x.pixels[..., :channels])
    for first, second in (weights[:2], weights[2:4]):
        f = f + expected(np.maximum(expected(f, first, bias), 0).astype(np.float32), second, bias).astype(np.float32)
    want = want + expected(f, weights[4], bias)
    steps = [
        Step(conv[0], x, hidden, relu=True),
        Step(conv[1], hidden, features, added=x),
        Step(conv[2], features, hidden, relu=True),
        Step(conv[3], hidden, features, added=features, moments=moments),
        Step(conv[4], features, x, added=x),
    ]
    return steps, want, f
