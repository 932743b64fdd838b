"""The pipeline with a network that only doubles: outcomes, order, overlap, stopping."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pyvips

from sanrt.errors import BackendError, OutOfMemoryError
from sanrt.runtime.pictures import codec
from sanrt.runtime.pictures.codec import Encoding, SourcePicture
from sanrt.runtime.pictures.jobs import Job, Replaceable, find_pictures
from sanrt.runtime.pictures.scratch import ScratchPicture
from sanrt.runtime.runs import pipeline
from sanrt.runtime.runs.pipeline import Failed, Finished, Opened, PipelineOptions, Planned, Skipped, Written
from sanrt.runtime.runs.results import Recipe, sort_out
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.runtime.tiling.plan import TilingPlan

RECIPE = Recipe(2, "a network that doubles")
OPTIONS = PipelineOptions(RECIPE)


def double(rgb):
    return rgb.repeat(2, axis=0).repeat(2, axis=1)


class Runner:
    """Stands in for a NetworkRunner: pictures as a whole by `enlarge`, or streamed and doubled, as `tiling` says."""

    def __init__(self, enlarge=double, tiling: Tiling = Tiling.WHOLE) -> None:
        self.enlarge, self.plan, self.options = enlarge, TilingPlan(tiling, 16, 2), UpscaleOptions(keep_hidden=True)

    def decide(self, info):
        return self.plan

    def run_array(self, plan, picture, progress, folder):
        progress(0.25)
        result = self.enlarge(picture)
        progress(0.75)
        return result, plan

    def run_file(self, plan, source, folder, progress):
        info = source.info
        result = ScratchPicture(2 * info.width, 2 * info.height, 3, info.dtype.type, folder)
        for top in range(0, info.height, 7):
            result.put(2 * top, 0, double(source.rgb(top, min(7, info.height - top))))
        return result, plan


def save(path: Path, value=100, size=(6, 5), bands=3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyvips.Image.new_from_array(np.full((*size, bands), value, np.uint8)).write_to_file(str(path))
    return path


@pytest.fixture
def jobs(tmp_path) -> list[Job]:
    for number in range(6):
        save(tmp_path / "in" / f"{number}.png", 10 * number)
    return find_pictures([tmp_path / "in"], tmp_path / "out")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_picture_is_written_once_in_order_with_its_own_pixels(jobs):
    outcomes = list(pipeline.run(jobs, Runner(), OPTIONS))
    assert outcomes == [Written(job, pixels=30) for job in jobs]
    for number, job in enumerate(jobs):
        assert np.array_equal(pyvips.Image.new_from_file(str(job.destination)).numpy(), np.full((12, 10, 3), 10 * number))


def test_what_another_run_wrote_meanwhile_is_skipped_if_it_is_the_same_and_else_never_replaced(jobs):
    list(pipeline.run(jobs[:2], Runner(), OPTIONS))
    list(pipeline.run(jobs[2:3], Runner(), PipelineOptions(Recipe(2, "another network"))))
    jobs[3].destination.write_bytes(b"somebody's")
    kept = [job.destination.read_bytes() for job in jobs[:4]]
    outcomes = list(pipeline.run(jobs, Runner(), OPTIONS))
    assert [type(outcome) for outcome in outcomes] == [Skipped] * 2 + [Failed] * 2 + [Written] * 2
    assert "appeared, or was changed, since the run began" in outcomes[3].reason
    assert [job.destination.read_bytes() for job in jobs[:4]] == kept
    replaced = list(pipeline.run([replace(job, replaces=Replaceable.ANYTHING) for job in jobs], Runner(), OPTIONS))
    assert [type(outcome) for outcome in replaced] == [Written] * 6


def test_a_file_that_appears_while_its_picture_is_upscaled_is_not_replaced(jobs):
    def slow(rgb):
        jobs[0].destination.parent.mkdir(exist_ok=True)
        jobs[0].destination.write_bytes(b"somebody's")
        return double(rgb)

    (outcome,) = pipeline.run(jobs[:1], Runner(slow), OPTIONS)
    assert "appeared, or was changed, since the run began" in outcome.reason
    assert jobs[0].destination.read_bytes() == b"somebody's"


def test_a_result_that_is_edited_while_it_is_made_again_is_not_replaced(jobs):
    other = PipelineOptions(Recipe(2, "another network"))
    assert [type(outcome) for outcome in pipeline.run(jobs[:2], Runner(), OPTIONS)] == [Written] * 2
    again = sort_out(dict.fromkeys(jobs[:2], other.recipe)).to_do
    edited = jobs[1].destination.read_bytes() + b"edited"

    def editing(rgb):
        jobs[1].destination.write_bytes(edited)
        return double(rgb)

    outcomes = list(pipeline.run(again, Runner(editing), other))
    assert [type(outcome) for outcome in outcomes] == [Written, Failed]
    assert jobs[1].destination.read_bytes() == edited


def test_two_runs_that_encode_the_same_picture_at_once_give_one_result_and_no_failure(jobs, monkeypatch):
    real = pipeline.write_picture

    def meanwhile(output, *pixels):
        monkeypatch.setattr(pipeline, "write_picture", real)
        assert [type(outcome) for outcome in pipeline.run(jobs[:1], Runner(), OPTIONS)] == [Written]
        real(output, *pixels)

    monkeypatch.setattr(pipeline, "write_picture", meanwhile)
    assert [type(outcome) for outcome in pipeline.run(jobs[:1], Runner(), OPTIONS)] == [Skipped]
    assert files(jobs[0].destination.parent) == ["0.png"]


def test_a_result_that_is_edited_while_it_is_encoded_again_is_not_replaced(jobs, monkeypatch):
    other = PipelineOptions(Recipe(2, "another network"))
    list(pipeline.run(jobs[:1], Runner(), OPTIONS))
    again = sort_out(dict.fromkeys(jobs[:1], other.recipe)).to_do
    edited = jobs[0].destination.read_bytes() + b"edited"
    real = codec.metadata.put

    def editing(*arguments):
        jobs[0].destination.write_bytes(edited)
        real(*arguments)

    monkeypatch.setattr(codec.metadata, "put", editing)
    (outcome,) = pipeline.run(again, Runner(), other)
    assert "appeared, or was changed, since the run began" in outcome.reason
    assert jobs[0].destination.read_bytes() == edited
    assert files(jobs[0].destination.parent) == ["0.png"]


@pytest.mark.parametrize("tiling", [Tiling.WHOLE, Tiling.EXACT])
@pytest.mark.parametrize("bands", [3, 4])
def test_a_source_that_changes_while_it_is_read_has_no_result(tmp_path, monkeypatch, tiling, bands):
    source = save(tmp_path / "a.png", bands=bands)
    steps = ["rgb"] if tiling is Tiling.WHOLE or bands == 3 else ["rgb", "alpha"]
    for step in steps:
        save(source, 50, bands=bands)
        with monkeypatch.context() as patched:
            if step == "rgb":
                real = SourcePicture.rgb

                def rgb(picture, *rows, real=real):
                    pixels = real(picture, *rows)
                    save(source, 60, bands=bands)
                    return pixels

                patched.setattr(SourcePicture, "rgb", rgb)
            else:
                real = pipeline.streamed_alpha

                def alpha(path, scale, real=real):
                    save(source, 60, bands=bands)
                    return real(path, scale)

                patched.setattr(pipeline, "streamed_alpha", alpha)
            (outcome,) = pipeline.run([Job(source, tmp_path / "out" / "a.png")], Runner(tiling=tiling), OPTIONS)
        assert outcome.reason == f"{source}: changed while it was read; run again once it is complete"
        assert not (tmp_path / "out" / "a.png").exists()


@pytest.mark.parametrize(
    "error", [BackendError("it broke"), OutOfMemoryError("none left"), MemoryError(), ValueError("odd")]
)
def test_a_picture_that_fails_in_the_network_is_told_and_the_others_go_on(jobs, error):
    def failing(rgb):
        if rgb[0, 0, 0] == 30:
            raise error
        return double(rgb)

    outcomes = list(pipeline.run(jobs, Runner(failing), OPTIONS))
    assert [type(outcome) for outcome in outcomes] == [Written] * 3 + [Failed] + [Written] * 2
    assert str(jobs[3].source) in outcomes[3].reason
    assert "\n" not in outcomes[3].reason
    assert str(error) in outcomes[3].reason
    assert files(jobs[0].destination.parent) == ["0.png", "1.png", "2.png", "4.png", "5.png"]


def test_failures_in_reading_and_writing_name_the_picture_once(jobs):
    jobs[1].source.write_bytes(b"")
    jobs[4].destination.mkdir(parents=True)
    outcomes = list(pipeline.run(jobs, Runner(), OPTIONS))
    assert [type(outcome) for outcome in outcomes] == [Written, Failed, Written, Written, Failed, Written]
    assert outcomes[1].reason.count(str(jobs[1].source)) == 1
    assert str(jobs[4].source) in outcomes[4].reason
    assert files(jobs[0].destination.parent) == ["0.png", "2.png", "3.png", "5.png"]


def test_the_next_picture_is_read_and_the_last_written_while_the_network_runs(jobs, monkeypatch):
    read, wrote = {}, {}
    for job in jobs:
        read[job], wrote[job] = threading.Event(), threading.Event()
    real_read, real_write = pipeline.read, pipeline.write

    def recorded_read(job, runner, options, listener):
        read[job].set()
        return real_read(job, runner, options, listener)

    def recorded_write(picture, options):
        done = real_write(picture, options)
        wrote[picture.job].set()
        return done

    monkeypatch.setattr(pipeline, "read", recorded_read)
    monkeypatch.setattr(pipeline, "write", recorded_write)
    started = iter(range(6))

    def waiting(rgb):
        number = next(started)
        if number == 3:
            assert read[jobs[4]].wait(20), "picture 4 is not read while 3 is in the network"
            assert wrote[jobs[2]].wait(20), "picture 2 is not written while 3 is in the network"
        return double(rgb)

    assert all(isinstance(outcome, Written) for outcome in pipeline.run(jobs, Runner(waiting), OPTIONS))


def test_many_cores_encode_several_pictures_at_once_and_the_order_stays(jobs, monkeypatch):
    monkeypatch.setattr(pipeline.machine, "cores", lambda: 3 * pipeline.CORES_PER_ENCODER)
    together, real_write = threading.Barrier(3), pipeline.write

    def meeting_write(picture, options):
        together.wait(20)
        return real_write(picture, options)

    monkeypatch.setattr(pipeline, "write", meeting_write)
    assert list(pipeline.run(jobs, Runner(), OPTIONS)) == [Written(job, pixels=30) for job in jobs]


def test_a_listener_hears_of_a_picture_when_it_is_opened_moves_and_is_on_disk(jobs):
    events, during = [], []

    def slow(rgb):
        during.append([type(event) for event in events].count(Finished))
        for _ in range(500):
            if [type(event) for event in events].count(Finished) == len(during) - 1:
                return double(rgb)
            time.sleep(0.01)
        raise AssertionError("the picture before is on disk, and nobody was told")

    def listener(event):
        if isinstance(event, Finished):
            assert event.outcome.job.destination.exists()
        events.append(event)

    list(pipeline.run(jobs, Runner(slow), OPTIONS, listener))
    for job in jobs:
        own = [event for event in events if not isinstance(event, Finished) and event.job == job]
        assert own[0] == Opened(job, 30)
        assert [event.share for event in own[1:]] == [0.25, 0.75]
    assert [event.outcome for event in events if isinstance(event, Finished)] == [Written(job, 30) for job in jobs]


def test_after_an_interrupt_the_outcomes_of_all_that_is_on_disk_still_come(jobs):
    def interrupted(rgb):
        if rgb[0, 0, 0] == 30:
            raise KeyboardInterrupt
        return double(rgb)

    outcomes, running = [], pipeline.run(jobs, Runner(interrupted), OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        deque(map(outcomes.append, running))
    assert outcomes == [Written(job, 30) for job in jobs if job.destination.exists()] != []


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 1), (8, 2), (16, 4), (64, 4)])
def test_encoders_leave_most_cores_to_the_network(cores, expected, monkeypatch):
    monkeypatch.setattr(pipeline.machine, "cores", lambda: cores)
    assert pipeline.encoders() == expected


def test_pictures_are_not_read_far_ahead_of_the_network(jobs, monkeypatch):
    seen, real_read = [], pipeline.read
    monkeypatch.setattr(pipeline, "read", lambda job, *rest: seen.append(job) or real_read(job, *rest))
    with closing(pipeline.run(jobs, Runner(), OPTIONS)) as outcomes:
        next(outcomes)
        assert len(seen) <= pipeline.WAITING + pipeline.encoders() + 3


def test_an_interruption_leaves_whole_results_and_nothing_else(jobs):
    def interrupted(rgb):
        if rgb[0, 0, 0] == 40:
            raise KeyboardInterrupt
        return double(rgb)

    with pytest.raises(KeyboardInterrupt), closing(pipeline.run(jobs, Runner(interrupted), OPTIONS)) as outcomes:
        list(outcomes)
    left = files(jobs[0].destination.parent)
    assert set(left) <= {"0.png", "1.png", "2.png", "3.png"}
    for name in left:
        assert pyvips.Image.new_from_file(str(jobs[0].destination.parent / name)).avg() == 10 * int(name[0])
    assert [type(o) for o in pipeline.run(jobs, Runner(), OPTIONS)].count(Skipped) == len(left)


def test_leftovers_of_killed_runs_are_removed(jobs):
    leftover = jobs[0].destination.parent / ".0.png.sanrt-0123abcd.partial"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    list(pipeline.run(jobs, Runner(), OPTIONS))
    assert not leftover.exists()


def test_opacity_goes_around_the_network(tmp_path):
    source = save(tmp_path / "a.png", 77, bands=4)
    job = Job(source, tmp_path / "out.png")
    assert [type(o) for o in pipeline.run([job], Runner(), OPTIONS)] == [Written]
    result = pyvips.Image.new_from_file(str(job.destination))
    assert (result.width, result.height, result.bands) == (10, 12, 4)
    assert (result.numpy() == 77).all()


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("suffix", "dtype"), [(".png", np.uint8), (".png", np.uint16), (".tif", np.uint8)])
@pytest.mark.parametrize("background", [None, (255, 0, 9)])
def test_opacity_of_streamed_pictures_is_that_of_whole_ones_and_never_in_memory(
    tmp_path, monkeypatch, orientation, suffix, dtype, background
):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (90, 41, 4)).astype(dtype)
    image = pyvips.Image.new_from_array(pixels).copy(interpretation="srgb" if dtype == np.uint8 else "rgb16").copy()
    image.set_type(pyvips.GValue.gint_type, "orientation", orientation)
    image.write_to_file(str(tmp_path / f"in{suffix}"))
    written = []
    for tiling in Tiling.WHOLE, Tiling.EXACT:
        if tiling is Tiling.EXACT:
            monkeypatch.delattr(pipeline, "upscale_alpha")
            monkeypatch.delattr(SourcePicture, "alpha")
        job = Job(tmp_path / f"in{suffix}", tmp_path / f"{tiling}{suffix}")
        options = PipelineOptions(RECIPE, Encoding(background=background))
        assert [type(outcome) for outcome in pipeline.run([job], Runner(tiling=tiling), options)] == [Written]
        written.append(pyvips.Image.new_from_file(str(job.destination)).numpy())
    assert written[0].shape == ((180, 82) if orientation == 1 else (82, 180)) + (3 if background else 4,)
    assert np.array_equal(*written)


def test_a_source_that_vanishes_before_its_opacity_is_read_leaves_nothing(tmp_path):
    class Vanishing(Runner):
        def run_file(self, plan, source, folder):
            streamed = super().run_file(plan, source, folder)
            source.info.path.unlink()
            return streamed

    job = Job(save(tmp_path / "a.png", bands=4), tmp_path / "out" / "a.png")
    (outcome,) = pipeline.run([job], Vanishing(tiling=Tiling.EXACT), OPTIONS)
    assert str(job.source) in outcome.reason
    assert not job.destination.parent.exists() or not list(job.destination.parent.iterdir())


def test_what_a_result_lacks_is_told(tmp_path):
    source = tmp_path / "deep.png"
    pyvips.Image.new_from_array(np.full((4, 4, 3), 40_000, np.uint16)).copy(interpretation="rgb16").write_to_file(
        str(source)
    )
    (outcome,) = pipeline.run([Job(source, tmp_path / "out.jpg")], Runner(), OPTIONS)
    assert "16-bit" in outcome.notes[0]


def test_a_plan_writes_nothing_and_foresees_sizes_and_failures(jobs, tmp_path):
    transparent = Job(save(tmp_path / "t.png", bands=4), tmp_path / "t.jpg")
    outcomes = list(pipeline.preview([jobs[1], transparent], None, OPTIONS))
    assert outcomes[0] == Planned(jobs[1], 10, 12)
    assert "transparency" in outcomes[1].reason
    assert not (tmp_path / "out").exists()
    flattened = PipelineOptions(RECIPE, encoding=Encoding(background=(255, 255, 255)))
    assert list(pipeline.preview([transparent], None, flattened)) == [Planned(transparent, 10, 12)]


def test_a_result_that_is_enlarged_again_is_told(tmp_path):
    source = save(tmp_path / "a.png")
    (first,) = pipeline.run([Job(source, tmp_path / "b.png")], Runner(), OPTIONS)
    (second,) = pipeline.run([Job(tmp_path / "b.png", tmp_path / "c.png")], Runner(), OPTIONS)
    assert not any("result of sanrt" in note for note in first.notes)
    assert "its source is itself a result of sanrt, made at x2" in second.notes
