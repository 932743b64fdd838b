"""`sanrt run` as a person calls it: whole processes, exit statuses, what lands on disk."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import pyvips
from typer.testing import CliRunner

from sanrt.cli import app, main
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.pictures.transparency import fill_hidden
from tests.commands import command
from tests.mutate import mutated


def noise(path: Path, height=20, width=30, bands=3, seed=0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), np.uint8)
    pyvips.Image.new_from_array(values).write_to_file(str(path))
    return path


def picture(path: Path) -> np.ndarray:
    return pyvips.Image.new_from_file(str(path), access="sequential", fail_on="error").numpy()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_tree_is_upscaled_to_a_tree_and_summed_up(sanrt, tmp_path):
    noise(tmp_path / "in" / "a.png")
    noise(tmp_path / "in" / "sub" / "b.webp", seed=1)
    status, out, err = sanrt("in", "out")
    assert (status, err) == (0, "")
    assert files(tmp_path / "out") == ["a.png", "sub/b.webp"]
    assert picture(tmp_path / "out" / "a.png").shape == (40, 60, 3)
    assert re.search(r"onnxruntime on CPU, ready in [0-9.]+ s\n", out)
    assert out.splitlines()[-1].startswith("2 written in ")


def test_the_written_picture_is_the_networks_output(sanrt, tmp_path, models):
    source = noise(tmp_path / "a.png")
    assert sanrt("a.png", "b.png")[0] == 0
    with load_backend("torch", models / "san_x2.onnx", RunOptions(threads=1)) as backend:
        x = picture(source).transpose(2, 0, 1)[None].astype(np.float32)
        expected = np.rint(backend.infer(x)[0].clip(0, 255)).transpose(1, 2, 0)
    assert np.abs(picture(tmp_path / "b.png") - expected).max() <= 1


def kinds() -> dict[str, tuple[bytes, pyvips.Image]]:
    """Files of every awkward kind, and the RGB pixels that the network must see."""
    rng = np.random.default_rng(5)

    def image(height, width, bands, dtype=np.uint8):
        return pyvips.Image.new_from_array(rng.integers(0, np.iinfo(dtype).max + 1, (height, width, bands), dtype))

    deep = image(9, 14, 3, np.uint16).copy(interpretation="rgb16")
    grey = image(9, 14, 1).copy(interpretation="b-w")
    rgba = image(9, 14, 4)
    palette = rgba.pngsave_buffer(palette=True)
    stored = pyvips.Image.new_from_buffer(palette, "").numpy()
    cmyk = image(16, 24, 4).copy(interpretation="cmyk").jpegsave_buffer(Q=95)
    photo = image(16, 24, 3).icc_transform("srgb", input_profile="srgb").copy()
    photo.set_type(pyvips.GValue.gint_type, "orientation", 6)
    rotated = photo.jpegsave_buffer(Q=95)
    plain = {"one": image(1, 1, 3), "tiny": image(7, 3, 3), "black": image(12, 12, 3) * 0, "long": image(20, 4000, 3)}
    return {
        "deep.png": (deep.pngsave_buffer(), deep),
        "grey.png": (grey.pngsave_buffer(), grey.bandjoin([grey, grey])),
        "palette.png": (palette, pyvips.Image.new_from_array(fill_hidden(stored[..., :3], stored[..., 3]))),
        "cmyk.jpg": (cmyk, pyvips.Image.new_from_buffer(cmyk, "").icc_transform("srgb", input_profile="cmyk")),
        "rotated.jpg": (rotated, pyvips.Image.new_from_buffer(rotated, "").autorot()),
        **{f"{name}.png": (pixels.cast("uchar").pngsave_buffer(), pixels) for name, pixels in plain.items()},
    }


@pytest.mark.parametrize("name", kinds())
def test_pictures_of_every_kind_come_out_as_the_reference_has_them(sanrt, tmp_path, models, name):
    data, seen = kinds()[name]
    (tmp_path / name).write_bytes(data)
    quicker = ["--backend", "torch"] if name == "long.png" else []
    assert sanrt(name, "out.png", *quicker)[0] == 0
    x = seen.numpy().astype(np.float32).transpose(2, 0, 1)[None] * (255 / 65535 if name == "deep.png" else 1)
    height, width = x.shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), (0, max(0, 4 - height)), (0, max(0, 4 - width))), mode="edge")
    with load_backend("torch", models / "san_x2.onnx", RunOptions(threads=1)) as backend:
        y = backend.infer(x.astype(np.float32))[0, :, : 2 * height, : 2 * width].clip(0, 255).transpose(1, 2, 0)
    result = pyvips.Image.new_from_file(str(tmp_path / "out.png"))
    pixels = result.numpy().reshape(2 * height, 2 * width, -1).astype(float)
    if name == "grey.png":
        assert result.bands == 1
        y = y.mean(axis=2, keepdims=True)
    assert result.hasalpha() == (name == "palette.png")
    assert result.format == ("ushort" if name == "deep.png" else "uchar")
    assert np.abs(pixels[..., : y.shape[2]] / (257 if name == "deep.png" else 1) - y).max() < 1.01
    if name == "rotated.jpg":
        assert result.get("icc-profile-data") == pyvips.Image.new_from_buffer(data, "").get("icc-profile-data")
        assert not result.get_typeof("orientation") or result.get("orientation") == 1


def test_a_second_run_does_nothing_unless_told_to(sanrt, tmp_path):
    noise(tmp_path / "in" / "a.png")
    sanrt("in", "out")
    before = (tmp_path / "out" / "a.png").stat().st_mtime_ns
    assert sanrt("in", "out")[1].splitlines()[-1] == "0 written, 1 skipped: out/a.png"
    assert (tmp_path / "out" / "a.png").stat().st_mtime_ns == before
    assert "1 written" in sanrt("in", "out", "--overwrite")[1]
    assert (tmp_path / "out" / "a.png").stat().st_mtime_ns > before


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files(folder)}


def test_a_picture_that_sanrt_did_not_make_is_refused_before_any_work(sanrt, tmp_path):
    noise(tmp_path / "b.png", seed=1)
    noise(tmp_path / "a.png")
    before = digests(tmp_path)
    status, out, err = sanrt("a.png", "b.png")
    assert (status, out) == (2, "")
    assert err.startswith("sanrt: b.png: already there and not made by sanrt, or changed since; nothing was done; ")
    assert "--overwrite" in err
    assert digests(tmp_path) == before
    assert sanrt("a.png", "b.png", "--dry-run")[0] == 2
    assert sanrt("a.png", "b.png", "--overwrite")[0] == 0
    assert picture(tmp_path / "b.png").shape == (40, 60, 3)


def test_a_refusal_needs_no_model(sanrt, tmp_path):
    noise(tmp_path / "a.png"), noise(tmp_path / "b.png", seed=1)
    status, _, err = sanrt("a.png", "b.png", "--models", "none", scale=4)
    assert status == 2
    assert "not made by sanrt" in err
    assert not (tmp_path / "none").exists()


def test_the_place_of_the_results_is_told_the_file_of_one_the_folder_of_several(sanrt, tmp_path):
    for name in "in/a.png", "in/b.png":
        noise(tmp_path / name)
    assert sanrt("in/a.png")[1].splitlines()[-1].endswith(": in/a_x2.png")
    assert sanrt("in/a.png", "in/b.png", "out")[1].splitlines()[-1].endswith(": out/")
    assert sanrt("in/a.png", "in/b.png", "out")[1].splitlines()[-1] == "0 written, 2 skipped: out/"
    (tmp_path / "bad.png").touch()
    assert "bad_x2.png" not in sanrt("bad.png")[1]


def test_pictures_that_are_not_there_are_told_before_a_model_is_loaded(sanrt, tmp_path):
    status, out, err = sanrt("nosuch.jpg", "neither.png", "out")
    assert (status, out) == (1, "")
    assert err == "sanrt: nosuch.jpg, neither.png: cannot be read (No such file or directory)\n"
    noise(tmp_path / "a.png")
    status, out, err = sanrt("nosuch.jpg", "a.png", "out")
    assert (status, err) == (1, "sanrt: nosuch.jpg: cannot be read (No such file or directory)\n")
    assert files(tmp_path / "out") == ["a.png"]


@pytest.mark.parametrize("arguments", [["in"], ["in", "--dry-run"], ["in/a.png"], ["in", "new"]])
def test_a_place_where_nothing_can_be_written_is_refused_once_before_any_work(sanrt, tmp_path, arguments, monkeypatch):
    noise(tmp_path / "in" / "a.png")
    noise(tmp_path / "in" / "b.png")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write everywhere
    status, out, err = sanrt(*arguments)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "allows no new files; nothing was done; name another OUTPUT" in err
    assert files(tmp_path) == ["in/a.png", "in/b.png"]


def test_a_dry_run_claims_nothing_of_pixels_that_it_did_not_decode(sanrt, tmp_path):
    path = noise(tmp_path / "a.jpg", 64, 64)
    path.write_bytes(path.read_bytes()[:-400])
    status, out, _ = sanrt("a.jpg", "b.jpg", "--dry-run")
    assert status == 0
    assert "odd JPEG (no end marker): read only if no pixel is missing" in out
    assert out.splitlines()[-1] == "1 to write, by the headers"
    assert sanrt("a.jpg", "b.jpg")[0] == 1


def test_no_option_of_a_run_replaces_its_own_sources(sanrt, tmp_path):
    for name in "in/a.png", "in/b.png", "out/a.png":
        noise(tmp_path / name, seed=len(name))
    before = digests(tmp_path)
    for arguments in (["in", "in"], ["in/a.png", "in/b.png", "in"], ["in", "out/a.png", "out"], ["in/a.png", "in/a.png"]):
        status, _, err = sanrt(*arguments, "--overwrite")
        assert (status, err.count("\n")) == (2, 1)
    assert digests(tmp_path) == before


def test_a_list_of_pictures_without_an_output_is_refused(sanrt, tmp_path):
    names = [noise(tmp_path / f"{name}.png", seed=seed).name for seed, name in enumerate("abc")]
    before = digests(tmp_path)
    status, _, err = sanrt(*names)
    assert status == 2
    assert "no folder for the results of several pictures: c.png, the last argument, is a file; add a folder" in err
    assert digests(tmp_path) == before


def test_a_folder_of_other_pictures_is_refused_whole_with_some_names_and_the_count(sanrt, tmp_path):
    for seed in range(6):
        noise(tmp_path / "edited" / f"{seed}.png", seed=seed)
    for seed in range(5):
        noise(tmp_path / "originals" / f"{seed}.png", seed=seed + 9)
    (tmp_path / "originals" / "4.png").write_bytes(b"")
    before = digests(tmp_path)
    status, _, err = sanrt("edited", "originals")
    assert status == 2
    assert "originals/0.png, originals/1.png, originals/2.png and 2 more: already there" in err
    assert err.count("\n") == 1
    assert digests(tmp_path) == before


def test_a_result_that_was_edited_stays_while_the_others_of_its_folder_are_made(sanrt, tmp_path):
    for seed, name in enumerate("abcd"):
        noise(tmp_path / "in" / f"{name}.png", seed=seed)
    assert sanrt("in", "out")[0] == 0
    edited, second = tmp_path / "out" / "a.png", tmp_path / "out" / "b.png"
    edited.write_bytes(edited.read_bytes() + b"edited")
    noise(second, seed=9)
    (tmp_path / "out" / "c.png").unlink()
    before = digests(tmp_path)
    status, out, err = sanrt("in", "out")
    assert status == 1
    assert err == f"sanrt: out/b.png: {STAYS[1]}\n"  # a.png still says what it was made from
    assert "1 written, 2 skipped, 1 failed" in out
    status, out, err = sanrt("in", "out", "--self-ensemble")
    assert err == f"sanrt: out/a.png: {STAYS[0]}\nsanrt: out/b.png: {STAYS[1]}\n"
    assert "2 written, 2 failed" in out
    assert {name: digests(tmp_path)[name] for name in ("out/a.png", "out/b.png")} == {
        name: before[name] for name in ("out/a.png", "out/b.png")
    }
    status, _, err = sanrt("in/a.png", "in/c.png", "out", "--self-ensemble")
    assert status == 2
    assert err.startswith("sanrt: out/a.png: already there and changed since sanrt made it; nothing was done; ")


STAYS = [
    f"already there and {what}; left as it is, replace it with --overwrite"
    for what in ("changed since sanrt made it", "not made by sanrt, or changed since")
]


REMEDY = "to enlarge them again, name them or add --include-results\n"


def test_results_in_a_folder_are_not_enlarged_again_unless_named_or_asked_for(sanrt, tmp_path):
    noise(tmp_path / "photos" / "a.png")
    told = "sanrt: passed over: 1 result of sanrt (photos/a_x2.png); " + REMEDY
    assert sanrt("photos/a.png")[0] == 0
    status, out, err = sanrt("photos", "-q")
    assert (status, out, err) == (0, "", told)
    assert files(tmp_path / "photos_x2") == ["a.png"]
    status, out, err = sanrt("photos", "photos", "--suffix", "_large")
    assert "1 written" in out
    assert err == told
    status, _, err = sanrt("photos_x2", "again")
    assert status == 1
    assert err.startswith("sanrt: photos_x2: nothing to enlarge; passed over: 1 result of sanrt (photos_x2/a.png); ")
    assert "1 written" in sanrt("photos_x2", "again", "--include-results")[1]
    assert "1 written" in sanrt("photos_x2/a.png", "again", "--overwrite")[1]
    assert picture(tmp_path / "again" / "a.png").shape == (80, 120, 3)


@pytest.mark.parametrize("first", ["a_x2.png", "a.png"])
def test_two_results_alone_are_no_source_and_output(sanrt, tmp_path, first):
    for seed, name in enumerate("ab"):
        noise(tmp_path / f"{name}.png", seed=seed)
        assert sanrt(f"{name}.png")[0] == 0
    before = digests(tmp_path)
    for words in ([], ["--scale", 2, "--self-ensemble"]):
        status, _, err = sanrt(first, "b_x2.png", *words)
        assert status == 2
        assert err.startswith("sanrt: b_x2.png: already there and the result of another picture; nothing was done; ")
    assert digests(tmp_path) == before
    assert "2 skipped" in sanrt("a.png", "a_x2.png")[1] or "1 skipped" in sanrt("a.png", "a_x2.png")[1]
    noise(tmp_path / "a.png", seed=7)
    assert "a_x2.png: made from another picture, or from this one before it changed; made again" in sanrt("a.png")[1]


def test_what_is_not_made_again_is_not_said_to_be(sanrt, tmp_path):
    noise(tmp_path / "in" / "a.png")
    assert sanrt("in", "out")[0] == 0
    again = "out/a.png: made with other options before; would be made again"
    assert again in sanrt("in", "out", "--self-ensemble", "--dry-run")[1]
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    status, out, _ = sanrt("in", "out", "--self-ensemble")
    assert status == 1
    assert "made again" not in out


def test_an_unknown_backend_is_told_also_where_nothing_is_to_do(sanrt, tmp_path):
    noise(tmp_path / "in" / "a.png")
    assert sanrt("in", "out")[0] == 0
    status, out, err = sanrt("in", "out", "--backend", "foo")
    assert (status, out) == (2, "")
    assert err.startswith("sanrt: unknown backend 'foo'; expected auto, ")


def test_a_dry_run_has_nothing_to_record(sanrt, tmp_path):
    noise(tmp_path / "a.png")
    status, _, err = sanrt("a.png", "b.png", "--dry-run", "--record", "record.jsonl")
    assert status == 2
    assert err == "sanrt: --record: a dry run has no results to record; leave one of them out\n"
    assert files(tmp_path) == ["a.png"]


def test_one_path_alone_gets_its_result_beside_it(sanrt, tmp_path):
    noise(tmp_path / "photos" / "a.png"), noise(tmp_path / "photos" / "sub" / "b.webp")
    assert sanrt("photos/a.png")[0] == 0
    assert picture(tmp_path / "photos" / "a_x2.png").shape == (40, 60, 3)
    (tmp_path / "photos" / "a_x2.png").unlink()
    assert sanrt("photos/")[0] == 0
    assert files(tmp_path / "photos_x2") == ["a.png", "sub/b.webp"]


def test_results_of_another_scale_model_or_option_are_made_again_and_told(models, sanrt, tiny_model, tmp_path):
    tiny_model(3), tiny_model(2, channels=24)
    noise(tmp_path / "in" / "a.png"), noise(tmp_path / "in" / "b.jpg")
    assert "2 written" in sanrt("in", "out")[1]
    for arguments, why in (
        (["--scale", 3], "made at x2 before"),
        (["--model", tiny_model(2, channels=24)], "made at x3 before"),
        ([], "made by another model before"),
        (["--self-ensemble"], "made with other options before"),
        (["--regions", 3], "made with other options before"),
        (["--precision", "fp32"], "made with other options before"),
        (["--tile", 16, "--overlap", 4], "made with other options before"),
    ):
        status, out, err = sanrt("in", "out", *arguments)
        assert (status, err) == (0, "")
        assert f"out/a.png and 1 more: {why}; made again" in out
        assert "2 written" in out
        assert "0 written, 2 skipped" in sanrt("in", "out", *arguments)[1]
    sanrt("in", "out")
    assert "out/b.jpg: made with other options before; made again" in sanrt("in", "out", "--quality", 50)[1]
    assert "0 written, 2 skipped" in sanrt("in", "out", "--quality", 50, "--tiling", "exact", "--memory", "2G")[1]


def test_a_result_of_a_changed_source_is_made_again_whatever_the_times(sanrt, tmp_path):
    source = noise(tmp_path / "in" / "a.png")
    assert sanrt("in", "out")[0] == 0
    noise(source, seed=1)
    os.utime(source, (0, 0))
    assert "out/a.png: made from another picture, or from this one before it changed; made again" in sanrt("in", "out")[1]
    (tmp_path / "out" / "a.png").touch()
    assert "0 written, 1 skipped" in sanrt("in", "out")[1]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.avif"])
def test_results_are_known_again_after_a_copy_without_times(sanrt, tmp_path, name):
    noise(tmp_path / "in" / name, 64, 48)
    assert sanrt("in", "out")[0] == 0
    shutil.copytree(tmp_path / "in", tmp_path / "later", copy_function=shutil.copyfile)
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (0, 0))
    assert "0 written, 1 skipped" in sanrt("later", "copy")[1]
    assert sanrt("later", "new")[0] == 0
    assert digests(tmp_path / "new") == digests(tmp_path / "out")


@pytest.mark.parametrize("edit", ["saved again", "appended", "a tag changed"])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_a_result_that_was_edited_since_is_the_users(sanrt, tmp_path, name, edit):
    noise(tmp_path / "in" / name, 64, 48)
    assert sanrt("in", "out")[0] == 0
    result = tmp_path / "out" / name
    if edit == "saved again":
        image = pyvips.Image.new_from_file(str(result)).copy_memory()
        image.write_to_file(str(result))
    else:
        data = result.read_bytes()
        result.write_bytes(data + b"more" if edit == "appended" else data[:200] + b"tag" + data[203:])
    before = digests(tmp_path)
    status, _, err = sanrt("in", "out", "--self-ensemble")
    assert status == 2
    assert f"out/{name}: already there and " in err
    assert digests(tmp_path) == before


def test_the_result_of_a_result_says_what_made_itself(sanrt, tmp_path):
    noise(tmp_path / "a.jpg")
    assert sanrt("a.jpg", "b.jpg")[0] == 0
    assert sanrt("b.jpg", "c.jpg")[0] == 0
    assert "0 written, 1 skipped" in sanrt("b.jpg", "c.jpg")[1]
    assert (tmp_path / "c.jpg").read_bytes().count(b"sanrt-result:") == 1
    assert "made from another picture" in sanrt("a.jpg", "c.jpg")[1]


@pytest.mark.parametrize("place", ["a folder", "a link to nothing", "a pipe"])
def test_whatever_else_is_in_a_results_place_is_left_there(sanrt, tmp_path, place):
    noise(tmp_path / "in" / "a.png")
    result = tmp_path / "out" / "a.png"
    result.parent.mkdir()
    {
        "a folder": result.mkdir,
        "a link to nothing": lambda: result.symlink_to("nowhere"),
        "a pipe": lambda: os.mkfifo(result),
    }[place]()
    status, _, err = sanrt("in", "out")
    assert status == 2
    assert "out/a.png: already there and not made by sanrt" in err
    assert os.path.lexists(result)


def test_an_empty_output_is_refused(sanrt, tmp_path):
    noise(tmp_path / "in" / "a.png")
    status, _, err = sanrt("in", "")
    assert status == 2
    assert "an empty name" in err
    assert files(tmp_path) == ["in/a.png"]


def test_a_dry_run_says_what_would_be_done_and_touches_nothing(sanrt, tmp_path):
    noise(tmp_path / "in" / "a.png")
    status, out, _ = sanrt("in", "out", "--dry-run", "--suffix", "_x2", "--format", "webp")
    assert status == 0
    assert "in/a.png -> out/a_x2.webp (60 x 40)" in out
    assert not (tmp_path / "out").exists()


def test_without_a_model_the_bundled_weights_run_and_none_is_made(sanrt, tmp_path):
    noise(tmp_path / "in" / "a.png")
    status, out, _ = sanrt("in", "out", "--models", "none", scale=4)
    assert status == 0
    assert "bundled weights san_x4: SAN x4" in out
    assert pyvips.Image.new_from_file(str(tmp_path / "out" / "a.png")).width == 120
    assert not (tmp_path / "none").exists()


def test_options_of_format_quality_and_transparency_reach_the_file(sanrt, tmp_path):
    noise(tmp_path / "in" / "a.png", 64, 64, bands=4)
    status, _, err = sanrt("in", "out", "--format", "jpeg")
    assert status == 1
    assert err.count("\n") == 1
    assert "transparency" in err
    for quality in (30, 90):
        assert sanrt("in", f"q{quality}", "--format", "jpeg", "--flatten", "#102030", "--quality", quality)[0] == 0
    sizes = [(tmp_path / f"q{quality}" / "a.jpg").stat().st_size for quality in (30, 90)]
    assert sizes[1] > 1.5 * sizes[0]


@pytest.mark.parametrize(("name", "ending"), [("jpg", "jpg"), ("JPEG", "jpg"), ("tif", "tif"), ("Webp", "webp")])
def test_a_format_may_be_named_by_its_ending_and_in_capitals(sanrt, tmp_path, name, ending):
    noise(tmp_path / "in" / "a.png")
    assert sanrt("in", "out", "--format", name)[0] == 0
    assert files(tmp_path / "out") == [f"a.{ending}"]


def test_self_ensemble_and_tiles_change_the_picture_and_are_repeatable(sanrt, tmp_path):
    noise(tmp_path / "a.png", 40, 50)
    results = {}
    for name, options in {"plain": [], "tiles": ["--tile", 32, "--overlap", 8], "plus": ["--self-ensemble"]}.items():
        assert sanrt("a.png", f"{name}.png", *options)[0] == 0
        results[name] = picture(tmp_path / f"{name}.png").astype(int)
        assert results[name].shape == (80, 100, 3)
    assert np.abs(results["plain"] - results["tiles"]).max() > 0
    assert np.abs(results["plain"] - results["plus"]).max() > 0
    assert sanrt("a.png", "again.png", "--tile", 32, "--overlap", 8)[0] == 0
    assert np.array_equal(picture(tmp_path / "again.png"), results["tiles"])


@pytest.mark.parametrize(
    "wrong",
    [
        ["--tile", "3"],
        ["--format", "bmp"],
        ["--format", "gif"],
        ["--quality", "0"],
        ["--flatten", "pinkish"],
        ["--threads", "0"],
    ],
)
def test_wrong_usage_is_exit_status_2(tmp_path, wrong):
    noise(tmp_path / "a.png")
    assert CliRunner().invoke(app, ["run", str(tmp_path / "a.png"), str(tmp_path / "b.png"), *wrong]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "told", "expected"),
    [
        (["in", "out", "--backend", "abacus"], "unknown backend 'abacus'", 2),
        (["in", "out", "--overlap", "40", "--tile", "64"], "overlap 40", 2),
        (["in", "out", "--tiling", "whole", "--tile", "64"], "tiles of 64 pixels with whole tiling", 2),
        (["in", "out", "--tile", "3"], "--tile: expected 16 or more; see `sanrt run --help`", 2),
        (["in", "out", "--quality", "200"], "--quality: expected 100 or less; see", 2),
        (["in", "out", "--quality", "good"], "--quality: expected a whole number; see", 2),
        (["in", "out", "--precision", "fp7"], "--precision: precision 'fp7': expected fp32", 2),
        (["in", "out", "--regions", "\N{SUPERSCRIPT TWO}"], "expected auto or a number from 1 to 1000", 2),
        (["in", "out", "--regions", "0"], "expected auto or a number from 1 to 1000", 2),
        (["in", "out", "--memory", "4X"], "--memory: 4X: expected a number of bytes such as 4G", 2),
        (["in", "out", "--nothing"], "there is no option --nothing", 2),
        (["in", "out", "--workers", "2"], "--workers 2: changes nothing without --ray", 2),
        (["in", "out", "--quiet", "--verbose"], "--quiet: hides", 2),
        (["in", "out", "--explain-tiles", "--record", "r.jsonl"], "--explain-tiles: writes no results", 2),
        (["in", "out", "--lossless"], "--lossless: changes nothing in png files", 2),
        (["in", "out", "--quality", "50", "--format", "tif"], "--quality: changes nothing in tiff files", 2),
        ([], "INPUTS is missing", 2),
        (["in", "out", "--model", "missing.onnx"], "missing.onnx", 1),
        (["in", "out", "--model", "in/a.png"], "in/a.png", 1),
        (["nothing", "out"], "nothing", 1),
        (["in", "in"], "--suffix", 2),
    ],
)
def test_errors_are_one_line_with_status_1_or_2_for_wrong_usage(sanrt, tmp_path, arguments, told, expected):
    noise(tmp_path / "in" / "a.png")
    status, _, err = sanrt(*arguments)
    assert status == expected
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_scale_than_asked_for_is_refused(sanrt, tmp_path, tiny_model):
    noise(tmp_path / "a.png")
    status, _, err = sanrt("a.png", "b.png", "--model", tiny_model(3), scale=2)
    assert status == 2
    assert "is for x3, but --scale 2 was asked for" in err


def claims(width: int, height: int) -> bytes:
    """A PNG with a right header for this size and next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.fixture
