"""Every backend computes what the PyTorch reference computes, or says in one line why it does not run."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from sanrt import files
from sanrt.errors import BackendError, OutOfMemoryError, UsageError
from sanrt.export.onnx import ExportOptions, export_onnx
from sanrt.export.scene import natural_scene
from sanrt.extras import install_command
from sanrt.model.checkpoint import bundled_checkpoint, load_checkpoint
from sanrt.model.exported import read_model
from sanrt.model.graph import san_model
from sanrt.model.spec import Architecture, GraphOptions, Precision, Quantisation, QuantisedType
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts import variants
from sanrt.runtime.artifacts.variants import derived_model, derived_weights
from sanrt.runtime.backends import registry as backends
from sanrt.runtime.backends import speed_trial
from sanrt.runtime.backends.protocol import BackendStatus, RunOptions
from sanrt.runtime.backends.registry import AUTO_ORDER, BACKENDS, load_unguarded, status
from sanrt.runtime.host import Gpu, Gpus
from sanrt.wording import NOTICE

ONE_THREAD = RunOptions(threads=1, precision=Precision.FP32)
RANGES = {"groups.0.blocks.0.conv1": 9.0}
CPU_BACKENDS = ("onnxruntime", "openvino", "native")

STARVED = """
import resource, sys
from pathlib import Path
import numpy as np
from sanrt.errors import BackendError
from sanrt.model.spec import Architecture, Precision
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_unguarded

with load_unguarded(sys.argv[1], Path(sys.argv[2]), RunOptions(threads=1, precision=Precision.FP32)) as backend:
    print(backend.infer(np.zeros((1, 3, 8, 8), np.float32)).shape, end=" ")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
    try:
        print(backend.infer(np.zeros((1, 3, 900, 900), np.float32)).shape)
    except BackendError as error:
        print(type(error).__name__, error)
