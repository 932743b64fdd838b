import re

import pytest
import torch
from torch import Tensor

from sanrt.errors import BackendError
from sanrt.kernels.cuda.nvrtc import CudaSource
from sanrt.kernels.cuda.soca import CHANNELS, MOST_TENSOR_STEPS, SocaLaunch, max_merged_rows, soca_gate, soca_source
from sanrt.model.contract import MIN_TRACE
from sanrt.model.soca import SOCA, covariance
from tests.kernels.cuda import emulator
from tests.kernels.cuda.references import rms

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STEPS = 5


def soca(channels: int, dtype: torch.dtype, steps: int = STEPS, scale: float = 1) -> SOCA:
    """A SOCA whose gates follow maps of a scale."""
    torch.manual_seed(1)
    module = SOCA(channels, 4, steps).eval().requires_grad_(False)
    module.down.weight *= 30 / scale
    module.up.weight *= 3
    return module.to(dtype)


def maps(
    channels: int, dtype: torch.dtype, size: tuple[int, int] = (23, 37), mean: float = 0, scale: float = 1, batch: int = 2
) -> Tensor:
    """Correlated channels of very different strengths."""
    torch.manual_seed(2)
    mixed = torch.randn(channels, channels) / channels**0.5 * torch.logspace(-1, 0, channels)[:, None]
    return (
        (scale * (torch.einsum("ij,bjhw->bihw", mixed, torch.randn(batch, channels, *size)) + mean)).to(dtype).contiguous()
    )


def errors(module: SOCA, x: Tensor, gates: Tensor) -> tuple[float, float]:
    """Root mean square error of `gates`, and of plain PyTorch in x's precision, against float64."""
    dtype = x.dtype
    plain = module.gate(covariance(x))
    exact = module.double().gate(covariance(x.double()))
    module.to(dtype)
    return rms(gates.reshape(exact.shape) - exact), rms(plain - exact)


def emulated(module: SOCA, x: Tensor, seed: int = 0, experimental: bool = False) -> Tensor:
    steps = module.sqrt_iterations
    assert steps is not None
    return emulator.soca(x, *weights(module), steps, seed, SocaLaunch.of(x, experimental))[1]


def merged(partials: Tensor, launch: SocaLaunch) -> Tensor:
    """The covariance (B, C, C) that a picture's per-block statistics add up to, in float64."""
    c, tile = launch.channels, 128 // launch.dtype.itemsize
    tiles = -(-launch.pixels // tile)
    cuts = torch.tensor([min(tiles * b // launch.blocks * tile, launch.pixels) for b in range(launch.blocks + 1)])
    n = cuts.diff().double()
    partials = partials[:, : launch.blocks]
    scatter, means = partials[..., : c * c].double().unflatten(2, (c, c)), partials[..., c * c : c * c + c].double()
    assert (partials[..., c * c + c] == n).all()
    centred = means - (n[:, None] * means).sum(1, keepdim=True) / launch.pixels
    total = scatter.sum(1) + torch.einsum("n,bni,bnj->bij", n, centred, centred)
    return (total + total.transpose(1, 2)) / 2 / launch.pixels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("mean", "scale"), [(0, 1), (0, 1e-3), (0, 1e3), (100, 1)])
def test_the_emulated_kernels_gate_as_well_as_pytorch(
    dtype: torch.dtype, channels_last: bool, mean: float, scale: float
) -> None:
    x = maps(64, dtype, mean=mean, scale=scale)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    module = soca(64, dtype, scale=scale)
    ours, plain = errors(module, x, emulated(module, x))
    assert module.gate(covariance(x)).std() > 0.02
    assert ours <= 2 * plain


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (5, 7), (40, 64)])
def test_every_channel_count_and_small_or_odd_sizes_work(channels: int, size: tuple[int, int]) -> None:
    x, module = maps(channels, torch.float32, size), soca(channels, torch.float32)
    ours, plain = errors(module, x, emulated(module, x))
    assert ours <= 2 * plain + 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_statistics_survive_a_mean_a_thousand_times_the_deviation(dtype: torch.dtype) -> None:
    x = maps(64, torch.float32, (41, 64))
    x = (x / x.std() + 1000).to(dtype)
    partials, _ = emulator.soca(x, *weights(soca(64, dtype)), STEPS)
    exact = covariance(x.double())
    error = (merged(partials, SocaLaunch.of(x)) - exact).abs().max() / exact.abs().max()
    assert error < 2e-6


def weights(module: SOCA) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    assert module.down.bias is not None
    assert module.up.bias is not None
    return (module.down.weight, module.down.bias), (module.up.weight, module.up.bias)


def test_blocks_that_saw_very_different_pixels_are_merged_exactly() -> None:
    x = maps(16, torch.float32, (64, 64), batch=1) + torch.linspace(-500, 500, 64)[:, None]
    launch = SocaLaunch.of(x)
    partials, _ = emulator.soca(x, *weights(soca(16, torch.float32)), STEPS)
    exact = covariance(x.double())
    assert launch.blocks > 4
    assert ((merged(partials, launch) - exact).abs() / exact.abs().max()).max() < 1e-6


@pytest.mark.parametrize("seed", [0, 1])
def test_groups_of_blocks_are_merged_into_their_covariance(seed: int) -> None:
    x = maps(16, torch.float32, (90, 93), mean=50) + torch.linspace(-5, 5, 93)
    launch, module = SocaLaunch.of(x), soca(16, torch.float32, scale=10)
    partials, gates = emulator.soca(x, *weights(module), STEPS, seed)
    assert (launch.group, launch.merged) == (16, 2)
    n = partials[:, launch.blocks :, 16 * 17]
    assert n.sum(1).tolist() == [90 * 93] * 2
    means = partials[:, launch.blocks :, 256:272]
    torch.testing.assert_close((n[..., None] * means).sum(1) / launch.pixels, x.mean((2, 3)), rtol=1e-6, atol=0)
    ours, plain = errors(module, x, gates)
    assert ours <= 2 * plain


@pytest.mark.parametrize("size", [(1, 1), (9, 20), (50, 60)])
def test_a_fixed_number_of_blocks_serves_every_size_as_the_plugin_has_it(size: tuple[int, int]) -> None:
    class Fixed(SocaLaunch):
        blocks, group = max_merged_rows(16), 1

    x, module = maps(16, torch.float32, size), soca(16, torch.float32)
    partials, gates = emulator.soca(x, *weights(module), STEPS, launch=Fixed.of(x))
    assert partials[..., : 16 * 17 + 1].isfinite().all()
    ours, plain = errors(module, x, gates)
    assert ours <= 2 * plain + 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 117.0])
