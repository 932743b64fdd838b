"""`sanrt build` as typed: which model it takes, and what it says next."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sanrt.cli import app
from sanrt.export import engine
from sanrt.model import checkpoint as checkpoints
from sanrt.model.checkpoint import save_checkpoint
from sanrt.runtime.artifacts.models import read_spec

SECTION = re.compile(r"^(\w[\w -]*):\n((?:  .*\n?)+)", re.MULTILINE)


class Stopped(Exception):
    """Raised in place of a build."""


@pytest.fixture
def model_of(monkeypatch, tmp_path, live_network):
    """`model_of(*arguments)`: the model that `sanrt build ARGUMENTS` takes in an empty folder, and what it printed."""
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "bundled.safetensors"
    save_checkpoint(weights, live_network(2, groups=1), "the bundled ones", torch.float32)
    monkeypatch.setattr(checkpoints, "bundled_checkpoint", lambda scale: weights)
    taken = []

    def stop(model, *_):
        taken.append(model)
        raise Stopped

    monkeypatch.setattr(engine, "build_engine", stop)

    def call(*arguments):
        result = CliRunner().invoke(app, ["build", "--flavor", "rtx", *map(str, arguments)])
        assert isinstance(result.exception, Stopped), result.output
        return taken.pop(), result.output.strip()

    return call


def test_without_a_name_it_takes_what_run_takes_and_not_what_was_written_last(model_of, tiny_model, tmp_path):
    (tmp_path / "models").mkdir()
    for name in ("san_x2", "san_x4", "mine"):
        (tmp_path / "models" / f"{name}.onnx").write_bytes(tiny_model(2).read_bytes())
    assert model_of() == (Path("models/san_x4.onnx"), "")
    assert model_of("--scale", 2) == (Path("models/san_x2.onnx"), "")
    assert model_of("models/mine.onnx")[0] == Path("models/mine.onnx")


def test_a_default_model_that_is_missing_is_made_as_run_makes_it_and_others_are_named(model_of, tiny_model, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.onnx").write_bytes(tiny_model(2).read_bytes())
    model, output = model_of("--scale", 2)
    assert read_spec(model).weights_origin == "the bundled ones"
    assert output == (
        "models/san_x2.onnx: not there yet (there are others, which must be named: models/mine.onnx);"
        " exporting the bundled x2 weights first"
    )


def test_a_named_model_of_another_scale_is_refused(monkeypatch, tiny_model):
    result = CliRunner().invoke(app, ["build", str(tiny_model(2)), "--scale", "4", "--flavor", "rtx"])
    assert "is for x2, but --scale 4 was asked for" in str(result.exception)


def test_help_lists_everyday_options_first_and_the_others_under_their_headings():
    result = CliRunner().invoke(app, ["build", "--help"])
    sections = {title: re.findall(r"--[\w-]+", text) for title, text in SECTION.findall(result.output)}
    assert list(sections) == ["Arguments", "Options", "8-bit options", "Sizes", "TensorRT options"]
    assert {"--fp16", "--int8", "--output"} <= set(sections["Options"])
    assert sections["Sizes"] == ["--min", "--opt", "--max"]
    assert "--calibrator" in sections["8-bit options"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--int8", "--auto"], "choose one of --int8 and --auto"),
        (["--fp16", "--bf16"], "choose one of --fp16 and --bf16"),
        (["--calibrator", "entropy"], "entropy: expected min-max or percentile"),
        (["--flavor", "trt"], "trt: expected auto, tensorrt or rtx"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage(words, told):
    result = CliRunner().invoke(app, ["build", *words])
    assert result.exit_code == 2
    assert told in result.output
