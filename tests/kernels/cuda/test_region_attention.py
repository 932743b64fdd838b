import pytest
import torch
from torch import Tensor

from sanrt.errors import BackendError
from sanrt.kernels.cuda.region_attention import DEPTH, TILE_KEYS, AttentionLaunch, attention_source
from tests.kernels.cuda import emulator
from tests.kernels.cuda.references import allowed_error, attention, rms

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def maps(inner: int, dtype: torch.dtype, size: tuple[int, int] = (33, 47), scale: float = 1, batch: int = 2) -> Tensor:
    torch.manual_seed(3)
    return (scale * torch.randn(batch, 3 * inner, *size)).to(dtype)


def errors(x: Tensor, y: Tensor, regions: int = 2) -> tuple[float, float]:
    """Root mean square error of `y`, and what it may be."""
    exact, allowed = allowed_error(x, regions)
    return rms(y - exact), allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1, 10, 1e3])
def test_the_emulated_kernels_attend_as_well_as_pytorch(dtype: torch.dtype, channels_last: bool, scale: float) -> None:
    x = maps(8, dtype, scale=scale)
    x[:, 16:] /= scale
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    y = emulator.region_attention(x, 2)
    ours, allowed = errors(x, y)
    assert ours <= allowed
    assert y.stride() == x[:, :8].clone(memory_format=torch.preserve_format).stride()


@pytest.mark.parametrize("inner", [2, 4, 6])
def test_fewer_inner_channels_work(inner: int) -> None:
    x = maps(inner, torch.float16, (19, 21))
    ours, allowed = errors(x, emulator.region_attention(x, 2))
    assert ours <= allowed


@pytest.mark.parametrize(
    ("size", "regions"), [((4, 4), 2), ((5, 7), 2), ((7, 13), 3), ((11, 64), 1), ((35, 37), 2), ((9, 70), 4)]
)
def test_uneven_regions_and_regions_smaller_or_larger_than_a_tile_work(size: tuple[int, int], regions: int) -> None:
    x = maps(8, torch.float32, size)
    ours, allowed = errors(x, emulator.region_attention(x, regions), regions)
    assert ours <= allowed


def test_scores_far_apart_and_far_from_zero_neither_overflow_nor_vanish() -> None:
    x = maps(8, torch.float32, (20, 36))
    x[:, 8:16, :, ::5] *= 300
    x[:, 16:] += 1000
    ours, allowed = errors(x, emulator.region_attention(x, 2))
    assert ours <= allowed


