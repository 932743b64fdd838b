"""The benchmark of estimates: a row for each run, with what was asked for and taken, and why others were not made."""

import json
import sys
from dataclasses import replace

import pytest

from benchmarks import estimates
from benchmarks.estimates import Row, summary
from benchmarks.measure import run_command


@pytest.fixture
def command(monkeypatch, tiny_model, tmp_path, capsys):
    """Run the command in this process: its exit status, its rows and what it printed."""

    def run(*arguments):
        report = tmp_path / "report.json"
        fixed = ["--model", str(tiny_model()), "--threads", "1", "--folder", str(tmp_path), "--json", str(report)]
        monkeypatch.setattr(sys, "argv", ["estimates.py", *fixed, *arguments])
        with pytest.raises(SystemExit) as end:
            run_command("estimates", estimates.estimated)
        return end.value.code, json.loads(report.read_text())["rows"] if report.exists() else None, capsys.readouterr()

    return run


def test_a_run_is_measured_beside_its_plan(command, tmp_path):
    status, (row,), shown = command("--backend", "native:fp32", "--sizes", "40x32")
    assert status == 0
    assert (row["backend"], row["size"], row["plan"]) == ("native:fp32", "40x32", "whole, 2 x 2 regions")
    assert row["measured"]
    assert min(row["asked_seconds"], row["seconds"], row["asked_memory"], row["memory"]) > 0
    assert "of 1 runs" in shown.out
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]


def test_what_the_time_or_the_backend_does_not_allow_is_said(command):
    status, rows, shown = command(
        "--backend", "onnxruntime:int16", "--backend", "native", "--sizes", "40x32", "--minutes", "1e-9"
    )
    assert status == 1
    assert rows[0]["failed"]
    assert "int16 was asked for" in rows[0]["reason"]
    assert not rows[1]["failed"]
    assert "left of --minutes" in rows[1]["reason"]
    assert "nothing was measured" in shown.out


def test_bad_arguments_are_told_in_one_line(command):
    status, rows, shown = command("--minutes", "0")
    assert (status, rows) == (1, None)
    assert shown.err.count("\n") == 1
    assert "--minutes 0" in shown.err


def test_the_summary_has_the_smallest_and_the_largest_ratio_and_how_many_are_near():
    row = Row("native", "64x64", asked_seconds=1.0, asked_memory=100, measured=True, seconds=2.0, memory=80)
    told = summary([row, replace(row, seconds=0.5, memory=200), replace(row, measured=False)])
    assert told == "asked / took: time 0.50 to 2.00 (0% within 25%), memory 0.50 to 1.25 (50%), of 2 runs"
