"""What a person sees of a run: counts that are true, a bar that moves within a picture, what is left by pixels."""

import logging
from pathlib import Path

import pytest

from sanrt.cli.console import Reporter, RunProgress
from sanrt.errors import InterruptedRunError
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.runs.pipeline import Advanced, Failed, Finished, Opened, Skipped, Written
from sanrt.wording import NOTICE


@pytest.fixture
def jobs():
    return [Job(Path(f"{n}.png"), Path(f"out/{n}.png")) for n in range(4)]


def test_work_is_counted_in_pixels_of_opened_pictures_and_their_mean_for_the_others(jobs):
    progress = RunProgress(4)
    assert progress.pixels_in_all is None
    progress.hear(Opened(jobs[0], 100))
    progress.hear(Opened(jobs[1], 300))
    assert (progress.pixels_done, progress.pixels_in_all) == (0, 800)
    progress.hear(Advanced(jobs[0], 0.5))
    assert progress.pixels_done == 50
    progress.hear(Finished(Written(jobs[0], 100)))
    progress.hear(Advanced(jobs[1], 0.25))
    assert progress.pixels_done == 175
    progress.hear(Finished(Failed(jobs[1], "bad")))
    progress.hear(Finished(Skipped(jobs[2])))
    assert (progress.pixels_done, progress.pixels_in_all) == (100, 200)


def test_a_picture_that_is_done_again_in_smaller_tiles_takes_its_progress_back(jobs):
    progress = RunProgress(1)
    progress.hear(Opened(jobs[0], 100))
    for share in (0.5, -0.5, 0.25):
        progress.hear(Advanced(jobs[0], share))
    assert progress.pixels_done == 25


def test_an_outcome_counts_once_however_often_it_is_told(jobs):
    reporter = Reporter(4)
    for _ in range(2):
        reporter.hear(Finished(Written(jobs[0], 100)))
    assert reporter.progress.summary().startswith("1 written in ")
    assert reporter.progress.line().startswith("1/4  ")


def test_the_bar_counts_what_is_written_while_the_next_picture_computes(jobs, monkeypatch, capfd):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    seen = []

    def outcomes():
        reporter.hear(Opened(jobs[0], 100))
        reporter.hear(Advanced(jobs[0], 1.0))
        reporter.hear(Finished(Written(jobs[0], 100)))
        seen.append(reporter.progress.line())
        reporter.hear(Opened(jobs[1], 100))
        reporter.hear(Advanced(jobs[1], 0.5))
        seen.append((reporter.progress.pixels_done, reporter.progress.pixels_in_all))
        yield Written(jobs[0], 100)
        yield Written(jobs[1], 100)

    reporter = Reporter(2)
    reporter.follow(outcomes())
    assert seen[0].startswith("1/2  ")
    assert seen[1] == (150, 200)


def test_an_interrupt_tells_what_is_on_disk_once_all_threads_have_ended(jobs, capfd):
    def outcomes():
        try:
            raise KeyboardInterrupt
            yield
        finally:
            reporter.hear(Finished(Written(jobs[0], 100)))

    with pytest.raises(InterruptedRunError) as raised, Reporter(3) as reporter:
        reporter.follow(outcomes())
    assert str(raised.value).startswith("1 written in ")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_notice_of_what_takes_long_is_told_on_stdout_unless_nothing_is_wanted(quiet, capfd):
    with Reporter(1, quiet):
        logging.getLogger("sanrt.somewhere").log(NOTICE, "measuring")
        logging.getLogger("sanrt.somewhere").info("a detail")
        logging.getLogger("sanrt.somewhere").warning("odd")
    assert tuple(capfd.readouterr()) == ("" if quiet else "measuring\n", "sanrt: odd\n")