"""
"""A run that works, then one that needs more memory than there is."""


def picture(*shape):
    return (np.random.default_rng(sum(shape)).random(shape) * 255).astype(np.float32)


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-12))


@contextmanager
def loaded(name, model, options=ONE_THREAD):
    found = status(name)
    if not found.usable:
        pytest.skip(f"{name}: {found.reason}")
    with load_unguarded(name, model, options) as backend:
        yield backend


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_cpu_backends_agree_with_torch_on_odd_sizes_and_batches(name, tiny_model):
    model = tiny_model(scale=3)
    with loaded("torch", model) as reference, loaded(name, model) as backend:
        assert (backend.name, backend.spec.regions) == (name, 2)
        for shape in ((1, 3, 4, 4), (1, 3, 17, 30), (2, 3, 21, 13)):
            pixels = picture(*shape)
            expected = reference.infer(pixels)
            assert expected.shape == (*shape[:2], shape[2] * 3, shape[3] * 3)
            assert psnr(backend.infer(pixels), expected) > 85


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_the_number_of_regions_changes_the_result_and_is_the_same_in_every_backend(name, tiny_model):
    pixels, options = picture(1, 3, 19, 26), replace(ONE_THREAD, regions=3)
    with loaded("torch", tiny_model(), options) as reference, loaded(name, tiny_model(), options) as backend:
        expected = reference.infer(pixels)
        assert backend.spec.regions == 3
        assert psnr(backend.infer(pixels), expected) > 85
    with loaded(name, tiny_model()) as two:
        assert psnr(two.infer(pixels), expected) < 75


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_results_are_not_overwritten_by_the_next_run(name, tiny_model):
    with loaded(name, tiny_model()) as backend:
        first = backend.infer(picture(1, 3, 8, 9))
        kept = first.copy()
        backend.infer(255 - picture(1, 3, 8, 9))
        assert np.array_equal(first, kept)


@pytest.mark.parametrize("scale", [2, 8])
def test_native_takes_channels_that_fill_no_vector(tiny_model, scale):
    model, pixels = tiny_model(scale, channels=24), picture(1, 3, 10, 13)
    with loaded("torch", model) as reference, loaded("native", model) as backend:
        assert psnr(backend.infer(pixels), reference.infer(pixels)) > 85


def test_a_bad_picture_leaves_nothing_behind_in_native_s_maps(tiny_model):
    box, x = np.array([0, 0, 8, 8]), picture(1, 24, 8, 8)
    with loaded("native", tiny_model(channels=24)) as backend:
        expected, *_ = backend.stages().run("body.0", x, box)
        backend.stages().run("head", np.full((1, 3, 8, 8), np.inf, np.float32), box)
        got, *_ = backend.stages().run("body.0", x, box)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT16])
def test_a_bad_picture_leaves_nothing_behind_for_the_next(tiny_model, precision):
    options, good = RunOptions(threads=2, precision=precision), picture(1, 3, 17, 21)
    with loaded("native", tiny_model(channels=24), options) as fresh:
        expected = fresh.infer(good)
    with loaded("native", tiny_model(channels=24), options) as backend:
        assert not np.isfinite(backend.infer(np.full_like(good, np.inf))).all()
        np.testing.assert_array_equal(backend.infer(good), expected)


def test_a_whole_picture_s_maps_are_freed_when_streaming_begins(tiny_model):
    with loaded("native", tiny_model(), RunOptions(threads=1)) as backend:
        backend.infer(picture(1, 3, 17, 21))
        backend.stages().run("head", picture(1, 3, 8, 8), np.array([0, 0, 8, 8]))
        assert backend.network.trunk is None


def test_what_a_stage_gave_is_not_overwritten_even_where_it_is_one_pixel(tiny_model):
    box = np.array([0, 0, 1, 1])
    with loaded("native", tiny_model()) as backend:
        (first,) = backend.stages().run("head", picture(1, 3, 8, 8), box)
        kept = first.copy()
        backend.stages().run("head", 255 - picture(1, 3, 8, 8), box)
        np.testing.assert_array_equal(first, kept)


def test_native_s_maps_do_not_pile_up_over_pictures_of_many_sizes(tiny_model):
    with loaded("native", tiny_model()) as backend:
        held = []
        for side in range(8, 20):
            backend.infer(picture(1, 3, side, side))
            held.append(len(backend.network.maps))
        assert len(set(held)) == 1


def test_a_damaged_file_of_weights_is_made_again(tiny_model, tmp_path):
    model = tmp_path / "san_x2.onnx"
    model.write_bytes(tiny_model().read_bytes())
    with loaded("native", model):
        pass
    (weights,) = (tmp_path / ".derived").glob("*.npz")
    content = weights.read_bytes()
    weights.write_bytes(content[:999])
    with loaded("native", model):
        pass
    assert weights.read_bytes() == content


def test_threads_that_load_a_new_model_at_once_all_get_it(tiny_model, tmp_path):
    model = tmp_path / "san_x2.onnx"
    model.write_bytes(tiny_model().read_bytes())
    pixels = picture(1, 3, 8, 8)

    def result(_):
        with loaded("onnxruntime", model) as backend:
            return backend.infer(pixels)

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(result, range(4))
    assert all(np.array_equal(first, other) for other in others)
    assert len(list((tmp_path / ".derived").iterdir())) == 1


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_a_model_in_a_folder_that_cannot_be_written_keeps_its_variants_in_the_cache_folder(
    name, tiny_model, tmp_path, monkeypatch
):
    model = tmp_path / "san_x2.onnx"
    model.write_bytes(tiny_model().read_bytes())
    (tmp_path / ".derived").touch()  # no folder can be made there, not even by root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with loaded(name, model) as backend:
        backend.infer(picture(1, 3, 8, 8))
    kept = [path.name for path in (tmp_path / "cache" / "sanrt" / "derived").iterdir()]
    assert any(each.startswith("san_x2-") for each in kept)


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_a_model_runs_where_nothing_can_be_written(name, tiny_model, tmp_path, monkeypatch):
    model = tmp_path / "san_x2.onnx"
    model.write_bytes(tiny_model().read_bytes())
    (tmp_path / ".derived").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".derived"))
    with loaded(name, model) as backend:
        backend.infer(picture(1, 3, 8, 8))
        backend.stages().run("head", picture(1, 3, 8, 8), np.array([0, 0, 8, 8]))


def test_an_engine_given_to_another_backend_is_called_what_it_is(tmp_path):
    (tmp_path / "a.engine").write_bytes(b"an engine")
    with pytest.raises(UsageError, match=r"a\.engine: an engine, which only tensorrt runs; leave backend='torch' out"):
        load_unguarded("torch", tmp_path / "a.engine", ONE_THREAD)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "native"])
def test_a_checkpoint_given_to_a_backend_of_models_is_told_with_the_export_that_makes_one(name, live_network, tmp_path):
    import torch

    if not status(name).usable:
        pytest.skip(f"{name} is not usable here")
    torch.save(live_network().state_dict(), tmp_path / "a b.pt")
    with pytest.raises(UsageError, match=rf"no exported model, which {name} needs; .*--checkpoint '.*a b\.pt'"):
        load_unguarded(name, tmp_path / "a b.pt", ONE_THREAD)


def test_another_graph_writer_makes_variants_anew(tiny_model, tmp_path, monkeypatch):
    model = tmp_path / "san_x2.onnx"
    model.write_bytes(tiny_model().read_bytes())
    derived_model(model, GraphOptions())
    derived_weights(model)
    monkeypatch.setattr(variants, "source_digest", lambda *packages: f"changed {packages}")
    monkeypatch.setattr(variants, "made_of", lambda model, content: b"by the changed writer")
    assert derived_model(model, GraphOptions()) == b"by the changed writer"
    with pytest.raises(ValueError, match="pickle"):  # not the weights that were kept
        derived_weights(model)


def test_the_earlier_name_of_a_backend_works_and_says_so_in_one_line(tiny_model, caplog):
    with loaded("winograd", tiny_model()) as backend:
        assert backend.name == "native"
    assert caplog.messages == ["backend winograd is called native now"]
    assert status("winograd") == status("native")


def test_native_without_all_it_needs_is_not_usable(monkeypatch):
    monkeypatch.setattr("sanrt.runtime.backends.native.library_version", lambda name: "0.50" if name == "llvmlite" else None)
    found = status("native")
    assert (found.usable, found.reason) == (False, "threadpoolctl is not installed")


def test_auto_runs_an_8_bit_model_on_a_backend_that_can(tiny_model, tmp_path):
    spec, weights = read_model(tiny_model())
    path = tmp_path / "san_x2.int8.onnx"
    eight = replace(spec, quantisation=Quantisation(QuantisedType.INT8, RANGES, RANGES))
    path.write_bytes(san_model(eight, weights).SerializeToString())
    with load_unguarded("auto", path, ONE_THREAD) as backend:
        assert backend.spec.quantisation


def test_native_may_be_called_from_several_threads(tiny_model):
    pictures = [picture(1, 3, 12 + i % 3, 20) for i in range(12)]
    with loaded("native", tiny_model(), replace(ONE_THREAD, threads=2)) as backend, ThreadPoolExecutor(4) as pool:
        expected = list(map(backend.infer, pictures))
        for got, want in zip(pool.map(backend.infer, pictures), expected, strict=True):
            assert np.array_equal(got, want)


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_stages_agree_with_torch_even_where_the_first_region_has_one_key(name, tiny_model):
    box = np.array([1, 0, 11, 15])
    with loaded("torch", tiny_model()) as reference, loaded(name, tiny_model()) as backend:
        stages = [b.stages() for b in (reference, backend)]
        expected, got = (s.run("head", picture(1, 3, 12, 15), box)[0] for s in stages)
        assert expected.shape == (1, 16, 10, 15)
        assert psnr(got, expected) > 85
        for side in (3, 9):
            x = picture(1, 16, side, side)
            pooled = reference.stages().run("keys-values", x)
            expected, got = (s.run("attend", x, *pooled)[0] for s in stages)
            assert psnr(got, expected) > 85


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_too_little_memory_is_an_error_and_not_the_result_of_the_run_before(name, tiny_model):
    if not status(name).usable:
        pytest.skip(status(name).reason)
    result = subprocess.run([sys.executable, "-c", STARVED, name, tiny_model()], capture_output=True, text=True)
    assert result.stdout.startswith("(1, 3, 16, 16) OutOfMemoryError"), result.stdout + result.stderr


def test_an_unknown_backend_is_told_the_names_there_are(tiny_model):
    with pytest.raises(UsageError, match=r"unknown backend 'cuda'; expected auto, torch, .*openvino"):
        load_unguarded("cuda", tiny_model(), ONE_THREAD)


def test_an_unusable_backend_is_not_replaced_by_another(tiny_model, monkeypatch):
    missing = BackendStatus("openvino", None, False, "openvino is not installed", "pip install 'sanrt[openvino]'")
    monkeypatch.setattr("sanrt.runtime.backends.openvino.status", lambda: missing)
    with pytest.raises(BackendError, match=r"not installed; to fix it: pip install 'sanrt\[openvino\]' \(usable: .*torch"):
        load_unguarded("openvino", tiny_model(), ONE_THREAD)


@pytest.mark.parametrize(("name", "known"), [("torch", "fp32"), ("onnxruntime", "fp32"), ("native", "fp32 or int16")])
def test_a_precision_that_a_backend_has_not_is_refused(name, known, tiny_model):
    with pytest.raises(BackendError, match=f"{name} runs in {known}, bf16 was asked for; use precision='fp32'"):
        load_unguarded(name, tiny_model(), replace(ONE_THREAD, precision=Precision.BF16))


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "openvino"])
def test_int16_is_refused_where_it_is_not(name, tiny_model):
    with (
        pytest.raises(BackendError, match=r"int16( was asked for)? .*fp32|int16 was asked for; use precision='fp32'"),
        loaded(name, tiny_model(), replace(ONE_THREAD, precision=Precision.INT16)),
    ):
        pass


@pytest.mark.parametrize(("features", "precision"), [(("AVX-512",), "fp32"), (("AVX-512", "AVX512-VNNI"), "int16")])
def test_native_computes_in_int16_where_the_processor_has_its_instruction(features, precision, monkeypatch, tiny_model):
    monkeypatch.setattr(machine, "cpu_features", lambda: features)
    with loaded("native", tiny_model(), RunOptions(threads=1)) as backend:
        assert backend.spec.precision == precision


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_int16_lies_within_55_db_of_fp32_on_natural_pictures(scale, tmp_path):
    model = tmp_path / f"x{scale}.onnx"
    export_onnx(load_checkpoint(bundled_checkpoint(scale)), model, ExportOptions(check=False))
    scenes = [natural_scene(61, 83, seed).transpose(2, 0, 1)[None].astype(np.float32) for seed in range(2)]
    with (
        loaded("torch", model) as reference,
        loaded("native", model, RunOptions(threads=2, precision=Precision.INT16)) as backend,
        loaded("native", model, RunOptions(threads=2, precision=Precision.FP32)) as exact,
    ):
        unit = reference.spec.architecture.value_range / 255
        for scene in scenes:
            want = reference.infer(scene * unit) / unit
            assert 55 < psnr(backend.infer(scene * unit) / unit, want) < 85
            assert psnr(exact.infer(scene * unit) / unit, want) > 85


def test_stages_are_fp32_in_either_precision(tiny_model):
    box, x = np.array([0, 0, 8, 8]), picture(1, 16, 8, 8)
    options = [RunOptions(threads=1, precision=precision) for precision in (Precision.FP32, Precision.INT16)]
    features = []
    for each in options:
        with loaded("native", tiny_model(), each) as backend:
            features.append(backend.stages().run("body.0", x[:, : backend.spec.architecture.channels], box)[0])
    np.testing.assert_array_equal(*features)


def test_openvino_refuses_fp16(tiny_model):
    with (
        pytest.raises(BackendError, match="openvino has no fp16"),
        loaded("openvino", tiny_model(), replace(ONE_THREAD, precision=Precision.FP16)),
    ):
        pass


def statuses(monkeypatch, usable):
    """Every backend's status, those named usable."""
    monkeypatch.setattr(
        backends, "status", lambda name, device=0: BackendStatus(name, "1", name in usable, "", automatic=name != "openvino")
    )


