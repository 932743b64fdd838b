"""`Upscaler`: types, channels and sizes of arrays."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import sanrt
from sanrt import Upscaler
from sanrt.errors import BackendError, UsageError
from sanrt.model.bundled import bundled_checkpoint, read_weights
from sanrt.model.spec import Precision
from sanrt.runtime.backends.registry import BACKENDS, status
from sanrt.runtime.tiling.options import Tiling
from sanrt.upscaler import BackendName, PrecisionName, TilingName


@pytest.fixture(scope="module")
def upscaler(tiny_model):
    with Upscaler.load(tiny_model(2), backend="onnxruntime", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def photo():
    """float64 (12, 10, 3) in 0.2..0.8: smooth, so that no result is clipped by much."""
    y, x = np.mgrid[0:12, 0:10] / 12
    return np.stack([0.2 + 0.5 * y, 0.3 + 0.4 * x, 0.7 - 0.3 * x * y], axis=2)


def in_type(values, dtype):
    full = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    return (np.rint(values * full) if full > 1 else values).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_every_type_gives_the_networks_output_in_that_type(upscaler, photo, dtype):
    picture = in_type(photo, dtype)
    full = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    x = (picture.astype(np.float64) / full * 255).astype(np.float32).transpose(2, 0, 1)[None]
    expected = upscaler.backend.infer(np.ascontiguousarray(x))[0].transpose(1, 2, 0).clip(0, 255) / 255 * full
    result = upscaler(picture)
    assert result.dtype == dtype
    assert result.shape == (24, 20, 3)
    assert expected.std() > 0.05 * full, "the network's output must be a picture, or this test shows nothing"
    assert np.abs(result - expected).max() <= (0.5 + 1e-4 * full if full > 1 else 1e-5)


def test_results_outside_the_range_are_clipped_not_wrapped(upscaler):
    noise = np.random.default_rng(0).integers(0, 2, (32, 32, 3)).astype(np.float32)
    raw = upscaler.backend.infer(np.ascontiguousarray(noise.transpose(2, 0, 1)[None] * 255))[0].transpose(1, 2, 0)
    assert raw.min() < -2, "an output below zero is what this test is about"
    for picture, low in ((noise, 0.0), ((noise * 255).astype(np.uint8), 0)):
        assert (upscaler(picture)[raw < -1] == low).all()


def test_grey_is_the_mean_of_three_equal_channels(upscaler, photo):
    grey = in_type(photo[..., 0], np.uint16)
    result = upscaler(grey)
    assert (result.shape, result.dtype) == ((24, 20), np.uint16)
    colours = upscaler(np.repeat(grey[..., None], 3, axis=2))
    assert np.abs(result - colours.mean(axis=2)).max() <= 0.5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_opacity_stays_apart_from_colour(upscaler, photo, dtype):
    full = in_type(np.ones(()), dtype)
    alpha = np.full((12, 10), full, dtype)
    alpha[:, :5] = 0
    result = upscaler(np.dstack([in_type(photo, dtype), alpha]))
    assert (result.shape, result.dtype) == ((24, 20, 4), dtype)
    seen = photo.copy()
    seen[:, :5] = seen[:, 5:6]  # what is hidden is taken from the nearest visible column
    assert np.array_equal(result[..., :3], upscaler(in_type(seen, dtype)))
    assert (result[:, :6, 3] == 0).all()
    assert (result[:, 14:, 3] == full).all()
    assert (np.diff(result[0, 7:13, 3].astype(float)) >= 0).all()


def test_a_list_gives_a_list_in_order(upscaler, photo):
    pictures = [in_type(photo, np.uint8), in_type(photo[:5, :7], np.uint16), in_type(photo[..., 0], np.float32)]
    results = upscaler(pictures)
    assert isinstance(results, list)
    for picture, result in zip(pictures, results, strict=True):
        assert np.array_equal(result, upscaler(picture))


def test_arrays_that_are_views_are_taken_as_they_look(upscaler, photo):
    picture = in_type(photo, np.uint8)
    turned = picture[::-1, ::-2].transpose(1, 0, 2)
    assert np.array_equal(upscaler(turned), upscaler(np.ascontiguousarray(turned)))


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (1, 40)])
def test_pictures_below_the_smallest_size_keep_their_shape(upscaler, photo, size):
    picture = np.full((*size, 3), 90, np.uint8)
    assert upscaler(picture).shape == (2 * size[0], 2 * size[1], 3)


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((4, 4, 3), np.int16), "int16"),
        (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\(1, 4, 4, 3\)"),
        (np.full((4, 4, 3), 200, np.float32), "200"),
        (np.full((4, 4, 3), np.nan, np.float32), "nan"),
        (np.full((4, 4, 3), 1.001, np.float32), r"to 1\.00100005; expected floats in 0\.\.1"),
        (np.zeros((3, 5, 6), np.uint8), r"\(3, 5, 6\).*channels come last"),
        (["x.png"], "a path"),
        (Path("x.png"), r"a path \(x\.png\); read it first"),
        (None, "NoneType"),
        (3, "int"),
    ],
)
def test_arrays_of_other_kinds_are_refused_by_name(upscaler, picture, told):
    with pytest.raises(UsageError, match=told):
        upscaler(picture)


class Wrapped:
    """Anything with `__array__`."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_pictures_are_taken_as_their_libraries_have_them(upscaler, photo):
    import torch
    from PIL import Image

    picture = in_type(photo, np.uint8)
    expected = upscaler(picture)
    for given in (Image.fromarray(picture), torch.from_numpy(picture), Wrapped(picture), memoryview_of(picture)):
        assert np.array_equal(upscaler(given), expected)
    assert all(np.array_equal(each, expected) for each in upscaler((Image.fromarray(picture), picture)))


