"""Training patches: repeatable, and low and high resolution of the same place."""

import numpy as np
import pytest
import pyvips
import torch

from training.data import Patches, picture_files, read_rgb, to_tensor
from training.degrade import degrade


@pytest.fixture
def folder(tmp_path):
    """Two blocky pictures, of colours that do not overshoot 0..255: clipping would tell the axes' order."""
    random = np.random.default_rng(1)
    for index, (height, width) in enumerate([(61, 70), (66, 63)]):
        coarse = random.integers(64, 193, (height // 6 + 1, width // 6 + 1, 3), np.uint8)
        pixels = coarse.repeat(6, 0).repeat(6, 1)[:height, :width]
        pyvips.Image.new_from_array(pixels).write_to_file(str(tmp_path / f"{index}.png"))
    return tmp_path


def test_the_same_seed_gives_the_same_patches_and_another_seed_others(folder):
    first, again, other = (Patches([folder], 2, 8, seed) for seed in (3, 3, 4))
    for _ in range(3):
        pair, same = first.batch(4), again.batch(4)
        assert all(torch.equal(a, b) for a, b in zip(pair, same, strict=True))
        assert not torch.equal(pair[1], other.batch(4)[1])


def test_a_batch_is_float_pixels_of_0_to_255_channels_last(folder):
    low, high = Patches([folder], 3, 8, 0).batch(5)
    assert (low.shape, high.shape) == ((5, 3, 8, 8), (5, 3, 24, 24))
    assert low.dtype == high.dtype == torch.float32
    assert low.is_contiguous(memory_format=torch.channels_last)
    assert 128 < high.max() <= 255


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_low_patch_is_the_degraded_high_patch_however_it_is_turned(folder, scale):
    patches = Patches([folder], scale, 14, 5)
    for _ in range(40):
        low, high = patches.sample()
        margin = 3  # the degradation's kernel reaches over the patch's border
        inside = slice(margin, -margin)
        error = np.abs(degrade(high, scale)[inside, inside].astype(int) - low[inside, inside])
        assert error.max() <= 1


def test_patches_come_in_all_eight_orientations(folder):
    patches = Patches([folder], 2, 30, 0)
    high = patches.pairs[0][1]
    patches.pairs = [(patches.pairs[0][0][:30, :30], high[:60, :60])]
    expected = {np.rot90(view, turn).tobytes() for turn in range(4) for view in (high[:60, :60], high[:60, :60][:, ::-1])}
    assert len(expected) == 8
    assert {patches.sample()[1].tobytes() for _ in range(100)} == expected


def test_pictures_smaller_than_a_patch_are_left_out_and_none_at_all_is_told(folder):
    assert len(Patches([folder], 2, 31, 0).pairs) == 1
    with pytest.raises(SystemExit, match="no picture of at least 80 px"):
        Patches([folder], 2, 40, 0)


def test_grey_pictures_are_read_as_three_equal_channels(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    pyvips.Image.new_from_array(grey).write_to_file(str(tmp_path / "grey.png"))
    (tmp_path / "notes.txt").write_text("not a picture")
    (path,) = picture_files(tmp_path)
    np.testing.assert_array_equal(read_rgb(path), np.stack([grey] * 3, 2))


def test_to_tensor_keeps_every_pixel_in_place():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    np.testing.assert_array_equal(to_tensor(pixels).numpy(), pixels.transpose(0, 3, 1, 2))