def test_auto_takes_the_first_usable_backend_that_pays_here(monkeypatch):
    statuses(monkeypatch, {"torch", "openvino", "onnxruntime"})
    assert backends.automatic_choice(AUTO_ORDER).name == "onnxruntime"
    statuses(monkeypatch, {"torch", "openvino"})
    assert backends.automatic_choice(AUTO_ORDER).name == "torch"
    statuses(monkeypatch, {"openvino"})
    assert backends.automatic_choice(AUTO_ORDER).name == "openvino"  # not what pays here, and the only one
    statuses(monkeypatch, set())
    assert backends.automatic_choice(AUTO_ORDER) is None


@pytest.mark.parametrize(
    ("precision", "taken"), [(Precision.BF16, "openvino"), (Precision.FP32, "native"), (None, "openvino")]
)
def test_auto_takes_openvino_only_where_it_will_run_in_bf16(
    precision, taken, tiny_model, openvino_module, monkeypatch, caplog
):
    """With AMX its bf16 can be the fastest; where the trial refuses that, its fp32 takes several times native's time."""
    statuses(monkeypatch, {"torch", "native"})
    usable = backends.status
    monkeypatch.setattr(
        backends,
        "status",
        lambda name, device=0: replace(usable(name), usable=name in ("openvino", "native"), automatic=True),
    )
    monkeypatch.setattr(openvino_module, "chosen_precision", lambda *_: precision or Precision.FP32)
    monkeypatch.setattr(backends, "fastest", lambda loaders, *_: next(iter(loaders)))
    options = RunOptions(precision=Precision.BF16 if precision is None else None)
    caplog.set_level(logging.INFO, "sanrt")
    assert backends.automatic_choice(AUTO_ORDER, tiny_model(), options).name == taken
    assert ("openvino passed over" in caplog.text) == (taken == "native")


