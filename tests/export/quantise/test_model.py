"""Quantised graphs against fake quantisation in PyTorch; ranges, the search, its cache, and what may go wrong."""

import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from sanrt.errors import BackendError, FileError, ParityError, PictureError, UsageError
from sanrt.export.quantise import calibration, search
from sanrt.export.quantise import model as quantising
from sanrt.export.quantise.calibration import Magnitudes, RangeMethod, calibration_set
from sanrt.export.quantise.model import QuantiseOptions, quantise
from sanrt.export.quantise.parts import convolutions_of, quantisable_parts, restricted_to
from sanrt.export.quantise.search import QualityLoss, largest_prefix, select_parts
from sanrt.export.quantise.trials import compare_backends
from sanrt.export.samples import samples
from sanrt.export.scene import natural_scene
from sanrt.export.tensors import Probe
from sanrt.export.validate import ValidateOptions, validate
from sanrt.model.checkpoint import load_checkpoint
from sanrt.model.exported import read_model
from sanrt.model.graph import san_model
from sanrt.model.spec import GraphOptions, Precision, Quantisation, QuantisedType
from sanrt.runtime.backends import default_variant
from sanrt.runtime.backends.default_variant import load_default, prefer, preference_path, preferred
from sanrt.runtime.backends.protocol import BackendStatus, RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.pictures.codec import Output, write_picture
from sanrt.runtime.pictures.formats import Format

KINDS = list(QuantisedType)
X = np.random.default_rng(0).uniform(0, 255, (1, 3, 12, 15)).astype(np.float32)


@pytest.fixture
def small_crops(monkeypatch):
    monkeypatch.setattr(calibration, "CROP", 24)
    monkeypatch.setattr(calibration, "MAX_CROPS", 6)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(3):
        scene = natural_scene(32, 56, seed)
        write_picture(Output(folder / f"{seed}.png", Format.PNG, 56, 32), scene)
    return folder


@pytest.fixture
def model(exported, tmp_path):
    path = tmp_path / "san_x2.onnx"
    path.write_bytes(exported.onnx.read_bytes())
    return path


def quantised_spec(model, kind, largest=60.0):
    spec, weights = read_model(model)
    ranges = {conv: largest for part in quantisable_parts(spec.architecture) for conv in convolutions_of(part)}
    return replace(spec, quantisation=Quantisation(kind, ranges, ranges)), weights


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize("kind", KINDS)
def test_head_tail_and_attention_stay_and_nothing_stands_between_convolutions_and_what_follows(kind, precision, model):
    spec, weights = quantised_spec(model, kind)
    graph = san_model(spec, weights, GraphOptions(precision=precision)).graph
    maker = {node.output[0]: node for node in graph.node}
    tensors = {i.name: i for i in graph.initializer}
    stored = {QuantisedType.INT8: onnx.TensorProto.INT8, QuantisedType.FP8: onnx.TensorProto.FLOAT8E4M3FN}[kind]
    for conv in (node for node in graph.node if node.op_type == "Conv"):
        sources = [maker[name].op_type for name in conv.input[:2] if name in maker]
        if conv.name not in spec.quantisation.ranges:
            assert "DequantizeLinear" not in sources, conv.name
            continue
        assert sources == ["DequantizeLinear"] * 2
        weight = maker[conv.input[1]]
        assert [tensors[name].data_type for name in (weight.input[0], weight.input[2])] == [stored] * 2
        assert tensors[weight.input[1]].dims == [64 if "upsampler" in conv.name else 16]
        users = [node.op_type for node in graph.node if conv.output[0] in node.input]
        follower = {"conv1": "Relu", "conv2": "Add", "conv": "Add", "0": "DepthToSpace"}
        assert users == [follower[conv.name.rpartition(".")[2]]]
    zeros = [numpy_helper.to_array(t).astype(np.float32) for name, t in tensors.items() if name.endswith(".zero")]
    assert len(zeros) == 2 * (8 + 2 + 1)
    assert not np.concatenate([z.ravel() for z in zeros]).any()
    added = [maker[name].op_type for node in graph.node if node.op_type == "Add" for name in node.input if name in maker]
    assert "DequantizeLinear" not in added
    assert {name for name in spec.quantisation.ranges if "upsampler" in name} == {"upsampler.0"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_computes_what_fake_quantisation_in_pytorch_computes(kind, model, exported):
    spec, weights = quantised_spec(model, kind, largest=30.0)
    found = Probe(san_model(spec, weights), ["output"])(X)["output"]
    net = load_checkpoint(exported.checkpoint).network()
    plain = net(torch.from_numpy(X)).numpy()

    def rounded(values, largest):
        if kind == QuantisedType.FP8:
            scale = largest / 448
            return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        scale = largest / 127
        return (values / scale).round().clamp(-127.5, 127).round() * scale

    for name in spec.quantisation.ranges:
        conv = net.get_submodule(name)
        conv.weight.data = rounded(conv.weight.data, conv.weight.data.abs().amax((1, 2, 3), keepdim=True))
        conv.register_forward_pre_hook(lambda _, inputs: rounded(inputs[0], torch.tensor(30.0)))
    expected = net(torch.from_numpy(X)).detach().numpy()
    assert np.abs(expected - plain).mean() > 20 * np.abs(expected - found).mean()
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected - plain).max())


