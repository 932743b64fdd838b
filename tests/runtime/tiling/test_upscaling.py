"""One picture through a backend: tiles, self-ensemble, memory that does not suffice."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import pyvips

from sanrt.errors import BackendError, OutOfMemoryError, PictureError, UsageError
from sanrt.geometry import Box
from sanrt.model.spec import Architecture, ModelSpec
from sanrt.runtime.artifacts.sizes import Limits, Profile, Size
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.runs import pipeline
from sanrt.runtime.runs.results import Recipe
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.runtime.tiling.orientations import ORIENTATIONS, OrientedSource
from sanrt.runtime.tiling.plan import TilingPlan, network_bytes, plan_tiling
from sanrt.runtime.tiling.streaming import ArraySource
from sanrt.runtime.tiling.upscaling import NetworkRunner, upscale

ARCH = Architecture(scale=2, groups=1, blocks=1, channels=16, reduction=4)
SPEC = ModelSpec(ARCH, "0" * 64, "a test", 5, min_side=4, multiple=1)


class Nearest:
    """A backend without stages that repeats every pixel, and remembers what sizes it was given."""

    name, device, streams, memory, limits, engine_digest = "nearest", "CPU", False, None, Limits(), None
    infer_with_regions = strips = None

    def __init__(self, most=None, spec=SPEC):
        self.spec, self.most, self.sizes = spec, most, []

    def infer(self, x):
        assert x.dtype == np.float32
        assert x.flags.c_contiguous
        assert min(x.shape[2:]) >= self.spec.min_side
        assert not any(side % self.spec.multiple for side in x.shape[2:])
        self.sizes.append(x.shape[2:])
        if self.most and x.shape[2] * x.shape[3] > self.most:
            raise OutOfMemoryError("nearest ran out of memory")
        return x.repeat(2, axis=2).repeat(2, axis=3)

    def stages(self):
        raise BackendError("nearest has no stages")


def noise(height, width, dtype=np.uint8, seed=0):
    full = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    return (np.random.default_rng(seed).random((height, width, 3)) * full).astype(dtype)


def doubled(picture):
    return picture.repeat(2, axis=0).repeat(2, axis=1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (4, 50), (16, 16), (17, 70), (100, 47)])
def test_tiles_and_padding_lose_and_move_no_pixel(dtype, size):
    picture = noise(*size, dtype)
    backend = Nearest(spec=replace(SPEC, min_side=6, multiple=4))
    result = upscale(backend, picture, UpscaleOptions(tile=16))
    assert result.dtype == dtype
    tolerance = {np.uint8: 0, np.uint16: 0, np.float32: 1e-6}[dtype]
    np.testing.assert_allclose(result.astype(float), doubled(picture).astype(float), rtol=0, atol=tolerance)


def test_all_tiles_of_a_picture_have_one_size():
    backend = Nearest()
    upscale(backend, noise(50, 90), UpscaleOptions(tile=32, overlap=7))
    assert set(backend.sizes) == {(32, 32)}
    assert len(backend.sizes) == 2 * 4


def test_a_picture_that_fits_goes_through_whole():
    backend = Nearest()
    upscale(backend, noise(50, 90))
    assert backend.sizes == [(50, 90)]


def test_without_a_tile_size_only_pictures_that_exceed_the_memory_are_cut():
    picture = noise(300, 400)
    for memory, whole in ((2**31, True), (2**28, False)):
        backend = Nearest()
        assert np.array_equal(upscale(backend, picture, UpscaleOptions(memory=memory)), doubled(picture))
        assert (backend.sizes == [(300, 400)]) is whole


def test_on_a_gpu_its_own_memory_decides_and_the_host_holds_only_the_result():
    picture, megapixels = noise(300, 400), 0.12
    for device, host, whole in ((2**30, 2**28, True), (2**27, 2**34, False), (2**30, int(megapixels * 90e6), False)):
        backend = Nearest()
        backend.memory = device
        way = plan_tiling(backend, *picture.shape[:2], UpscaleOptions(memory=host))
        assert (way.tiling is Tiling.WHOLE) is whole
        assert way.tile**2 * network_bytes(ARCH) <= device


def limited(*profiles):
    backend = Nearest()
    backend.limits = Limits(tuple(Profile(Size(1, *low), Size(1, *low), Size(1, *high)) for low, high in profiles))
    return backend


def test_a_picture_larger_than_an_engine_takes_goes_in_tiles_that_it_takes():
    picture = noise(70, 50)
    backend = limited(((4, 4), (40, 64)), ((4, 4), (64, 30)))
    assert np.array_equal(upscale(backend, picture), doubled(picture))
    assert len(backend.sizes) > 1
    assert all(backend.limits.take(*size) for size in backend.sizes)
    for size in ((40, 64), (64, 30), (2, 64)):
        assert plan_tiling(backend, *size, UpscaleOptions()).tiling is Tiling.WHOLE
    for size in ((41, 40), (64, 31)):
        assert plan_tiling(backend, *size, UpscaleOptions()).tiling is Tiling.OVERLAP


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"tiling": Tiling.WHOLE},
            BackendError,
            "nearest: 50 x 70 pixels as a whole, its engine takes 4 x 4 to 64 x 40",
        ),
        ({"tile": 48}, UsageError, "tiles of 48 pixels: the engines take 40; use tile=40"),
    ],
)
def test_what_an_engine_does_not_take_is_one_line_before_anything_runs(options, kind, message):
    backend = limited(((4, 4), (40, 64)))
    with pytest.raises(kind, match=message) as caught:
        upscale(backend, noise(70, 50), UpscaleOptions(**options))
    assert "\n" not in str(caught.value)
    assert not backend.sizes


def test_after_an_out_of_memory_too_tiles_stay_within_the_engine():
    backend = limited(((4, 4), (16, 400)))
    backend.most = 16 * 64
    assert np.array_equal(upscale(backend, picture := noise(16, 300)), doubled(picture))
    assert all(backend.limits.take(*size) for size in backend.sizes)


def test_a_blended_result_larger_than_the_memory_is_refused_before_anything_runs():
    backend = Nearest()
    with pytest.raises(PictureError, match="600 x 400"):
        upscale(backend, noise(200, 300), UpscaleOptions(tile=64, memory=1_000_000))
    assert not backend.sizes


@pytest.mark.parametrize("options", [UpscaleOptions(), UpscaleOptions(tile=80)])
def test_out_of_memory_halves_the_tiles_says_so_and_gets_every_pixel_right(options, caplog):
    backend = Nearest(most=30 * 30)
    picture = noise(96, 70)
    with caplog.at_level(logging.WARNING):
        result = upscale(backend, picture, options)
    assert np.array_equal(result, doubled(picture))
    assert "out of memory" in caplog.text
    assert "again: overlap in tiles of" in caplog.text
    assert max(max(size) for size in backend.sizes[-4:]) <= 30


def test_out_of_memory_with_the_smallest_tiles_is_an_error():
    with pytest.raises(OutOfMemoryError):
        upscale(Nearest(most=1), noise(96, 96))


def test_values_that_are_not_finite_are_an_error_not_a_picture():
    class Overflowing(Nearest):
        def infer(self, x):
            y = super().infer(x)
            y[..., 3, 5] = np.nan
            return y

    with pytest.raises(BackendError, match="not finite"):
        upscale(Overflowing(), noise(16, 16))


def test_self_ensemble_undoes_every_turn():
    picture = noise(20, 33, np.float32)
    np.testing.assert_allclose(upscale(Nearest(), picture, UpscaleOptions(self_ensemble=True)), doubled(picture), atol=1e-6)


def test_self_ensemble_is_the_mean_over_the_eight_turns(tiny_model):
    picture = noise(12, 17, np.float32)
    with load_backend("onnxruntime", tiny_model(2), RunOptions(threads=1)) as backend:

        def plain(seen):
            x = np.ascontiguousarray(seen.transpose(2, 0, 1)[None] * np.float32(255))
            return backend.infer(x)[0].transpose(1, 2, 0)

        turns = [(quarter, mirror) for quarter in range(4) for mirror in (False, True)]
        total = np.zeros((24, 34, 3))
        for quarter, mirror in turns:
            seen = np.rot90(picture[:, ::-1] if mirror else picture, quarter)
            undone = np.rot90(plain(seen), -quarter)
            total += undone[:, ::-1] if mirror else undone
        expected = (total / 8).clip(0, 255) / 255
        result = upscale(backend, picture, UpscaleOptions(self_ensemble=True))
        once = upscale(backend, picture)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert np.abs(once - expected).max() > 1e-3, "the turns must matter, or this test shows nothing"


def test_self_ensemble_makes_the_upscaling_commute_with_turns(tiny_model):
    picture = noise(12, 16)
    options = UpscaleOptions(self_ensemble=True)
    with load_backend("onnxruntime", tiny_model(2), RunOptions(threads=1)) as backend:
        turned = np.rot90(upscale(backend, np.rot90(picture).copy(), options), -1)
        assert np.abs(turned.astype(int) - upscale(backend, picture, options)).max() <= 1


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_turned_source_reads_what_the_turned_picture_has_there(orientation):
    x = noise(7, 11, np.float32).transpose(2, 0, 1)[None]
    source, whole = OrientedSource(ArraySource(x), orientation), orientation.apply(x)
    assert source.size == whole.shape[2:]
    assert np.array_equal(orientation.inverse(whole), x)
    for box in Box(0, 0, *source.size).tiles(4):
        assert np.array_equal(source.read(box), whole[:, :, box.top : box.bottom, box.left : box.right])


def test_a_streamed_self_ensemble_of_a_file_is_the_whole_one(tiny_model, tmp_path):
    picture = noise(33, 46)
    pyvips.Image.new_from_array(picture).write_to_file(str(tmp_path / "in.png"))
    with load_backend("onnxruntime", tiny_model(2), RunOptions(threads=1)) as backend:
        expected = upscale(backend, picture, UpscaleOptions(self_ensemble=True))
        options = UpscaleOptions(tile=20, tiling=Tiling.EXACT, self_ensemble=True, memory=2**30, scratch=tmp_path)
        assert np.abs(upscale(backend, picture, options).astype(int) - expected).max() <= 1
        job = Job(tmp_path / "in.png", tmp_path / "out.png")
        runner = NetworkRunner(backend, options)
        (outcome,) = pipeline.run([job], runner, pipeline.PipelineOptions(Recipe(2, "")))
        assert outcome.plan == TilingPlan(Tiling.EXACT, 20, 2)
        once = upscale(backend, picture).astype(int)
    result = pyvips.Image.new_from_file(str(job.destination)).numpy().astype(int)
    assert np.abs(result - expected).max() <= 1
    assert np.abs(once - expected).max() > 1, "the turns must matter, or this test shows nothing"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", "out.png"]


def test_an_engine_must_take_the_turned_picture_too():
    backend = limited(((4, 4), (40, 64)))
    assert plan_tiling(backend, 30, 60, UpscaleOptions()).tiling is Tiling.WHOLE
    assert plan_tiling(backend, 30, 60, UpscaleOptions(self_ensemble=True)).tiling is Tiling.OVERLAP


@pytest.mark.parametrize(("tile", "overlap"), [(8, None), (32, 17), (32, -1), (None, -1)])
def test_tiles_and_overlaps_that_make_no_sense_are_refused(tile, overlap):
    with pytest.raises(UsageError):
        UpscaleOptions(tile, overlap)


@pytest.mark.parametrize("options", [UpscaleOptions(regions=3), UpscaleOptions(regions=3, tile=16)])
def test_regions_that_a_backend_without_stages_has_not_are_refused_not_ignored(options):
    with pytest.raises(UsageError, match=r"3 x 3 regions.*leave `regions` out"):
        upscale(Nearest(), noise(24, 24), options)


@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("regions", [1, 3])
def test_whole_pictures_with_other_regions_are_what_a_model_loaded_with_them_gives(name, regions, tiny_model):
    x = 255 * np.random.default_rng(1).random((2, 3, 21, 30), np.float32)
    with (
        load_backend(name, tiny_model(), RunOptions(threads=1)) as any_regions,
        load_backend(name, tiny_model(), RunOptions(threads=1, regions=regions)) as own,
    ):
        before = any_regions.infer(x)
        np.testing.assert_array_equal(any_regions.infer_with_regions(x, regions), own.infer(x))
        assert np.abs(before - own.infer(x)).max() > 0.01
        np.testing.assert_array_equal(any_regions.infer(x), before)
        picture = noise(21, 30)
        expected = upscale(own, picture, UpscaleOptions(regions=regions))
        np.testing.assert_array_equal(upscale(any_regions, picture, UpscaleOptions(regions=regions)), expected)


def test_regions_that_do_not_fit_a_side_leave_tiles_and_memory_as_asked_for():
    backend = Nearest()
    backend.streams = True
    asked = UpscaleOptions(tile=64, tiling=Tiling.EXACT, regions=1000, memory=2**30)
    assert plan_tiling(backend, 1500, 4000, asked) == TilingPlan(Tiling.EXACT, 64, 2)


@pytest.mark.parametrize("name", ["native", "onnxruntime"])
@pytest.mark.parametrize("self_ensemble", [False, True])
def test_a_whole_picture_tells_its_progress_within_itself_where_the_backend_can(live_network, tmp_path, name, self_ensemble):
    from sanrt.model.graph import san_model

    net = live_network(2, groups=3)
    weights = {key: tensor.detach().numpy() for key, tensor in net.state_dict().items()}
    path = tmp_path / "model.onnx"
    path.write_bytes(san_model(replace(SPEC, architecture=net.arch), weights).SerializeToString())
    shares: list[float] = []
    with load_backend(name, path, RunOptions(threads=1)) as backend:
        picture = noise(20, 30)
        result = upscale(backend, picture, UpscaleOptions(self_ensemble=self_ensemble), shares.append)
        assert np.array_equal(result, upscale(backend, picture, UpscaleOptions(self_ensemble=self_ensemble)))
    assert sum(shares) == pytest.approx(1)
    assert all(share >= -1e-9 for share in shares)
    passes = 8 if self_ensemble else 1
    assert max(shares) < 0.5 / passes if name == "native" else len(shares) == passes
