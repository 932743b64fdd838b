"""`validate` against planted errors: it must fail, and `locate` must name the stage."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from sanrt.cli import app
from sanrt.errors import ModelError, ParityError, PictureError, SanrtError, UsageError
from sanrt.export.locate import locate
from sanrt.export.quantise.calibration import RangeMethod, measure_ranges
from sanrt.export.samples import Sample, samples
from sanrt.export.scene import natural_scene
from sanrt.export.validate import ValidateOptions, validate
from sanrt.model.exported import read_model
from sanrt.model.graph import san_model
from sanrt.model.spec import Precision, Quantisation, QuantisedType
from sanrt.runtime.pictures.codec import Output, open_picture, write_picture
from sanrt.runtime.pictures.formats import Format

SMALL = partial(natural_scene, 32, 40)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(Output(path, Format.PNG, pixels.shape[1], pixels.shape[0]), pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hr")
    for seed in range(2):
        write(folder / f"{seed}.png", SMALL(seed))
    return folder


def checked(exported, path, hr, **options):
    return validate(path, partial(samples, None, hr), ValidateOptions(checkpoint=exported.checkpoint, **options))


def flip_a_weight(graph):
    """The largest weight of one convolution changes its sign."""

    def flip(weight):
        index = np.unravel_index(np.abs(weight).argmax(), weight.shape)
        weight[index] *= -1

    change(graph, "groups.1.blocks.0.conv2.weight", flip)


def open_a_gate(graph):
    """One channel's gate is open whatever the statistics say."""
    change(graph, "groups.0.soca.up.bias", lambda bias: bias.__setitem__(3, 20.0))


def raise_the_guard(graph):
    """The trace's guard is far above the traces that pictures have."""
    name = next(i.name for i in graph.initializer if i.name.endswith("1e-10"))
    change(graph, name, lambda value: value.__setitem__(..., 1e7))


def change(graph, name, edit):
    tensor = next(i for i in graph.initializer if i.name == name)
    array = numpy_helper.to_array(tensor).copy()
    edit(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


PLANTED = {
    flip_a_weight: "groups.1.blocks.0.conv2",
    open_a_gate: "groups.0.soca.up",
    raise_the_guard: "groups.0.soca.z.map",
}


def test_an_honest_export_is_within_the_tolerance_and_no_stage_jumps(exported, folder):
    result = checked(exported, exported.onnx, folder, backend="onnxruntime")
    result.require()
    assert 0 < result.difference.max_abs < 2e-3
    assert [p.picture for p in result.rows] == ["0.png, middle, the file's own graph", "0.png", "1.png"]
    assert abs(result.y_psnr_drop) < 1e-3
    assert all(p.ssim > 0.9999 for p in result.pictures)
    location = locate(exported.onnx, SMALL(), exported.checkpoint)
    assert location.jump is None
    assert len(location.stages) == 7 + 2 * (6 + 7)


def planted(exported, folder, *plants):
    """The export with errors in it, as sanrt 0.1 would have written it: without the digests that show them at once."""
    model = onnx.load(exported.onnx)
    for plant in plants:
        plant(model.graph)
    kept = [entry for entry in model.metadata_props if not entry.key.endswith(("tensors_digest", "description_digest"))]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, folder / "wrong.onnx")
    return folder / "wrong.onnx"


@pytest.mark.parametrize("plant", PLANTED, ids=lambda f: f.__name__)
def test_a_planted_error_fails_and_is_located(plant, exported, folder, tmp_path):
    path = planted(exported, tmp_path, plant)
    with pytest.raises(SanrtError, match=r"wrong.onnx: its tensor groups|wrong.onnx: the constant const.float32..1e-10"):
        checked(exported, path, folder, backend="onnxruntime").require()
    assert locate(path, SMALL(), exported.checkpoint).jump.stage == PLANTED[plant]


