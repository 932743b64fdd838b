"""`--outscale` and `--size`: results of other sizes than the network makes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import pyvips

from sanrt.cli import main
from sanrt.errors import UsageError
from sanrt.request import ModelChoice, by_scale
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.pictures.resize import ResultSize, reduced
from sanrt.runtime.pictures.storage import RemotePath


@pytest.fixture
def sanrt(tiny_model, tmp_path, monkeypatch, capfd):
    """Calls `sanrt COMMAND ARGUMENTS` in `tmp_path`, where models for x2, x3 and x4 are; exit status, stdout, stderr."""
    for scale in (2, 3, 4):
        load_backend("onnxruntime", tiny_model(scale), RunOptions()).close()
    monkeypatch.chdir(tmp_path)

    def call(command, *arguments):
        models = [] if command == "verify" else ["--models", tiny_model(2).parent, "--backend", "onnxruntime"]
        monkeypatch.setattr(sys, "argv", ["sanrt", command, *map(str, [*models, *arguments])])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return call


def noise(path: Path, height=20, width=30, bands=3, dtype=np.uint8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(bands).integers(0, np.iinfo(dtype).max + 1, (height, width, bands), dtype)
    kind = ("srgb" if bands > 2 else "b-w") if dtype is np.uint8 else ("rgb16" if bands > 2 else "grey16")
    pyvips.Image.new_from_array(values).copy(interpretation=kind).write_to_file(str(path))
    return path


def picture(path: str | Path) -> np.ndarray:
    return pyvips.Image.new_from_file(str(path)).numpy()


def test_a_result_is_the_next_larger_networks_reduced(sanrt):
    noise(Path("a.png"))
    assert sanrt("run", "a.png", "--outscale", "2.5")[::2] == (0, "")
    assert sanrt("run", "a.png", "--scale", "3")[0] == 0
    expected = reduced(pyvips.Image.new_from_file("a_x3.png"), 75, 50).numpy()
    assert (picture("a_x2.5.png") == expected).all()


def test_an_outscale_that_a_network_has_changes_no_pixel(sanrt):
    noise(Path("a.png"))
    assert sanrt("run", "a.png", "b.png", "--outscale", "3")[0] == sanrt("run", "a.png", "c.png", "--scale", "3")[0] == 0
    assert (picture("b.png") == picture("c.png")).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_streamed_pictures_are_reduced_as_those_in_memory_are_with_their_transparency(sanrt, dtype):
    noise(Path("a.png"), 40, 48, 4, dtype)
    for name, tiling in ("whole.png", ["whole"]), ("exact.png", ["exact", "--tile", "16"]):
        assert sanrt("run", "a.png", name, "--outscale", "1.5", "--tiling", *tiling)[0] == 0
    whole, exact = picture("whole.png"), picture("exact.png")
    assert whole.shape == (60, 72, 4)
    assert whole.dtype == dtype
    assert abs(whole[..., 3].astype(int) - exact[..., 3]).max() == 0
    visible = (whole[..., 3] > np.iinfo(dtype).max // 10)[..., None]
    assert abs((whole.astype(int) - exact) * visible).max() <= (2 if dtype is np.uint8 else 80)


def test_size_takes_for_each_picture_the_smallest_network_that_suffices(sanrt):
    for name, side in ("two.png", 50), ("three.png", 34), ("four.png", 25), ("wide.png", 40):
        noise(Path("in", name), 20 if name == "wide.png" else side, side)
    status, out, err = sanrt("run", "in", "--size", "100x100", "--verbose")
    assert (status, err) == (0, "")
    assert [f"SAN x{scale} " in out for scale in (2, 3, 4)] == [True] * 3
    assert out.splitlines()[-1].startswith("4 written in ")
    sizes = {path.name: picture(path).shape[:2] for path in Path("in_100x100").iterdir()}
    assert sizes == {"two.png": (100, 100), "three.png": (100, 100), "four.png": (100, 100), "wide.png": (50, 100)}
    assert sanrt("run", "in", "--size", "100x100")[1].splitlines()[-1] == "0 written, 4 skipped: in_100x100/"


def test_a_second_run_skips_results_of_the_same_size_alone(sanrt):
    noise(Path("a.png"))
    assert sanrt("run", "a.png", "b.png", "--outscale", "1.5")[0] == 0
    assert "1 skipped" in sanrt("run", "a.png", "b.png", "--outscale", "1.5")[1]
    status, out, _ = sanrt("run", "a.png", "b.png", "--outscale", "1.7")
    assert (status, picture("b.png").shape) == (0, (34, 51, 3))
    assert "made with other options before" in out


def test_a_recorded_result_of_another_size_is_verified(sanrt):
    noise(Path("a.png"))
    assert sanrt("run", "a.png", "b.png", "--size", "50x50", "--record", "record")[0] == 0
    status, out, _ = sanrt("verify", "record")
    assert status == 0, out
    assert "same, bit for bit" in out


def test_a_plan_and_a_dry_run_tell_of_every_network(sanrt):
    noise(Path("in/a.png"), 50, 50)
    noise(Path("in/b.png"), 34, 34)
    status, out, err = sanrt("plan", "in", "--size", "100x100", "--backend", "native")
    assert (status, err) == (0, "")
    assert "2 to write" in out
    status, out, _ = sanrt("run", "in", "--size", "100x90", "--dry-run")
    assert status == 0
    assert out.count("(90 x 90)") == 2
    assert not Path("in_100x90").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--outscale", "9"], 2, "up to 8"),
        (["--outscale", "1"], 2, "more than 1"),
        (["--outscale", "nan"], 2, "more than 1"),
        (["--outscale", "2", "--size", "90x90"], 2, "leave one out"),
        (["--outscale", "2.5", "--scale", "2"], 2, "take --scale 3"),
        (["--size", "90"], 2, "3840x2160"),
        (["--size", "0x90"], 2, "3840x2160"),
        (["--size", "90x90", "--scale", "2"], 1, "take --scale 3"),
        (["--size", "900x900"], 1, "x8 is the most: --scale 8 without --size makes 240 x 160"),
    ],
)
def test_sizes_that_cannot_be_are_told_in_one_line(sanrt, arguments, status, told):
    noise(Path("a.png"))
    found = sanrt("run", "a.png", "b.png", *arguments)
    assert found[0] == status
    assert told in found[2]
    assert len(found[2].splitlines()) == 1
    assert not Path("b.png").exists()


def test_a_picture_that_fills_the_size_already_is_told_and_left_at_every_run(sanrt):
    noise(Path("in/full.png"), 20, 100)
    noise(Path("in/small.png"), 40, 50)
    for command, *more in ("plan",), ("run", "--dry-run"), ("run",), ("run",):
        status, out, err = sanrt(command, "in", "--size", "100x90", *more)
        assert (status, err) == (0, "")
        assert "in/full.png: 100 x 20 already fills --size 100x90" in out
        assert "left as it is" in out
    assert out.splitlines()[-1] == "0 written, 2 skipped: in_100x90/"
    assert [path.name for path in Path("in_100x90").iterdir()] == ["small.png"]
    assert "1 skipped\n" in sanrt("run", "in/full.png", "--size", "100x90")[1]


def test_pictures_in_an_object_store_need_their_scale_said(tmp_path):
    job = Job(RemotePath("s3://bucket/a.png"), tmp_path / "b.png")
    with pytest.raises(UsageError, match=r"s3://bucket/a\.png: its size is not known .* say `scale` beside size=\("):
        by_scale([job], ModelChoice(None, tmp_path, None, "auto", RunOptions()), ResultSize(size=(9, 9)))
