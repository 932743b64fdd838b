"""Standard streams: pictures in pipes, names that no terminal shows, a full disk, help and version."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pyvips
from typer.testing import CliRunner

from sanrt.cli import app
from sanrt.cli.request import colour, memory_size
from sanrt.cli.streams import printable

STRICT = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "OMP_NUM_THREADS": "1"}
"""As Python is under en_US.UTF-8 and the like."""


@pytest.fixture
def sanrt(tiny_model, tmp_path):
    """Calls `sanrt COMMAND ...` as a process in `tmp_path`; `run` and `plan` with the tiny model."""

    def call(command, *arguments, **more):
        named = ["--model", tiny_model(2), "--threads", "1", "--backend", "native"] if command in ("run", "plan") else []
        words = [sys.executable, "-m", "sanrt", command, *arguments, *named]
        return subprocess.run(words, cwd=tmp_path, env=STRICT, timeout=300, **{"capture_output": True, **more})

    return call


def encoded(ending=".png") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3)).astype(np.uint8)
    return pyvips.Image.new_from_array(pixels).write_to_buffer(ending)


def test_a_picture_goes_through_pipes(sanrt, tmp_path):
    done = sanrt("run", "-", input=encoded())
    assert (done.returncode, done.stderr) == (0, b"")
    assert pyvips.Image.new_from_buffer(done.stdout, "").get("vips-loader").startswith("pngload")
    (tmp_path / "a.jpg").write_bytes(encoded(".jpg"))
    done = sanrt("run", "a.jpg", "-", "--format", "webp")
    assert pyvips.Image.new_from_buffer(done.stdout, "").width == 40
    assert done.stdout[8:12] == b"WEBP"
    assert sanrt("run", "-", "b.png", input=encoded()).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "b.png"]


def test_a_pipe_that_holds_no_picture_is_told_by_its_name(sanrt):
    done = sanrt("run", "-", input=b"not a picture")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"sanrt: standard input: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("paths", [["-", "a.png", "out"], ["a.png", "-", "out"]])
def test_a_pipe_among_several_inputs_is_wrong_usage(sanrt, paths):
    assert sanrt("run", *paths, input=b"").returncode == 2


def test_names_that_are_no_text_are_done_and_told_in_escapes(sanrt, tmp_path):
    (tmp_path / "in").mkdir()
    for name in (b"caf\xe9.png", b"a\x1b[31m\n.png"):
        Path(tmp_path, "in", os.fsdecode(name)).write_bytes(encoded())
    done = sanrt("run", "in", "out", "-v", "--record", "r.jsonl")
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert b"caf\\xe9.png" in done.stdout
    assert b"a\\x1b[31m\\n.png" in done.stdout
    for again in (sanrt("verify", "r.jsonl"), sanrt("plan", "in", "more/")):
        assert again.returncode == 0, again.stderr
        assert b"\x1b" not in again.stdout


def test_printable_leaves_what_people_read():
    assert printable("Füße 写真 a.png") == "Füße 写真 a.png"
    assert printable("a\udce9\x07\u202e.png") == r"a\xe9\x07\u202e.png"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["doctor"], ["--version"], ["run", "a.png", "b.png"]])
def test_a_full_disk_behind_stdout_is_told_in_one_line(sanrt, tmp_path, words):
    (tmp_path / "a.png").write_bytes(encoded())
    with Path("/dev/full").open("wb") as full:
        done = sanrt(*words, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert done.returncode == 1
    assert done.stderr == b"sanrt: standard output: cannot be written (No space left on device); free some space\n"


@pytest.mark.parametrize("words", [["-h"], ["run", "-h"], ["plan", "-h"]])
def test_help_has_a_short_name_everywhere(words):
    assert CliRunner().invoke(app, words).output.startswith("Usage: ")


def test_version_and_completion_are_there():
    import sanrt

    assert CliRunner().invoke(app, ["--version"]).output == f"sanrt {sanrt.__version__}\n"
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output


def test_the_help_of_run_begins_with_the_everyday_options():
    text = CliRunner().invoke(app, ["run", "--help"]).output
    places = [
        text.index(word) for word in ("\nOptions:", "--format", "\nNetwork:", "--backend", "\nLarge pictures:", "--tile ")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("white", (255, 255, 255)), ("Red", (255, 0, 0)), ("#fff", (255, 255, 255)), ("#1a2B3c", (0x1A, 0x2B, 0x3C))],
)
def test_colours_are_taken_as_people_write_them(text, expected):
    assert colour(text) == expected


@pytest.mark.parametrize("text", ["4G", "4GB", "4 GiB", "4g", "4.0G", "4096M", "4294967296"])
def test_sizes_are_taken_as_people_write_them(text):
    assert memory_size(text) == 4 * 2**30


def test_a_video_without_a_name_has_the_weights_of_one_that_has(tmp_path):
    clips = pytest.importorskip("tests.clips")
    source = clips.clip(tmp_path / "in.mp4", range(3))

    def bundled(*arguments):
        command = [sys.executable, "-m", "sanrt", "run", *arguments, "--models", "none", "--backend", "native"]
        done = subprocess.run(command, cwd=tmp_path, input=source.read_bytes(), capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout

    bundled("in.mp4", "named.mp4", "--scale", "2")
    told = bundled("-", "out.mp4", "--scale", "2")
    assert b"1 of 1 videos: compressed video, through the weights for photographs" in told
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "named.mp4").read_bytes()
    assert b"san_x2_photo" in bundled("-", "out.webp", "--size", "60x60")
    image = pyvips.Image.new_from_file(str(tmp_path / "out.webp"), n=-1)
    assert (image.get("n-pages"), image.width) == (3, 60)


def test_a_video_to_standard_output_is_told_what_to_do(sanrt, tmp_path):
    clips = pytest.importorskip("tests.clips")
    done = sanrt("run", "-", "-", input=clips.clip(tmp_path / "in.mp4", range(2)).read_bytes())
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"sanrt: -: a video on standard input; name OUTPUT, such as out.mp4, or send raw frames (--y4m)\n"
    done = sanrt("run", "-", input=b"YUV4MPEG2 W4 H4 F25:1 Ip C420\nFRAME\n" + bytes(24))
    assert (done.returncode, done.stderr) == (2, b"sanrt: -: raw frames (YUV4MPEG2) on standard input; add --y4m\n")


def test_an_animation_goes_to_standard_output_as_one(sanrt, tmp_path):
    frames = [pyvips.Image.black(12, 10, bands=3) + colour for colour in (40, 90, 200)]
    image = pyvips.Image.arrayjoin([frame.cast("uchar").copy(interpretation="srgb") for frame in frames], across=1).copy()
    image.set_type(pyvips.GValue.gint_type, "page-height", 10)
    image.write_to_file(str(tmp_path / "in.gif"))
    for arguments in ("run", "-", "-"), ("run", str(tmp_path / "in.gif"), "-"):
        done = sanrt(*arguments, input=(tmp_path / "in.gif").read_bytes())
        assert (done.returncode, done.stderr, done.stdout[:6]) == (0, b"", b"GIF89a")
        assert pyvips.Image.new_from_buffer(done.stdout, "", n=-1).get("n-pages") == 3
