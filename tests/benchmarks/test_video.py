"""The video benchmark: pace, memory and repeated frames are told."""

import sys

import pytest

from benchmarks.measure import run_command

pytest.importorskip("av")

from benchmarks.video import video


def test_pace_memory_and_repeated_frames_are_told(monkeypatch, tiny_model, capsys):
    fixed = ["--model", str(tiny_model()), "--backend", "onnxruntime", "--threads", "1"]
    arguments = [*fixed, "--size", "32x24", "--count", "6", "--many", "20", "--preset", "ultrafast"]
    monkeypatch.setattr(sys, "argv", ["video.py", *arguments])
    with pytest.raises(SystemExit) as end:
        run_command("video", video)
    told = capsys.readouterr().out
    assert end.value.code == 0
    assert "6 frames of 32x24: the network alone" in told
    assert "% of that" in told
    assert "each frame shown twice" in told
    assert [line.split()[0] for line in told.splitlines()[-10:]] == [str(count) for count in range(2, 21, 2)]


def test_frames_are_160x90_unless_told_otherwise(monkeypatch, tiny_model, capsys):
    arguments = ["--model", str(tiny_model()), "--backend", "onnxruntime", "--count", "2", "--many", "0"]
    monkeypatch.setattr(sys, "argv", ["video.py", *arguments])
    with pytest.raises(SystemExit) as end:
        run_command("video", video)
    assert end.value.code == 0
    assert "2 frames of 160x90" in capsys.readouterr().out
