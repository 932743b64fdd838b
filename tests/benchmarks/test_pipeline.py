"""The pipeline benchmark: its steps add up, and a bad picture or argument ends it with one line."""

import sys
import time

import numpy as np
import pytest
import pyvips

from benchmarks.measure import run_command
from benchmarks.pipeline import Measured, Stopwatch, pipeline
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_unguarded
from sanrt.runtime.runs.pipeline import Written
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.runtime.tiling.upscaling import upscale


@pytest.fixture
def measure(monkeypatch, tiny_model, capsys):
    """Run the command in this process: its exit status, and what it printed."""

    def run(*arguments):
        fixed = ["--model", str(tiny_model()), "--backend", "onnxruntime", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["pipeline.py", *fixed, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_command("pipeline", pipeline)
        return end.value.code, capsys.readouterr()

    return run


def test_closeness_is_that_of_the_slowest_thread():
    found = Measured(100, {"read": 1.0, "convert": 1.0, "infer": 3.0, "write": 2.0}, overlapped=5.0)
    assert (found.total, found.slowest, found.closeness) == (7.0, 4.0, 0.8)


def test_every_step_of_a_folder_is_told(measure):
    status, shown = measure("--count", 2, "--size", "20x16")
    assert status == 0
    assert "2 pictures, 0.00 Mpx of input" in shown.out
    lines = [line for line in shown.out.splitlines() if line.endswith("%") and " s " in line]
    assert len(lines) == 4
    assert sum(float(line.split()[-1].rstrip("%")) for line in lines) == pytest.approx(100, abs=0.3)


@pytest.mark.parametrize("name", ["native", "onnxruntime"])
def test_computing_is_timed_once_with_whatever_regions(name, tiny_model):
    picture = np.full((20, 24, 3), 90, np.uint8)
    with load_unguarded(name, tiny_model(), RunOptions(threads=1)) as backend:
        watch = Stopwatch(backend)
        for options in (UpscaleOptions(), UpscaleOptions(tile=16, tiling=Tiling.OVERLAP)):
            before, started = watch.seconds, time.perf_counter()
            upscale(backend, picture, options)
            assert 0 < watch.seconds - before < time.perf_counter() - started
        if backend.infer_with_regions:
            before = watch.seconds
            upscale(backend, picture, UpscaleOptions(regions=3, tiling=Tiling.WHOLE))
            assert watch.seconds > before


def test_the_measured_results_are_written_where_nothing_of_the_users_lies(measure, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    pyvips.Image.new_from_array(np.full((16, 16, 3), 90, np.uint8)).write_to_file(folder / "a.png")
    status, _ = measure(folder)
    assert status == 0
    assert [path.name for path in folder.iterdir()] == ["a.png"]


def test_a_bad_picture_ends_it_with_one_line(measure, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    status, shown = measure(tmp_path)
    assert status == 1
    assert shown.err.count("\n") == 1
    assert "a.png" in shown.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tiling", "exact"], "not timed"),
        (["--size", "0x9"], "size '0x9'"),
        (["nowhere"], "nowhere"),
        (["--paper"], "expected one of them"),
    ],
)
def test_bad_arguments_are_told_in_one_line(measure, arguments, told):
    status, shown = measure(*arguments)
    assert status == 1
    assert shown.err.count("\n") == 1
    assert told in shown.err


def test_steps_have_the_names_that_the_runtime_gives(measure, monkeypatch, tmp_path):
    import benchmarks.pipeline

    seen = []
    monkeypatch.setattr(benchmarks.pipeline, "require_written", lambda outcome: seen.append(outcome) or outcome)
    measure("--count", 1, "--size", "16x16")
    assert isinstance(seen[0], Written)
    assert set(seen[0].seconds) == {"read", "upscale", "write"}