@pytest.mark.parametrize("faster", ["openvino", "native"])
def test_auto_takes_what_was_measured_fastest_and_measures_it_once(faster, tiny_model, openvino_module, monkeypatch):
    statuses(monkeypatch, {"native", "onnxruntime"})
    usable = backends.status
    monkeypatch.setattr(
        backends,
        "status",
        lambda name, device=0: replace(usable(name), usable=name in ("openvino", "native", "onnxruntime"), automatic=True),
    )
    measured = []

    class Timed(nullcontext):
        def __init__(self, name):
            super().__init__(self)
            self.name = name

        def infer(self, picture):
            measured.append(self.name)
            time.sleep(0.001 if self.name == faster else 0.02)

    class Module:
        def __init__(self, name):
            self.load = lambda model, options: Timed(name)

    monkeypatch.setattr(backends, "backend_module", Module)
    monkeypatch.setattr(backends, "passed_over", lambda *_: False)
    model, options = tiny_model(scale=3), RunOptions(threads=1, regions=3)
    names = "openvino", "native", "onnxruntime"
    assert backends.automatic_choice(names, model, options).name == faster
    assert set(measured) == {"openvino", "native"}
    measured.clear()
    assert backends.automatic_choice(names, model, options).name == faster
    assert not measured
    for kept in (model.parent / ".derived").glob("*-fastest.json"):
        kept.unlink()


