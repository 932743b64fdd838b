"""`sanrt export` as typed."""

from __future__ import annotations

import sys

import pytest
import torch

from sanrt.cli import main
from sanrt.model import checkpoint as checkpoints
from sanrt.model.checkpoint import save_checkpoint
from sanrt.runtime.models import read_spec


@pytest.fixture
def sanrt(monkeypatch, capsys, tmp_path):
    """`sanrt("export", ...)` in an empty folder: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sanrt", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return (stopped.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def weights(live_network, tmp_path):
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, live_network(2, groups=1), "seeded [not] markup", torch.float32)
    return path


def test_a_checkpoint_becomes_the_model_that_run_and_build_look_for(sanrt, weights, tmp_path):
    status, out, err = sanrt("export", "--checkpoint", weights, "--sqrt-iterations", 3)
    assert (status, err) == (0, "")
    assert read_spec(tmp_path / "models" / "san_x2.onnx").iterations == 3
    assert "seeded [not] markup" in out
    assert "3 Newton-Schulz steps (trained with 5), residual up to " in out
    assert "dB PSNR" in out
    assert "Matrix square roots" not in out
    assert out.splitlines()[-1] == "next: sanrt run INPUT OUTPUT --scale 2, or first an engine: sanrt build --fp16"


def test_verbose_shows_every_group_and_another_place_is_named_in_the_next_command(sanrt, weights):
    status, out, _ = sanrt("export", "--checkpoint", weights, "-o", "sub/mine.onnx", "-v", "--no-check")
    assert status == 0
    assert "Matrix square roots" in out
    assert "not checked" in out
    assert "sanrt run INPUT OUTPUT --model sub/mine.onnx" in out


def test_bundled_weights_are_the_default(sanrt, weights, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "bundled_checkpoint", lambda scale: weights if scale == 2 else None)
    assert sanrt("export", "--scale", 2, "--models", "elsewhere")[0] == 0
    assert (tmp_path / "elsewhere" / "san_x2.onnx").exists()


def test_a_genuine_file_is_recognised(sanrt, weights, monkeypatch, shared):
    digest = checkpoints.load_checkpoint(shared / "golden" / "san_x2_g2m2c32r8.pt").digest
    monkeypatch.setitem(checkpoints.GENUINE, digest, "the genuine one")
    _, out, _ = sanrt("export", "--checkpoint", shared / "golden" / "san_x2_g2m2c32r8.pt")
    assert "weights: the genuine one" in out


def test_weights_of_another_scale_are_refused_in_one_line(sanrt, weights, tmp_path):
    status, _, err = sanrt("export", "--scale", 4, "--checkpoint", weights)
    assert status == 1
    assert err == f"sanrt: {weights}: weights for x2, but --scale 4 was asked for; leave --scale out, or pass 2\n"
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("arguments", [[], ["--scale", "5"], ["--scale", "4", "--sqrt-iterations", "0"]])
def test_wrong_usage_exits_with_2(sanrt, arguments):
    assert sanrt("export", *arguments)[0] == 2


@pytest.mark.parametrize("missing", ["torch", "onnx"])
def test_a_missing_package_is_the_command_that_installs_it(sanrt, weights, monkeypatch, missing):
    for name in [n for n in sys.modules if n.startswith(("sanrt.export.onnx", "sanrt.model.graph"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    status, _, err = sanrt("export", "--checkpoint", weights)
    assert status == 1
    assert err == f"sanrt: sanrt export needs {missing}, which is not installed; pip install 'sanrt[export]'\n"