def test_in_onnxruntimes_form_convolutions_take_and_give_8_bits_and_compute_nearly_the_same(model):
    spec, weights = quantised_spec(model, QuantisedType.INT8, largest=40.0)
    graph = san_model(spec, weights, GraphOptions(requantised=True))
    plain, found = (Probe(g, ["output"])(X)["output"] for g in (san_model(spec, weights), graph))
    fp32 = Probe(san_model(replace(spec, quantisation=None), weights), ["output"])(X)["output"]
    assert 0 < np.abs(found - plain).mean() < 3 * np.abs(plain - fp32).mean()
    tensors = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    zeros = {node.name: tensors[node.input[2]] for node in graph.graph.node if node.op_type == "QuantizeLinear"}
    assert {zero.dtype.name for zero in zeros.values()} == {"uint8"}
    assert {name for name, zero in zeros.items() if zero == 0} == {n for n in zeros if n.endswith("conv2.input.quantised")}
    assert sum(".output." in name for name in zeros) == 4 + 2 + 1
    fp8, weights = quantised_spec(model, QuantisedType.FP8)
    assert san_model(fp8, weights, GraphOptions(requantised=True)) == san_model(fp8, weights)


@pytest.mark.parametrize("part", ["groups.0.blocks.1", "groups.1.conv", "upsampler.0"])
def test_a_single_part_runs_in_onnxruntimes_form_and_stays_near_the_files_own(part, model, exported):
    spec, weights = quantised_spec(model, QuantisedType.INT8, largest=60.0)
    one = restricted_to(spec.quantisation, [part])
    assert list(one.ranges) == list(one.outputs) == convolutions_of(part)
    path = model.with_name("one.onnx")
    own, fp32 = (san_model(replace(spec, quantisation=q), weights) for q in (one, None))
    onnx.save(own, path)
    plain, exact = (Probe(graph, ["output"])(X)["output"] for graph in (own, fp32))
    with load_backend("onnxruntime", path, RunOptions(threads=1)) as backend:
        found = backend.infer(X)
    assert 0 < np.abs(found - plain).mean() < 3 * np.abs(plain - exact).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_file_read_and_written_again_holds_the_same_8_bits(kind, model, tmp_path):
    spec, weights = quantised_spec(model, kind)
    weights["groups.0.blocks.0.conv1.weight"] = weights["groups.0.blocks.0.conv1.weight"].copy()
    weights["groups.0.blocks.0.conv1.weight"][3] = 0  # a dead channel has no range
    first = san_model(spec, weights)
    onnx.save(first, tmp_path / "a.onnx")
    again_spec, again = read_model(tmp_path / "a.onnx")
    assert again_spec.quantisation == spec.quantisation
    assert again.keys() == weights.keys()

    def bits(graph):
        return {i.name: numpy_helper.to_array(i).astype(np.float32) for i in graph.initializer if ".blocks." in i.name}

    for precision in (Precision.FP32, Precision.FP16):
        second = bits(san_model(again_spec, again, GraphOptions(precision=precision)).graph)
        for name, array in bits(first.graph).items():
            assert np.isfinite(second[name]).all()
            if name.endswith("weight"):
                np.testing.assert_array_equal(second[name], array, name)


def test_min_max_keeps_the_largest_and_a_percentile_cuts_outliers():
    rng = np.random.default_rng(0)
    batches = [(size * rng.normal(0, 1, 20000)).astype(np.float32) for size in (0.2, 1, 1)]
    batches[1][0] = -50.0
    seen = Magnitudes()
    for batch in batches:
        seen.add(batch)
    exact = np.quantile(np.abs(np.concatenate(batches)), 0.9999)
    assert seen.range(RangeMethod.MIN_MAX) == 50.0
    assert seen.range(RangeMethod.PERCENTILE) == pytest.approx(exact, abs=0.1)