def test_auto_leaves_out_of_the_measurement_what_does_not_load(tiny_model):
    def refuse():
        raise BackendError("no such precision")

    load = partial(load_unguarded, "native", tiny_model(), ONE_THREAD)
    assert set(speed_trial.seconds({"openvino": refuse, "native": load})) == {"native"}
    assert speed_trial.seconds({"openvino": refuse}) == {}


def test_a_backend_whose_first_run_fails_is_left_out_and_measured_again_the_next_time(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"a model")
    broken = True

    class Unreliable(nullcontext):
        def __init__(self):
            super().__init__(self)

        def infer(self, picture):
            if broken:
                raise BackendError("no memory now")

    class Slow(nullcontext):
        def __init__(self):
            super().__init__(self)

        def infer(self, picture):
            time.sleep(0.01)

    def chosen():
        return speed_trial.fastest({"a": Unreliable, "b": Slow}, tmp_path / "a.onnx", ())

    assert chosen() == "b"
    broken = False
    assert chosen() == "a"
    broken = True
    assert chosen() == "a"


def test_a_trial_is_told_when_it_is_made_and_not_where_it_was_kept(tmp_path, caplog):
    (tmp_path / "m.onnx").write_bytes(b"a model")

    class Quick(nullcontext):
        def __init__(self):
            super().__init__(self)

        def infer(self, picture):
            pass

    caplog.set_level(NOTICE, "sanrt")
    for _ in range(2):
        speed_trial.fastest({"a": Quick, "b": Quick}, tmp_path / "m.onnx", ())
    (told,) = caplog.messages
    assert told.startswith("measuring which is the fastest here for ")
    assert told.endswith("m.onnx: a or b; once")


def test_auto_knows_every_backend():
    assert set(AUTO_ORDER) == set(BACKENDS)


def test_auto_says_what_it_chose(tiny_model):
    with load_unguarded("auto", tiny_model(), ONE_THREAD) as backend:
        assert (
            backend.name
            == backends.automatic_choice(backends.candidates(tiny_model(), ONE_THREAD), tiny_model(), ONE_THREAD).name
        )


@pytest.mark.parametrize(
    ("features", "automatic"), [(("AVX2",), False), (("AVX-512", "AVX512-BF16"), False), (("AVX-512", "AMX-BF16"), True)]
)
def test_openvino_is_automatic_where_bf16_is_faster_by_far(features, automatic, monkeypatch):
    monkeypatch.setattr(machine, "cpu_features", lambda: features)
    monkeypatch.setattr("sanrt.runtime.backends.openvino.library_version", lambda _: "2026.4")
    assert status("openvino").automatic is automatic


@pytest.mark.parametrize(("features", "automatic"), [((), False), (("AVX2",), True), (("AVX2", "AVX-512"), True)])
def test_native_is_automatic_where_it_was_measured(features, automatic, monkeypatch):
    monkeypatch.setattr(machine, "cpu_features", lambda: features)
    monkeypatch.setattr("sanrt.runtime.backends.native.library_version", lambda _: "0.50")
    assert status("native").automatic is automatic
    assert status("native").usable


