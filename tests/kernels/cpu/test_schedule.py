"""Sequences of convolutions on several threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from sanrt.kernels.cpu import schedule
from sanrt.kernels.cpu.schedule import ConvolutionSchedule, Step
from sanrt.kernels.cpu.soca import StripMoments
from sanrt.kernels.cpu.winograd import Arithmetic, Convolution
from sanrt.kernels.cpu.workers import Workers
from tests.kernels.cpu.references import ARITHMETIC, assert_close, block_steps, filled, random


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("height", "width", "channels"), [(3, 4, 16), (50, 7, 16), (61, 75, 16), (20, 26, 48), (20, 26, 64), (14, 20, 128)]
)
def test_steps_follow_each_other_in_place_on_any_number_of_threads(processor, height, width, channels, arithmetic, threads):
    workers = Workers(threads)
    steps, want, features = block_steps(height, width, arithmetic, channels)
    ConvolutionSchedule(steps, workers).run()
    workers.close()
    assert_close(steps[-1].output.pixels[..., :channels], want, arithmetic)
    moments = steps[3].moments.found
    counts, means = moments[:, 0, 0], moments[:, 1, :channels]
    scatter = np.triu(moments[:, 2 : 2 + channels, :channels].sum(0, dtype=np.float64))
    scatter += np.triu(scatter, 1).T
    rows = features.reshape(-1, channels)
    assert counts.sum() == len(rows)
    mean = counts @ means / len(rows)
    scatter += (means - mean).T @ np.diag(counts) @ (means - mean)
    assert_close(mean, rows.mean(0), arithmetic)
    assert_close(scatter / len(rows), np.cov(rows.T, bias=True), arithmetic)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of three strips, two steps at a time."""
    for name, value in (("PART_STRIPS", 3), ("MAX_LAG_STRIPS", 2), ("STRIP_BYTES", 50_000)):
        monkeypatch.setattr(schedule, name, value)
    schedule.work_items.cache_clear()
    yield
    schedule.work_items.cache_clear()


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_the_result_depends_neither_on_the_number_of_threads_nor_on_the_order_of_the_strips(
    arithmetic, monkeypatch, small_parts
):
    results = []
    for threads, near in ((1, 2**40), (2, 2**40), (5, 2**40), (1, 0), (2, 0), (5, 0)):
        monkeypatch.setattr(schedule, "SHARED_CACHE_BYTES", near)
        workers = Workers(threads)
        steps, _, _ = block_steps(61, 75, arithmetic)
        ConvolutionSchedule(steps, workers).run()
        workers.close()
        results.append((steps[-1].output.array, steps[3].moments.found))
    for result in results[1:]:
        for got, first in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, first)


@pytest.mark.parametrize(("rows", "columns", "threads"), [(30, 54, 2), (60, 107, 3), (7, 5, 1), (3, 2, 2)])
def test_in_large_maps_a_thread_takes_a_part_through_several_steps_and_waits_for_nothing_that_comes_later(
    rows, columns, threads
):
    def taken(far):
        return [part[:-1] for part in schedule.work_items(schedule.strips_of(rows, columns, 6, 12), 21, threads, far)]

    step, flag, first, last = (schedule.WORK_ITEM.index(name) for name in ("step", "flag", "first_needed", "last_needed"))
    todo, done = [list(part) for part in taken(far=True)], set()
    while any(todo):
        ready = [part for part in todo if part and done.issuperset(range(part[0][first], part[0][last]))]
        assert ready, "every thread waits"
        done.add(ready[0].pop(0)[flag])
    plain, parts = taken(far=False), taken(far=True)
    assert [sorted(map(tuple, part)) for part in plain] == [sorted(map(tuple, part)) for part in parts]
    assert all((np.diff(part[:, step]) >= 0).all() for part in plain)
    assert rows < 30 or all((np.diff(part[:, step]) < 0).any() for part in parts)


def test_a_thread_that_fails_leaves_nobody_waiting(monkeypatch):
    workers = Workers(2)
    steps, want, _ = block_steps(61, 75, Arithmetic.FP32)
    starving, buffer = ConvolutionSchedule(steps, workers), workers.buffer

    def starved(name, size):
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no room")
        return buffer(name, size)

    monkeypatch.setattr(workers, "buffer", starved)
    with pytest.raises(MemoryError, match="no room"):
        starving.run()
    monkeypatch.undo()
    steps, want, _ = block_steps(61, 75, Arithmetic.FP32)
    ConvolutionSchedule(steps, workers).run()
    assert_close(steps[-1].output.pixels[..., :16], want, Arithmetic.FP32)
    workers.close()


def test_steps_that_would_write_beyond_their_maps_are_refused():
    source, output = (filled(6, 6, 16, Arithmetic.FP32, seed) for seed in (1, 2))
    conv, other = (Convolution(random(16, n, 3, 3), random(16)) for n in (16, 48))
    for wrong in (
        lambda: Step(other, source, output),
        lambda: Step(conv, source, source),
        lambda: Step(conv, source, filled(6, 7, 16, Arithmetic.FP32)),
        lambda: Step(conv, source, output, also=output),
        lambda: Step(conv, source, output, gate=random(8)),
        lambda: ConvolutionSchedule([Step(conv, source, output, moments=StripMoments(3, 16))], Workers(1)),
    ):
        with pytest.raises(AssertionError):
            wrong()
