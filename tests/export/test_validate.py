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
from sanrt.export.quantise.calibration import Method, calibrated
from sanrt.export.samples import Sample, samples
from sanrt.export.scene import natural_scene
from sanrt.export.validate import ValidateOptions, validate
from sanrt.model.graph import read_model, san_model
from sanrt.model.spec import Quantisation, QuantisedType
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
    assert [p.picture for p in result.pictures] == ["0.png, middle, the file's own graph", "0.png", "1.png"]
    assert abs(result.y_psnr_drop) < 1e-3
    assert all(p.ssim > 0.9999 for p in result.pictures)
    location = locate(exported.onnx, SMALL(), exported.checkpoint)
    assert location.jump is None
    assert len(location.stages) == 7 + 2 * (6 + 7)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda f: f.__name__)
def test_a_planted_error_fails_and_is_located(plant, exported, folder, tmp_path):
    model = onnx.load(exported.onnx)
    plant(model.graph)
    path = tmp_path / "wrong.onnx"
    onnx.save(model, path)
    with pytest.raises(ParityError, match=r"wrong.onnx \(fp32\) on onnxruntime: differs .* expected 0.002 or less"):
        checked(exported, path, folder, backend="onnxruntime").require()
    assert locate(path, SMALL(), exported.checkpoint).jump.stage == PLANTED[plant]


@pytest.fixture(scope="module")
def int8(exported, tmp_path_factory):
    spec, weights = read_model(exported.onnx)
    ranges = calibrated(spec, weights, [Sample("scene", SMALL(), None)], Method.MIN_MAX)
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
    with pytest.raises(UsageError, match=r"digest .* --checkpoint"):
        validate(exported.onnx, partial(samples, None, folder), ValidateOptions(checkpoint=other))


def test_the_command_prints_writes_json_and_heatmaps_and_exits_1_outside_the_tolerance(exported, folder, tmp_path):
    report, heat = tmp_path / "report.json", tmp_path / "heat"
    words = ["validate", str(exported.onnx), "--hr", str(folder), "--checkpoint", str(exported.checkpoint)]
    words += ["--backend", "onnxruntime"]
    runner = CliRunner()
    done = runner.invoke(app, [*words, "--json", str(report), "--heatmap", str(heat), "--locate"])
    assert done.exit_code == 0, done.output
    assert "no jump" in done.output
    figures = json.loads(report.read_text())
    assert figures["precision"] == "fp32"
    assert [p["picture"] for p in figures["pictures"]][1:] == ["0.png", "1.png"]
    with open_picture(heat / "1.png") as picture:
        assert picture.rgb().shape == (32, 40, 3)
        assert picture.rgb().max() == 255
    refused = runner.invoke(app, [*words, "--tolerance", "1e-9"])
    assert isinstance(refused.exception, ParityError)


def test_pictures_and_their_originals_must_belong_together(exported, folder, tmp_path):
    write(tmp_path / "lr" / "0.png", SMALL()[:16, :20])
    (only,) = samples(tmp_path / "lr", folder, 2)
    assert only.high.shape == (32, 40, 3)
    write(tmp_path / "lr" / "2.png", SMALL()[:16, :20])
    with pytest.raises(PictureError, match=r"2\.png: no high-resolution picture"):
        list(samples(tmp_path / "lr", folder, 2))
    with pytest.raises(PictureError, match="expected 60 x 48"):
        list(samples(tmp_path / "lr", folder, 3))


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