def test_constant_maps_give_the_gate_of_a_zero_covariance(dtype: torch.dtype, value: float) -> None:
    x, module = torch.full((1, 64, 9, 11), value, dtype=dtype), soca(64, dtype)
    gates = emulated(module, x)
    torch.testing.assert_close(gates.flatten(), module.gate(torch.zeros(1, 64, 64)).flatten())


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_any_number_of_steps_is_the_references(steps: int) -> None:
    x, module = maps(32, torch.float32), soca(32, torch.float32, steps)
    ours, plain = errors(module, x, emulated(module, x))
    assert ours <= 2 * plain


def test_the_result_does_not_move_with_the_order_of_the_threads() -> None:
    x, module = maps(64, torch.float16), soca(64, torch.float16)
    first = emulated(module, x)
    assert all(torch.equal(first, emulated(module, x, seed)) for seed in (1, 2, 3))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_emulation_notices_a_barrier_that_is_missing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, module = maps(16, torch.float32), soca(16, torch.float32)
    whole = emulated(module, x)
    monkeypatch.setattr(emulator, "library", lambda *names: emulator.without_barrier(*names, number))
    assert not all(torch.equal(whole, emulated(module, x, seed)) for seed in (1, 2, 3))


def test_a_picture_has_the_same_gate_in_any_batch() -> None:
    x, module = maps(16, torch.float32, batch=3), soca(16, torch.float32)
    assert torch.equal(emulated(module, x)[1:2], emulated(module, x[1:2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("pixels", [1, 63, 64, 511, 512, 57600, 8294400])
def test_every_block_has_pixels_and_no_more_rows_are_left_than_can_be_merged(dtype: torch.dtype, pixels: int) -> None:
    launch = SocaLaunch(1, 64, pixels, dtype, channels_last=False)
    assert 1 <= launch.blocks <= -(-pixels // (128 // dtype.itemsize))
    assert launch.blocks == launch.merged * launch.group
    assert launch.merged <= max_merged_rows(16)
    assert launch.partials == (1, launch.blocks + (launch.merged if launch.group > 1 else 0), 64 * 65 + 4)


def test_unsupported_channels_and_formats_are_refused() -> None:
    with pytest.raises(BackendError, match="24 channels; expected one of 16, 32, 48, 64"):
        soca_source(24, torch.float16)
    with pytest.raises(BackendError, match=r"torch\.float64"):
        soca_source(64, torch.float64)


def test_the_kernel_counts_the_same_trace_as_zero_as_the_reference() -> None:
    assert float(re.search(r"MIN_TRACE = (\S+)f;", CudaSource("soca", ()).text)[1]) == MIN_TRACE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mean", "scale"), [(0, 1e-3), (0, 1e3), (100, 1)])
def test_the_root_on_tensor_cores_gates_as_well_as_pytorch(dtype: torch.dtype, mean: float, scale: float) -> None:
    x, module = maps(64, dtype, mean=mean, scale=scale), soca(64, dtype, scale=scale)
    ours, plain = errors(module, x, emulated(module, x, experimental=True))
    assert ours <= 2 * plain


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
def test_the_root_on_tensor_cores_takes_every_channel_count_and_odd_sizes(channels: int, size: tuple[int, int]) -> None:
    x, module = maps(channels, torch.float32, size), soca(channels, torch.float32)
    ours, plain = errors(module, x, emulated(module, x, experimental=True))
    assert ours <= 2 * plain + 1e-7


@pytest.mark.parametrize("steps", [1, 12, 20])
def test_the_root_on_tensor_cores_is_as_stable_as_pytorchs(steps: int) -> None:
    """Of a covariance of rank 3, whose other eigenvalues let z and what is not symmetric of it grow by 1.5 a step."""
    torch.manual_seed(3)
    x = torch.einsum("ij,bjhw->bihw", torch.randn(64, 3), torch.randn(1, 3, 23, 37)).contiguous()
    module = soca(64, torch.float32, steps, scale=30)
    ours, plain = errors(module, x, emulated(module, x, experimental=True))
    assert ours <= 2 * plain


def test_steps_that_fp16_does_not_suffice_for_are_refused() -> None:
    x, module = maps(16, torch.float16), soca(16, torch.float16)
    (down, down_bias), (up, up_bias) = weights(module)
    with pytest.raises(BackendError, match="25 steps of the square root; expected at most 24"):
        soca_gate(x, down, down_bias, up, up_bias, MOST_TENSOR_STEPS + 1, experimental=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_own_pictures_gates_alone(value: float) -> None:
    x, module = maps(16, torch.float32, (90, 93)), soca(16, torch.float32)
    x[1, 3, 50, 50] = value
    for experimental in (False, True):
        gates = emulated(module, x, experimental=experimental)
        assert gates[0].isfinite().all()
        assert gates[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_maps_give_that_gate_on_tensor_cores_too(dtype: torch.dtype) -> None:
    x, module = torch.full((1, 64, 9, 11), 117.0, dtype=dtype), soca(64, dtype)
    gates = emulated(module, x, experimental=True)
    torch.testing.assert_close(gates.flatten(), module.gate(torch.zeros(1, 64, 64)).flatten())


@pytest.mark.parametrize("seed", [0, 1])
def test_many_blocks_are_merged_by_a_launch_of_their_own(seed: int) -> None:
    x = maps(16, torch.float32, (90, 93), mean=50) + torch.linspace(-5, 5, 93)
    launch, module = SocaLaunch.of(x, experimental=True), soca(16, torch.float32, scale=10)
    partials, gates = emulator.soca(x, *weights(module), STEPS, seed, launch)
    assert (launch.blocks, launch.group, launch.merged, launch.merge_grid) == (32, 1, 1, (8, 2, 1))
    row = partials[:, -1]
    exact, means = covariance(x.double()), x.double().mean((2, 3))
    scatter = row[:, :256].double().unflatten(1, (16, 16))
    assert (row[:, 272] == 90 * 93).all()
    torch.testing.assert_close(row[:, 256:272].double(), means, rtol=1e-6, atol=0)
    assert (((scatter + scatter.mT) / 2 / launch.pixels - exact).abs() / exact.abs().max()).max() < 1e-6
    ours, plain = errors(module, x, gates)
    assert ours <= 2 * plain


def test_on_tensor_cores_too_the_order_of_the_threads_and_the_batch_move_nothing() -> None:
    x, module = maps(16, torch.float32, (90, 93), batch=3), soca(16, torch.float32)
    first = emulated(module, x, experimental=True)
    assert all(torch.equal(first, emulated(module, x, seed, experimental=True)) for seed in (1, 2))
    assert torch.equal(emulated(module, x[1:2], experimental=True), first[1:2])


@pytest.mark.parametrize("pixels", [1, 511, 512, 16384, 57600, 8294400])
def test_blocks_to_be_merged_by_a_launch_come_in_whole_rounds_and_none_is_empty(pixels: int) -> None:
    launch = SocaLaunch(1, 64, pixels, torch.float16, channels_last=True, experimental=True)
    assert 1 <= launch.blocks <= -(-pixels // 64)
    assert launch.blocks % 32 == 0 if launch.merge_grid else launch.blocks == launch.merged < 32
    assert launch.partials == (1, launch.blocks, 64 * 65 + 4)