def test_an_error_of_torch_without_a_text_is_told_by_its_kind():
    from sanrt.runtime.backends.torch import call

    def fail(*_):
        raise RuntimeError

    with pytest.raises(BackendError, match=r"torch failed \(RuntimeError\)"):
        call(fail, np.zeros((1, 3, 4, 4), np.float32))


# --- bf16 or fp32 -------------------------------------------------------------------------------------------------


@pytest.fixture
def openvino_module():
    pytest.importorskip("openvino", reason="openvino is not installed")
    from sanrt.runtime.backends import openvino

    return openvino


def test_bf16_is_chosen_only_where_it_is_near_and_faster(openvino_module):
    PrecisionTrial = openvino_module.PrecisionTrial
    assert PrecisionTrial(fp32_seconds=1.0, bf16_seconds=0.2, psnr=55).precision is Precision.BF16
    assert PrecisionTrial(fp32_seconds=1.0, bf16_seconds=0.95, psnr=55).precision is Precision.FP32
    assert PrecisionTrial(fp32_seconds=1.0, bf16_seconds=0.2, psnr=30).precision is Precision.FP32


def test_the_trial_is_made_once_and_bf16_runs_when_it_pays(openvino_module, tiny_model, tmp_path, monkeypatch):
    model = tmp_path / "san_x2.onnx"
    model.write_bytes(tiny_model().read_bytes())
    trials = []

    def measured(*_):
        trials.append(openvino_module.PrecisionTrial(1.0, 0.2, 60.0))
        return trials[-1]

    monkeypatch.setattr(machine, "cpu_features", lambda: ("AMX-BF16",))
    monkeypatch.setattr(openvino_module, "measure_precisions", measured)
    monkeypatch.setattr(openvino_module, "compiled", lambda graph, model, precision, options: precision)
    monkeypatch.setattr(openvino_module, "warm_up", lambda request, shape: None)
    for _ in range(2):
        with load_unguarded("openvino", model, RunOptions(threads=1)) as backend:
            assert backend.spec.precision is backend.request is Precision.BF16
    assert len(trials) == 1
    (path,) = (tmp_path / ".derived").glob("*openvino*.json")
    path.write_text("{")
    load_unguarded("openvino", model, RunOptions(threads=1)).close()
    assert len(trials) == 2
    assert json.loads(files.kept([path.parent], path.name))["psnr"] == 60.0


def test_the_trial_measures_both_precisions(openvino_module, tiny_model):
    graph = tiny_model()
    try:
        trial = openvino_module.measure_precisions(graph.read_bytes(), graph, ONE_THREAD)
    except BackendError as error:
        pytest.skip(str(error))
    assert trial.fp32_seconds > 0
    assert trial.bf16_seconds > 0
    assert 35 < trial.psnr < 90


def test_bf16_by_wish_stays_near_fp32(openvino_module, tiny_model):
    pixels = picture(1, 3, 24, 20)
    try:
        with load_unguarded("openvino", tiny_model(), replace(ONE_THREAD, precision=Precision.BF16)) as bf16:
            got = bf16.infer(pixels)
    except BackendError as error:
        pytest.skip(str(error))
    with load_unguarded("openvino", tiny_model(), replace(ONE_THREAD, precision=Precision.FP32)) as fp32:
        assert 35 < psnr(got, fp32.infer(pixels)) < 90


def test_beside_bf16_the_ends_and_the_statistics_stay_fp32(openvino_module, tiny_model, monkeypatch):
    pixels = picture(1, 3, 24, 20)
    with load_unguarded("openvino", tiny_model(), replace(ONE_THREAD, precision=Precision.FP32)) as fp32:
        expected = fp32.infer(pixels)
    found = []
    for kept in (openvino_module.KEPT_FP32, re.compile("nothing")):
        monkeypatch.setattr(openvino_module, "KEPT_FP32", kept)
        try:
            with load_unguarded("openvino", tiny_model(), replace(ONE_THREAD, precision=Precision.BF16)) as bf16:
                found.append(psnr(bf16.infer(pixels), expected))
        except BackendError as error:
            pytest.skip(str(error))
    assert found[0] > found[1] + 3


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (MemoryError(), OutOfMemoryError),
        (RuntimeError("Exception from src/inference/x.cpp:3:\nCould not allocate memory\n"), OutOfMemoryError),
        (RuntimeError("Exception from src/inference/x.cpp:3:\nShape mismatch\n"), BackendError),
    ],
)
def test_errors_of_openvino_become_ours(raised, expected, openvino_module):
    def fail(*_, **__):
        raise raised

    with pytest.raises(BackendError) as caught:
        openvino_module.infer(SimpleNamespace(start_async=fail), picture(1, 3, 4, 4))
    assert type(caught.value) is expected
    assert "\n" not in str(caught.value)