def bad(tmp_path) -> Path:
    """A folder with one good picture among all kinds of bad ones."""
    folder = tmp_path / "in"
    whole = noise(folder / "good.png", 64, 64).read_bytes()
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("this is no picture\n" * 100)
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "huge.png").write_bytes(claims(100_000, 100_000))
    (folder / "large.png").write_bytes(claims(20_000, 20_000))
    (folder / "folder.png").mkdir()
    (folder / "unreadable.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    return folder


def test_bad_pictures_are_a_line_each_and_the_good_one_is_written(sanrt, bad, tmp_path):
    status, out, err = sanrt("in", "out")
    assert status == 1
    names = ["empty", "huge", "large", "pipe", "text", "truncated", "unreadable"]
    assert sorted(line.split(":")[1].strip() for line in err.splitlines()) == [f"in/{name}.png" for name in names]
    assert "Traceback" not in err
    assert "100000" in err
    assert files(tmp_path / "out") == ["good.png"]
    assert picture(tmp_path / "out" / "good.png").shape == (128, 128, 3)
    assert out.splitlines()[-1].startswith(f"1 written, {len(names)} failed in ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_told(sanrt, tmp_path):
    noise(tmp_path / "in" / "a.png").chmod(0)
    status, _, err = sanrt("in", "out")
    assert status == 1
    assert "in/a.png: cannot be read (Permission denied)" in err


def test_a_killed_run_is_completed_by_the_next_without_doing_anything_twice(models, tmp_path):
    count = 12
    for number in range(count):
        noise(tmp_path / "in" / f"{number:02}.png", 100, 100, seed=number)
    out = tmp_path / "out"
    arguments = command(models, tmp_path / "in", out, "--threads", 1)
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        until(lambda: len(list(out.glob("*.png"))) >= 3, process)
        process.kill()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 3 <= len(done) < count, "the kill came too late to show anything"
    for name in done:
        assert picture(out / name).shape == (200, 200, 3)
    again = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert again.stdout.splitlines()[-1].startswith(f"{count - len(done)} written, {len(done)} skipped")
    assert files(out) == [f"{number:02}.png" for number in range(count)]
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done


def test_an_interrupt_ends_the_run_with_130_and_nothing_half_written(models, tmp_path):
    for number in range(12):
        noise(tmp_path / "in" / f"{number:02}.png", 100, 100, seed=number)
    out = tmp_path / "out"
    arguments = command(models, tmp_path / "in", out, "--threads", 1)
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: len(list(out.glob("*.png"))) >= 2, process)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert err.endswith("so far; the same command goes on from here\n")
    assert len(err.splitlines()) == 1
    left = files(out)
    assert 2 <= len(left) < 12, "the interrupt came too late to show anything"
    assert err.startswith(f"sanrt: interrupted: {len(left)} written in ")
    for name in left:
        assert picture(out / name).shape == (200, 200, 3)


def until(true, process: subprocess.Popen, seconds: float = 60) -> None:
    """Wait for a condition while the process lives."""
    for _ in range(int(seconds / 0.01)):
        if true():
            return
        assert process.poll() is None, "the process ended early"
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def test_damaged_pictures_never_stop_a_run(sanrt, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in mutated(120, seed=7):
        (folder / name).write_bytes(data)
    status, _, err = sanrt("in", "out", "--format", "png")
    intact = {path.stem for path in folder.glob("*_intact_*") if "float" not in path.name}
    assert status == 1
    assert intact, "no undamaged picture among them"
    assert intact <= {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert "Traceback" not in err
    assert "unexpected" not in err
    assert all(line.startswith("sanrt: in/") for line in err.splitlines())
    assert len(err.splitlines()) + len(files(tmp_path / "out")) == 120


def test_pictures_that_sanrt_does_not_read_are_told_also_to_those_who_want_errors_alone(sanrt, tmp_path):
    noise(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.psd").touch()
    for words in ([], [], ["-q"]):
        status, _, err = sanrt("in", "out", *words)
        assert status == 0
        assert err == "sanrt: passed over: 1 Photoshop file (in/b.psd); convert them to PNG, TIFF or JPEG\n"


def test_the_bundled_weights_run_and_models_of_other_weights_are_named(models, tiny_model, tmp_path, monkeypatch, capfd):
    (tmp_path / "models").mkdir()
    for name in ("mine", "san_x2"):
        (tmp_path / "models" / f"{name}.onnx").write_bytes(tiny_model(2).read_bytes())
    noise(tmp_path / "a.png", 8, 8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sanrt", "run", "a.png", "b.png", "--backend", "native"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert (
        "bundled weights san_x4 (there are others, which must be named: models/mine.onnx): SAN x4" in capfd.readouterr().out
    )


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_type_that_is_a_models_own_is_told_with_the_command_that_makes_one(sanrt, tmp_path, kind):
    noise(tmp_path / "a.png")
    status, _, err = sanrt("a.png", "b.png", "--precision", kind)
    assert status == 2
    assert f"`sanrt build --{kind}` makes a model that computes in it; expected fp32, fp16, bf16, int16" in err
    assert err.count("\n") == 1
