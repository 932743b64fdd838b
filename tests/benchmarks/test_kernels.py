import pytest
import torch

from benchmarks import kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main() == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "no CUDA GPU" in err


def test_a_row_tells_the_floor_and_both_ratios() -> None:
    row = str(kernels.Row("soca", 180, 320, "7.4 MB", 10.0, 15.0, 12.0, 90.0))
    assert "1.50 x floor" in row
    assert "experimental 1.20 x floor" in row
    assert "6.00 x faster" in row


def test_plain_attention_is_the_operators() -> None:
    maps = torch.randn(1, 24, 9, 10)
    torch.testing.assert_close(kernels.plain_attention(maps), kernels.region_attention(maps, kernels.REGIONS))
