"""Pictures from files."""

import numpy as np
import pyvips

from training.data import picture_files, read_rgb, to_tensor


def test_grey_pictures_are_read_as_three_equal_channels(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    pyvips.Image.new_from_array(grey).write_to_file(str(tmp_path / "grey.png"))
    (tmp_path / "notes.txt").write_text("not a picture")
    (path,) = picture_files(tmp_path)
    np.testing.assert_array_equal(read_rgb(path), np.stack([grey] * 3, 2))


def test_to_tensor_keeps_every_pixel_in_place():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    np.testing.assert_array_equal(to_tensor(pixels).numpy(), pixels.transpose(0, 3, 1, 2))