def test_a_histogram_that_widens_forgets_nothing():
    seen = Magnitudes()
    for values in ([0.5, 1.0], [0.0], [3.9, -100.0], []):
        seen.add(np.array(values, np.float32))
    assert seen.counts.sum() == 5
    assert seen.top >= seen.largest == 100


@pytest.mark.parametrize("fitting", range(18))
def test_the_search_finds_the_largest_set_in_logarithmically_many_measurements(fitting):
    asked = []

    def fits(count):
        asked.append(count)
        return count <= fitting

    assert largest_prefix(17, fits) == fitting
    assert len(asked) <= 1 + math.ceil(math.log2(17))


def test_the_least_sensitive_parts_are_chosen_and_kept_ones_stay_out():
    price = {"a": 0.05, "b": 0.01, "c": 0.2, "d": 0.03}

    def measure(blocks):
        return QualityLoss(100 - 100 * sum(price[b] for b in blocks), sum(price[b] for b in blocks))

    selection = select_parts(list(price), ["b"], measure, 0.1)
    assert selection.parts == ["a", "d"]
    assert selection.loss.y_psnr_drop == pytest.approx(0.08)
    assert [cost.alone and cost.alone.y_psnr_drop for cost in selection.costs] == [0.05, None, 0.2, 0.03]
    assert select_parts(list(price), [], measure, 0.001).parts == []


def test_quantise_writes_a_model_that_runs_validates_and_tells_its_parts(model, exported, pictures, small_crops):
    kept = "groups.1.blocks.0"
    result = quantise(model, QuantiseOptions(QuantisedType.INT8, pictures, max_psnr_drop=50.0, keep=(kept,)))
    assert result.path.name == "san_x2.int8.onnx"
    rows = {row["part"]: row for row in result.spec.report["quantisation"]["parts"]}
    assert [name for name, row in rows.items() if not row["quantised"]] == [kept]
    assert len(result.spec.quantisation.ranges) == len(result.spec.quantisation.outputs) == 6 + 2 + 1
    with load_backend("onnxruntime", result.path, RunOptions()) as int8, load_backend("torch", model, RunOptions()) as fp32:
        assert int8.spec.computes == "int8 + fp32"
        assert int8.spec.report["quantisation"]["type"] == "int8"
        difference = np.abs(int8.infer(X) - fp32.infer(X)).max()
    assert 2e-3 < difference < 32
    options = ValidateOptions("onnxruntime", checkpoint=exported.checkpoint)
    checked = validate(result.path, lambda scale: samples(None, pictures, scale), options)
    assert checked.tolerance.max_abs > checked.difference.max_abs > 2e-3
    with pytest.raises(BackendError, match="torch runs no int8 model"):
        load_backend("torch", result.path, RunOptions())
    with pytest.raises(UsageError, match="is int8 already"):
        quantise(result.path, QuantiseOptions(QuantisedType.INT8, pictures))


def test_a_search_taken_up_again_measures_nothing_twice(model, pictures, small_crops, monkeypatch):
    options = QuantiseOptions(QuantisedType.INT8, pictures, max_psnr_drop=50.0)
    first = quantise(model, options)

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(search, "Probe", refuse)
    monkeypatch.setattr(calibration, "Probe", refuse)
    assert quantise(model, options).selection == first.selection
    other = replace(options, calibration=pictures.parent / "other")
    other.calibration.mkdir(exist_ok=True)
    write_picture(Output(other.calibration / "a.png", Format.PNG, 96, 96), natural_scene(96, 96, 7))
    with pytest.raises(AssertionError, match="measured again"):
        quantise(model, other)


def test_when_nothing_fits_it_says_so_and_writes_nothing(model, pictures, small_crops):
    with pytest.raises(ParityError, match=r"no part can be fp8 within -100 dB .* (groups\.\d\.|upsampler).*, costs"):
        quantise(model, QuantiseOptions(QuantisedType.FP8, pictures, max_psnr_drop=-100.0))
    assert not (model.parent / "san_x2.fp8.onnx").exists()
    with pytest.raises(UsageError, match="no such part"):
        quantise(model, QuantiseOptions(QuantisedType.FP8, pictures, keep=("groups.7.*",)))


def test_calibration_crops_are_spread_disjoint_and_the_same_every_time(pictures, small_crops):
    first, second = calibration_set(pictures, 2), calibration_set(pictures, 2)
    assert first.digest == second.digest
    assert (len(first.crops), len(first.held_out)) == (4, 2)
    assert len({sample.name for sample in (*first.crops, *first.held_out)}) == 6
    assert all(s.low.shape == (12, 12, 3) and s.high.shape == (24, 24, 3) for s in first.crops)


