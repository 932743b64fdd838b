"""The native backend's exact streaming: by strips of any height, the very pixels of `whole`."""

import numpy as np
import pytest
import pyvips

pytest.importorskip("llvmlite")

from sanrt.errors import PictureError
from sanrt.kernels.cpu.ir import this_processor
from sanrt.model.bundled import WeightsKind, bundled_checkpoint
from sanrt.model.spec import Precision
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.pictures.codec import open_picture
from sanrt.runtime.tiling.options import PROCESS_MEMORY, Tiling, UpscaleOptions, memory_for
from sanrt.runtime.tiling.plan import HIGH_STRIP, SOURCE_BYTES, STRIP_HEIGHTS, TilingPlan, plan_tiling
from sanrt.runtime.tiling.upscaling import NetworkRunner, upscale

INT16 = pytest.param(Precision.INT16, marks=pytest.mark.skipif(not this_processor().pmadd, reason="no int16 here"))
PRECISIONS = (Precision.FP32, INT16)


def noise(height, width, bands=3):
    return np.random.default_rng(height * width).integers(0, 256, (height, width, bands), np.uint8)


def saved(pixels, path):
    pyvips.Image.new_from_array(pixels).copy(interpretation="srgb").write_to_file(str(path))
    return path


def least_memory(backend, picture, rows):
    """`--memory` that just suffices for strips of such height."""
    height, width = picture.shape[:2]
    return memory_for(backend.strips.needed(height, width, rows).memory + height * width * SOURCE_BYTES)


def from_file(runner, path, folder):
    """The pixels that a streamed file gives."""
    with open_picture(path) as source:
        result, plan = runner.run_file(runner.decide(source.info), source, folder)
    with result:
        return result.image().numpy(), plan


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", [WeightsKind.FAST, WeightsKind.CLEAN])
def test_strips_of_every_height_give_the_whole_picture_s_pixels(kind, precision, tmp_path):
    model = bundled_checkpoint(2, kind)  # 32 and 64 channels
    picture = noise(267, 61)
    path = saved(picture, tmp_path / "a.png")
    with load_backend("native", model, RunOptions(threads=2, precision=precision)) as backend:
        whole = upscale(backend, picture, UpscaleOptions(tiling=Tiling.WHOLE))
        for tile in 64, 96, 250, 512:
            for memory in least_memory(backend, picture, tile), None:  # all maps in files; all in memory
                options = UpscaleOptions(tile, tiling=Tiling.EXACT, memory=memory)
                got, plan = from_file(NetworkRunner(backend, options), path, tmp_path)
                assert plan == TilingPlan(Tiling.EXACT, tile, plan.regions, strips=True)
                np.testing.assert_array_equal(got, whole, err_msg=f"strips of {tile}, memory {memory}")
        picture = picture.astype(np.float32) / 255
        whole, strips = (
            upscale(backend, picture, UpscaleOptions(tile, tiling=tiling))
            for tiling, tile in ((Tiling.WHOLE, None), (Tiling.EXACT, 64))
        )
        np.testing.assert_array_equal(strips, whole)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("regions", [*range(1, 11)])
def test_strips_take_any_number_of_regions(regions, precision, tiny_model):
    picture = noise(70, 43)
    with load_backend("native", tiny_model(2), RunOptions(threads=2, precision=precision)) as backend:
        whole, strips = (
            upscale(backend, picture, UpscaleOptions(tiling=tiling, tile=tile, regions=regions))
            for tiling, tile in ((Tiling.WHOLE, None), (Tiling.EXACT, 16))
        )
        np.testing.assert_array_equal(strips, whole)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_self_ensemble_goes_by_strips_too(precision, tiny_model, tmp_path):
    picture = noise(53, 71)
    path = saved(picture, tmp_path / "a.png")
    with load_backend("native", tiny_model(2), RunOptions(threads=1, precision=precision)) as backend:
        whole = upscale(backend, picture, UpscaleOptions(tiling=Tiling.WHOLE, self_ensemble=True))
        memory = max(least_memory(backend, each, 32) for each in (picture, picture.transpose(1, 0, 2)))
        options = UpscaleOptions(tile=32, tiling=Tiling.EXACT, self_ensemble=True, memory=memory)
        np.testing.assert_array_equal(from_file(NetworkRunner(backend, options), path, tmp_path)[0], whole)
        np.testing.assert_array_equal(upscale(backend, picture, UpscaleOptions(32, None, True, Tiling.EXACT)), whole)