def memoryview_of(picture):
    """An object with `__array_interface__` alone."""
    return type("View", (), {"__array_interface__": picture.__array_interface__, "kept": picture})()


def test_pillow_modes_are_taken_as_what_they_show(upscaler, photo):
    from PIL import Image

    palette = Image.fromarray(in_type(photo, np.uint8)).quantize(7)
    assert np.array_equal(upscaler(palette), upscaler(np.asarray(palette.convert("RGB"))))
    bits = Image.fromarray(in_type(photo[..., 0], np.uint8)).convert("1")
    assert np.array_equal(upscaler(bits), upscaler(np.asarray(bits.convert("L"))))
    deep = Image.fromarray(in_type(photo[..., 0], np.uint16))
    assert np.array_equal(upscaler(deep), upscaler(in_type(photo[..., 0], np.uint16)))
    with pytest.raises(UsageError, match=r"mode CMYK; expected RGB.*convert\('RGB'\)"):
        upscaler(palette.convert("CMYK"))


def test_a_tensor_that_no_array_can_be_had_of_is_refused_in_one_line(upscaler):
    import torch

    with pytest.raises(UsageError, match="picture is Tensor, no array can be had of it"):
        upscaler(torch.zeros(4, 4, 3, requires_grad=True))


def test_floats_that_leave_the_range_by_rounding_are_clipped(upscaler):
    above = np.full((8, 8, 3), np.float32(1.0000001))
    assert np.array_equal(upscaler(above), upscaler(np.ones((8, 8, 3), np.float32)))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_the_byte_order_of_samples_does_not_matter(upscaler, photo, dtype):
    picture = in_type(photo, dtype)
    result = upscaler(picture.astype(np.dtype(dtype).newbyteorder(">")))
    assert result.dtype == dtype
    assert np.array_equal(result, upscaler(picture))


def test_one_channel_comes_back_as_one_channel(upscaler, photo):
    grey = in_type(photo[..., 0], np.uint8)
    assert np.array_equal(upscaler(grey[..., None]), upscaler(grey)[..., None])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precision": "fp7"}, "precision 'fp7': expected fp32, fp16, bf16, int16"),
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(tiny_model, options, told):
    with pytest.raises(UsageError, match=told):
        Upscaler.load(tiny_model(2), **options)


def test_a_scale_that_san_does_not_have_is_told_without_advice_to_export_it():
    with pytest.raises(UsageError, match=r"^scale 5: expected 2, 3, 4, 8$"):
        Upscaler.load(5)


def test_options_are_what_the_command_line_takes(tiny_model, tmp_path):
    options = {"precision": "fp32", "regions": "auto", "memory": 2**30, "scratch": str(tmp_path), "backend": "onnxruntime"}
    with Upscaler.load(tiny_model(2), threads=1, **options) as upscaler:
        assert (upscaler.options.memory, upscaler.options.scratch, upscaler.options.regions) == (2**30, tmp_path, None)
        name = upscaler.spec.architecture.name
        assert repr(upscaler) == f"<Upscaler {tiny_model(2)}: {name}, fp32, onnxruntime on CPU>"


def test_the_types_of_choices_name_all_choices():
    assert set(get_args(BackendName)) == {"auto", *BACKENDS}
    assert get_args(TilingName) == tuple(Tiling)
    assert get_args(PrecisionName) == tuple(Precision)


def test_a_scale_finds_what_export_wrote_else_the_bundled_weights(tiny_model, tmp_path):
    folder = tiny_model(3).parent
    with Upscaler.load(3, models=folder, threads=1) as upscaler:
        assert upscaler.scale == 3
        assert upscaler.spec.weights_origin == "seeded random weights"
        assert repr(upscaler).startswith(f"<Upscaler {folder}/san_x3.onnx: ")
    with Upscaler.load(3, models=tmp_path, threads=1) as upscaler:
        assert upscaler.spec.weights_origin == read_weights(bundled_checkpoint(3)).spec.weights_origin
        assert repr(upscaler).startswith("<Upscaler bundled weights san_x3: ")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"regions": -1}, "regions -1; expected a whole number, 1 or more, up to 1000"),
        ({"regions": 0}, "regions 0"),
        ({"regions": 2.0}, "regions 2.0"),
        ({"threads": -5}, "threads -5; expected a whole number, 1 or more"),
        ({"threads": 0}, "threads 0"),
        ({"threads": "2"}, "threads '2'"),
        ({"device": -1}, "device -1"),
        ({"tile": 15}, "tile 15; expected a whole number, 16 or more"),
        ({"tile": 64.5}, "tile 64.5"),
        ({"overlap": -1}, "overlap -1"),
        ({"model": 5}, "scale 5: expected 2, 3, 4, 8"),
        ({"model": True}, "scale True"),
        ({"model": 2.0}, "scale 2.0: expected 2, 3, 4, 8"),
        ({"model": None}, "scale None"),
    ],
)
def test_numbers_that_make_no_sense_are_told_with_what_does(wrong, told):
    with pytest.raises(UsageError, match=re.escape(told)):
        Upscaler.load(**{"model": 2, "backend": "torch", **wrong})


