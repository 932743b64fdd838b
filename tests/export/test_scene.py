"""The generated scene."""

from __future__ import annotations

import numpy as np
import pytest

from sanrt.errors import PictureError
from sanrt.export.samples import MAX_SCENE_SIDE, read_scene
from sanrt.export.scene import natural_scene


def test_a_scene_is_the_same_for_its_seed_and_another_for_another():
    assert np.array_equal(natural_scene(32, 48), natural_scene(32, 48))
    assert not np.array_equal(natural_scene(32, 48), natural_scene(32, 48, seed=1))
    assert natural_scene(32, 48).shape == (32, 48, 3)


def test_a_scenes_spectrum_falls_about_as_natural_ones_do():
    power = np.mean([np.abs(np.fft.fft2(natural_scene(seed=s).mean(2))) ** 2 for s in range(4)], 0)[:48, :48]
    radius = np.hypot(*np.mgrid[:48, :48])
    bands = [power[(radius >= low) & (radius < 2 * low)].mean() for low in (2, 4, 8, 16)]
    slope = np.polyfit(np.log([2, 4, 8, 16]), np.log(bands), 1)[0]
    assert -3 < slope < -1


def test_a_picture_file_is_cut_to_its_middle_in_8_bits(tmp_path):
    import pyvips

    wide = np.zeros((20, MAX_SCENE_SIDE + 100, 3), np.uint16)
    wide[:, 50 : 50 + MAX_SCENE_SIDE] = 0x1234
    pyvips.Image.new_from_array(wide).write_to_file(tmp_path / "wide.png")
    scene = read_scene(tmp_path / "wide.png")
    assert scene.shape == (20, MAX_SCENE_SIDE, 3)
    assert (scene == 0x12).all()


def test_a_picture_too_small_to_measure_on_is_refused(tmp_path):
    import pyvips

    pyvips.Image.black(3, 9, bands=3).write_to_file(tmp_path / "small.png")
    with pytest.raises(PictureError, match=r"small\.png: 3 x 9"):
        read_scene(tmp_path / "small.png")
