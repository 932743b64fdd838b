"""`--weights`: which of the bundled weights a picture goes through, and what is said of it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import pyvips
import torch

from sanrt import Upscaler
from sanrt.cli import main
from sanrt.errors import UsageError
from sanrt.model import bundled
from sanrt.model.checkpoint import save_checkpoint
from sanrt.model.graph import san_model
from sanrt.model.san import SAN
from sanrt.model.spec import Architecture, ModelSpec
from sanrt.runtime.pictures.jpeg import quality


@pytest.fixture(autouse=True)
def two_kinds(tmp_path, monkeypatch):
    """Bundled weights for x2, clean and photo, and an empty working folder."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for seed, name in enumerate(["san_x2", "san_x2_photo"]):
        torch.manual_seed(seed)
        save_checkpoint(folder / f"{name}.safetensors", SAN(Architecture(2, 1, 1, 16, 4)), f"seed {seed}")
    monkeypatch.setattr(bundled, "FOLDER", folder)
    monkeypatch.setattr("sanrt.runtime.artifacts.models.BUNDLED_FOLDER", folder)
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)


@pytest.fixture
def folder(tmp_path):
    """JPEG files of quality 60, the last that takes `photo` and the one above, and a PNG."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    y, x = np.mgrid[:24, :20]
    pixels = np.stack([127 + 90 * np.sin(x / 3 + c) * np.cos(y / (2 + c)) for c in range(3)], 2).astype(np.uint8)
    image = pyvips.Image.new_from_array(pixels).copy(interpretation="srgb")
    for number in (60, bundled.PHOTO_QUALITY, bundled.PHOTO_QUALITY + 1):
        image.jpegsave(str(pictures / f"q{number}.jpg"), Q=number)
    image.pngsave(str(pictures / "a.png"))
    return pictures


@pytest.fixture
def sanrt(monkeypatch, capfd):
    """Calls `sanrt ARGUMENTS`; returns exit status, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sanrt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return call


@pytest.fixture
def run(sanrt):
    """Calls `sanrt run ARGUMENTS` at x2 on the native backend in fp32."""
    return lambda *arguments: sanrt("run", *arguments, "--scale", 2, "--backend", "native", "--precision", "fp32")


def pixels(folder):
    """Every result's pixels, by name."""
    return {path.name: pyvips.Image.new_from_file(str(path)).numpy().tolist() for path in sorted(folder.iterdir())}


def test_auto_takes_photo_weights_for_jpeg_up_to_the_measured_quality_and_clean_ones_for_the_rest(run, folder, tmp_path):
    status, out, err = run(folder, tmp_path / "auto", "--format", "png")
    assert (status, err) == (0, "")
    assert f"2 of 4 pictures: JPEG of quality {bundled.PHOTO_QUALITY} or less" in out
    for kind in ("clean", "photo"):
        assert run(folder, tmp_path / kind, "--format", "png", "--weights", kind)[0] == 0
    auto, clean, photo = (pixels(tmp_path / name) for name in ("auto", "clean", "photo"))
    assert auto == {name: (photo if name in ("q60.png", f"q{bundled.PHOTO_QUALITY}.png") else clean)[name] for name in auto}
    assert all(clean[name] != photo[name] for name in auto)


def test_what_auto_made_is_skipped_and_other_weights_make_it_again(run, folder, tmp_path):
    run(folder, tmp_path / "out")
    assert "4 skipped" in run(folder, tmp_path / "out")[1]
    again = run(folder, tmp_path / "out", "--weights", "clean")[1]
    assert "2 written, 2 skipped" in again
    assert "made by another model before" in again
    assert "4 skipped" in run(folder, tmp_path / "out", "--weights", "clean")[1]
    assert "2 written, 2 skipped" in run(folder, tmp_path / "out")[1]


def test_an_exported_model_takes_photographs_too_which_is_told(run, folder, tmp_path):
    Path("models").mkdir()
    tiny_onnx(Path("models/san_x2.onnx"))
    _, out, _ = run(folder, tmp_path / "out")
    assert "models/san_x2.onnx was exported, so JPEG photographs go through it too; `sanrt export --scale 2" in out
    tiny_onnx(Path("models/san_x2_photo.onnx"))
    assert "2 of 4 pictures: JPEG of quality" in run(folder, tmp_path / "out")[1]