def test_constant_maps_give_the_values_back() -> None:
    x = torch.full((1, 24, 10, 14), 3.0)
    torch.testing.assert_close(emulator.region_attention(x, 2), torch.full((1, 8, 10, 14), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_result_does_not_move_with_the_order_of_the_threads(dtype: torch.dtype) -> None:
    x = maps(8, dtype, batch=1)
    first = emulator.region_attention(x, 2)
    assert all(torch.equal(first, emulator.region_attention(x, 2, seed)) for seed in (1, 2, 3))


@pytest.mark.parametrize("number", [1, 2])
def test_the_emulation_notices_a_barrier_that_is_missing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = maps(8, torch.float32, (64, 64), batch=1)
    whole = emulator.region_attention(x, 2)
    monkeypatch.setattr(emulator, "library", lambda *names: emulator.without_barrier(*names, number))
    assert not all(torch.equal(whole, emulator.region_attention(x, 2, seed)) for seed in (1, 2, 3))


@pytest.mark.parametrize("size", [(4, 4), (33, 47), (180, 320), (1081, 1921)])
@pytest.mark.parametrize("regions", [1, 2])
def test_grids_cover_every_query_and_key_once(size: tuple[int, int], regions: int) -> None:
    height, width = size
    launch = AttentionLaunch(3, 8, height, width, regions, torch.float16, channels_last=True)
    largest = max(
        (height * (i + 1) // regions - height * i // regions) * (width * (j + 1) // regions - width * j // regions)
        for i in range(regions)
        for j in range(regions)
    )
    assert launch.grid[0] * 128 >= largest > (launch.grid[0] - 1) * 128
    assert launch.grid[1:] == launch.pool_grid[1:] == (regions**2, 3)
    assert launch.pool_grid[0] * 256 == launch.padded * DEPTH
    assert launch.padded % TILE_KEYS == 0
    assert launch.padded >= largest // 4 - max(size)


def test_shapes_the_kernels_cannot_take_are_refused() -> None:
    with pytest.raises(BackendError, match="9 inner channels; expected 1 to 8"):
        attention_source(9, torch.float16)
    with pytest.raises(BackendError, match=r"2 x 2 regions of maps \[1, 24, 3, 9\]"):
        AttentionLaunch.of(torch.zeros(1, 24, 3, 9), 2)
    with pytest.raises(BackendError, match="256 x 256 regions; expected at most 255 x 255"):
        AttentionLaunch.of(torch.zeros(1, 24, 512, 512), 256)


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("channels_last", "scale"), [(False, 1e-3), (True, 1), (False, 10), (True, 1e3)])
def test_loading_ahead_attends_as_well_as_pytorch(dtype: torch.dtype, channels_last: bool, scale: float) -> None:
    x = maps(8, dtype, scale=scale)
    x[:, 16:] /= scale
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    ours, allowed = errors(x, emulator.region_attention(x, 2, ahead=True))
    assert ours <= allowed


@pytest.mark.parametrize(
    ("inner", "size", "regions"),
    [(8, (4, 4), 2), (8, (5, 7), 2), (6, (7, 13), 3), (8, (11, 64), 1), (6, (35, 37), 2), (8, (9, 70), 4), (8, (48, 48), 1)],
)
def test_loading_ahead_takes_tails_in_every_direction(inner: int, size: tuple[int, int], regions: int) -> None:
    x = maps(inner, torch.float16, size)
    ours, allowed = errors(x, emulator.region_attention(x, regions, ahead=True), regions)
    assert ours <= allowed


@pytest.mark.parametrize("first", [-400.0, 400.0])
def test_a_reference_that_starts_far_from_the_largest_score_follows_it(first: float) -> None:
    """The keys read first score far below, or far above, all others."""
    x = maps(8, torch.float16, (20, 36), batch=1)
    x[:, :8] = x[:, :8].abs()
    x[:, 8:16, :2] = first
    ours, allowed = errors(x, emulator.region_attention(x, 1, ahead=True), 1)
    assert ours <= allowed


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
def test_what_is_not_finite_shows_where_pytorch_shows_it(part: int, value: float, ahead: bool) -> None:
    x = maps(8, torch.float16, (12, 20), batch=1)
    x[0, 8 * part : 8 * part + 8, 5, 7] = value
    exact, y = attention(x.double(), 2), emulator.region_attention(x, 2, ahead=ahead).double()
    assert torch.equal(y.isfinite(), exact.isfinite())
    assert rms((y - exact)[exact.isfinite()]) <= 2e-3


@pytest.mark.parametrize("dtype", HALVES)
def test_loading_ahead_does_not_move_with_the_order_of_the_threads_or_of_the_copies(dtype: torch.dtype) -> None:
    x = maps(8, dtype, (48, 48), batch=1)
    first = emulator.region_attention(x, 1, ahead=True)
    assert all(torch.equal(first, emulator.region_attention(x, 1, seed, ahead=True)) for seed in (1, 2))


@pytest.mark.parametrize("missing", ["__syncthreads();   // this tile", "await_copies();"])
def test_the_emulation_notices_that_a_tile_is_not_waited_for(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = maps(8, torch.float16, (48, 48), batch=1)
    whole = emulator.region_attention(x, 1, ahead=True)
    monkeypatch.setattr(emulator, "library", lambda *names: emulator.without(missing, *names))
    assert not all(torch.equal(whole, emulator.region_attention(x, 1, seed, ahead=True)) for seed in (1, 2, 3))


def test_loading_ahead_is_for_16_bit_types() -> None:
    with pytest.raises(BackendError, match=r"experimental attention of float32 maps; expected float16 or bfloat16"):
        attention_source(8, torch.float32, ahead=True)
    assert attention_source(8, torch.float16, ahead=True).defines[-1] == "EXPERIMENTAL"
    assert attention_source(8, torch.float16).defines == ("SCALAR=Half", "INNER=8")