def spoil(graph):
    """One convolution's weights times 1.2."""
    change(graph, "groups.1.conv.weight", lambda weight: np.multiply(weight, np.float32(1.2), out=weight))


def move_a_little(graph):
    """One bias moves by less than any picture shows."""
    change(graph, "groups.1.conv.bias", lambda bias: np.add(bias, np.float32(1e-7), out=bias))


@pytest.mark.parametrize("backend", ["native", "onnxruntime", "openvino", "torch"])
@pytest.mark.parametrize("plant", [spoil, move_a_little], ids=lambda f: f.__name__)
def test_weights_that_are_not_the_checkpoint_s_fail_on_every_backend(plant, backend, exported, folder, tmp_path):
    result = checked(exported, planted(exported, tmp_path, plant), folder, backend=backend)
    assert not result.passed
    with pytest.raises(ParityError, match=r"its tensor groups.1.conv.(weight|bias) is not what .*tiny.safetensors has"):
        result.require()


def test_every_row_is_held_to_the_tolerance_of_its_own_type(exported, folder, tmp_path):
    result = checked(exported, planted(exported, tmp_path, spoil), folder, backend="native", precision=Precision.INT16)
    assert [(row.type, row.tolerance.max_abs) for row in result.rows] == [("fp32", 2e-3), ("int16", 20), ("int16", 20)]
    with pytest.raises(ParityError, match=r"wrong.onnx \(fp32\), its own graph: differs .* expected 0.002 or less and 1"):
        replace(result, wrong=None).require()
    with pytest.raises(ParityError, match=r"wrong.onnx \(int16\) on native: .* expected 20 or less and 55 dB"):
        replace(result, wrong=None, own_graph=None).require()


def test_a_conversion_to_fp16_is_held_to_fp16_s_tolerance(exported, folder, tmp_path):
    model = onnx.load(exported.onnx)
    for name in ("groups.0.conv.weight", "groups.1.conv.weight"):
        change_type(model.graph, name)
    onnx.save(model, tmp_path / "half.onnx")
    result = checked(exported, tmp_path / "half.onnx", folder, backend="onnxruntime")
    result.require()
    assert [row.type for row in result.rows] == ["fp16", "fp16", "fp16"]


def change_type(graph, name):
    """A weight in fp16, with a Cast back."""
    tensor = next(i for i in graph.initializer if i.name == name)
    half = numpy_helper.to_array(tensor).astype(np.float16)
    tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
    graph.node.insert(0, onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))


@pytest.fixture(scope="module")
def int8(exported, tmp_path_factory):
    spec, weights = read_model(exported.onnx)
    ranges = measure_ranges(spec, weights, [Sample("scene", SMALL(), None)], RangeMethod.MIN_MAX)
    path = tmp_path_factory.mktemp("int8") / "int8.onnx"
    quantisation = Quantisation(QuantisedType.INT8, ranges.inputs, ranges.outputs)
    onnx.save(san_model(replace(spec, quantisation=quantisation), weights), path)
    return path


@pytest.mark.parametrize("plant", [None, *PLANTED], ids=lambda f: f.__name__ if f else "honest")
def test_a_planted_error_is_located_in_an_int8_graph_too(plant, exported, int8, tmp_path):
    model = onnx.load(int8)
    if plant:
        plant(model.graph)
    path = tmp_path / "wrong.onnx"
    onnx.save(model, path)
    jump = locate(path, SMALL(), exported.checkpoint).jump
    assert (jump and jump.stage) == PLANTED.get(plant)


def test_other_weights_are_refused_by_digest(exported, folder):
    with pytest.raises(UsageError, match=r"digest .* \(bundled\)"):
        validate(exported.onnx, partial(samples, None, folder), ValidateOptions())
    other = exported.checkpoint.with_name("other.safetensors")
    other.write_bytes(exported.checkpoint.read_bytes().replace(b"seeded random", b"others random"))
    with pytest.raises(UsageError, match=r"digest .* `checkpoint`"):
        validate(exported.onnx, partial(samples, None, folder), ValidateOptions(checkpoint=other))


