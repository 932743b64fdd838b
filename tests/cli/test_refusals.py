"""What names, headers and options tell is refused before a model is loaded, by `run` and `plan` alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pyvips

from sanrt.runtime.backends import registry
from sanrt.runtime.runs import refusals
from tests.clips import clip

av = pytest.importorskip("av")


class LoadedError(Exception):
    """A model was loaded."""


@pytest.fixture
def unloadable(monkeypatch) -> None:
    """No model can be loaded."""

    def load(*arguments):
        raise LoadedError

    monkeypatch.setattr(registry, "load_backend", load)
    monkeypatch.setattr(registry, "load_unguarded", load)


def photo(path: Path, width: int = 8, height: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyvips.Image.new_from_array(np.zeros((height, width, 3), np.uint8)).write_to_file(str(path))
    return path


VIDEOS = [
    (["out.webm", "--codec", "h264"], {}, "WebM holds no h264"),
    (["out.mp4", "--codec", "prores"], {}, "MP4 holds no prores"),
    (["out.mp4", "--codec", "h264"], {"codec": "ffv1", "stored": "gray16le"}, "libx264 takes no 16-bit samples"),
    (["out.mp4", "--codec", "hevc"], {"size": (4, 4), "codec": "ffv1"}, "libx265 takes no 8 x 8 yuv420p"),
    (["out.mp4", "--codec", "h264"], {"size": (8200, 2), "codec": "ffv1"}, "libx264 takes no 16400 x 4 yuv420p"),
    (["out.mp4", "--codec", "av1"], {"size": (8200, 64), "codec": "ffv1"}, "libsvtav1 takes no 16400 x 128 yuv420p"),
]


@pytest.mark.parametrize("word", ["run", "plan"])
@pytest.mark.parametrize(("words", "made", "told"), VIDEOS)
def test_a_video_is_refused_before_a_model_is_loaded(sanrt, tmp_path, unloadable, word, words, made, told):
    source = clip(tmp_path / ("in.mkv" if made else "in.mp4"), range(2), **made)
    status, _, err = sanrt(source, *words, word=word)
    assert status == 1
    (line,) = err.splitlines()
    assert f"{words[0]}: " in line
    assert told in line


@pytest.mark.parametrize("kind", ["nvenc", "qsv", "amf", "v4l2m2m"])
def test_a_hardware_encoder_that_cannot_begin_says_what_it_needs_and_what_runs_anywhere(sanrt, tmp_path, unloadable, kind):
    name = f"h264_{kind}"
    if name not in av.codecs_available:
        pytest.skip(f"PyAV has no {name} here")
    source = clip(tmp_path / "in.mp4", range(2))
    output = av.open("/dev/null", "w", format="matroska")
    stream = output.add_stream(name, rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "nv12"
    try:
        stream.codec_context.open()
    except av.FFmpegError:
        pass
    else:
        pytest.skip("it runs here")
    status, _, err = sanrt(source, "out.mp4", "--codec", name)
    assert status == 1
    (line,) = err.splitlines()
    assert f"out.mp4: {name} does not begin here (" in line
    assert "it needs a" in line
    assert line.endswith("; take --codec h264, which runs anywhere")


def test_an_encoder_that_is_of_another_system_is_told_with_what_there_is(sanrt, tmp_path, unloadable):
    if "h264_videotoolbox" in av.codecs_available:
        pytest.skip("it is of this system")
    status, _, err = sanrt(clip(tmp_path / "in.mp4", range(2)), "out.mp4", "--codec", "h264_videotoolbox")
    assert status == 1
    assert err.endswith("out.mp4: PyAV has no encoder h264_videotoolbox here; choose h264, hevc, av1, ffv1, prores\n")


@pytest.mark.parametrize("word", ["run", "plan"])
def test_a_picture_is_refused_before_a_model_is_loaded(sanrt, tmp_path, unloadable, word):
    source = photo(tmp_path / "in.png", width=9000)
    status, _, err = sanrt(source, "out.webp", word=word)
    assert status == 1
    assert "18000" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("word", ["run", "plan"])
def test_a_result_whose_folder_cannot_be_made_is_refused_before_a_model_is_loaded(sanrt, tmp_path, unloadable, word):
    photo(tmp_path / "in" / "sub" / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").touch()
    status, _, err = sanrt("in", "out", word=word)
    assert (status, len(err.splitlines())) == (1, 1)
    assert f"out/sub/a.png: cannot be written, {tmp_path}/out/sub is a file; " in err


def test_what_is_refused_is_told_before_the_rest_is_made(sanrt, tmp_path, unloadable, capfd):
    photo(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "in" / "c.mp4").write_bytes(b"no video at all")
    with pytest.raises(LoadedError):
        sanrt("in", "out")
    err = capfd.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in err] == ["in/b.png", "in/c.mp4"]


def test_headers_of_thousands_of_pictures_are_not_read_twice(sanrt, tmp_path, monkeypatch):
    monkeypatch.setattr(refusals, "PICTURES", 2)
    for name in "abc":
        photo(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "in" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    status, out, err = sanrt("in", "out")
    assert [line.split(":")[1].strip() for line in err.splitlines()] == ["in/b.png", "in/c.png"]
    assert (status, out.splitlines()[-1].split(" in ")[0]) == (1, "1 written, 2 failed")