def test_a_reduced_result_of_a_photograph_comes_from_its_scale_s_weights(sanrt, folder):
    status, out, err = sanrt("run", folder, "half", "--outscale", 1.5, "--backend", "native", "--dry-run")
    assert (status, err) == (0, "")
    assert "2 of 4 pictures: JPEG of quality" in out
    assert "bundled weights san_x2_photo: " in out


def test_weights_beside_a_named_model_are_wrong_usage(run, folder, tmp_path):
    Path("models").mkdir()
    tiny_onnx(Path("models/other.onnx"))
    status, _, err = run(folder, tmp_path / "out", "--model", "models/other.onnx", "--weights", "photo")
    assert (status, err.count("\n")) == (2, 1)
    assert "models/other.onnx is named, and has its own" in err


def test_weights_that_are_not_shipped_are_refused_with_what_there_is(run, folder, tmp_path):
    status, _, err = run(folder, tmp_path / "out", "--weights", "fast")
    assert (status, err.count("\n")) == (2, 1)
    assert "no fast weights for x2; sanrt ships clean for x2; photo for x2" in err


def test_plan_says_which_pictures_go_through_which_weights(sanrt, folder):
    status, out, _ = sanrt("plan", folder, "--scale", 2, "--backend", "native")
    assert status == 0
    assert "san_x2: 2 of 4 pictures" in out
    assert "san_x2_photo: 2 of 4 pictures" in out


def test_a_record_of_both_weights_verifies(run, sanrt, folder, tmp_path):
    run(folder, tmp_path / "out", "--record", tmp_path / "record.jsonl")
    status, out, err = sanrt("verify", tmp_path / "record.jsonl")
    assert (status, err) == (0, "")
    assert out.count("same") >= 4


def test_the_library_takes_clean_weights_unless_asked_otherwise():
    picture = np.random.default_rng(0).integers(0, 256, (12, 14, 3), np.uint8)
    results = {}
    for kind in ("clean", "photo"):
        with Upscaler.load(2, weights=kind, backend="native") as upscaler:
            results[kind] = upscaler(picture)
    with Upscaler.load(2, backend="native") as upscaler:
        assert np.array_equal(upscaler(picture), results["clean"])
    assert not np.array_equal(results["clean"], results["photo"])
    with pytest.raises(UsageError, match="expected clean, photo, fast"):
        Upscaler.load(2, weights="sharp")


def test_export_and_validate_know_the_kind(sanrt):
    assert sanrt("export", "--scale", 2, "--weights", "photo")[0] == 0
    assert [path.name for path in Path("models").glob("*.onnx")] == ["san_x2_photo.onnx"]
    status, out, err = sanrt("validate", "models/san_x2_photo.onnx", "--backend", "onnxruntime")
    assert (status, err) == (0, "")
    assert "passed" in out


@pytest.mark.parametrize("number", [1, 5, 30, 50, 75, 92, 99, 100])
def test_the_quality_of_a_jpeg_is_read_off_its_table(tmp_path, number):
    image = pyvips.Image.black(40, 40).copy(interpretation="b-w")
    for subsampling in ("on", "off"):
        image.jpegsave(str(tmp_path / "a.jpg"), Q=number, subsample_mode=subsampling)
        assert quality(tmp_path / "a.jpg") == number


def test_files_that_are_no_jpeg_or_are_cut_have_no_quality(tmp_path):
    image = pyvips.Image.black(40, 40)
    image.pngsave(str(tmp_path / "a.png"))
    assert quality(tmp_path / "a.png") is None
    content = image.jpegsave_buffer(Q=70)
    for length in (0, 2, 20, content.index(b"\xff\xdb") + 30):
        (tmp_path / "cut.jpg").write_bytes(content[:length])
        assert quality(tmp_path / "cut.jpg") is None


def tiny_onnx(path):
    """A small x2 model with weights of its own."""
    torch.manual_seed(len(path.name))
    net = SAN(Architecture(2, 1, 1, 16, 4))
    weights = {name: tensor.detach().numpy() for name, tensor in net.state_dict().items()}
    path.write_bytes(san_model(ModelSpec(net.arch, f"{len(path.name):064x}", "seeded", 5), weights).SerializeToString())
