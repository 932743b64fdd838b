import pytest
import torch
from torch import Tensor

from sanrt.kernels.cuda.residual import supports
from tests.kernels.cuda import emulator

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def maps(channels: int, dtype: torch.dtype, size: tuple[int, int] = (9, 11), batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, *size).to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [16, 48, 64])
def test_the_emulated_kernel_adds_in_float32_and_rounds_once(dtype: torch.dtype, channels: int) -> None:
    torch.manual_seed(7)
    (y, x), bias = (maps(channels, dtype) for _ in range(2)), torch.randn(channels).to(dtype)
    expected = (y.float() + bias.float()[:, None, None] + x.float()).to(dtype)
    assert torch.equal(emulator.residual(y, bias, x), expected)


def test_only_whole_vectors_of_channels_last_maps_are_taken() -> None:
    def taken(y: Tensor, x: Tensor | None = None, offset: int = 0) -> bool:
        bias = torch.zeros(len(y[0]) + offset, dtype=y.dtype)[offset:]
        return supports(y, bias, y if x is None else x)

    assert taken(maps(16, torch.float16))
    assert taken(maps(4, torch.float32))
    assert not taken(maps(4, torch.float16))
    assert not taken(maps(16, torch.float16).contiguous())
    assert not taken(maps(16, torch.float16), maps(16, torch.float16)[:1])
    assert not taken(maps(16, torch.float16), offset=1)
