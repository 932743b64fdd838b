"""Results of other sizes than the network makes."""

from __future__ import annotations

import numpy as np
import pytest
import pyvips

from sanrt.errors import PictureError, UsageError
from sanrt.runtime.pictures.codec import Encoding, open_picture, plan_output, write_picture
from sanrt.runtime.pictures.resize import KERNEL, ResultSize, reduced
from sanrt.runtime.pictures.scratch import ScratchPicture


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def image(samples: np.ndarray) -> pyvips.Image:
    names = {(1, 1): "b-w", (3, 1): "srgb", (1, 2): "grey16", (3, 2): "rgb16"}
    found = pyvips.Image.new_from_array(samples)
    return found.copy(interpretation=names[found.bands - (found.bands % 2 == 0), samples.itemsize])


@pytest.mark.parametrize(
    ("size", "source", "expected"),
    [
        (ResultSize(3.5), (10, 7), (35, 25)),
        (ResultSize(1.5), (1, 1), (2, 2)),
        (ResultSize(size=(3840, 2160)), (1280, 720), (3840, 2160)),
        (ResultSize(size=(3840, 2160)), (1000, 1000), (2160, 2160)),
        (ResultSize(size=(3840, 2160)), (1000, 10), (3840, 38)),
        (ResultSize(size=(100, 100)), (300, 1), (100, 1)),
        (ResultSize(), (10, 7), (40, 28)),
    ],
)
def test_a_result_has_the_size_asked_for_and_its_sources_aspect_ratio(size, source, expected):
    assert size.of(*source, 4) == expected


def test_the_network_is_the_smallest_that_makes_enough():
    assert [ResultSize(factor).outscale_network for factor in (1.01, 2, 2.5, 3.5, 4.01, 8)] == [2, 2, 3, 4, 8, 8]
    assert [ResultSize(size=(800, 800)).least_scale(side, 10) for side in (500, 400, 300, 100, 99)] == [2, 2, 3, 8, None]


@pytest.mark.parametrize("facts", [{"outscale": 1}, {"outscale": 8.1}, {"size": (0, 5)}, {"outscale": 2, "size": (9, 9)}])
def test_a_size_that_no_result_has_is_refused(facts):
    with pytest.raises(UsageError, match=r"outscale|size"):
        Encoding(**facts)


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ((20, 30), "already fills"),
        ((200, 200), "take scale=8"),
        ((2000, 2000), "x8 is the most: scale=8 without `size` makes 240 x 240"),
    ],
)
def test_a_picture_that_the_network_cannot_bring_to_that_size_is_refused(size, told):
    with pytest.raises(PictureError, match=told):
        ResultSize(size=size).checked(30, 30, 4)


def test_a_reduction_averages_what_it_leaves_out():
    board = np.indices((64, 64)).sum(axis=0, dtype=np.uint8) % 2 * np.uint8(255)
    result = reduced(image(board), 32, 32).numpy()
    assert abs(result[4:-4, 4:-4].astype(int) - 127).max() <= 2


@pytest.mark.parametrize("bands", [1, 3])
def test_sixteen_bits_stay_sixteen(bands):
    samples = noise(40, 60, bands, dtype=np.uint16)
    result = reduced(image(samples), 45, 30)
    assert result.format == "ushort"
    floats = image(samples).cast("float").resize(0.75, kernel=KERNEL, gap=0).numpy().reshape(30, 45, bands)
    assert abs(result.numpy().reshape(30, 45, bands) - floats.clip(0, 65535)).max() < 1


@pytest.mark.parametrize(("dtype", "most"), [(np.uint8, 255), (np.uint16, 65535)])
def test_colours_count_by_their_opacity(dtype, most):
    samples = np.zeros((32, 32, 4), dtype)
    samples[:, :15] = most, 0, 0, most
    samples[:, 15:] = 0, most, 0, 0
    result = reduced(image(samples), 20, 20).numpy().astype(int)
    opacity = result[..., 3]
    assert set(np.unique(opacity)) > {0, most}
    assert (abs(result[opacity > 0][:, :2] - [most, 0]) <= 1 + most // 256).all()
    assert (result[:, 15:, :3] == [0, most, 0]).all()


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_files_of_every_kind_are_written_reduced_from_memory_and_from_a_scratch_file(bands, dtype, tmp_path):
    samples = noise(20, 30, bands, dtype=dtype) if bands > 1 else noise(20, 30, dtype=dtype)
    image(samples).write_to_file(str(tmp_path / "in.png"))
    with open_picture(tmp_path / "in.png") as source:
        output = plan_output(source.info, tmp_path / "out.png", 2, Encoding(outscale=1.5))
        rgb, alpha = (pixels.repeat(2, axis=0).repeat(2, axis=1) for pixels in (source.rgb(), source.alpha()))
    assert (output.width, output.height) == (45, 30)
    write_picture(output, rgb, alpha)
    written = pyvips.Image.new_from_file(str(tmp_path / "out.png"))
    assert (written.width, written.height, written.bands) == (45, 30, bands)
    assert written.format == ("uchar" if dtype is np.uint8 else "ushort")
    with ScratchPicture(60, 40, 3, dtype, tmp_path) as scratch:
        scratch.put(0, 0, rgb)
        write_picture(output, scratch, alpha)
    assert (pyvips.Image.new_from_file(str(tmp_path / "out.png")).numpy() == written.numpy()).all()
