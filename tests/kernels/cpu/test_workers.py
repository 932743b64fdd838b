"""The threads that share a picture."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from sanrt.errors import BackendError

pytest.importorskip("llvmlite")

from sanrt.kernels.cpu.workers import Workers


def test_an_error_in_any_thread_reaches_the_caller_and_the_threads_live_on():
    workers, seen = Workers(2), []

    def fails(_):
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        workers.run(fails)
    workers.run(lambda _: seen.append(1))
    assert seen == [1, 1]


def test_an_interrupt_is_told_when_no_thread_is_at_work_any_more():
    workers, seen = Workers(2), []

    def slow(_):
        if threading.current_thread() is not threading.main_thread():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)
        seen.append(1)

    with pytest.raises(KeyboardInterrupt):
        workers.run(slow)
    assert seen == [1, 1]
    workers.run(lambda _: seen.append(2))
    assert seen == [1, 1, 2, 2]


def test_ended_threads_leave_the_work_to_the_caller():
    workers, seen = Workers(3), []
    workers.close()
    workers.run(lambda _: seen.append(1))
    assert seen == [1]


def test_more_threads_than_can_be_started_are_told(monkeypatch):
    def full(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    with pytest.raises(BackendError, match="4 threads cannot be started"):
        Workers(4)


def test_the_threads_of_workers_that_nobody_has_any_more_end():
    before = set(threading.enumerate())
    workers = Workers(4)
    workers.run(lambda _: None)
    started = set(threading.enumerate()) - before
    assert len(started) == 3
    del workers
    for thread in started:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in started)
