"""The short run on a GPU: its steps' fates, its budget and its report, and what of it can be rehearsed on a processor."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import PYTHON, STEPS, Step, run_steps
from benchmarks.gpu_probes import PROBES, exercised
from benchmarks.measure import run_command
from sanrt.errors import OutOfMemoryError
from tests.runtime.backends.tensorrt.test_backend import FakeDevice


def step(code: str, seconds: float = 60, **facts: object) -> Step:
    return Step("a step", seconds, "something", (PYTHON, "-c", code), **facts)


def test_each_step_tells_what_became_of_it_and_the_rest_goes_on():
    steps = [
        step("print('3 of 3\\n╰────╯')"),
        step("import sys; print('it broke'); sys.exit(3)"),
        step("print('begun', flush=True); import time; time.sleep(600)", seconds=3),
        step("", needs=("no_such_module",)),
        step("print('after all')"),
    ]
    found = [(each.result, each.finding) for each in run_steps(steps, 600)]
    assert found == [
        ("done", "3 of 3"),
        ("failed", "it broke"),
        ("timed out", "after 3 s; its last line: begun"),
        ("left out", "no_such_module not installed"),
        ("done", "after all"),
    ]


def test_what_a_step_started_ends_with_it(tmp_path):
    sign = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(6); pathlib.Path({str(sign)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); import time; time.sleep(600)"
    (outcome,) = run_steps([step(parent, seconds=3)], 600)
    assert outcome.result == "timed out"
    list(run_steps([step("import time; time.sleep(8)")], 600))
    assert not sign.exists()


def test_steps_beyond_the_budget_are_left_out_and_a_rehearsal_needs_no_gpu_tools():
    assert [each.finding for each in run_steps([step("print(1)")] * 2, 0)] == ["the minutes are spent"] * 2
    both = step("print('DEVICE')", rehearsal=(PYTHON, "-c", "import sys; print(sys.argv[1])", "DEVICE"), needs=("ncu",))
    assert [each.finding for each in run_steps([both], 60, rehearse=True)] == ["cpu"]


def test_the_report_is_there_after_every_step(monkeypatch, tmp_path, capsys):
    report, seen = tmp_path / "gpu.json", []
    look = f"import pathlib; print(pathlib.Path({str(report)!r}).read_text().count('finding'))"
    steps = (replace(step("print('first')"), name="one"), replace(step(look), name="two"))
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(report)])
    with pytest.raises(SystemExit) as end:
        run_command("gpu", gpu.gpu)
    facts = json.loads(report.read_text())
    seen = [each["finding"] for each in facts["steps"]]
    assert (end.value.code, seen, facts["rehearsal"]) == (0, ["first", "1"], False)
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["one", "done"], ["two", "done"]]


def test_every_step_names_what_is_there():
    root = Path(gpu.__file__).resolve().parents[1]
    for each in STEPS:
        for words in (each.command, each.rehearsal):
            assert all((root / word).exists() for word in words if word.startswith(("tests/", "benchmarks/")))
            if "benchmarks.gpu_probes" in words:
                assert words[words.index("benchmarks.gpu_probes") + 1] in PROBES


@pytest.mark.parametrize(
    "name", ["ceilings", "kernels", "one_of_each", "cudnn_graph", "experiments", "little_memory", "streamed"]
)
def test_what_a_processor_can_stand_in_for_is_rehearsed(name):
    with torch.inference_mode():
        assert PROBES[name]("cpu")


class Limited(FakeDevice):
    """A GPU of 1 GiB."""

    def allocate(self, size: int) -> int:
        if size > 1 << 30:
            raise OutOfMemoryError("CUDA: cudaMalloc failed (out of memory)")
        return super().allocate(size)


class Wrong(Limited):
    """A GPU that copies nothing within itself."""

    def copy(self, target: int, source: int, size: int, stream: int) -> None: ...


def test_the_device_layer_is_exercised_and_its_faults_are_seen():
    device = Limited()
    assert exercised(device, 77) == (
        "NVIDIA Fake: boxes, a graph captured and launched, another stream followed, 1 TB refused and gone on,"
        " beside a thread that allocates"
    )
    assert device.followed == [77]
    assert not device.memory
    with pytest.raises(AssertionError, match="copied wrongly"):
        exercised(Wrong(), 1)
