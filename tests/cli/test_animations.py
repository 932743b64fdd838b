"""`sanrt run` on animated GIF and WebP files: frames, times, transparency and what else they hold, read by libvips."""

from __future__ import annotations

import errno
import sys
from itertools import accumulate

import numpy as np
import pytest
import pyvips

from sanrt.errors import PictureError
from sanrt.runtime.pictures.animations import plan_animation, write_animation
from sanrt.runtime.pictures.codec import Encoding, PictureInfo
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.jobs import find_pictures
from sanrt.runtime.runs import record, videos
from sanrt.runtime.video import animated
from sanrt.runtime.video.container import ffmpeg
from sanrt.runtime.video.segments import makers

WIDTH, HEIGHT = 20, 14
DELAYS = [40, 50, 0, 10, 200]


def drawn(number: int, clear: bool = False) -> np.ndarray:
    """A frame of 64 colours, (H, W, 3); with `clear` (H, W, 4) with hidden, half and fully visible pixels."""
    rng = np.random.default_rng(number)
    colours = rng.integers(0, 4, (HEIGHT, WIDTH, 3), dtype=np.uint8) * np.uint8(85)
    opacity = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    opacity[:4] = 0
    opacity[4, :number] = 0
    return np.dstack([colours, opacity]) if clear else colours