# --- ONNX Runtime's CUDA provider ---------------------------------------------------------------------------------

H100 = Gpus((Gpu("NVIDIA H100", (9, 0), 80 << 30),), "580.1", "13.0")


def versions(monkeypatch, **installed):
    found = {name.replace("_", "-"): number for name, number in installed.items()}
    monkeypatch.setattr("sanrt.runtime.backends.onnxruntime_cuda.library_version", found.get)


def test_cuda_status_tells_what_is_missing(monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: H100)
    versions(monkeypatch)
    assert status("onnxruntime-cuda").remedy == install_command("gpu")
    versions(monkeypatch, onnxruntime="1")
    assert status("onnxruntime-cuda").remedy.startswith("pip uninstall -y onnxruntime &&")
    versions(monkeypatch, onnxruntime="1", onnxruntime_gpu="1")
    assert "overwrite each other" in status("onnxruntime-cuda").reason
    versions(monkeypatch, onnxruntime_gpu="1")
    monkeypatch.setattr(machine, "gpus", lambda: Gpus(problem="no NVIDIA driver"))
    assert status("onnxruntime-cuda").reason == "no NVIDIA driver"
    monkeypatch.setattr(machine, "gpus", lambda: H100)
    assert status("onnxruntime-cuda") == BackendStatus("onnxruntime-cuda", "1", True, "runs on NVIDIA H100")


T4 = Gpu("Tesla T4", (7, 5), 16 << 30)
L4 = Gpu("NVIDIA L4", (8, 9), 24 << 30)


@pytest.mark.parametrize(
    ("devices", "cuda", "device", "reason"),
    [
        ((T4,), "13.0", 0, "Tesla T4 has compute capability 7.5; expected 8.0 or later"),
        ((L4,), "12.4", 0, "its libraries are of CUDA 13.0, and the driver 550.54 runs CUDA up to 12.4"),
        ((T4, L4), "13.0", 1, ""),
        ((L4, T4), "13.0", 1, "Tesla T4 has compute capability 7.5"),
        ((L4,), "13.2", 0, ""),
        ((L4,), "14.0", 0, ""),
        ((L4,), "13.0", 1, "GPU 1 is not there; the driver shows 1, numbered from 0"),
    ],
)
def test_a_gpu_that_torch_or_its_kernels_cannot_use_is_never_usable(devices, cuda, device, reason, monkeypatch):
    from sanrt.runtime.backends import torch_cuda

    monkeypatch.setattr(machine, "gpus", lambda: Gpus(devices, "550.54", cuda))
    monkeypatch.setattr(torch_cuda, "library_version", {"torch": "2.13.0", "nvidia-cuda-nvrtc": "13.0"}.get)
    monkeypatch.setattr(torch_cuda, "cuda_of", lambda module, file: "12.8")
    found = status("torch-cuda", device)
    assert (found.usable, found.reason.startswith(reason)) == (not reason, True)


def test_a_driver_older_than_onnxruntimes_cuda_is_told_before_a_session_is_tried(monkeypatch):
    from sanrt.runtime.backends import onnxruntime_cuda

    versions(monkeypatch, onnxruntime_gpu="1.31.1")
    monkeypatch.setattr(onnxruntime_cuda, "cuda_of", lambda module, file: "13.0")
    monkeypatch.setattr(machine, "gpus", lambda: Gpus((L4,), "550.54", "12.4"))
    found = status("onnxruntime-cuda")
    assert not found.usable
    assert "its libraries are of CUDA 13.0, and the driver 550.54 runs CUDA up to 12.4" in found.reason
    assert found.remedy == "install a newer NVIDIA driver and reboot"


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "13.0"),
        ("cuda: Optional[str] = None\n", ""),
        ("package_name = 'onnxruntime-gpu'\n__version__ = '1.31.1'\ncuda_version = '13.0'\n", "13.0"),
        ("package_name = 'onnxruntime'\n__version__ = '1.32.0'\n", ""),
    ],
)
def test_the_cuda_that_a_library_was_built_for_is_read_without_importing_it(text, cuda, tmp_path, monkeypatch):
    from sanrt.runtime.backends import gpu

    package = tmp_path / "library_of_cuda"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "version.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gpu.cuda_of("library_of_cuda", "version.py") == cuda
    assert gpu.cuda_of("not_there_at_all", "version.py") == ""


