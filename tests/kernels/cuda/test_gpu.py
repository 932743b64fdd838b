"""The kernels on hardware: the emulation's promises again, through the operators, at sizes that fill a GPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sanrt.kernels.cuda.experimental import Experiment
from sanrt.kernels.cuda.operators import rectified_convolution, region_attention, residual, soca_gate
from sanrt.kernels.cuda.residual import supports
from sanrt.kernels.cuda.selfcheck import check_experiments
from sanrt.model.san import SAN
from sanrt.model.soca import SOCA, covariance
from sanrt.model.spec import Architecture
from sanrt.runtime.backends.torch_cuda import CudaNetwork, without_tf32
from tests.kernels.cuda.references import allowed_error, rms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a PyTorch built for CUDA"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty is filled with not-a-numbers: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def soca(channels: int, dtype: torch.dtype, scale: float = 1) -> SOCA:
    torch.manual_seed(1)
    module = SOCA(channels, 4, 5).eval().requires_grad_(False)
    module.down.weight *= 30 / scale
    module.up.weight *= 3
    return module.to("cuda", dtype)


def gates(module: SOCA, x: Tensor) -> Tensor:
    result: Tensor = soca_gate(x, module.down.weight, module.down.bias, module.up.weight, module.up.bias, 5)
    return result


def maps(
    channels: int, dtype: torch.dtype, size: tuple[int, int], mean: float = 0, scale: float = 1, batch: int = 2
) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(2)
    strengths = torch.logspace(-1, 0, channels, device="cuda")[:, None, None]
    x = torch.randn(2, channels, *size, generator=generator, device="cuda") * strengths
    return (scale * (x + x.flip(1) / 2 + mean)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("mean", "scale"), [(0, 1), (0, 1e-3), (0, 1e3), (100, 1)])
@pytest.mark.parametrize(("channels", "size"), [(64, (180, 320)), (64, (101, 203)), (48, (33, 65)), (16, (7, 9))])
def test_gates_are_as_good_as_pytorchs(
    dtype: torch.dtype, channels_last: bool, mean: float, scale: float, channels: int, size: tuple[int, int]
) -> None:
    x, module = maps(channels, dtype, size, mean, scale), soca(channels, dtype, scale)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    ours, plain = gates(module, x), module.gate(covariance(x))
    exact = module.double().gate(covariance(x.double()))
    assert rms(ours - exact) <= max(2 * rms(plain - exact), torch.finfo(dtype).eps * rms(exact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 117.0])
def test_constant_maps_give_the_gate_of_a_zero_covariance(dtype: torch.dtype, value: float) -> None:
    module = soca(64, dtype)
    ours = gates(module, torch.full((1, 64, 40, 50), value, dtype=dtype, device="cuda"))
    torch.testing.assert_close(ours, module.gate(torch.zeros(1, 64, 64, device="cuda")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1, 10])
@pytest.mark.parametrize(("inner", "size", "regions"), [(8, (90, 160), 2), (6, (33, 47), 3), (4, (4, 4), 2)])
def test_attention_is_as_good_as_pytorchs(
    dtype: torch.dtype, channels_last: bool, scale: float, inner: int, size: tuple[int, int], regions: int
) -> None:
    x = maps(3 * inner, dtype, size, scale=scale)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    exact, allowed = allowed_error(x, regions)
    assert rms(region_attention(x, regions) - exact) <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_move_between_runs(dtype: torch.dtype) -> None:
    x, module, qkv = maps(64, dtype, (180, 320)), soca(64, dtype), maps(24, dtype, (90, 160))
    first = gates(module, x), region_attention(qkv, 2)
    for _ in range(20):
        assert torch.equal(gates(module, x), first[0])
        assert torch.equal(region_attention(qkv, 2), first[1])


def test_a_map_that_starts_off_sixteen_bytes_is_read_right() -> None:
    x, module = maps(16, torch.float16, (9, 11)), soca(16, torch.float16)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(x).copy_(x)
    assert torch.equal(gates(module, shifted), gates(module, x))


def test_kernels_run_on_the_current_stream() -> None:
    x, module = maps(64, torch.float16, (180, 320)), soca(64, torch.float16)
    expected, stream = gates(module, x), torch.cuda.Stream()
    y = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        y.copy_(x)
        ours = gates(module, y)
    stream.synchronize()
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(64, (180, 320)), (48, (33, 65)), (6, (7, 9))])
def test_the_residual_is_the_sum_in_float32_rounded_once(
    dtype: torch.dtype, channels_last: bool, channels: int, size: tuple[int, int]
) -> None:
    kind = torch.channels_last if channels_last else torch.contiguous_format
    y, x = (maps(channels, dtype, size, mean=mean).contiguous(memory_format=kind) for mean in (0, 1))
    bias = torch.randn(channels, device="cuda", dtype=dtype)
    ours, expected = residual(y, bias, x), (y.float() + bias.float()[:, None, None] + x.float()).to(dtype)
    if supports(y, bias, x):
        assert torch.equal(ours, expected)
    else:  # plain PyTorch, which rounds twice
        assert rms(ours - expected) <= torch.finfo(dtype).eps * rms(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_rectified_convolution_is_as_good_as_pytorchs(dtype: torch.dtype, channels_last: bool) -> None:
    kind = torch.channels_last if channels_last else torch.contiguous_format
    conv = nn.Conv2d(64, 64, 3, padding=1).cuda().requires_grad_(False)
    conv, x = conv.to(dtype, memory_format=kind), maps(64, dtype, (90, 160)).contiguous(memory_format=kind)  # type: ignore[call-overload]
    with without_tf32():
        ours, plain = rectified_convolution(x, conv.weight, conv.bias), torch.relu(conv(x))
    exact = torch.relu(conv.double()(x.double()))
    assert rms(ours - exact) <= max(2 * rms(plain - exact), torch.finfo(dtype).eps * rms(exact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experiment", list(Experiment))
@pytest.mark.parametrize("channels", [32, 64])
def test_what_is_experimental_computes_what_the_measured_kernels_compute(
    experiment: Experiment, channels: int, dtype: torch.dtype
) -> None:
    if experiment is Experiment.CUDNN:
        pytest.importorskip("cudnn", reason="needs nvidia-cudnn-frontend")
    if dtype == torch.float32 and experiment is not Experiment.SOCA:
        pytest.skip("16-bit types only")
    with without_tf32():
        assert check_experiments({experiment}, channels, torch.device("cuda"), dtype)


def test_a_network_with_the_kernels_is_the_reference() -> None:
    torch.manual_seed(3)
    net = (
        SAN(Architecture(scale=2, groups=2, blocks=1, channels=64, reduction=16, value_range=1.0))
        .eval()
        .requires_grad_(False)
    )
    for batch in (1, 2):
        x = torch.rand(batch, 3, 50, 70)
        torch.testing.assert_close(CudaNetwork(net, dtype=torch.float32)(x).cpu(), net(x), rtol=0, atol=1e-4)