def animation(path, pictures, delays=DELAYS, plays=0):
    """A GIF or WebP file of these frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pyvips.Image.new_from_array(np.concatenate(pictures)).copy()
    image.set_type(pyvips.GValue.gint_type, "page-height", len(pictures[0]))
    image.set_type(pyvips.GValue.array_int_type, "delay", list(delays))
    image.set_type(pyvips.GValue.gint_type, "loop", plays)
    saved = {"keep_duplicate_frames": True, "dither": 0} if path.suffix == ".gif" else {"lossless": True, "exact": True}
    image.write_to_file(str(path), **saved)
    return path


def pictures(count=5, clear=False):
    return [drawn(number, clear) for number in range(count)]


def found(path):
    """Frames, (n, H, W, bands), milliseconds of each, and how often it is shown."""
    image = pyvips.Image.new_from_file(str(path), n=-1)
    height = image.get_page_height()
    return image.numpy().reshape(-1, height, image.width, image.bands), image.get("delay"), image.get("loop")


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("plays", [0, 1, 3])
@pytest.mark.parametrize("ending", [".gif", ".webp"])
def test_a_gif_becomes_an_animation_of_the_same_frames_and_times(sanrt, tmp_path, ending, plays, clear):
    source = animation(tmp_path / "in.gif", pictures(clear=clear), plays=plays)
    status, out, err = sanrt(source, f"out{ending}")
    assert (status, err) == (0, "")
    frames, delays, repeats = found(tmp_path / f"out{ending}")
    assert (delays, repeats) == (DELAYS, plays)
    assert frames.shape[:3] == (5, 2 * HEIGHT, 2 * WIDTH)
    assert (frames[..., 3:].min(initial=255) < 255) == clear
    assert ("256 colours a frame" in out) == (ending == ".gif")
    assert hidden(tmp_path) == []


def test_milliseconds_stay_in_webp_and_do_not_drift_in_gif(sanrt, tmp_path):
    shown = [33, 33, 34, 0, 5, 1001, 7, 16]
    source = animation(tmp_path / "in.webp", pictures(8), [30] * 8, plays=2)
    with source.open("r+b") as file:  # libvips writes none of 10 or less
        content = file.read()
        for place, delay in zip((at for at in range(len(content)) if content[at:].startswith(b"ANMF")), shown, strict=True):
            file.seek(place + 20)
            file.write(delay.to_bytes(3, "little"))
    assert found(source)[1] == shown
    status, out, err = sanrt(source, "out.webp")
    assert (status, err, "rounded" in out) == (0, "", False)
    assert found(tmp_path / "out.webp")[1:] == (shown, 2)
    status, out, err = sanrt(source, "out.gif")
    assert (status, err, "times are rounded to 1/100 s, in which GIF counts" in out) == (0, "", True)
    ends = list(accumulate(found(tmp_path / "out.gif")[1]))
    assert all(abs(end - exact) <= 5 for end, exact in zip(ends, accumulate(shown), strict=True))


@pytest.mark.parametrize("clear", [False, True])
def test_frames_are_those_of_pictures(sanrt, tmp_path, clear):
    source = animation(tmp_path / "in.webp", pictures(3, clear), [50, 60, 70])
    assert sanrt(source, "out.webp")[0] == 0  # lossless, as its source is
    frames, _, _ = found(tmp_path / "out.webp")
    for number, frame in enumerate(frames):
        pyvips.Image.new_from_array(drawn(number, clear)).write_to_file(f"{number}.png")
        assert sanrt(f"{number}.png", f"large{number}.png")[0] == 0
        assert np.array_equal(frame, pyvips.Image.new_from_file(f"large{number}.png").numpy())


@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
def test_frames_that_draw_a_part_are_composed_on_the_canvas(sanrt, tmp_path, disposal):
    pillow = pytest.importorskip("PIL.Image")
    canvases = [pillow.new("RGBA", (WIDTH, HEIGHT)) for _ in range(4)]
    for number, canvas in enumerate(canvases):
        canvas.paste((255, 60 * number, 0, 255), (4 * number, 2, 4 * number + 6, 9))
    canvases[0].save("in.gif", save_all=True, append_images=canvases[1:], duration=100, disposal=disposal)
    source = found(tmp_path / "in.gif")[0]
    assert sanrt("in.gif", "out.webp", "--lossless")[0] == 0
    frames = found(tmp_path / "out.webp")[0]
    for frame, small in zip(frames, source, strict=True):
        opacity = frame[::2, ::2, 3].astype(int) - small[..., 3]
        assert abs(opacity).max() < 128  # at edges alone, as opacity of pictures
        assert np.count_nonzero(opacity) < 120


def test_folders_keep_the_kind_of_animations(sanrt, tmp_path):
    animation(tmp_path / "in" / "moving.gif", pictures())
    animation(tmp_path / "in" / "sub" / "moving.webp", pictures())
    animation(tmp_path / "in" / "still.gif", pictures(1), [100])
    animation(tmp_path / "in" / "still.webp", pictures(1), [100])
    status, out, err = sanrt("in", "out")
    assert (status, err, "4 written" in out) == (0, "", True)
    made = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert made == ["moving.gif", "still.png", "still.webp", "sub/moving.webp"]
    before = {name: (tmp_path / "out" / name).read_bytes() for name in made}
    assert "4 skipped" in sanrt("in", "out")[1]
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in made}
    status, _, err = sanrt("out", "again")
    assert (status, "nothing to enlarge" in err) == (1, True)
    (tmp_path / "in" / "still.gif").unlink()
    assert sanrt("in", "pictures", "--format", "png")[0] == 0
    assert (tmp_path / "pictures" / "moving.png").exists()


def test_the_output_may_be_left_out_or_be_a_folder(sanrt, tmp_path):
    animation(tmp_path / "cat.gif", pictures())
    assert sanrt("cat.gif")[0] == 0
    assert len(found(tmp_path / "cat_x2.gif")[0]) == 5
    assert sanrt("cat.gif", "out/")[0] == 0
    assert (tmp_path / "out" / "cat.gif").read_bytes() == (tmp_path / "cat_x2.gif").read_bytes()
    status, out, _ = sanrt("cat.gif", "cat.png")
    assert (status, "only the first of its 5 frames" in out) == (0, True)


def test_a_result_of_other_options_is_made_again_and_another_file_is_left(sanrt, tmp_path):
    source = animation(tmp_path / "in.webp", pictures())
    assert sanrt(source, "out.webp")[0] == 0
    assert "made with other options before" in sanrt(source, "out.webp", "--quality", 50, "--flatten", "white")[1]
    other = animation(tmp_path / "other.gif", pictures(2), [10, 10]).read_bytes()
    status, _, err = sanrt(source, "other.gif")
    assert (status, "not made by sanrt" in err) == (2, True)
    assert (tmp_path / "other.gif").read_bytes() == other
    assert sanrt(source, "other.gif", "--overwrite")[0] == 0
    assert len(found(tmp_path / "other.gif")[0]) == 5


def test_equal_frames_are_computed_once(sanrt, tmp_path):
    source = animation(tmp_path / "in.gif", [drawn(number) for number in (0, 0, 1, 1, 1, 2)], [40] * 6)
    status, out, _ = sanrt(source, "out.gif")
    assert (status, "3 of 6 frames (50 %) equal the one before and were not computed again" in out) == (0, True)
    assert found(tmp_path / "out.gif")[1] == [40] * 6
    status, out, _ = sanrt(source, "out.webp")
    assert (status, "3 of 6 frames equal the one before, or nearly; it is shown longer in their place" in out) == (0, True)
    assert found(tmp_path / "out.webp")[1] == [80, 120, 40]


def test_frames_that_are_all_equal_are_told_to_be_a_still_picture(sanrt, tmp_path):
    source = animation(tmp_path / "in.gif", [drawn(0)] * 3, [40] * 3)
    status, out, _ = sanrt(source, "out.webp")
    assert (status, "all frames are equal: a still picture, without durations" in out) == (0, True)
    assert pyvips.Image.new_from_file(str(tmp_path / "out.webp"), n=-1).height == 2 * HEIGHT


def test_a_slow_change_does_not_stand_still_in_lossy_webp(tmp_path):
    output = plan_animation(PictureInfo(tmp_path / "a.gif", Format.GIF, 64, 48), 40, tmp_path / "b.webp", 1, Encoding())
    frames = [np.full((48, 64, 3), 60 + number, np.uint8) for number in range(40)]
    for number, frame in enumerate(frames):
        frame[:16, :16] = number % 2 * 200
    with (tmp_path / "b.webp").open("w+b") as file:
        write_animation(output, iter(frame.tobytes() for frame in frames), [40] * 40, 0, file)
    last = found(tmp_path / "b.webp")[0][-1]
    assert abs(last[30:, 30:, :3].mean() - 99) < 4


def test_equal_frames_shown_longer_than_webp_can_say_are_refused(sanrt, tmp_path):
    source = animation(tmp_path / "in.gif", [drawn(0)] * 30 + [drawn(1)], [655_000] * 31)
    status, _, err = sanrt(source, "out.webp")
    assert (status, "out.webp: equal frames are shown for 19650 s, WEBP holds at most 16777" in err) == (1, True)
    assert not (tmp_path / "out.webp").exists()


def test_what_players_take_for_a_mistake_is_shown_as_long_in_a_video(sanrt, tmp_path):
    av = pytest.importorskip("av")
    assert sanrt(animation(tmp_path / "in.gif", pictures(), [10, 0, 10, 20, 10]), "out.mkv")[0] == 0
    with av.open(str(tmp_path / "out.mkv")) as video:
        assert [round(frame.time * 1000) for frame in video.decode(video=0)] == [0, 100, 200, 300, 320]


def test_work_goes_on_where_it_was(sanrt, tmp_path, monkeypatch):
    source = animation(tmp_path / "in.gif", pictures(10), [1000] * 10)
    assert sanrt(source, "whole.gif")[0] == 0

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(animated, "assemble", full)
        status, _, err = sanrt(source, "out.gif")
    assert (status, "No space left on device" in err) == (1, True)
    assert not (tmp_path / "out.gif").exists()
    (folder,) = hidden(tmp_path)
    (tmp_path / folder / "000002.json").unlink()
    status, out, _ = sanrt(source, "out.gif")
    assert (status, "8 of 10 frames were there of an earlier run" in out) == (0, True)
    assert (tmp_path / "out.gif").read_bytes() == (tmp_path / "whole.gif").read_bytes()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("ending", [".gif", ".webp"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_truncated_animations_are_refused(sanrt, tmp_path, ending, part):
    source = animation(tmp_path / f"in{ending}", pictures())
    source.write_bytes(source.read_bytes()[: int(part * source.stat().st_size)])
    for output in (f"out{ending}", "folder/"):
        status, _, err = sanrt(source, output)
        assert (status, len(err.splitlines())) == (1, 1)
        assert "in" + ending in err
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [f"in{ending}"]


def test_animations_need_no_ffmpeg(sanrt, tmp_path, monkeypatch):
    source = animation(tmp_path / "in.gif", pictures())
    monkeypatch.setitem(sys.modules, "av", None)
    for each in (ffmpeg, makers):
        each.cache_clear()
    assert sanrt(source, "out.webp")[0] == 0
    status, _, err = sanrt(source, "out.mp4")
    assert (status, "needs PyAV" in err or "video" in err) == (1, True)
    makers.cache_clear()


def test_what_a_format_does_not_hold_is_refused_before_any_work(sanrt, tmp_path):
    high = PictureInfo(tmp_path / "a.gif", Format.GIF, 100, 9000)
    with pytest.raises(PictureError, match=r"WEBP holds at most 16383 pixels a side, the result has 200 x 18000; take a"):
        plan_animation(high, 3, tmp_path / "b.webp", 2, Encoding())
    with pytest.raises(PictureError, match=r"at most 100 million rows in all; name a video, such as b\.mp4$"):
        plan_animation(high, 6000, tmp_path / "b.gif", 2, Encoding())
    assert plan_animation(high, 3, tmp_path / "b.gif", 2, Encoding()).height == 18000
    animation(tmp_path / "still.gif", pictures(1), [100])
    status, _, err = sanrt("still.gif", "out.gif")
    assert (status, "sanrt writes GIFs of several frames, still.gif has one" in err) == (2, True)
    pyvips.Image.black(8, 8).write_to_file("a.png")
    status, _, err = sanrt("a.png", "out.gif")
    assert (status, "sanrt writes no such files" in err) == (2, True)


def test_plan_knows_animations(sanrt, models, tmp_path):
    animation(tmp_path / "in.gif", pictures())
    (job,) = find_pictures([tmp_path / "in.gif"], tmp_path / "out.gif")
    video = videos.settle(job, job.source, 2, Encoding())
    assert (video.info.frames, video.info.dtype, video.output.width) == (5, np.uint8, 2 * WIDTH)
    status, out, _ = sanrt("in.gif", "out.gif", "--dry-run")
    assert (status, "40 x 28" in out) == (0, True)
    assert not (tmp_path / "out.gif").exists()


def test_a_gif_with_anything_but_blocks_in_it_is_refused(sanrt, tmp_path):
    content = animation(tmp_path / "in.gif", pictures()).read_bytes()
    third = [at for at in range(len(content)) if content[at:].startswith(b"\x21\xf9\x04")][2]
    (tmp_path / "in.gif").write_bytes(content[:third] + b"\1" + content[third:])
    status, _, err = sanrt("in.gif", "out.gif")
    assert (status, f"in.gif: damaged GIF file (no block at byte {third})" in err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.gif"]


def test_a_gif_whose_further_frames_are_hidden_is_no_still_picture(sanrt, tmp_path):
    content = animation(tmp_path / "in.gif", pictures()).read_bytes()
    second = [at for at in range(len(content)) if content[at:].startswith(b"\x21\xf9\x04")][1]
    (tmp_path / "in.gif").write_bytes(content[:second] + b"\0" + content[second:])
    status, _, err = sanrt("in.gif", "out.png")
    assert (status, f"in.gif: damaged GIF file (no block at byte {second})" in err) == (1, True)


def test_verify_makes_every_frame_of_an_animation_again(sanrt, tmp_path):
    source = animation(tmp_path / "in.webp", pictures())
    assert sanrt(source, "out.webp", "--record", "run.jsonl")[0] == 0
    (entry,) = record.read_record(tmp_path / "run.jsonl")
    assert "ffmpeg" not in entry.versions
    (replay,) = record.verify([entry])
    assert replay.verdict is record.Verdict.IDENTICAL
    other = animation(tmp_path / "other.webp", [*pictures(4), drawn(9)])
    assert sanrt(other, "another.webp")[0] == 0
    (tmp_path / "out.webp").write_bytes((tmp_path / "another.webp").read_bytes())
    (replay,) = record.verify([entry])
    assert replay.verdict is record.Verdict.DIFFERENT
    assert "FFmpeg" not in replay.detail
