"""`sanrt export` as typed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from sanrt.cli import main
from sanrt.extras import install_command
from sanrt.model import checkpoint as checkpoints
from sanrt.model.checkpoint import save_checkpoint
from sanrt.runtime.artifacts.models import read_spec


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


@pytest.fixture
def bundled(live_network, monkeypatch, tmp_path):
    """Bundled x2 weights, other ones than `weights`; there are none of other scales."""
    path = tmp_path / "bundled.safetensors"
    save_checkpoint(path, live_network(2, groups=1, blocks=2), "the bundled ones", torch.float32)
    monkeypatch.setattr(checkpoints, "bundled_checkpoint", lambda scale, kind: path if scale == 2 else None)
    return path


def test_a_checkpoint_becomes_a_model_of_its_own_name(sanrt, weights, tmp_path):
    status, out, err = sanrt("export", "--checkpoint", weights, "--sqrt-iterations", 3)
    assert (status, err) == (0, "")
    assert read_spec(tmp_path / "models" / "own.onnx").iterations == 3
    assert "seeded [not] markup" in out
    assert "3 Newton-Schulz steps, where the weights were trained with 5 steps; residual up to " in out
    assert "dB PSNR" in out
    assert "Matrix square roots" not in out
    assert out.splitlines()[-1] == (
        "next: sanrt run INPUT OUTPUT --model models/own.onnx, or first an engine: sanrt build models/own.onnx --fp16"
    )


def test_a_checkpoint_and_the_bundled_weights_keep_apart(sanrt, weights, bundled, tmp_path):
    assert sanrt("export", "--checkpoint", weights, "--no-check")[0] == 0
    status, out, _ = sanrt("export", "--scale", 2, "--no-check")
    assert status == 0
    assert "replaced" not in out
    assert out.splitlines()[-1].endswith("INPUT OUTPUT --scale 2, or first an engine: sanrt build --scale 2 --fp16")
    origins = {path.name: read_spec(path).weights_origin for path in (tmp_path / "models").glob("*.onnx")}
    assert origins == {"own.onnx": "seeded [not] markup", "san_x2.onnx": "the bundled ones"}


def test_an_experiment_does_not_take_the_default_s_place_unasked(sanrt, bundled, tmp_path):
    assert sanrt("export", "--scale", 2, "--no-check")[0] == 0
    status, _, err = sanrt("export", "--scale", 2, "--no-check", "--sqrt-iterations", 8)
    assert (status, err.count("\n")) == (1, 1)
    assert "would be lost" in err
    assert read_spec(tmp_path / "models" / "san_x2.onnx").iterations == 5
    assert sanrt("export", "--scale", 2, "--no-check", "--sqrt-iterations", 8, "--overwrite")[0] == 0
    assert read_spec(tmp_path / "models" / "san_x2.onnx").iterations == 8


@pytest.mark.parametrize("name", ["san_x2.pt", "san_x4.safetensors", "SAN_X2.pth", "san_x4_photo.pt"])
def test_a_checkpoint_with_a_name_of_bundled_weights_takes_none_of_theirs(sanrt, weights, tmp_path, name):
    shutil.copy(weights, tmp_path / name)
    assert sanrt("export", "--checkpoint", name, "--no-check")[0] == 0
    (made,) = (tmp_path / "models").glob("*.onnx")
    assert made.stem == f"{Path(name).stem}-{read_spec(made).weights_digest[:8]}"


def test_other_weights_are_not_replaced_before_that_is_asked_for(sanrt, weights, bundled, tmp_path):
    assert sanrt("export", "--checkpoint", weights, "--no-check", "-o", "a.onnx")[0] == 0
    before = (tmp_path / "a.onnx").read_bytes()
    status, _, err = sanrt("export", "--checkpoint", bundled, "--no-check", "-o", "a.onnx")
    assert status == 1
    assert err.startswith(
        "sanrt: a.onnx: is there already and would be lost: SAN x2 (G=1 m=1 C=16 r=4), 5 Newton-Schulz steps"
    )
    assert "other weights" in err
    assert "--overwrite" in err
    assert (tmp_path / "a.onnx").read_bytes() == before
    status, out, _ = sanrt("export", "--checkpoint", bundled, "--no-check", "-o", "a.onnx", "--overwrite")
    assert status == 0
    assert "replaced: SAN x2 (G=1 m=1 C=16 r=4), 5 Newton-Schulz steps, seeded [not] markup (other weights" in out
    assert read_spec(tmp_path / "a.onnx").weights_origin == "the bundled ones"


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n a picture of somebody's"])
def test_a_file_that_no_export_wrote_is_not_replaced(sanrt, weights, tmp_path, content):
    (tmp_path / "a.onnx").write_bytes(content)
    status, _, err = sanrt("export", "--checkpoint", weights, "--no-check", "-o", "a.onnx")
    assert (status, (tmp_path / "a.onnx").read_bytes()) == (1, content)
    assert "a file that `sanrt export` did not write" in err


@pytest.mark.parametrize("name", ["a.pt", "a", "a.engine", "own.safetensors"])
def test_a_name_by_which_no_command_knows_a_model_is_refused(sanrt, weights, name):
    before = weights.read_bytes()
    status, _, err = sanrt("export", "--checkpoint", weights, "--no-check", "-o", name, "--overwrite")
    assert status == 2
    assert f"--output {name}: expected a name that ends in .onnx" in err
    assert weights.read_bytes() == before


def test_the_same_weights_are_exported_anew_and_what_was_there_is_told(sanrt, weights, tmp_path):
    assert sanrt("export", "--checkpoint", weights, "--no-check", "--sqrt-iterations", 3)[0] == 0
    status, out, _ = sanrt("export", "--checkpoint", weights, "--no-check")
    assert status == 0
    assert "replaced: SAN x2 (G=1 m=1 C=16 r=4), 3 Newton-Schulz steps, seeded [not] markup (the same weights)" in out
    assert read_spec(tmp_path / "models" / "own.onnx").iterations == 5


def test_verbose_shows_every_group_and_another_place_is_named_in_the_next_command(sanrt, weights, tmp_path):
    (tmp_path / "sub").mkdir()
    status, out, _ = sanrt("export", "--checkpoint", weights, "-o", "sub/mine.onnx", "-v", "--no-check")
    assert status == 0
    assert "Matrix square roots" in out
    assert "not checked" in out
    assert "sanrt run INPUT OUTPUT --model sub/mine.onnx" in out


def test_bundled_weights_are_the_default(sanrt, bundled, tmp_path):
    assert sanrt("export", "--scale", 2, "--models", "elsewhere")[0] == 0
    assert (tmp_path / "elsewhere" / "san_x2.onnx").exists()


def test_a_genuine_file_is_recognised(sanrt, weights, monkeypatch, shared):
    digest = checkpoints.load_checkpoint(shared / "golden" / "san_x2_g2m2c32r8.pt").digest
    monkeypatch.setitem(checkpoints.GENUINE, digest, "the genuine one")
    _, out, _ = sanrt("export", "--checkpoint", shared / "golden" / "san_x2_g2m2c32r8.pt")
    assert "weights: the genuine one" in out


def test_weights_of_another_scale_are_refused_in_one_line(sanrt, weights, tmp_path):
    status, _, err = sanrt("export", "--scale", 4, "--checkpoint", weights)
    assert status == 2
    assert err == f"sanrt: {weights}: is for x2, but --scale 4 was asked for; leave --scale out, or pass 2\n"
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
    assert err == f"sanrt: sanrt export needs {missing}, which is not installed; {install_command('export')}\n"
