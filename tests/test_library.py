"""The package's own functions: what the commands do, for programs."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pyvips
from typer.testing import CliRunner

import sanrt
from sanrt import Failed, Skipped, Upscaler, Written
from sanrt.cli import app
from sanrt.errors import FileError, MissingPackageError, ModelError, PictureError, UsageError
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend


@pytest.fixture
def models(tiny_model, tmp_path, monkeypatch) -> Path:
    """A folder with the tiny x2 and x3 models; the working folder is `tmp_path`."""
    for scale in (2, 3):
        load_backend("onnxruntime", tiny_model(scale), RunOptions()).close()
    monkeypatch.chdir(tmp_path)
    return tiny_model(2).parent


def noise(path: Path, height=20, width=30, bands=3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(height).integers(0, 256, (height, width, bands), np.uint8)
    pyvips.Image.new_from_array(values).copy(interpretation="srgb").write_to_file(str(path))
    return path


def typed(*words: object) -> None:
    """Run a command line in this process; what it raises is raised."""
    done = CliRunner().invoke(app, [*map(str, words)], standalone_mode=False)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception


def test_the_package_lists_its_names_before_it_has_imported_them():
    code = (
        "import sys, sanrt; names = {*dir(sanrt)}; assert 'numpy' not in sys.modules\n"
        "assert names >= {*sanrt.__all__} >= {'Upscaler', 'export_model', 'build_engine', 'validate_model'}\n"
        "for name in sanrt.__all__: getattr(sanrt, name)\n"
        "assert not {'torch', 'onnx', 'typer', 'rich', 'pyvips'} & {*sys.modules}, {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(getattr(sanrt, name).__doc__ for name in sanrt.__all__ if name != "__version__")


def test_a_name_that_the_package_has_not_is_told_as_python_does():
    with pytest.raises(AttributeError, match="module 'sanrt' has no attribute 'upscale'"):
        sanrt.upscale  # noqa: B018


def test_files_are_those_that_the_command_writes_byte_for_byte(models, tmp_path):
    for name in "a.png", "b.jpg", "sub/c.png":
        noise(tmp_path / "in" / name)
    options = {"backend": "onnxruntime", "self_ensemble": True, "outscale": 1.5}
    outcomes = sanrt.upscale_files(Path("in"), "out", scale=2, models=models, **options)
    typed(
        "run",
        "in",
        "typed",
        "--scale",
        2,
        "--models",
        models,
        "--backend",
        "onnxruntime",
        "--self-ensemble",
        "--outscale",
        1.5,
    )
    assert [type(outcome) for outcome in outcomes] == [Written] * 3
    assert [str(outcome.job.destination) for outcome in outcomes] == ["out/a.png", "out/b.jpg", "out/sub/c.png"]
    for outcome in outcomes:
        written = outcome.job.destination
        assert written.read_bytes() == (Path("typed") / written.relative_to("out")).read_bytes()
    assert [type(outcome) for outcome in sanrt.upscale_files("in", "out", scale=2, models=models, **options)] == [
        Skipped
    ] * 3


def test_a_bad_picture_is_an_outcome_and_stops_no_other(models, tmp_path):
    noise(tmp_path / "in" / "b.png")
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    events = []
    bad, good = sanrt.upscale_files("in", model=models / "san_x2.onnx", backend="onnxruntime", listener=events.append)
    assert isinstance(bad, Failed)
    assert bad.reason.startswith("in/a.png: ")
    assert isinstance(good, Written)
    assert good.job.destination == Path("in_x2/b.png")
    assert {type(event).__name__ for event in events} == {"Opened", "Advanced", "Finished"}


@pytest.mark.parametrize(
    ("sources", "options", "told"),
    [
        ([], {}, "no pictures named"),
        (["a.png", "b.png"], {}, "without output"),
        ("a.png", {"format": "gif"}, "expected png, jpeg"),
        ("a.png", {"tiling": "diagonal"}, "tiling 'diagonal'"),
        ("a.png", {"precision": "int8"}, "sanrt build --int8"),
        ("a.png", {"outscale": 9}, "up to 8"),
        ("a.png", {"scale": 3, "model": "san_x2.onnx"}, "is for x2"),
    ],
)
def test_what_cannot_be_is_a_usage_error_before_any_work(models, tmp_path, sources, options, told):
    noise(tmp_path / "a.png"), noise(tmp_path / "b.png")
    if "model" in options:
        options = {**options, "model": models / options["model"]}
    with pytest.raises(UsageError, match=told):
        sanrt.upscale_files(sources, models=models, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_an_upscaler_writes_the_file_that_the_command_writes(models, tmp_path):
    noise(tmp_path / "a.png", bands=4)
    model = models / "san_x2.onnx"
    with Upscaler.load(model, backend="onnxruntime", precision="fp32", tile=16, tiling="exact") as upscaler:
        result = upscaler.upscale_file("a.png", tmp_path / "b.webp", quality=80, size=(50, 50))
        assert isinstance(result, Written)
        assert result.plan.tile == 16
        assert isinstance(upscaler.upscale_file("a.png", "b.webp", quality=80, size=(50, 50)), Skipped)
        with pytest.raises(UsageError, match=r"a folder; .*upscale_files"):
            upscaler.upscale_file(".", "b.png")
        with pytest.raises(UsageError, match="would replace it"):
            upscaler.upscale_file("a.png", "a.png")
        with pytest.raises(PictureError, match="cannot be read"):
            upscaler.upscale_file("none.png", "c.png")
    options = ["--precision", "fp32", "--tile", "16", "--tiling", "exact", "--quality", "80", "--size", "50x50"]
    typed("run", "a.png", "typed.webp", "--model", model, "--backend", "onnxruntime", *options)
    assert Path("b.webp").read_bytes() == Path("typed.webp").read_bytes()


def test_another_file_in_the_results_place_is_kept_unless_told(models, tmp_path):
    noise(tmp_path / "a.png"), noise(tmp_path / "mine.png", 5)
    mine = Path("mine.png").read_bytes()
    with Upscaler.load(models / "san_x2.onnx", backend="onnxruntime") as upscaler:
        with pytest.raises(UsageError, match="not made by sanrt"):
            upscaler.upscale_file("a.png", "mine.png")
        assert Path("mine.png").read_bytes() == mine
        upscaler.upscale_file("a.png", "mine.png", overwrite=True)
    assert pyvips.Image.new_from_file("mine.png").width == 60


def test_an_exported_model_is_the_one_that_the_command_writes_and_validates(live_network, tmp_path, monkeypatch):
    import torch

    from sanrt.model.checkpoint import save_checkpoint

    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "own.safetensors", live_network(2), "seeded", torch.float32)
    report = sanrt.export_model("own.safetensors", models="here")
    assert report.path == Path("here/own.onnx")
    assert report.parity is not None
    typed("export", "--checkpoint", "own.safetensors", "-o", "typed.onnx")
    assert report.path.read_bytes() == Path("typed.onnx").read_bytes()
    validation = sanrt.validate_model(report.path, checkpoint="own.safetensors", backend="onnxruntime")
    assert validation.passed
    failing = sanrt.validate_model(report.path, checkpoint="own.safetensors", backend="onnxruntime", min_psnr=1000)
    assert not failing.passed


def test_functions_without_what_they_need_say_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="expected a scale"):
        sanrt.export_model()
    with pytest.raises(UsageError, match=r"ends in \.onnx"):
        sanrt.export_model(scale=2, output=tmp_path / "a.engine")
    with pytest.raises(ModelError, match=r"none\.onnx"):
        sanrt.validate_model(tmp_path / "none.onnx")
    monkeypatch.setitem(sys.modules, "sanrt.export.engine", None)
    monkeypatch.delattr("sanrt.export.engine", raising=False)
    with pytest.raises(MissingPackageError, match=r"pip install"):
        sanrt.build_engine(tmp_path / "none.onnx")


def test_an_engine_is_built_with_the_options_of_the_command(tiny_model, tmp_path, monkeypatch):
    engine = pytest.importorskip("sanrt.export.engine")
    asked = []

    def build(model, options, output, progress, device):
        asked.append((model, options, output, device))
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "build_engine", build)
    monkeypatch.setattr(engine, "choose_flavor", lambda device: "rtx")
    sizes = {"smallest": ["1x8x8"], "best": ["1x64x64"], "largest": ["2x128x128"]}
    with pytest.raises(KeyboardInterrupt):
        sanrt.build_engine(tiny_model(2), precision="bf16", flavor="rtx", gpus=["sm89"], device=1, level=1, **sizes)
    words = ["--bf16", "--flavor", "rtx", "--gpu", "sm89", "--device", 1, "--level", 1]
    words += ["--min", "1x8x8", "--opt", "1x64x64", "--max", "2x128x128"]
    typed("build", tiny_model(2), *words)
    assert asked[0] == asked[1]
    assert replace(asked[0][1], level=3) != asked[0][1]


def test_an_upscaler_says_what_it_is(models):
    with Upscaler.load(models / "san_x3.onnx", backend="onnxruntime") as upscaler:
        assert repr(upscaler).endswith(": SAN x3 (G=1 m=1 C=16 r=4), fp32, onnxruntime on CPU>")


@pytest.mark.parametrize("scale", [2.0, True, 5, "2"])
def test_a_scale_that_san_does_not_have_is_told_by_every_function(scale, tmp_path):
    told = f"scale {scale}: expected 2, 3, 4, 8"
    for call in (
        lambda: sanrt.export_model(scale=scale, models=tmp_path),
        lambda: sanrt.build_engine(scale=scale, models=tmp_path, flavor="rtx"),
        lambda: sanrt.upscale_files(tmp_path, scale=scale),
    ):
        with pytest.raises(UsageError, match=re.escape(told)):
            call()


def test_no_function_makes_a_folder_for_a_place_that_was_probably_mistyped(models, tmp_path):
    model, picture, nowhere = models / "san_x2.onnx", tmp_path / "a.png", tmp_path / "no" / "where"
    pyvips.Image.black(9, 8, bands=3).write_to_file(str(picture))
    for call in (
        lambda: sanrt.export_model(scale=2, output=nowhere / "a.onnx"),
        lambda: sanrt.export_model(scale=2, models=nowhere / "models"),
        lambda: sanrt.build_engine(model, nowhere / "a.engine", flavor="rtx"),
        lambda: sanrt.validate_model(model, heatmaps=nowhere / "heat"),
        lambda: sanrt.validate_model(model, polygraphy=nowhere / "replay"),
        lambda: sanrt.upscale_files(picture, nowhere / "b.png"),
        lambda: sanrt.upscale_files(picture, f"{nowhere}/results/"),
    ):
        with pytest.raises(FileError, match=f"there is no folder {re.escape(str(nowhere))}; make it, or name"):
            call()
    assert not nowhere.parent.exists()
    (outcome,) = sanrt.upscale_files(picture, f"{nowhere}/", scale=2, models=models, backend="onnxruntime", threads=1)
    assert outcome.job.destination == nowhere / "a.png"
    sanrt.export_model(scale=2, output=tmp_path / "made" / "a.onnx", check=False)
    assert (tmp_path / "made" / "a.onnx").exists()


def test_outcomes_come_in_the_order_of_the_sources_and_a_picture_that_is_named_twice_has_one(models, tmp_path):
    (tmp_path / "in").mkdir()
    names = ("c.png", "a.png", "in/b.png", "in/d.png")
    for name in names:
        pyvips.Image.black(9, 8, bands=3).copy(interpretation="srgb").write_to_file(str(tmp_path / name))
    options = {"scale": 2, "models": models, "backend": "onnxruntime", "threads": 1}
    sanrt.upscale_files([tmp_path / "in", tmp_path / "c.png"], tmp_path / "out", **options)
    sources = [tmp_path / "in" / "d.png", tmp_path / "c.png", tmp_path / "a.png", tmp_path / "c.png", tmp_path / "in"]
    outcomes = sanrt.upscale_files(sources, tmp_path / "out", **options)
    assert [outcome.job.source for outcome in outcomes] == [
        tmp_path / name for name in ("in/d.png", "c.png", "a.png", "in/b.png")
    ]
    assert [type(outcome) for outcome in outcomes] == [Skipped, Skipped, Written, Skipped]