@pytest.mark.parametrize(("channels", "width"), [(16, 8), (32, 8), (64, 8), (96, 16), (128, 16)])
def test_attention_is_as_wide_as_onnxruntimes_fused_kernel_on_gpus_takes(channels, width):
    from sanrt.runtime.backends.onnxruntime_cuda import fused_width

    assert fused_width(Architecture(2, 1, 1, channels, 8)) == width


def test_free_gpu_memory_is_the_driver_s_answer_in_the_shared_context(monkeypatch):
    calls = []

    class Driver:
        def __getattr__(self, name):
            def function(*arguments):
                calls.append(name)
                if name == "cuMemGetInfo_v2":
                    arguments[0]._obj.value, arguments[1]._obj.value = 3 << 30, 80 << 30
                return self.refused if name == "cuDevicePrimaryCtxRetain" else 0

            return function

    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: Driver())
    Driver.refused = 0
    assert machine.free_gpu_memory(0) == 3 << 30
    assert calls[1:] == [
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent_v2",
        "cuMemGetInfo_v2",
        "cuCtxPopCurrent_v2",
        "cuDevicePrimaryCtxRelease_v2",
    ]
    Driver.refused = 2
    assert machine.free_gpu_memory(0) is None


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_is_not_silently_the_cpu(tiny_model, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    monkeypatch.setattr(machine, "gpus", lambda: H100)
    monkeypatch.setattr(machine, "free_gpu_memory", lambda index: 80 << 30)
    versions(monkeypatch, onnxruntime_gpu="1")
    with pytest.raises(BackendError, match="CUDA provider does not start"):
        load_unguarded("onnxruntime-cuda", tiny_model(), ONE_THREAD)
    with pytest.raises(BackendError, match="GPU 3 is not there; the driver shows 1"):
        load_unguarded("onnxruntime-cuda", tiny_model(), replace(ONE_THREAD, device=3))


def test_cuda_binds_buffers_once_per_shape(tiny_model, monkeypatch):
    """The binding is run for real, with ONNX Runtime's CPU memory in the GPU's place."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from sanrt.runtime.backends import onnxruntime as cpu
    from sanrt.runtime.backends import onnxruntime_cuda as cuda

    made = []
    allocate = onnxruntime.OrtValue.ortvalue_from_shape_and_type

    def on_host(shape, dtype, device, index):
        made.append((tuple(shape), device, index))
        return allocate(shape, dtype)

    monkeypatch.setattr(machine, "gpus", lambda: H100)
    monkeypatch.setattr(machine, "free_gpu_memory", lambda index: 80 << 30)
    monkeypatch.setattr(cuda, "open_cuda_session", cpu.open_session)
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", on_host)
    with cuda.load(tiny_model(), ONE_THREAD) as backend, load_unguarded("onnxruntime", tiny_model(), ONE_THREAD) as expected:
        for shape in ((1, 3, 9, 12), (1, 3, 9, 12), (2, 3, 8, 8)):
            pixels = picture(*shape)
            assert np.array_equal(backend.infer(pixels), expected.infer(pixels))
        pixels, crop = picture(1, 3, 9, 12), np.array([0, 0, 9, 12])
        heads = [each.stages().run("head", pixels, crop)[0] for each in (backend, expected)]
        assert np.array_equal(*heads)
        assert (backend.device, backend.memory) == ("NVIDIA H100", 80 << 30)
    assert [m[0] for m in made] == [(1, 3, 9, 12), (1, 3, 18, 24), (2, 3, 8, 8), (2, 3, 16, 16)]
    assert {m[1:] for m in made} == {("cuda", 0)}


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "least"), [(Precision.FP32, 90), (Precision.FP16, 55)])
def test_cuda_agrees_with_torch(precision, least, tiny_model):
    pixels = picture(2, 3, 33, 46)
    with (
        loaded("onnxruntime-cuda", tiny_model(), RunOptions(precision=precision)) as backend,
        loaded("torch", tiny_model()) as reference,
    ):
        assert psnr(backend.infer(pixels), reference.infer(pixels)) > least


def test_the_native_backend_has_sanrt_s_version():
    import sanrt

    assert status("native").version == sanrt.__version__


def test_no_package_is_the_remedy_for_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: machine.Gpus(problem="none"))
    assert {name: status(name).remedy for name in backends.GPU_BACKENDS} == dict.fromkeys(backends.GPU_BACKENDS, "")


def test_the_ending_of_a_model_may_be_in_capitals(tiny_model, tmp_path):
    model = tmp_path / "MODEL.ONNX"
    model.write_bytes(tiny_model().read_bytes())
    for name in ("auto", "torch"):
        with load_unguarded(name, model, RunOptions(threads=1)) as backend:
            backend.infer(picture(1, 3, 8, 8))
