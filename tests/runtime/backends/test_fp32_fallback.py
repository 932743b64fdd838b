import logging
from dataclasses import replace

import numpy as np
import pytest

from sanrt.errors import BackendError
from sanrt.model.spec import Precision
from sanrt.runtime.artifacts.sizes import Limits
from sanrt.runtime.backends.fp32_fallback import FP32Fallback
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.runtime.tiling.upscaling import upscale


class Overflowing:
    """A backend that says fp16 and gives one infinity wherever the picture is bright, as an overflow would."""

    name, device, streams, memory, limits, engine_digest = "overflowing", "CPU", True, None, Limits(), None
    strips = None

    def __init__(self, inner, precision=Precision.FP16):
        self.inner, self.spec = inner, replace(inner.spec, precision=precision)

    def spoilt(self, outputs, given):
        if given.max() > 250:
            outputs[0][..., 0, 0] = np.inf
        return outputs

    def infer(self, pictures):
        return self.spoilt([self.inner.infer(pictures)], pictures)[0]

    @property
    def infer_with_regions(self):
        infer = self.inner.infer_with_regions
        return infer and (lambda pictures, k: self.spoilt([infer(pictures, k)], pictures)[0])

    def stages(self):
        stages = self.inner.stages()

        class Spoilt:
            maps = None

            def run(_, stage, *inputs):
                outputs = stages.run(stage, *inputs)
                return self.spoilt(outputs, inputs[0]) if stage == "head" else outputs

        return Spoilt()

    def close(self):
        self.inner.close()


@pytest.fixture
def backend(tiny_model):
    with load_backend("onnxruntime", tiny_model(2), RunOptions(threads=1)) as loaded:
        yield loaded


def picture():
    pixels = np.full((40, 36, 3), 90, np.uint8)
    pixels[:10, :10] = np.random.default_rng(0).integers(0, 255, (10, 10, 3))
    pixels[3, 3] = 255
    return pixels


@pytest.mark.parametrize("tiling", [Tiling.WHOLE, Tiling.OVERLAP, Tiling.EXACT])
def test_an_overflowed_tile_is_computed_in_fp32_and_told(backend, caplog, tiling):
    options = UpscaleOptions(tile=None if tiling is Tiling.WHOLE else 16, tiling=tiling, memory=2**30)
    with caplog.at_level(logging.WARNING):
        result = upscale(FP32Fallback(Overflowing(backend), lambda _: backend), picture(), options)
    np.testing.assert_array_equal(result, upscale(backend, picture(), options))
    assert "overflowed in fp16; computing it in fp32 on onnxruntime" in caplog.text


@pytest.mark.parametrize("tiling", [Tiling.WHOLE, Tiling.EXACT])
def test_what_is_not_finite_in_fp32_is_an_error(backend, tiling):
    def unsound(_=2):
        return Overflowing(backend, Precision.FP32)

    options = UpscaleOptions(tile=None if tiling is Tiling.WHOLE else 16, tiling=tiling, memory=2**30)
    for watched in FP32Fallback(Overflowing(backend), unsound), FP32Fallback(unsound(), unsound), unsound():
        with pytest.raises(BackendError, match=r"NaN or infinity|not finite"):
            upscale(watched, picture(), options)


def test_finite_results_load_no_second_backend(backend):
    def never(_):
        raise AssertionError

    with FP32Fallback(backend, never) as watched:
        np.testing.assert_array_equal(upscale(watched, picture()), upscale(backend, picture()))


def test_other_regions_are_computed_in_fp32_with_the_same_regions(tiny_model, caplog):
    loaded = []

    def exact(regions):
        loaded.append(load_backend("onnxruntime", tiny_model(2), RunOptions(threads=1, regions=regions)))
        return loaded[-1]

    inner, options = load_backend("torch", tiny_model(2), RunOptions()), UpscaleOptions(regions=3, tiling=Tiling.WHOLE)
    with FP32Fallback(Overflowing(inner), exact) as watched:
        for _ in range(2):
            result = upscale(watched, picture(), options)
        np.testing.assert_array_equal(result, upscale(loaded[0], picture(), options))
        assert abs(result.astype(int) - upscale(inner, picture(), options)).max() <= 1
    assert [backend.spec.regions for backend in loaded] == [3]


def test_the_fp32_backend_is_loaded_again_in_a_forked_process(backend):
    loaded = []

    def fp32(_):
        loaded.append(backend)
        return backend

    inner = Overflowing(backend)
    inner.name = "native"  # which goes on after a fork
    guarded = FP32Fallback(inner, fp32)
    for _ in range(2):
        upscale(guarded, picture())
        guarded.after_fork()
    assert len(loaded) == 2
