"""Patches are gathered where they belong, repeatably; the low resolution is the CPU's, to the bit."""

import numpy as np
import pytest
import torch

from sanrt.errors import PictureError
from training.data import picture_files, read_rgb
from training.degrade import degrade
from training.tiles import BLOCK, Tiles, load_tiles, read_part, reduce, write_part
from training.wear import decoded, png


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_tiles_are_reduced_as_the_degradation_reduces_pictures(shared, scale):
    paths = picture_files(shared / "data" / "eval" / "Set5" / "x2" / "HR")
    high = np.stack([read_rgb(path)[:192, :192] for path in paths])
    expected = np.stack([degrade(each, scale) for each in high])
    np.testing.assert_array_equal(reduce(torch.from_numpy(high), scale), expected)


def test_more_tiles_than_fit_a_chunk_are_reduced_in_order():
    high = torch.arange(70, dtype=torch.uint8)[:, None, None, None].expand(70, 24, 24, 3).contiguous()
    np.testing.assert_array_equal(reduce(high, 2)[:, 5, 5, 0], np.arange(70))


def test_patches_are_what_slicing_and_turning_by_numpy_gives(tiles):
    draws = tiles.draw(BLOCK, 7, 3, 0)[0]
    low, high = tiles.patches(draws, 7)
    assert (low.shape, high.shape) == ((BLOCK, 3, 7, 7), (BLOCK, 3, 14, 14))
    assert low.dtype == high.dtype == torch.float32
    assert low.is_contiguous(memory_format=torch.channels_last)

    def sliced(picture, top, left, side, turn):
        part = picture[top : top + side, left : left + side].numpy()
        part = part[::-1] if turn % 2 else part
        part = part[:, ::-1] if turn // 2 % 2 else part
        return part.transpose(2, 1, 0) if turn >= 4 else part.transpose(2, 0, 1)

    for index, (tile, version, top, left, turn) in enumerate(draws.tolist()):
        np.testing.assert_array_equal(low[index], sliced(tiles.low[version, tile], top, left, 7, turn))
        np.testing.assert_array_equal(high[index], sliced(tiles.high[tile], 2 * top, 2 * left, 14, turn))


def test_draws_reach_every_tile_version_place_and_orientation(tiles):
    draws = torch.cat([tiles.draw(8, 20, 0, block) for block in range(3)]).flatten(0, 1)
    for column, size in enumerate([5, 2, 5, 5, 8]):
        assert draws[:, column].unique().tolist() == list(range(size))


def test_draws_depend_on_seed_and_block_alone(tiles):
    first, again = tiles.draw(4, 8, 3, 7), tiles.draw(4, 8, 3, 7)
    assert torch.equal(first, again)
    assert not torch.equal(first, tiles.draw(4, 8, 4, 7))
    assert not torch.equal(first, tiles.draw(4, 8, 3, 8))


def test_a_patch_larger_than_the_tiles_is_told(tiles):
    with pytest.raises(PictureError, match=r"tiles of 24 low-resolution px; expected at least the 25 px"):
        tiles.draw(1, 25, 0, 0)


def test_a_pack_is_loaded_with_its_versions_beside_their_tiles(packed):
    tiles = load_tiles(packed, 2, photo=True, device=torch.device("cpu"))
    assert tiles.scale == 2
    assert (tiles.high.shape, tiles.low.shape) == ((11, 48, 48, 3), (3, 11, 24, 24, 3))
    assert len(list(packed.glob("high-*.npz"))) > 1
    assert torch.equal(tiles.low[0], reduce(tiles.high, 2))
    differences = (tiles.low[1:, :, None].float() - tiles.low[0][None, None].float()).abs().mean((3, 4, 5))
    assert differences.argmin(2).tolist() == [list(range(11))] * 2, "a worn version lies beside another tile"
    assert (differences.diagonal(dim1=1, dim2=2) > 0).all()

    clean = load_tiles(packed, 2, photo=False, device=torch.device("cpu"))
    assert torch.equal(clean.low, tiles.low[:1])


def test_held_out_pictures_come_with_every_quality(packed):
    held_out = load_tiles(packed, 2, photo=True, device=torch.device("cpu"), prefix="dev-")
    assert held_out.low.shape == (5, 2, 24, 24, 3)
    errors = (held_out.low[1:].float() - held_out.low[0].float()).square().mean((1, 2, 3, 4))
    assert (errors.diff() > 0).all(), "a lower quality is nearer to the truth"


def test_what_is_no_pack_is_told(tmp_path):
    with pytest.raises(PictureError, match=r"no high\*.npz; expected pictures packed by"):
        load_tiles(tmp_path, 2, photo=False, device=torch.device("cpu"))
    np.savez(tmp_path / "high-0.npz", data=np.zeros(1, np.uint8))
    with pytest.raises(PictureError, match=r"high-0.npz: not a file of packed pictures .*ends"):
        load_tiles(tmp_path, 2, photo=False, device=torch.device("cpu"))


def test_parts_keep_order_and_pixels(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    write_part(tmp_path / "part.npz", [png(picture) for picture in pictures])
    np.testing.assert_array_equal(read_part(tmp_path / "part.npz"), pictures)
    np.testing.assert_array_equal(decoded(png(pictures[1])), pictures[1])


def test_tiles_know_their_scale():
    assert Tiles(torch.zeros(1, 24, 24, 3), torch.zeros(1, 1, 8, 8, 3)).scale == 3