def test_the_command_prints_writes_json_and_heatmaps_and_exits_1_outside_the_tolerance(exported, folder, tmp_path):
    report, heat = tmp_path / "report.json", tmp_path / "heat"
    words = ["validate", str(exported.onnx), "--hr", str(folder), "--checkpoint", str(exported.checkpoint)]
    words += ["--backend", "onnxruntime"]
    runner = CliRunner()
    done = runner.invoke(app, [*words, "--json", str(report), "--heatmap", str(heat), "--locate"])
    assert done.exit_code == 0, done.output
    assert "no jump" in done.output
    assert done.stdout.splitlines()[-1].startswith("passed: ")
    assert "on average" in done.stdout.splitlines()[-1]
    figures = json.loads(report.read_text())
    assert figures["precision"] == "fp32"
    assert [p["picture"] for p in figures["pictures"]][1:] == ["0.png", "1.png"]
    with open_picture(heat / "1.png") as picture:
        assert picture.rgb().shape == (32, 40, 3)
        assert picture.rgb().max() == 255
    refused = runner.invoke(app, [*words, "--tolerance", "1e-9"])
    assert isinstance(refused.exception, ParityError)
    assert refused.stdout.splitlines()[-1].startswith("failed: ")


def test_pictures_and_their_originals_must_belong_together(exported, folder, tmp_path):
    write(tmp_path / "lr" / "0.png", SMALL()[:16, :20])
    (only,) = samples(tmp_path / "lr", folder, 2)
    assert only.high.shape == (32, 40, 3)
    write(tmp_path / "lr" / "2.png", SMALL()[:16, :20])
    with pytest.raises(PictureError, match=r"2\.png: no high-resolution pictures? of that name"):
        list(samples(tmp_path / "lr", folder, 2))
    with pytest.raises(PictureError, match="expected 60 x 48"):
        list(samples(tmp_path / "lr", folder, 3))


def test_pictures_of_one_name_in_two_folders_are_paired_by_their_paths_and_keep_their_heatmaps(exported, tmp_path):
    for seed, name in enumerate(("a/1", "b/1", "b/2.x")):
        write(tmp_path / "hr" / f"{name}.png", SMALL(seed))
        write(tmp_path / "lr" / f"{name}.png", SMALL(seed)[::2, ::2])
    found = list(samples(tmp_path / "lr", tmp_path / "hr", 2))
    assert [sample.name for sample in found] == ["a/1.png", "b/1.png", "b/2.x.png"]
    for seed, sample in enumerate(found):
        np.testing.assert_array_equal(sample.high, SMALL(seed))
    options = ValidateOptions("onnxruntime", checkpoint=exported.checkpoint, heatmaps=tmp_path / "heat")
    validate(exported.onnx, partial(samples, tmp_path / "lr", tmp_path / "hr"), options)
    heat = tmp_path / "heat"
    assert [str(path.relative_to(heat)) for path in sorted(heat.rglob("*.png"))] == [sample.name for sample in found]


def empty(folder):
    folder.mkdir()


def missing(folder):
    pass


def no_pictures(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture")


def a_lie(folder):
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty, "no pictures in it"),
        (missing, "cannot be read"),
        (no_pictures, "no pictures in it"),
        (a_lie, "unknown content"),
    ],
)
def test_folders_without_pictures_are_one_clear_line(make, message, tmp_path):
    make(tmp_path / "given")
    with pytest.raises(SanrtError, match=message) as error:
        list(samples(None, tmp_path / "given", 2))
    assert "\n" not in str(error.value)


def test_something_that_is_no_model_is_refused(tmp_path, exported):
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="not an ONNX file"):
        locate(tmp_path / "a.onnx", SMALL(), exported.checkpoint)
