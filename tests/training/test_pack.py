"""What is packed: tiles with detail, in small files, worn as people's photographs are."""

import numpy as np
import pytest

from sanrt.errors import PictureError
from training.data import read_rgb
from training.degrade import bicubic
from training.drawings import drawing
from training.pack import detailed, middle, pack, parts
from training.tiles import read_part
from training.wear import blurred, compressed_before, decoded, jpeg, noisy, worn


@pytest.fixture
def picture():
    coarse = np.random.default_rng(2).integers(40, 216, (12, 16, 3), np.uint8)
    return coarse.repeat(5, 0).repeat(5, 1)


def test_flat_tiles_are_left_out_and_the_others_cover_the_picture():
    picture = np.full((100, 150, 3), 128, np.uint8)
    picture[48:96, 96:144] = np.random.default_rng(0).integers(0, 256, (48, 48, 3))
    (tile,) = detailed(picture, 48, 35)
    np.testing.assert_array_equal(tile, picture[48:96, 96:144])
    assert len(list(detailed(picture, 48, 1000))) == 1, "a tile that loses nothing was kept"
    noise = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)
    assert len(list(detailed(noise, 48, 35))) == 6


def test_parts_are_as_large_as_allowed_and_lose_nothing():
    pictures = [bytes(size) for size in (5, 4, 1, 9, 12, 2)]
    found = list(parts(pictures, 10))
    assert [[len(p) for p in part] for part in found] == [[5, 4, 1], [9], [12], [2]]


def test_tiles_are_packed_with_loss_unless_told_otherwise(photos, packed, tmp_path):
    pack(photos, tmp_path, side=48, dev_side=48, tiles=5, drawings=0)
    lossy, exact = (np.concatenate([read_part(p) for p in sorted(at.glob("high-*.npz"))]) for at in (tmp_path, packed))
    assert (len(lossy), len(exact)) == (5, 11)
    errors = np.square(lossy[:, None].astype(float) - exact).mean((2, 3, 4))
    assert (errors.min(1) > 0).all()
    assert (errors.min(1) < 60).all()
    assert len(set(errors.argmin(1))) == 5


def test_photographs_are_packed_as_they_are_and_smaller(photos, packed):
    tiles = np.concatenate([read_part(path) for path in packed.glob("high-*.npz")])
    picture = read_rgb(photos / "train" / "0.png")
    for factor in (1, 1.5, 2):
        expected = bicubic(picture, 1 / factor)[:48, :48]
        assert (tiles == expected).all((1, 2, 3)).any(), f"no tile is {factor} times smaller"


def test_drawings_have_hard_edges_and_are_packed_with_the_photographs(photos, tmp_path):
    drawn = [drawing(96, np.random.default_rng(seed)) for seed in (*range(12), 0)]
    np.testing.assert_array_equal(drawn[0], drawn[-1])
    steepest = [np.abs(np.diff(picture.astype(int), axis=axis)).max() for picture in drawn for axis in (0, 1)]
    assert np.median(steepest) > 128
    pack(photos, tmp_path, quality=0, side=48, dev_side=48, drawings=3)
    assert sum(len(read_part(path)) for path in tmp_path.glob("high-*.npz")) == 11 + 3


def test_a_folder_without_pictures_is_told(tmp_path):
    with pytest.raises(PictureError, match="0 tiles and 0 held-out pictures"):
        pack(tmp_path, tmp_path / "out")


def test_held_out_tiles_are_the_middle(picture):
    np.testing.assert_array_equal(middle(picture, 24), picture[18:42, 28:52])
    with pytest.raises(PictureError, match="80 x 60 px; expected 72 px a side"):
        middle(picture, 72)


def test_the_same_seed_wears_alike_and_qualities_span_their_range(picture):
    first, again = ([worn(picture, random) for _ in range(40)] for random in map(np.random.default_rng, (0, 0)))
    assert first == again
    sizes = sorted(map(len, first))
    assert sizes[-1] > 3 * sizes[0]
    assert all(decoded(each).shape == picture.shape for each in first)


def test_chroma_is_halved_only_when_asked(picture):
    def chroma_error(data):
        difference = decoded(data).astype(float) - picture
        return (difference - difference.mean(2, keepdims=True)).std()

    assert chroma_error(jpeg(picture, 95)) > 3 * chroma_error(jpeg(picture, 95, full_chroma=True))


def test_blur_and_noise_are_slight_and_noise_may_be_grey(picture):
    assert 0 < np.abs(blurred(picture, 0.5).astype(float) - picture).mean() < 20
    random = np.random.default_rng(0)
    differences = [noisy(picture, 2, random).astype(float) - picture for _ in range(20)]
    assert all(1.8 < difference.std() < 2.2 for difference in differences)
    grey = [(difference.std(2) == 0).all() for difference in differences]
    assert {True, False} == set(grey)


def test_a_first_compression_leaves_the_picture_in_place_on_several_grids(picture):
    random = np.random.default_rng(0)
    results = [compressed_before(picture, random) for _ in range(6)]
    assert all(result.shape == picture.shape for result in results)
    assert all(0 < np.abs(result.astype(float) - picture).mean() < 25 for result in results)
    assert len({result.tobytes() for result in results}) == 6