def test_pictures_that_do_not_fit_go_in_the_highest_strips_that_leave_half_of_the_memory_or_are_low(tiny_model):
    options = UpscaleOptions(memory=PROCESS_MEMORY + 2**28)
    with load_backend("native", tiny_model(2), RunOptions(threads=1)) as backend:
        assert plan_tiling(backend, 300, 200, options).tiling is Tiling.WHOLE
        for height, width in (2400, 1000), (9000, 300):
            plan = plan_tiling(backend, height, width, options)
            assert str(plan).startswith(f"exact in strips of {plan.tile} rows")
            needed = {rows: backend.strips.needed(height, width, rows).memory for rows in (*STRIP_HEIGHTS, None)}
            left = 2**28 - height * width * SOURCE_BYTES
            assert needed[plan.tile] <= left < needed[None]
            assert needed[plan.tile] <= left // 2 or plan.tile <= HIGH_STRIP
            assert all(needed[rows] > left // 2 for rows in STRIP_HEIGHTS if rows > plan.tile)


def test_a_picture_whose_strips_exceed_the_memory_is_refused_with_the_least_that_would_do(tiny_model, tmp_path):
    picture = noise(300, 200)
    path = saved(picture, tmp_path / "a.png")
    with load_backend("native", tiny_model(2), RunOptions(threads=1)) as backend, open_picture(path) as source:
        low, high = (least_memory(backend, picture, rows) for rows in (16, 128))

        def decided(memory, tile=None):
            return NetworkRunner(backend, UpscaleOptions(tile, tiling=Tiling.EXACT, memory=memory)).decide(source.info)

        assert decided(low).tile == 16
        assert decided(high, 128).tile == 128
        with pytest.raises(PictureError, match=rf"in strips of 16 rows take \d+ MiB .*; allow memory={low} bytes$"):
            decided(low - 4)
        with pytest.raises(PictureError, match=rf"of 128 rows .*; use tile=16, or allow memory={high} bytes$"):
            decided(low, 128)


def test_after_an_out_of_memory_strips_are_lower(tiny_model, monkeypatch):
    from sanrt.kernels.cpu import passes

    picture, stream, heights = noise(90, 40), passes.stream, []

    def limited(network, read, size, regions, bands, *rest):
        heights.append(bands.rows)
        if bands.rows > 30:
            raise MemoryError
        stream(network, read, size, regions, bands, *rest)

    def full(*_):
        raise MemoryError

    with load_backend("native", tiny_model(2), RunOptions(threads=1)) as backend:
        whole = upscale(backend, picture, UpscaleOptions(tiling=Tiling.WHOLE))
        monkeypatch.setattr(passes, "stream", limited)
        monkeypatch.setattr(passes, "upscale", full)
        runner = NetworkRunner(backend, UpscaleOptions())
        result, plan = runner.run_array(runner.decide_array(90, 40), picture)
    np.testing.assert_array_equal(result, whole)
    assert heights == [45, 22]
    assert plan == TilingPlan(Tiling.EXACT, 22, 2, strips=True)


def test_what_is_not_finite_is_an_error(tiny_model):
    with load_backend("native", tiny_model(2), RunOptions(threads=1)) as backend:
        from sanrt.errors import BackendError

        picture = np.full((40, 40, 3), np.nan, np.float32)
        with pytest.raises(BackendError, match="not finite"):
            upscale(backend, picture, UpscaleOptions(tile=16, tiling=Tiling.EXACT))
