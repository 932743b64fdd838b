"""Training runs, is interrupted, and continues."""

import json
import runpy
import sys

import numpy as np
import pytest
import pyvips
import torch

from training.data import Patches
from training.degrade import degrade
from training.train import train

TINY = {"scale": 2, "groups": 1, "blocks": 1, "channels": 16, "reduction": 4, "batch": 2, "patch": 8}


@pytest.fixture
def pictures(tmp_path):
    """A training folder that is a test set too: HR/ and LR/."""
    for name in "ab":
        high = np.random.default_rng(ord(name)).integers(0, 256, (32, 40, 3), np.uint8)
        for kind, pixels in {"HR": high, "LR": degrade(high, 2)}.items():
            (tmp_path / "set" / kind).mkdir(parents=True, exist_ok=True)
            pyvips.Image.new_from_array(pixels).write_to_file(str(tmp_path / "set" / kind / f"{name}.png"))
    return tmp_path / "set"


def steps(log):
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


def test_an_interrupted_run_continues_from_its_checkpoint(pictures, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def go():
        train([pictures / "HR"], out, iterations=6, every=2, evaluate=pictures, **TINY)

    batch, calls = Patches.batch, []

    def interrupted(self, size):
        calls.append(size)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return batch(self, size)

    monkeypatch.setattr(Patches, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go()
    early = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (early["step"], steps(out / "log.jsonl")) == (2, [2])

    go()
    late = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (late["step"], steps(out / "log.jsonl")) == (6, [2, 4, 6])
    assert len(calls) == 4 + 4
    assert {int(state["step"]) for state in late["optimiser"]["state"].values()} == {6}
    assert not torch.equal(early["net"]["groups.0.conv.weight"], late["net"]["groups.0.conv.weight"])
    row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert 0 < row["l1"] < 1
    assert row["y_psnr"] > 5

    go()
    assert steps(out / "log.jsonl") == [2, 4, 6], "a finished run was continued"


def test_the_command_trains(pictures, tmp_path, monkeypatch):
    options = [part for name, value in TINY.items() for part in (f"--{name}", str(value))]
    arguments = [str(pictures / "HR"), "--out", str(tmp_path / "run"), *options, "--iterations", "6", "--every", "3"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as end, pytest.warns(RuntimeWarning, match="found in sys.modules"):
        runpy.run_module("training.train", run_name="__main__")
    assert not end.value.code
    assert steps(tmp_path / "run" / "log.jsonl") == [3, 6]
