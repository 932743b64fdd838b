"""PSNR, SSIM and luma against their definitions."""

import subprocess
import sys

import numpy as np
import pytest

from sanrt.arrays import psnr
from sanrt.errors import PictureError
from sanrt.export.metrics import shaved_luma, ssim, y_channel, y_psnr


@pytest.fixture
def pair():
    random = np.random.default_rng(0)
    first = random.integers(0, 256, (40, 52, 3), np.uint8)
    return first, np.clip(first + random.normal(0, 12, first.shape), 0, 255).astype(np.uint8)


def test_ssim_is_wang_s_index_computed_window_by_window(pair):
    first, second = (picture[:14, :13, 0].astype(float) for picture in pair)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / 4.5)
    window /= window.sum()
    values = []
    for top in range(4):
        for left in range(3):
            x, y = (p[top : top + 11, left : left + 11] for p in (first, second))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            c1, c2 = 2.55**2, 7.65**2
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim(first, second) == pytest.approx(np.mean(values), abs=1e-9)


def test_ssim_of_equal_pictures_is_one_and_of_an_inverted_one_negative(pair):
    grey = pair[0][..., 0]
    assert ssim(grey, grey) == pytest.approx(1)
    assert ssim(grey, 255 - grey) < 0


def test_luma_of_black_white_and_the_primaries():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(y_channel(colours), [[16, 235, 81.481, 144.553, 40.966]])


def test_shaved_pixels_do_not_count(pair):
    first, second = pair
    spoilt = second.copy()
    spoilt[:3] = spoilt[-3:] = spoilt[:, :3] = spoilt[:, -3:] = 0
    assert y_psnr(first, spoilt, 3) == y_psnr(first, second, 3)
    assert y_psnr(first, spoilt, 2) < y_psnr(first, second, 2)


@pytest.mark.parametrize("measure", [psnr, ssim, lambda a, b: y_psnr(a, b, 1)])
def test_shapes_that_numpy_would_stretch_are_refused(measure):
    with pytest.raises(PictureError, match=r"\(16, 16, 3\).*\(1, 16, 3\)"):
        measure(np.zeros((16, 16, 3), np.uint8), np.zeros((1, 16, 3), np.uint8))


def test_pictures_too_small_for_the_protocol_are_refused():
    small = np.zeros((16, 20, 3), np.uint8)
    with pytest.raises(PictureError, match=r"20 x 16 px.*nothing is left"):
        y_psnr(small, small, 8)
    with pytest.raises(PictureError, match=">= 11"):
        ssim(*shaved_luma(small, small, 4))


def test_metrics_need_neither_torch_nor_onnx():
    code = "import sys, sanrt.export.metrics; sys.exit(bool({'torch', 'onnx', 'pyvips'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)
