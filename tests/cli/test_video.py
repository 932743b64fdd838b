"""`sanrt run` on videos: what results hold, read by FFmpeg, against what their sources hold."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import pyvips

from sanrt.files import file_digest
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.pictures.provenance import Provenance, SourceIdentity
from sanrt.runtime.pictures.storage import RemotePath
from sanrt.runtime.runs import record, videos
from sanrt.runtime.runs.suitable_weights import suits_photo
from sanrt.runtime.video import joining, segments
from sanrt.runtime.video.container import ffmpeg, look, picture_of
from sanrt.runtime.video.container import frames as source_frames
from sanrt.runtime.video.frames import Conversion, PixelFormat
from tests.clips import clip, frames, picture, tags, times

av = pytest.importorskip("av")

LOSSLESS = {"codec": "ffv1", "stored": "yuv420p"}
VARIABLE = [0, 1, 4, 9, 10, 22, 23, 24, 40, 41, 42, 60]
TURNED = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
"""A display matrix: a quarter turn."""


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
@pytest.mark.parametrize("variable", [False, True])
def test_frames_times_and_tags_are_the_sources(sanrt, tmp_path, name, variable):
    shown = {"times": VARIABLE, "time_base": Fraction(1, 50)} if variable else {"rate": Fraction(30000, 1001)}
    if name == "a.mkv":
        shown = {"times": VARIABLE, "time_base": Fraction(1, 1000)} if variable else {"rate": Fraction(25)}
    source = clip(tmp_path / "in" / name, tags=(1, 1, 1, 1), aspect=Fraction(4, 3), **shown)
    status, out, err = sanrt(source, name)
    assert (status, err) == (0, "")
    assert times(tmp_path / name) == times(source)
    assert tags(tmp_path / name) == tags(source) == (1, 1, 1, 1)
    with av.open(str(tmp_path / name)) as file:
        stream = file.streams.video[0]
        assert (stream.width, stream.height) == (64, 48)
        assert stream.sample_aspect_ratio == Fraction(4, 3)
        assert stream.codec_context.name == "h264"
        assert len(list(file.decode(stream))) == 12
    assert "frames/s" in out
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("codec", "stored", "colours"),
    [
        ("libx265", "yuv420p10le", (9, 1, 9, 16)),
        ("libx264", "yuv420p", (6, 2, 1, 13)),
        ("libx264", "yuv444p", (5, 1, 5, 6)),
        ("ffv1", "yuv422p10le", (1, 1, 1, 1)),
        ("ffv1", "gray", (2, 1, 2, 2)),
        ("prores_ks", "yuv422p10le", (1, 1, 1, 1)),
        ("libsvtav1", "yuv420p10le", (9, 1, 9, 18)),
        ("libvpx-vp9", "yuv420p", (1, 1, 1, 1)),
    ],
)
def test_depth_subsampling_and_colours_are_kept(sanrt, tmp_path, codec, stored, colours):
    ending = ".mov" if codec == "prores_ks" else ".webm" if codec == "libvpx-vp9" else ".mkv"
    options = {"x265-params": "log-level=error:bframes=0"} if codec == "libx265" else {}
    source = clip(
        tmp_path / f"in{ending}", range(3), codec=codec, stored=stored, options=options, tags=colours, size=(64, 64)
    )
    status, _, err = sanrt(source, f"out{ending}")
    assert (status, err) == (0, "")
    with av.open(str(tmp_path / f"out{ending}")) as file:
        assert file.streams.video[0].format.name.replace("yuvj", "yuv") == stored
    assert tags(tmp_path / f"out{ending}") == tags(source) == colours


def test_sound_subtitles_chapters_metadata_rotation_and_fonts_are_copied(sanrt, tmp_path):
    beside = {"metadata": {"title": "T", "artist": "somebody", "camera": "x"}, "chapters": True, "matrix": TURNED}
    mkv = clip(tmp_path / "in.mkv", sound="flac", subtitles="srt", attachment=True, **beside)
    mp4 = clip(tmp_path / "in.mp4", sound="aac", **beside)
    assert sanrt(mkv, "out.mkv")[0] == sanrt(mp4, "out.mp4")[0] == 0
    for name in ("mkv", "mp4"):
        with av.open(f"in.{name}") as source, av.open(f"out.{name}") as result:
            assert [each.type for each in result.streams] == [each.type for each in source.streams]
            assert [each.language for each in result.streams] == [each.language for each in source.streams]
            assert [each["metadata"] for each in result.chapters()] == [{"title": "first"}, {"title": "second"}]
            assert [each["start"] * each["time_base"] for each in result.chapters()] == [0, Fraction(1, 5)]
            kept = {
                key.lower(): value
                for key, value in source.metadata.items()
                if key.lower() != "encoder" and "brand" not in key and key != "minor_version"
            }
            assert kept.items() <= {key.lower(): value for key, value in result.metadata.items()}.items()
            assert "camera" in kept
            assert next(result.decode(video=0)).rotation == next(source.decode(video=0)).rotation != 0
        assert packets(f"out.{name}") == packets(f"in.{name}")
    with av.open("out.mkv") as result:
        assert [(each.name, each.data) for each in result.streams.attachments] == [("font.ttf", b"not a font at all")]


def packets(path: str) -> list[tuple]:
    """All that is not pictures: where, when, how long, and the bytes."""
    with av.open(path) as file:
        streams = [each for each in file.streams if each.type in ("audio", "subtitle")]
        found = [
            (each.stream_index, each.pts * each.time_base, (each.duration or 0) * each.time_base, bytes(each))
            for each in file.demux(*streams)
            if each.pts is not None
        ]
    assert len(found) > 3
    return sorted(found)


def test_what_a_container_does_not_hold_is_told(sanrt, tmp_path):
    source = clip(tmp_path / "in.mkv", range(3), subtitles="srt", attachment=True)
    status, out, _ = sanrt(source, "out.mp4")
    assert status == 0
    assert "out.mp4: left out: subtitle stream 1 (subrip), which MP4 does not hold" in out
    assert "out.mp4: left out: attachment stream 2" in out
    source = clip(tmp_path / "b.mp4", range(3), rate=Fraction(30000, 1001))
    status, out, _ = sanrt(source, "b.mkv")
    assert status == 0
    assert "times of frames are rounded to milliseconds, in which Matroska counts" in out
    source = clip(tmp_path / "even.mp4", range(3), rate=Fraction(25))
    assert "rounded" not in sanrt(source, "even.mkv")[1]  # 1/12800 s is the unit, 40 ms each is exact
    source = clip(tmp_path / "c.mp4", range(3), sound="aac")
    status, _, err = sanrt(source, "c.webm")
    assert status == 1
    assert "WebM holds no aac sound" in err
    assert not (tmp_path / "c.webm").exists()


def test_lossless_frames_are_what_run_makes_of_the_decoded_frames(sanrt, tmp_path):
    source = clip(tmp_path / "in.mkv", range(4), tags=(6, 1, 6, 6), **LOSSLESS)
    assert sanrt(source, "out.mkv")[0] == 0
    info = look(source)
    for number, frame in enumerate(source_frames(info)):
        pyvips.Image.new_from_array(picture_of(frame.frame, info)).write_to_file(f"{number}.png")
        assert sanrt(f"{number}.png", f"{number}_large.png")[0] == 0
        large = pyvips.Image.new_from_file(f"{number}_large.png").numpy()
        planes = Conversion(PixelFormat(8, (2, 2)), 6, False).from_picture(large)
        assert all(np.array_equal(a, b) for a, b in zip(planes, frames(tmp_path / "out.mkv")[number], strict=True))


def test_rgb_stays_rgb_where_nothing_is_lost(sanrt, tmp_path):
    source = clip(tmp_path / "in.mkv", range(2), codec="ffv1", stored="bgr0", tags=(0, 2, 2, 2))
    assert sanrt(source, "out.mkv")[0] == 0
    pyvips.Image.new_from_array(picture(1)).write_to_file("1.png")
    sanrt("1.png", "1_large.png")
    large = pyvips.Image.new_from_file("1_large.png").numpy()
    with av.open("out.mkv") as file:
        found = [frame.reformat(format="rgb24").to_ndarray() for frame in file.decode(video=0)]
    assert np.array_equal(found[1], large)


def test_grey_that_says_no_range_is_full(sanrt, tmp_path):
    source = clip(tmp_path / "in.mkv", range(2), codec="ffv1", stored="gray", size=(64, 64))
    info = look(source)
    stored = np.array([[0, 8, 255]], np.uint8)
    assert np.array_equal(info.conversion.to_rgb([stored])[..., 0], stored)
    for codec, expected in (("ffv1", (2, 2, 2, 2)), ("av1", (6, 1, 2, 2))):
        assert sanrt(source, f"{codec}.mkv", "--codec", codec)[0] == 0
        assert tags(tmp_path / f"{codec}.mkv") == expected


def test_rgb_of_more_bits_than_an_mp4s_encoder_takes_is_refused_before_any_work(sanrt, tmp_path):
    source = clip(tmp_path / "in.mkv", range(2), codec="ffv1", stored="gbrp12le", tags=(0, 2, 2, 2))
    status, _, err = sanrt(source, "out.mp4", "--codec", "h264")
    assert status == 1
    assert "libx264 takes no 12-bit samples" in err
    assert sanrt(source, "out.mp4", "--codec", "hevc")[0] == 0
    with av.open("out.mp4") as file:
        assert file.streams.video[0].format.name == "yuv420p12le"


def test_equal_frames_are_computed_once(sanrt, tmp_path):
    source = clip(tmp_path / "in.mkv", [0, 0, 0, 1, 1, 2, 0, 0], **LOSSLESS)
    status, out, _ = sanrt(source, "out.mkv")
    assert status == 0
    assert "out.mkv: 4 of 8 frames (50 %) equal the one before and were not computed again" in out
    found = frames(tmp_path / "out.mkv")
    assert np.array_equal(found[0][0], found[2][0])
    assert np.array_equal(found[0][0], found[7][0])
    assert not np.array_equal(found[2][0], found[3][0])


def killed_run(models, source, destination, wait_for, tmp_path):
    """Start a run in a process of its own and kill it once so many segments are there."""
    arguments = ["--models", models, "--scale", 2, "--backend", "onnxruntime", source, destination]
    process = subprocess.Popen([sys.executable, "-m", "sanrt", "run", *map(str, arguments)], cwd=tmp_path)
    give_up = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < give_up:
        if len(list(tmp_path.glob(".out*.work/*.json"))) >= wait_for:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_run_goes_on_and_gives_the_same_file(sanrt, models, tmp_path):
    source = clip(tmp_path / "in.mp4", range(40), rate=Fraction(1), sound="aac")
    assert sanrt(source, "whole.mp4")[0] == 0
    killed_run(models, source, "out.mp4", 3, tmp_path)
    assert not (tmp_path / "out.mp4").exists()
    (folder,) = hidden(tmp_path)
    there = len(list((tmp_path / folder).glob("*.json")))
    (tmp_path / folder / ".000099.mkv.sanrt-0123456789abcdef.partial").write_bytes(b"half")
    (tmp_path / ".out.mp4.sanrt-0123456789abcdef.partial").write_bytes(b"half")
    status, out, err = sanrt(source, "out.mp4")
    assert (status, err) == (0, "")
    assert f"out.mp4: {4 * there} of 40 frames were there of an earlier run" in out
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "ffv1", "prores"])
def test_segments_join_to_the_frames_of_one_stream(sanrt, tmp_path, codec):
    name = "out.mov" if codec == "prores" else "out.mkv"
    source = clip(tmp_path / "in.mp4", range(10), rate=Fraction(1), size=(64, 64))
    status, _, err = sanrt(source, name, "--codec", codec)
    assert (status, err) == (0, "")
    assert times(tmp_path / name) == times(source) == list(range(10))
    with av.open(name) as file:
        shown = [frame.pts * frame.time_base for frame in file.decode(video=0)]
        assert file.streams.video[0].codec_context.codec.canonical_name == codec
    assert shown == times(source)
    with av.open(name) as file:
        decoded = [packet.dts for packet in file.demux(video=0) if packet.dts is not None]
    assert decoded == sorted(set(decoded))


def test_what_sanrt_made_is_known_and_nothing_else_is_replaced(sanrt, tmp_path):
    source = clip(tmp_path / "in.mkv", range(3))
    for name in ("out.mkv", "out.mp4"):
        assert sanrt(source, name)[0] == 0
        written = (tmp_path / name).read_bytes()
        assert "1 skipped" in sanrt(source, name)[1]
        status, out, _ = sanrt(source, name, "--crf", 30)
        assert (status, "made with other options before; made again" in out) == (0, True)
        assert len((tmp_path / name).read_bytes()) < len(written)
        assert "1 skipped" in sanrt(source, name, "--crf", 30)[1]
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-700] + bytes(700))
        for _ in range(2):
            status, _, err = sanrt(source, name)
            assert status
            assert "not made by sanrt" in err
            clip(tmp_path / name, range(2))
        assert sanrt(source, name, "--overwrite")[0] == 0
        assert (tmp_path / name).read_bytes() == written


def test_folders_mix_pictures_and_videos(sanrt, tmp_path):
    clip(tmp_path / "in" / "a.mkv", range(2))
    clip(tmp_path / "in" / "sub" / "b.avi", range(2), codec="mpeg4")
    pyvips.Image.new_from_array(picture(1)).write_to_file(str(tmp_path / "in" / "c.png"))
    status, out, err = sanrt("in", "out")
    assert (status, err) == (0, "")
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert found == ["a.mkv", "c.png", "sub/b.mkv"]
    assert "3 written" in out
    assert "3 skipped" in sanrt("in", "out")[1]
    assert times(tmp_path / "out" / "sub" / "b.mkv") == times(tmp_path / "in" / "sub" / "b.avi")


def test_sizes_between_the_networks_are_even(sanrt, tmp_path):
    source = clip(tmp_path / "in.mkv", range(2))
    assert sanrt(source, "out.mkv", "--outscale", 1.6)[0] == 0
    with av.open("out.mkv") as file:
        stream = file.streams.video[0]
        assert (stream.width, stream.height) == (50, 38)


def truncated(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def only_sound(path: Path) -> Path:
    whole = clip(path.with_name("with.mkv"), range(2), sound="flac")
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.pts is not None:
                packet.stream = stream
                out.mux(packet)
    return path


def empty_video(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height = 32, 24
        out.start_encoding()
    return path


BAD = {
    "truncated.mp4": (lambda path: truncated(clip(path), 0.5), "truncated"),
    "truncated.mkv": (lambda path: truncated(clip(path), 0.5), "truncated"),
    "truncated.avi": (lambda path: truncated(clip(path), 0.9), "truncated"),
    "empty.mp4": (lambda path: path.write_bytes(b""), "empty file"),
    "noise.mp4": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "damaged or no video"),
    "text.mkv": (lambda path: path.write_text("not a video\n" * 99), "damaged or no video"),
    "picture.mp4": (
        lambda path: path.write_bytes(pyvips.Image.black(8, 8).pngsave_buffer()),
        "a PNG picture by its content",
    ),
    "sound.mkv": (only_sound, "no video stream in it, only audio"),
    "none.mkv": (empty_video, "no frames"),
    "interlaced.mkv": (lambda path: clip(path, options={"flags": "+ildct+ilme", "x264-params": "tff=1"}), "interlaced"),
    "alpha.mkv": (lambda path: clip(path, codec="ffv1", stored="yuva420p"), "transparency"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_enlarged_is_one_line_and_leaves_nothing(sanrt, tmp_path, name):
    make, expected = BAD[name]
    make(tmp_path / name)
    before = sorted(path.name for path in tmp_path.iterdir())
    status, _, err = sanrt(name, "out.mkv")
    assert status == 1
    assert len(err.splitlines()) == 1
    assert expected in err
    assert name in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["out.webm", "--codec", "h264"], "WebM holds no h264"),
        (["out.mp4", "--codec", "ffv1"], "MP4 holds no ffv1"),
        (["out.mkv", "--codec", "h264"], "libx264 takes no 12-bit samples"),
        (["out.mkv", "--codec", "h265"], "expected h264, hevc, av1, ffv1, prores"),
        (["out.mkv", "--codec", "hevc", "--crf", "60"], "expected 0 to 51"),
        (["out.mkv", "--codec", "ffv1", "--crf", "6"], "has no such thing"),
        (["out.mkv", "--codec", "hevc", "--preset", "8"], "expected one of ultrafast"),
        (["out.png"], "the result of a video is one"),
        (["out.mkv", "--record", "r.jsonl", "--ray"], "--record: with --ray is for pictures"),
    ],
)
def test_what_cannot_be_written_is_one_line(sanrt, tmp_path, arguments, expected):
    source = clip(tmp_path / "in.mkv", range(2), codec="ffv1", stored="yuv420p12le")
    status, _, err = sanrt(source, *arguments)
    assert status
    assert len(err.splitlines()) == 1
    assert expected in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mkv"]


def test_an_odd_side_is_refused_where_the_codec_cannot_hold_it(sanrt, tmp_path, tiny_model):
    tiny_model(3)
    source = clip(tmp_path / "in.mkv", range(2), size=(33, 25), stored="yuv444p")
    status, _, err = sanrt(source, "out.mp4", "--codec", "av1", scale=3)
    assert (status, "99 x 75 has an odd side" in err) == (1, True)
    assert sanrt(source, "out.mp4", scale=3)[0] == 0  # 4:4:4 has no chroma to share
    source = clip(tmp_path / "even.mkv", range(2), size=(32, 24), stored="yuv420p")
    assert sanrt(source, "even_out.mp4", scale=3)[0] == 0


def test_a_full_disk_is_one_line(sanrt, tmp_path, small_disk):
    source = clip(tmp_path / "in.mkv", range(30), rate=Fraction(2), options={"crf": "45"})
    with small_disk():
        status, _, err = sanrt(source, "out.mkv", "--codec", "ffv1")
    assert status == 1
    assert len(err.splitlines()) == 1
    assert "cannot be written (File too large)" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mkv"]


def test_a_disk_that_is_full_when_segments_are_joined_is_one_line(sanrt, tmp_path, monkeypatch):
    class FullDisk(BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(videos, "join", lambda *arguments: joining.join(*arguments[:-1], FullDisk()))
    source = clip(tmp_path / "in.mkv")
    status, _, err = sanrt(source, "out.mkv")
    assert (status, err.splitlines()[1:]) == (1, [])
    assert "out.mkv: cannot be written (No space left on device)" in err
    monkeypatch.setattr(videos, "join", joining.join)
    assert "12 of 12 frames were there of an earlier run" in sanrt(source, "out.mkv")[1]
    assert hidden(tmp_path) == []


def test_packets_that_a_container_refuses_are_told_as_that(sanrt, tmp_path, monkeypatch):
    def backwards(*arguments):
        for number, (at, packet) in enumerate(copied(*arguments)):
            packet.dts = packet.pts = -number
            yield at, packet

    copied = joining.copied_packets
    monkeypatch.setattr(joining, "copied_packets", backwards)
    status, _, err = sanrt(clip(tmp_path / "in.mp4", sound="aac"), "out.mp4")
    assert (status, err.splitlines()[1:]) == (1, [])
    assert "out.mp4: MP4 refuses some of it (Invalid argument); choose a name ending in .mkv" in err


def test_a_source_that_changes_meanwhile_leaves_no_segments(sanrt, tmp_path, monkeypatch):
    def while_it_changes(*arguments):
        plan = make(*arguments)
        with source.open("ab") as file:
            file.write(bytes(8))
        return plan

    make, source = videos.make_segments, clip(tmp_path / "in.mkv")
    monkeypatch.setattr(videos, "make_segments", while_it_changes)
    status, _, err = sanrt(source, "out.mkv")
    assert (status, "changed while it was read" in err) == (1, True)
    assert hidden(tmp_path) == []


def test_a_result_that_another_run_wrote_meanwhile_leaves_no_segments(sanrt, tmp_path, monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(videos, "appeared", lambda *_: next(answers))
    status, out, err = sanrt(clip(tmp_path / "in.mkv"), "out.mkv")
    assert (status, err, "1 skipped" in out) == (0, "", True)
    assert hidden(tmp_path) == []


def test_dropped_frames_that_an_avi_counts_are_not_missing(tmp_path):
    path = clip(tmp_path / "in.avi", range(5), codec="mpeg4", times=[0, 1, 4, 5, 9])
    with av.open(str(path)) as file:
        assert file.streams.video[0].frames == 10
    assert len(list(source_frames(look(path)))) == 5


def test_without_pyav_a_named_video_says_what_to_install_and_folders_pass_over(sanrt, tmp_path, monkeypatch):
    clip(tmp_path / "in" / "a.mkv", range(2))
    pyvips.Image.new_from_array(picture(1)).write_to_file(str(tmp_path / "in" / "c.png"))
    ffmpeg.cache_clear()
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr("sanrt.runtime.video.formats.find_spec", lambda name: None)
    status, _, err = sanrt("in/a.mkv", "out.mkv")
    assert status == 1
    assert "video needs av, which is not installed; pip install" in err
    assert "[video]" in err
    status, _, err = sanrt("in", "out")
    assert status == 0
    assert "passed over: 1 video (in/a.mkv); to read them: pip install" in err


def test_compressed_video_goes_through_the_weights_for_photographs(tmp_path):
    lossy, lossless = clip(tmp_path / "a.mp4", range(2)), clip(tmp_path / "b.mkv", range(2), **LOSSLESS)
    studio = clip(tmp_path / "c.mov", range(2), codec="prores_ks", stored="yuv422p10le")
    assert [suits_photo(path) for path in (lossy, lossless, studio)] == [True, False, False]


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_hdr10_metadata_is_handed_on(sanrt, tmp_path, codec):
    display = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"
    options = {"x265-params": f"log-level=error:bframes=0:master-display={display}:max-cll=1000,400"}
    hdr = {"codec": "libx265", "stored": "yuv420p10le", "tags": (9, 1, 9, 16), "options": options, "size": (64, 64)}
    source = clip(tmp_path / "in.mkv", range(2), **hdr)
    assert sanrt(source, "out.mkv", "--codec", codec)[0] == 0
    wanted, found = look(source).mastering, look(tmp_path / "out.mkv").mastering
    assert wanted.light_level == found.light_level == (1000, 400)
    assert wanted.luminance[1] == 1000
    values = zip(found.primaries + found.luminance, wanted.primaries + wanted.luminance, strict=True)
    assert all(abs(one - other) < Fraction(1, 10_000) * max(1, other) for one, other in values)
    assert tags(tmp_path / "out.mkv") == (9, 1, 9, 16)
    status, out, _ = sanrt(source, "lossless.mkv", "--codec", "ffv1")
    assert (status, "left out: HDR10 mastering metadata, which ffv1 does not take" in out) == (0, True)


def test_an_animated_gif_becomes_a_video(sanrt, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    first, *others = (pillow.fromarray(picture(number)).quantize(64) for number in range(3))
    first.save("in.gif", save_all=True, append_images=others, duration=[100, 50, 200])
    status, out, err = sanrt("in.gif", "out.mp4")
    assert (status, err) == (0, "")
    assert "RGB becomes 4:2:0" in out
    assert times(tmp_path / "out.mp4") == [0, Fraction(1, 10), Fraction(3, 20)]
    assert tags(tmp_path / "out.mp4")[:2] == (6, 1)
    assert sanrt("in.gif", "out.mkv", "--codec", "ffv1")[0] == 0
    info = look(tmp_path / "in.gif")
    wanted = np.asarray(first.convert("RGB"))
    assert np.array_equal(picture_of(next(source_frames(info)).frame, info), wanted)
    clear = pillow.new("RGBA", (32, 24))
    clear.save("clear.gif", save_all=True, append_images=[pillow.new("RGBA", (32, 24), "red")], duration=100)
    status, _, err = sanrt("clear.gif", "clear.mp4")
    assert (status, "transparent frames" in err) == (1, True)


def test_a_cover_is_copied(sanrt, tmp_path):
    clip(tmp_path / "one.mkv", range(1), codec="mjpeg", stored="yuvj420p", tags=(5, 2, 2, 2))
    clip(tmp_path / "two.mp4", range(3))
    with av.open("one.mkv") as cover, av.open("two.mp4") as video, av.open("in.mp4", "w") as out:
        streams = [out.add_stream_from_template(each.streams.video[0], opaque=True) for each in (video, cover)]
        streams[1].disposition = 0x400
        for source, stream in zip((video, cover), streams, strict=True):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
    assert sanrt("in.mp4", "out.mp4")[0] == sanrt("in.mp4", "out.mkv")[0] == 0
    covers = []
    for name in ("in.mp4", "out.mp4", "out.mkv"):
        with av.open(name) as file:
            (stream,) = (each for each in file.streams.video if each.disposition & 0x400)
            covers.append(next(bytes(packet) for packet in file.demux(stream) if packet.size))
    assert covers[0] == covers[1] == covers[2]
    assert times(tmp_path / "out.mp4") == times(tmp_path / "two.mp4")


def test_a_recording_that_begins_between_keyframes_is_enlarged_from_the_first_one(sanrt, tmp_path):
    content = clip(tmp_path / "whole.ts", range(12), options={"g": "5"}).read_bytes()
    (tmp_path / "in.ts").write_bytes(content[188 * 12 :])
    assert sanrt("in.ts", "out.mkv")[0] == 0
    assert 0 < len(times(tmp_path / "out.mkv")) < 12


def test_frames_before_the_beginning_of_an_edit_are_not_missing(sanrt, tmp_path):
    with av.open(str(clip(tmp_path / "whole.mp4", range(12)))) as whole, av.open("in.mp4", "w") as out:
        stream = out.add_stream_from_template(whole.streams.video[0], opaque=True)
        for packet in whole.demux(video=0):
            if packet.size:  # what is before 0 becomes an edit list's
                packet.stream, packet.pts, packet.dts = stream, packet.pts - 3 * 512, packet.dts - 3 * 512
                out.mux(packet)
    info = look(tmp_path / "in.mp4")
    shown = len(list(source_frames(info)))
    assert sanrt("in.mp4", "out.mp4")[0] == 0
    assert len(frames(tmp_path / "out.mp4")) == shown


def test_a_video_becomes_an_animation_as_players_show_it(sanrt, tmp_path):
    source = clip(tmp_path / "in.mp4", range(4), rate=Fraction(30), sound="aac", matrix=TURNED, metadata={"title": "a"})
    status, out, err = sanrt(source, "out.webp", "--lossless")
    assert (status, err) == (0, "")
    assert "left out: sound, metadata, which WEBP does not hold" in out
    assert "times are rounded to 1/1000 s, in which WEBP counts" in out
    image = pyvips.Image.new_from_file("out.webp", n=-1)
    assert (image.get("delay"), image.get("loop")) == ([33, 34, 33, 33], 0)
    assert sanrt(source, "upright.mkv", "--codec", "ffv1")[0] == 0
    info = look(tmp_path / "upright.mkv")
    for number, frame in enumerate(source_frames(info)):
        shown = np.rot90(picture_of(frame.frame, info), -1 if info.display_matrix[1] > 0 else 1)
        made = image.numpy()[number * 64 : (number + 1) * 64]
        assert made.shape == shown.shape == (64, 48, 3)
        difference = (made.astype(float) - shown) @ (0.299, 0.587, 0.114)  # of luma: that of colours is FFV1's 4:2:0
        assert abs(difference).mean() < 2
    status, out, err = sanrt(source, "out.gif")
    assert (status, err, "256 colours" in out) == (0, "", True)
    image = pyvips.Image.new_from_file("out.gif", n=-1)
    assert (image.get("delay"), image.width, image.get_page_height()) == ([30, 40, 30, 30], 48, 64)


def test_a_video_that_no_animation_can_show_is_refused(sanrt, tmp_path):
    hdr = clip(tmp_path / "hdr.mkv", range(2), codec="ffv1", stored="yuv420p10le", tags=(9, 1, 9, 16))
    assert "hdr.mkv is HDR, which animations do not show" in sanrt(hdr, "out.gif")[2]
    wide = clip(tmp_path / "wide.mp4", range(2), aspect=Fraction(4, 3))
    assert "pixels of" in sanrt(wide, "out.webp")[2]
    deep = clip(tmp_path / "deep.mkv", range(2), codec="ffv1", stored="yuv420p10le", tags=(1, 1, 1, 1))
    status, out, _ = sanrt(deep, "out.webp")
    assert (status, "10-bit samples become 8-bit: WEBP holds no more" in out) == (0, True)
    assert not (tmp_path / "out.gif").exists()


def test_an_animated_webp_becomes_a_video_of_the_same_frames(sanrt, tmp_path):
    image = pyvips.Image.new_from_array(np.concatenate([picture(number) for number in range(3)])).copy()
    image.set_type(pyvips.GValue.gint_type, "page-height", 24)
    image.set_type(pyvips.GValue.array_int_type, "delay", [40, 51, 500])
    image.webpsave("in.webp", lossless=True)
    assert sanrt("in.webp", "out.mkv", "--codec", "ffv1")[0] == 0
    assert times(tmp_path / "out.mkv") == [0, Fraction(40, 1000), Fraction(91, 1000)]
    assert sanrt("in.webp", "out.webp")[0] == 0
    made = pyvips.Image.new_from_file("out.webp", n=-1).numpy().reshape(3, 48, 64, 3)
    info = look(tmp_path / "out.mkv")
    for each, frame in zip(made, source_frames(info), strict=True):
        assert np.array_equal(picture_of(frame.frame, info), each)


def test_transparent_frames_are_laid_onto_a_colour(sanrt, tmp_path):
    frame = np.dstack([picture(1), np.full((24, 32), 255, np.uint8)])
    frame[:10, :, 3] = 0
    image = pyvips.Image.new_from_array(np.concatenate([frame, frame[:, ::-1]])).copy()
    image.set_type(pyvips.GValue.gint_type, "page-height", 24)
    image.set_type(pyvips.GValue.array_int_type, "delay", [100, 100])
    image.webpsave("in.webp", lossless=True, exact=True)
    status, _, err = sanrt("in.webp", "out.mkv")
    assert (status, "lay them onto a colour with --flatten white, or name a .webp or .gif" in err) == (1, True)
    assert sanrt("in.webp", "out.mkv", "--flatten", "#00ff00", "--codec", "ffv1")[0] == 0
    info = look(tmp_path / "out.mkv")
    for each in source_frames(info):
        shown = picture_of(each.frame, info)
        assert (shown[:16] == (0, 255, 0)).all()
        assert not (shown[24:] == (0, 255, 0)).all(axis=2).any()


@pytest.mark.parametrize("ending", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_the_last_frame_is_held_as_in_the_source(sanrt, tmp_path, ending, codec):
    if (ending, codec) == (".mov", "av1"):
        pytest.skip("MOV holds no AV1")
    delays = [40, 50, 60, 70, 80, 90, 100, 1500]
    image = pyvips.Image.new_from_array(np.concatenate([picture(number) for number in range(8)])).copy()
    image.set_type(pyvips.GValue.gint_type, "page-height", 24)
    image.set_type(pyvips.GValue.array_int_type, "delay", delays)
    image.webpsave("in.webp")
    assert sanrt("in.webp", f"out{ending}", "--codec", codec, "--outscale", 2)[0] == 0
    with av.open(f"out{ending}") as file:
        assert file.duration == 1000 * sum(delays)
        assert file.streams.video[0].duration in (None, sum(delays) / 1000 / file.streams.video[0].time_base)
    assert sanrt(f"out{ending}", f"again{ending}")[2] == ""
    if (ending, codec) == (".mkv", "av1"):
        return  # FFmpeg reads no durations of AV1 in Matroska
    with av.open(f"again{ending}") as file:
        assert file.duration == 1000 * sum(delays)


def test_a_codec_that_is_not_the_sources_is_told(sanrt, tmp_path):
    source = clip(tmp_path / "in.webm", range(2), codec="libvpx-vp9", size=(64, 64))
    assert "out.webm: vp9 becomes av1: sanrt writes no vp9" in sanrt(source, "out.webm")[1]
    assert "out.mp4: vp9 becomes h264: sanrt writes no vp9" in sanrt(source, "out.mp4")[1]
    assert "becomes" not in sanrt(source, "asked.mp4", "--codec", "hevc")[1]
    assert "out.mov: av1 becomes h264: MOV holds no av1" in sanrt("out.webm", "out.mov")[1]
    deep = clip(tmp_path / "deep.mkv", range(2), stored="yuv420p10le")
    note = "H.264 of 10 bits (High 10), which few devices play; take --codec hevc for these"
    assert f"deep.mp4: {note}" in sanrt(deep, "deep.mp4")[1]
    assert note not in sanrt(deep, "out.mkv")[1]
    assert note not in sanrt(deep, "other.mp4", "--codec", "hevc")[1]


def test_results_of_one_name_at_two_urls_do_not_remove_each_others_segments():
    first, second = (Job(Path("a.mp4"), RemotePath(f"s3://{bucket}/clip.mp4")) for bucket in ("one", "two"))
    made = Provenance(SourceIdentity("0" * 64, 1, "etag"), 2, "model", "options")
    folder = segments.folder_of(videos.local_result(first), made)

    def killed() -> None:
        with segments.work_folder(videos.local_result(first), made) as work:
            work.path(0).touch()
            work.finished(segments.Segment(work.path(0), ((0, 1),), (0,), 0))
            raise ValueError("on the way")

    with segments.work_folder(videos.local_result(second), made), pytest.raises(ValueError, match="on the way"):
        killed()
    assert segments.folder_of(videos.local_result(second), made) != folder
    assert folder.is_dir(), "a killed run goes on from there"
    segments.remove_others(videos.local_result(second))
    assert folder.is_dir()
    segments.remove_others(videos.local_result(first))
    assert not folder.exists()


@pytest.mark.parametrize("killed", [False, True])
def test_damaged_frames_that_the_decoder_repairs_are_told_with_the_first_time(sanrt, tmp_path, monkeypatch, killed):
    monkeypatch.setattr("sanrt.runtime.video.segments.SEGMENT_SECONDS", Fraction(1, 2))
    source = clip(tmp_path / "in.mkv", range(36), options={"g": "12"}, size=(128, 96))
    whole = bytearray(source.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 60] = np.random.default_rng(3).integers(0, 256, 60, np.uint8).tobytes()
    source.write_bytes(whole)
    with av.open(str(source)) as file:
        damaged = [frame.time for frame in file.decode(video=0) if frame.is_corrupt]
    assert damaged, "nothing was damaged"
    if killed:  # the second run has not decoded the damaged part for itself
        with monkeypatch.context() as patch:
            patch.setattr(videos, "join", lambda *_: 1 / 0)
            assert sanrt(source, "out.mkv")[0] == 1
    status, out, err = sanrt(source, "out.mkv")
    assert (status, err) == (0, "")
    told = f"out.mkv: {len(damaged)} of 36 frames are damaged in the source and enlarged as the decoder repaired them; "
    assert told + f"the first is shown at {damaged[0]:.3f} s" in out.splitlines()


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv", "out.webp"])
def test_a_recorded_video_is_made_again_and_compared(sanrt, tmp_path, name):
    codec = ["--codec", "ffv1"] if name == "out.mkv" else ["--lossless"] if name == "out.webp" else []
    source = clip(tmp_path / "in.mp4", range(4), sound=None if name == "out.webp" else "aac")
    status, _, err = sanrt(source, name, *codec, "--record", "run.jsonl")
    assert (status, err) == (0, "")
    (entry,) = record.read_record(tmp_path / "run.jsonl")
    assert entry.source_digest == file_digest(source)
    assert entry.output_digest == file_digest(tmp_path / name)
    assert entry.encoding["codec"] == (codec[1] if name == "out.mkv" else None)
    assert entry.versions["ffmpeg"] == ffmpeg().ffmpeg_version_info
    (replay,) = record.verify([entry])
    assert (replay.verdict, replay.detail) == (record.Verdict.IDENTICAL, "")


def test_a_recorded_video_that_is_another_now_differs_by_its_frames(sanrt, tmp_path):
    lossless = ["--codec", "ffv1"]
    source = clip(tmp_path / "in.mkv", range(4), codec="ffv1", stored="yuv444p")
    assert sanrt(source, "out.mkv", *lossless, "--record", "run.jsonl")[0] == 0
    other = clip(tmp_path / "other.mkv", [0, 1, 2, 5], codec="ffv1", stored="yuv444p")
    assert sanrt(other, "another.mkv", *lossless)[0] == 0
    made, another = (tmp_path / "out.mkv").read_bytes(), (tmp_path / "another.mkv").read_bytes()
    (entry,) = record.read_record(tmp_path / "run.jsonl")
    (tmp_path / "out.mkv").write_bytes(another)
    (replay,) = record.verify([entry])
    assert replay.verdict is record.Verdict.DIFFERENT
    assert replay.detail.endswith(" of 255, and the file changed since the run")
    (tmp_path / "out.mkv").write_bytes(made + b"\xec\x81\x00")  # an empty element: other bytes, the same frames
    (replay,) = record.verify([entry])
    assert (replay.verdict, replay.detail.partition(",")[0]) == (record.Verdict.CLOSE, "largest difference 0.00 of 255")
    short = clip(tmp_path / "short.mkv", range(3), codec="ffv1", stored="yuv444p")
    assert sanrt(short, "cut.mkv", *lossless)[0] == 0
    assert record.largest_difference_of_frames(tmp_path / "out.mkv", tmp_path / "cut.mkv") == 1


def test_tilings_are_compared_on_a_videos_first_frame(sanrt, tmp_path):
    source = clip(tmp_path / "in.mp4", range(3), size=(96, 96))
    status, out, err = sanrt(source, "out.mp4", "--explain-tiles", "--tile", "32")
    assert (status, err) == (0, "")
    rows = {line.split()[0]: float(line.split()[1]) for line in out.splitlines() if " of 255 " in line}
    assert rows["whole"] == 0
    assert rows["exact"] < 2e-4 * 255 < rows["overlap"]
    assert not (tmp_path / "out.mp4").exists()
