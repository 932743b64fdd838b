"""`sanrt build` as typed: which model it takes, and what it says next."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sanrt.cli import app, quantise
from sanrt.errors import BackendError, UsageError
from sanrt.export import engine
from sanrt.export.quantise.trials import BackendTrial
from sanrt.model.checkpoint import save_checkpoint
from sanrt.model.spec import Precision
from sanrt.runtime.artifacts import models as artifacts
from sanrt.runtime.artifacts.engines import (
    STAGES_SUFFIX,
    SUFFIX,
    BuildOptions,
    EngineInfo,
    Identity,
    Proof,
    read_engine,
    save_engine,
)
from sanrt.runtime.artifacts.flavors import Flavor
from sanrt.runtime.artifacts.models import read_spec
from sanrt.runtime.artifacts.variants import model_digest

SECTION = re.compile(r"^(\w[\w -]*):\n((?:  .*\n?)+)", re.MULTILINE)


class Stopped(Exception):
    """Raised in place of a build."""


@pytest.fixture
def model_of(monkeypatch, tmp_path, live_network):
    """`model_of(*arguments)`: the model that `sanrt build ARGUMENTS` takes in an empty folder, and what it printed."""
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "bundled.safetensors"
    save_checkpoint(weights, live_network(2, groups=1), "the bundled ones", torch.float32)
    monkeypatch.setattr(artifacts, "bundled_checkpoint", lambda scale, kind: weights)
    taken = []

    def stop(model, *_):
        taken.append(model)
        raise Stopped

    monkeypatch.setattr(engine, "build_engine", stop)

    def call(*arguments):
        result = CliRunner().invoke(app, ["build", "--flavor", "rtx", *map(str, arguments)])
        assert isinstance(result.exception, Stopped), result.output
        *said, memory = result.output.strip().splitlines()
        assert memory.startswith("up to 1x1080x1920 (--max): about "), memory
        return taken.pop(), "\n".join(said)

    return call


def test_without_tensorrt_nothing_is_exported(monkeypatch, tmp_path):
    def missing(device=0):
        raise BackendError("neither is here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "choose_flavor", missing)
    result = CliRunner().invoke(app, ["build", "--fp16"])
    assert isinstance(result.exception, BackendError)
    assert list(tmp_path.iterdir()) == []


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
        " exporting the bundled weights san_x2 first"
    )


def engine_of(model, path, options):
    """An engine of some bytes, as `sanrt build` would have left it at `path`."""
    identity = Identity(model_digest(model), options, "11", "NVIDIA L4 sm89", "0.2")
    proof = Proof("build log", 3, {"fp16": 7}, [], 9, [], 8, [], [])
    beside = os.path.relpath(model.resolve(), path.parent.resolve())
    info = EngineInfo(path, read_spec(model), beside, identity, 5, sha256(b"bytes").hexdigest(), proof)
    save_engine(info, b"bytes")
    return info


@pytest.fixture
def built(monkeypatch, tmp_path, tiny_model):
    """`built(*words)`: the last line that `sanrt build models/mine.onnx WORDS` prints, by a TensorRT that builds at once."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.onnx").write_bytes(tiny_model(2).read_bytes())

    def build_engine(model, options, output, progress, device):
        name = f"{model.stem}-{options.precision}{STAGES_SUFFIX if options.stages else SUFFIX}"
        return engine_of(model, output or model.with_name(name), options), True

    monkeypatch.setattr(engine, "build_engine", build_engine)

    def call(*words):
        done = CliRunner().invoke(app, ["build", "models/mine.onnx", "--flavor", "tensorrt", *words])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.output.splitlines()[-1]

    return call


@pytest.mark.parametrize("words", [[], ["-o", "elsewhere/my engine.engine"], ["--bf16"]])
def test_the_next_command_runs_the_very_engine_that_was_built(built, words):
    Path("elsewhere").mkdir()
    line = built(*words)
    (command,) = re.findall(r"`(.*)`", line)
    path = Path(shlex.split(command)[shlex.split(command).index("--model") + 1])
    assert shlex.split(command)[:4] == ["sanrt", "run", "INPUT", "OUTPUT"]
    assert read_engine(path).model_path.resolve() == Path("models/mine.onnx").resolve()
    if "-o" in words:
        assert path == Path(words[1])
    assert line.endswith("on a machine with NVIDIA L4 sm89")


def test_after_stage_engines_the_next_command_has_the_whole_one_that_they_go_with(built):
    assert "`sanrt build models/mine.onnx --fp16`" in built("--stages")
    built()
    assert "`sanrt run INPUT OUTPUT --model models/mine-fp16.engine --tiling exact`" in built("--stages")
    assert "`sanrt build models/mine.onnx --bf16`" in built("--stages", "--bf16")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-o", "mine.trt"], r"expected a name that ends in \.engine"),
        (["-o", "models/mine.engine", "--stages"], r"expected a name that ends in \.stages"),
        (["-o", "elsewhere/mine.stages", "--stages"], "looked for beside their model; expected a file in models"),
    ],
)
def test_an_engine_where_run_would_not_find_it_is_refused_before_it_is_built(built, words, told):
    with pytest.raises(UsageError, match=told):
        built(*words)


def test_an_engine_replaces_an_earlier_one_of_its_model_and_nothing_else(built, tiny_model):
    built("-o", "mine.engine")
    built("-o", "mine.engine", "--bf16")
    assert read_engine(Path("mine.engine")).identity.options.precision == "bf16"
    Path("notes.engine").write_text("somebody's")
    Path("models/other.onnx").write_bytes(tiny_model(2).read_bytes())
    engine_of(Path("models/other.onnx"), Path("other.engine"), BuildOptions(Flavor.TENSORRT))
    for name in ("notes.engine", "other.engine"):
        before = Path(name).read_bytes()
        with pytest.raises(UsageError, match=r"is there already, and no engine of models/mine\.onnx"):
            built("-o", name)
        assert Path(name).read_bytes() == before


def test_a_quantised_model_that_is_not_worth_it_is_not_what_is_advised(monkeypatch):
    model, int8 = Path("models/san_x4.onnx"), Path("models/san_x4.int8.onnx")
    slow = BackendTrial(int8, "onnxruntime", Precision.FP32, "int8 + fp32", 30.0, 2.0)
    fast = BackendTrial(model, "native", None, "int16", 30.0, 1.0)
    assert "not worth it" in quantise.verdict([fast, slow], "int8")
    assert quantise.next_words(model, fast) == "`sanrt run INPUT OUTPUT` takes it by itself"
    elsewhere = replace(slow, model=Path("mine.int8.onnx"))
    assert quantise.next_words(Path("mine.onnx"), elsewhere) == (
        "`sanrt run INPUT OUTPUT --model mine.int8.onnx --backend onnxruntime --precision fp32`"
    )
    x2 = Path("other folder/san_x2.onnx")
    assert quantise.next_words(x2, slow) == ("`sanrt run INPUT OUTPUT --models 'other folder' --scale 2` takes it by itself")


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