def test_pictures_smaller_than_a_crop_are_one_clear_line(pictures):
    with pytest.raises(PictureError, match="0 crops of 192 x 192 in 3 pictures, expected 2 or more") as error:
        calibration_set(pictures, 2)
    assert "\n" not in str(error.value)


def test_run_takes_the_preferred_variant_of_this_very_model_on_this_machine_only(model, pictures, small_crops):
    result = quantise(model, QuantiseOptions(QuantisedType.INT8, pictures, max_psnr_drop=50.0))
    assert preferred(model) is None
    prefer(model, result.path, "onnxruntime", None)
    with load_default(model, RunOptions(threads=1)) as backend:
        assert (backend.name, backend.spec.computes) == ("onnxruntime", "int8 + fp32")
    kept = preference_path(model).read_text()
    for key, value in {"machine": "another", "exported": "0" * 64, "model": "gone.onnx"}.items():
        preference_path(model).write_text(json.dumps({**json.loads(kept), key: value}))
        assert preferred(model) is None, key


@pytest.mark.parametrize("of_the_variant", [False, True])
def test_an_engine_built_since_takes_the_place_of_a_preference_if_it_runs_here(of_the_variant, model, tmp_path, monkeypatch):
    variant = tmp_path / "san_x2.int8.onnx"
    variant.write_bytes(model.read_bytes())
    prefer(model, variant, "onnxruntime", Precision.FP32)
    assert preferred(model).backend == "onnxruntime"
    built = SimpleNamespace(path=tmp_path / "x.engine")
    built.path.touch()
    asked = (variant if of_the_variant else model).name
    monkeypatch.setattr(default_variant, "engines_of", lambda path: [built] * (path.name == asked))
    refusals: list[str | None] = [None]
    tensorrt = SimpleNamespace(refusal=lambda path, options: refusals[0])
    monkeypatch.setattr(default_variant, "backend_module", lambda name: tensorrt)
    usable = BackendStatus("any", "1", True, "")
    monkeypatch.setattr(default_variant, "status", lambda name: usable)
    since = preference_path(model).stat().st_mtime
    os.utime(built.path, (since + 1, since + 1))
    assert preferred(model) == replace(preferred(model), model="x.engine", backend="tensorrt", precision=None)
    refusals[0] = "built for another GPU"
    assert preferred(model).backend == "onnxruntime"
    refusals[0] = None
    os.utime(built.path, (since - 1, since - 1))  # `build --auto` built it, then measured
    assert preferred(model).backend == "onnxruntime"


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(model, tmp_path, monkeypatch):
    monkeypatch.setattr(quantising, "calibration_set", lambda *_: pytest.fail("measured first"))
    (tmp_path / "file").touch()
    monkeypatch.setattr(quantising, "quantised_path", lambda *_: tmp_path / "file" / "a.int8.onnx")
    with pytest.raises(FileError, match=r"cannot be written \(.*\); copy san_x2\.onnx to a folder of your own"):
        quantise(model, QuantiseOptions(QuantisedType.INT8))


UNKNOWN = {
    "another backend": {"backend": "gone"},
    "no text for a backend": {"backend": ["onnxruntime"]},
    "a number for a model": {"model": 7},
    "a model elsewhere": {"model": "../model.onnx"},
    "another precision": {"precision": "fp4"},
    "a number for a precision": {"precision": 0},
    "a list for a precision": {"precision": []},
    "a number for the machine": {"machine": 3},
    "more than that": {"more": 1},
}


@pytest.mark.parametrize("changed", UNKNOWN)
def test_a_preference_that_is_not_understood_is_passed_over_and_told(model, changed, caplog):
    prefer(model, model, "onnxruntime", None)
    facts = json.loads(preference_path(model).read_text())
    preference_path(model).write_text(json.dumps({**facts, **UNKNOWN[changed]}))
    assert preferred(model) is None
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{preference_path(model)}: names no model and backend of this sanrt")
    assert record.getMessage().endswith("passed over; remove it")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_preference_is_passed_over_and_told(model, content, caplog):
    preference_path(model).write_bytes(content)
    assert preferred(model) is None
    assert len(caplog.records) == 1


def test_every_way_is_tried_the_fastest_first(model, pictures, small_crops):
    found = compare_backends([model], calibration_set(pictures, 2).held_out).trials
    assert {"onnxruntime", "torch"} <= {t.backend for t in found}
    assert all(t.seconds > 0 and math.isfinite(t.y_psnr) for t in found)
    assert [t.seconds for t in found] == sorted(t.seconds for t in found)
