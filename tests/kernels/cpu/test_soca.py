"""The CPU's channel gate against the reference network's."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from sanrt.kernels.cpu import ir, winograd  # noqa: E402
from sanrt.kernels.cpu.soca import Gate, empty_moments  # noqa: E402
from sanrt.model.soca import SOCA  # noqa: E402


@pytest.mark.parametrize(("channels", "reduction"), [(16, 4), (24, 3), (64, 16)])
@pytest.mark.parametrize("iterations", [1, 5, 12])
def test_the_gate_is_that_of_the_reference(processor, channels, reduction, iterations):
    torch.manual_seed(channels)
    reference = SOCA(channels, reduction, iterations).double()
    x = torch.randn(1, channels, 20, 30, dtype=torch.float64) @ torch.randn(30, 30, dtype=torch.float64) + 3
    padded = winograd.whole_vectors(channels)
    moments, parts = empty_moments(3, padded), np.split(x[0].reshape(channels, -1).numpy(), [70, 500], axis=1)
    for row, part in zip(moments, parts, strict=True):
        row[0], row[1, :channels] = part.shape[1], part.mean(1)
        row[2 : 2 + channels, :channels] = np.triu(np.cov(part, bias=True) * part.shape[1])

    def pad(values):
        values = values.detach().numpy()
        padding = [(0, 0)] * (values.ndim - 1) + [(0, padded - channels)]
        return np.ascontiguousarray(np.pad(values, padding), np.float32)

    down, up = reference.down.weight[:, :, 0, 0], reference.up.weight[:, :, 0, 0]
    bias = reference.down.bias.detach().numpy().astype(np.float32)
    out = ir.aligned((padded,))
    Gate(channels, iterations, pad(down), bias, pad(up.T), pad(reference.up.bias))(moments, out)
    want = (reference(x) / x)[0, :, 0, 0].detach().numpy()
    np.testing.assert_allclose(out[:channels], want, atol=2e-6)