def test_whole_numbers_of_numpy_are_scales(tiny_model):
    with Upscaler.load(np.int64(3), models=tiny_model(3).parent, threads=1) as upscaler:
        assert upscaler.scale == 3


@pytest.mark.parametrize("backend", ["native", "onnxruntime", "openvino", "torch"])
def test_a_closed_upscaler_says_so(tiny_model, backend, photo):
    if not status(backend).usable:
        pytest.skip(f"{backend}: {status(backend).reason}")
    upscaler = Upscaler.load(tiny_model(2), backend=backend, threads=1)
    upscaler.close()
    upscaler.close()
    with pytest.raises(BackendError, match=f"^backend {backend}: the model was closed; load it again$"):
        upscaler(in_type(photo, np.uint8))


def test_tiling_reaches_the_network_and_unknown_ones_are_refused(tiny_model, photo):
    picture = np.kron(in_type(photo, np.uint8), np.ones((4, 4, 1), np.uint8))
    results = {}
    for tiling, tile in (("whole", None), ("exact", 16), ("overlap", 16)):
        with Upscaler.load(tiny_model(2), backend="onnxruntime", threads=1, tiling=tiling, tile=tile) as upscaler:
            results[tiling] = upscaler(picture).astype(int)
    assert np.abs(results["exact"] - results["whole"]).max() <= 1
    assert np.abs(results["overlap"] - results["whole"]).max() > 1
    with pytest.raises(UsageError, match="whole, exact, overlap"):
        Upscaler.load(tiny_model(2), tiling="diagonal")


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (3, 40)])
def test_pictures_too_small_for_regions_are_streamed_as_a_whole(upscaler, tiny_model, size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    with Upscaler.load(tiny_model(2), backend="onnxruntime", threads=1, tiling="exact") as exact:
        assert np.array_equal(exact(picture), upscaler(picture))


def test_auto_takes_a_backend_that_loads_checkpoints(live_network, tmp_path):
    import torch

    from sanrt.model.checkpoint import save_checkpoint

    exact_root = live_network(sqrt_iterations=None)  # its steps are measured at export, so no graph can be written yet
    save_checkpoint(tmp_path / "own.safetensors", exact_root, "a test", torch.float32)
    with Upscaler.load(tmp_path / "own.safetensors", threads=1) as upscaler:
        assert upscaler.backend.name in ("torch", "torch-cuda")


def test_gpu_arrays_reach_a_backend_that_is_watched(upscaler, monkeypatch):
    with pytest.raises(UsageError, match="backend='tensorrt'"):
        upscaler.on_device("array")
    monkeypatch.setattr(upscaler.backend.backend, "infer_on_device", lambda array: (array, "result"), raising=False)
    assert upscaler.on_device("array") == ("array", "result")


@pytest.mark.parametrize("tiling", ["whole", "exact"])
def test_an_overlap_that_would_be_ignored_is_refused(tiny_model, tiling):
    with pytest.raises(UsageError, match="overlaps nothing"):
        Upscaler.load(tiny_model(2), tiling=tiling, overlap=8)


def test_the_package_has_no_other_lazy_names():
    with pytest.raises(AttributeError, match="Nothing"):
        _ = sanrt.Nothing


@pytest.mark.parametrize("backend", ["native", "onnxruntime", "openvino", "torch"])
def test_threads_may_share_an_upscaler(tiny_model, backend):
    if not status(backend).usable:
        pytest.skip(f"{backend}: {status(backend).reason}")
    pictures = [np.random.default_rng(i).integers(0, 256, (20 + i % 3, 24, 3), np.uint8) for i in range(24)]
    with Upscaler.load(tiny_model(2), backend=backend, threads=1) as upscaler, ThreadPoolExecutor(6) as pool:
        for got, expected in zip(pool.map(upscaler, pictures), map(upscaler, pictures), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_dropped_upscalers_leave_no_threads_behind(tiny_model):
    before = set(threading.enumerate())
    for _ in range(8):
        Upscaler.load(tiny_model(2), backend="native", threads=3)(np.zeros((16, 16, 3), np.uint8))
    left = set(threading.enumerate()) - before
    deadline = time.monotonic() + 60
    for thread in left:
        thread.join(max(0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in left)
