import numpy as np
import pytest

from sanrt.model.contract import Moments
from sanrt.model.spec import Precision
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend, status
from sanrt.runtime.tiling.featuremaps import FeatureStore
from sanrt.runtime.tiling.plan import MAX_REGION_PIXELS, choose_regions
from sanrt.runtime.tiling.streaming import ArraySource, Streaming

NEEDS_OPENVINO = pytest.mark.skipif(not status("openvino").usable, reason="openvino is not installed")
BACKENDS = ["torch", "onnxruntime", "native", pytest.param("openvino", marks=NEEDS_OPENVINO)]


def stream(backend, pixels, tile, regions=2, store=None, progress=lambda share: None):
    scale = backend.spec.architecture.scale
    output = np.full((1, 3, pixels.shape[2] * scale, pixels.shape[3] * scale), np.nan, np.float32)

    def sink(box, part):
        output[:, :, box.top : box.bottom, box.left : box.right] = part

    store = store or FeatureStore(2**30)
    Streaming(backend.stages(), backend.spec, ArraySource(pixels), store, tile, regions, progress).run(sink)
    return output


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (1, 3, height, width)).astype(np.float32)


@pytest.fixture(scope="module")
def live_model(tmp_path_factory):
    """`live_model(scale)`: G=2, m=2, gamma and the attention's output not zero, the attention as strong as the rest."""

    def make(scale=2, groups=2, blocks=2, channels=16):
        import torch

        from sanrt.model.graph import san_model
        from sanrt.model.san import SAN
        from sanrt.model.spec import Architecture, ModelSpec

        torch.manual_seed(scale)
        arch = Architecture(scale, groups, blocks, channels, 4, value_range=1.0)
        net = SAN(arch)
        with torch.no_grad():
            net.gamma.fill_(0.4)
            net.attention.out.weight.mul_(3)
            net.attention.query.weight.mul_(5)
        weights = {name: t.detach().numpy() for name, t in net.state_dict().items()}
        path = tmp_path_factory.mktemp("live") / "model.onnx"
        path.write_bytes(san_model(ModelSpec(arch, "0" * 64, "random", 5), weights).SerializeToString())
        return path

    return make


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_every_tile_size_gives_the_whole_picture_s_pixels(live_model, name, scale):
    pixels = picture(53, 46) / 255
    with load_backend(name, live_model(scale), RunOptions(threads=1, precision=Precision.FP32)) as backend:
        whole = backend.infer(pixels)
        for tile in 5, 16, 31, 64:
            np.testing.assert_allclose(stream(backend, pixels, tile), whole, rtol=0, atol=2e-5, err_msg=f"tile {tile}")


@pytest.mark.parametrize("name", BACKENDS)
def test_scratch_files_and_more_regions_change_nothing(live_model, tmp_path, name):
    pixels = picture(37, 71) / 255
    # 11 regions a side: names of regions must not run together
    with load_backend(name, live_model(), RunOptions(threads=1, precision=Precision.FP32, regions=11)) as backend:
        store = FeatureStore(0, tmp_path)
        np.testing.assert_allclose(stream(backend, pixels, 20, 11, store), backend.infer(pixels), rtol=0, atol=2e-5)
        assert store.maps == []


def test_overlapped_tiles_would_not_pass_the_exactness_test(live_model):
    pixels = picture(53, 46) / 255
    with load_backend("onnxruntime", live_model(), RunOptions(threads=1)) as backend:
        lone = backend.infer(np.ascontiguousarray(pixels[:, :, :31]))[:, :, :40]
        assert abs(lone - backend.infer(pixels)[:, :, :40]).max() > 1e-3


def test_progress_adds_up_to_one(live_model):
    shares = []
    with load_backend("onnxruntime", live_model(), RunOptions(threads=1)) as backend:
        stream(backend, picture(40, 30) / 255, 16, progress=shares.append)
    assert sum(shares) == pytest.approx(1)


def test_maps_are_freed_when_a_stage_fails(live_model, tmp_path):
    class Broken:
        def run(self, stage, *inputs):
            if stage == "join.1":
                raise KeyboardInterrupt
            return stages.run(stage, *inputs)

    with load_backend("onnxruntime", live_model(), RunOptions(threads=1)) as backend:
        stages, store = backend.stages(), FeatureStore(0, tmp_path)
        streaming = Streaming(Broken(), backend.spec, ArraySource(picture(24, 24) / 255), store, 16, 2)
        with pytest.raises(KeyboardInterrupt):
            streaming.run(lambda box, part: None)
        assert store.maps == []


def test_merged_moments_are_those_of_all_pixels_even_far_from_zero():
    x = np.random.default_rng(0).normal(1000, 1, (3, 500))
    merged = Moments(np.zeros(3), np.zeros((3, 3)))
    for part in np.split(x, [1, 40, 333], 1):
        centred = part - part.mean(1, keepdims=True)
        merged.add(part.mean(1), centred @ centred.T, part.shape[1])
    np.testing.assert_allclose(merged.mean, x.mean(1), rtol=1e-12)
    np.testing.assert_allclose(merged.scatter / merged.count, np.cov(x, bias=True), rtol=1e-9)


def test_regions_follow_the_picture_s_size_alone():
    assert choose_regions(256, 512) == 2
    assert choose_regions(256, 513) == choose_regions(513, 256) == 3
    for height, width in (4000, 6000), (30, 10**6), (10**5, 10**5):
        k = choose_regions(height, width)
        assert -(-height // k) * -(-width // k) <= MAX_REGION_PIXELS or 2 * (k + 1) > min(height, width)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "name"),
    [("bundled", "torch"), ("bundled", "onnxruntime"), ("bundled", "native"), ("random", "native")],
)
def test_exact_to_2e_4_of_the_value_range_on_a_photo_sized_picture(live_model, tmp_path, name, which):
    if which == "bundled":
        from sanrt.model.checkpoint import bundled_checkpoint, load_checkpoint
        from sanrt.model.graph import san_model
        from sanrt.model.spec import ModelSpec

        checkpoint = load_checkpoint(bundled_checkpoint(4))
        model = tmp_path / "bundled.onnx"
        spec = ModelSpec(checkpoint.architecture, checkpoint.digest, checkpoint.origin, 5)
        weights = {name: t.numpy() for name, t in checkpoint.tensors.items()}
        model.write_bytes(san_model(spec, weights).SerializeToString())
    else:
        model = live_model(4, groups=3, blocks=3, channels=32)
    with load_backend(name, model, RunOptions(precision=Precision.FP32)) as backend:
        value_range = backend.spec.architecture.value_range
        pixels = picture(261, 389) * (value_range / 255)
        whole = backend.infer(pixels)
        for tile in 96, 200:
            assert abs(stream(backend, pixels, tile) - whole).max() <= 2e-4 * value_range
