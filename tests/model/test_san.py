"""The reference network against recorded outputs and against the paper's formulas written out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from sanrt.errors import UsageError
from sanrt.model.attention import RegionAttention
from sanrt.model.checkpoint import load_checkpoint
from sanrt.model.soca import SOCA, covariance, exact_sqrt, newton_schulz_sqrt
from sanrt.model.spec import Architecture


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_golden_outputs_of_the_official_code_are_reproduced(shared, scale):
    stem = shared / "golden" / f"san_x{scale}_g2m2c32r8"
    net = load_checkpoint(stem.with_suffix(".pt")).network()
    recorded = np.load(stem.with_suffix(".npz"))
    for i in range(3):
        output = net(torch.from_numpy(recorded[f"x{i}"]).float()).numpy()
        assert np.abs(output - recorded[f"y{i}"]).max() <= 1e-3


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (17, 23)])
def test_output_is_scale_times_the_input(live_network, scale, size):
    output = live_network(scale)(torch.rand(2, 3, *size) * 255)
    assert output.shape == (2, 3, size[0] * scale, size[1] * scale)
    assert output.isfinite().all()


def test_pictures_of_a_batch_do_not_see_each_other(live_network):
    net, pictures = live_network(), torch.rand(2, 3, 9, 11) * 255
    torch.testing.assert_close(net(pictures)[1:], net(pictures[1:]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (17, 23)])
def test_region_attention_equals_the_formula_with_every_pair_of_positions(size):
    attention = RegionAttention(16)
    x = torch.randn(2, 16, *size)
    expected = torch.empty_like(x)
    h, w = size[0] // 2, size[1] // 2
    for rows in (slice(0, h), slice(h, None)):
        for columns in (slice(0, w), slice(w, None)):
            expected[:, :, rows, columns] = explicit_attention(attention, x[:, :, rows, columns])
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)


def explicit_attention(attention, region):
    query, key, value = attention.query(region), attention.key(region), attention.value(region)
    height, width = region.shape[2] // 2, region.shape[3] // 2
    pooled = [t[:, :, : 2 * height, : 2 * width].unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)) for t in (key, value)]
    scores = torch.einsum("bchw,bcyx->bhwyx", query, pooled[0])
    weights = scores.flatten(3).softmax(3).reshape(scores.shape)
    return attention.out(torch.einsum("bhwyx,bcyx->bchw", weights, pooled[1])) + region


def test_region_attention_forms_no_matrix_of_position_pairs():
    attention, x = RegionAttention(16), torch.randn(1, 16, 128, 128)
    with torch.profiler.profile(profile_memory=True) as profile:
        attention(x)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < 4 * (64 * 64) * (32 * 32)


def test_covariance_equals_the_formula_with_the_centring_matrix():
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64) + 3
    flat, count = x.flatten(2), 35
    centring = (torch.eye(count, dtype=torch.float64) - 1 / count) / count
    torch.testing.assert_close(covariance(x), flat @ centring @ flat.transpose(1, 2))


def test_covariance_of_half_precision_features_is_float32_and_far_from_underflow():
    x = (torch.randn(1, 8, 64, 64) * 0.01).half()
    sigma = covariance(x)
    assert sigma.dtype == torch.float32
    torch.testing.assert_close(sigma, covariance(x.double()).float(), atol=1e-9, rtol=1e-4)


def test_newton_schulz_comes_nearer_to_the_exact_root_with_every_step():
    sigma = covariance(torch.randn(1, 16, 20, 20, dtype=torch.float64))
    exact = exact_sqrt(sigma)
    torch.testing.assert_close(exact @ exact, sigma)
    errors = [float((newton_schulz_sqrt(sigma, n) - exact).norm() / exact.norm()) for n in range(1, 15)]
    assert all(later < earlier for earlier, later in pairwise(errors[:9]))
    assert errors[0] > 0.1
    assert errors[-1] < 1e-9


@pytest.mark.parametrize("iterations", [1, 2, 5, 12])
def test_newton_schulz_steps_are_the_papers_formula(iterations):
    sigma = covariance(torch.randn(2, 8, 6, 6, dtype=torch.float64))
    trace = torch.einsum("bii->b", sigma)[:, None, None]
    y, z, eye = sigma / trace, torch.eye(8, dtype=torch.float64).expand(2, 8, 8), torch.eye(8, dtype=torch.float64)
    for _ in range(iterations):
        y, z = y @ (3 * eye - z @ y) / 2, (3 * eye - z @ y) @ z / 2
    torch.testing.assert_close(newton_schulz_sqrt(sigma, iterations), y * trace.sqrt())


@pytest.mark.parametrize("iterations", [None, 1, 5, 22])
@pytest.mark.parametrize("value", [0.0, 200.0])
@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
def test_gates_of_constant_maps_are_finite(iterations, value, size):
    features = torch.full((1, 16, *size), value)
    gated = SOCA(16, 4, iterations)(features)
    assert gated.isfinite().all()


def test_fewer_pixels_than_channels_do_not_derail_the_largest_number_of_steps():
    sigma = covariance(torch.randn(4, 64, 4, 4) * torch.logspace(0, -3, 64)[:, None, None])
    exact = exact_sqrt(sigma.double())
    assert (newton_schulz_sqrt(sigma, 22).double() - exact).norm() / exact.norm() < 1e-2


def test_exact_and_newton_schulz_networks_differ_by_little_but_differ(live_network):
    picture = torch.rand(1, 3, 12, 12) * 255
    few, many, exact = (live_network(sqrt_iterations=n)(picture) for n in (2, 20, None))
    assert (many - exact).abs().max() < 1e-3
    assert (few - exact).abs().max() > (many - exact).abs().max()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"scale": scale} for scale in (1, 5, 16, 2.0, "2", None)),
        *({"groups": groups} for groups in (0, -1, 10**9)),
        {"blocks": 0},
        *({"channels": channels} for channels in (0, 12, -8, 16.0)),
        *({"reduction": reduction} for reduction in (0, 17, -1)),
        *({"sqrt_iterations": steps} for steps in (0, -3, 10**9, 2.5)),
        *({"value_range": value} for value in (0, -1.0, float("nan"), float("inf"), "255")),
    ],
)
def test_numbers_that_no_network_has_are_refused(wrong):
    with pytest.raises(UsageError, match="expected"):
        Architecture(**{"scale": 2, "groups": 1, "blocks": 1, "channels": 16, "reduction": 4, **wrong})
