"""Turns, warm-up, intervals and processes of measurements."""

from __future__ import annotations

from functools import partial
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest

from sanrt.errors import BackendError
from sanrt.model.spec import Precision
from sanrt.runtime.runs import latency
from sanrt.runtime.runs.latency import Contender, Entrant, Running, Session, steady
from sanrt.runtime.runs.timing import Interval, Worker, intervals, peak_memory


def test_intervals_enclose_their_percentiles_and_are_the_same_again():
    turns = np.random.default_rng(1).gamma(9, 0.01, (10, 4)).tolist()
    turns[0].append(0.1)
    found = intervals(turns)
    assert [each.value for each in found] == pytest.approx(np.percentile(np.concatenate(turns), [50, 90, 99]))
    assert all(each.low <= each.value <= each.high for each in found)
    assert found == intervals(turns)
    assert intervals([[2.0]]) == [Interval(2.0, 2.0, 2.0)] * 3


def test_runs_that_share_the_state_of_their_turn_tell_no_more_than_one():
    alone = np.random.default_rng(1).gamma(9, 0.01, 12).tolist()
    together, one = (intervals([[each] * count for each in alone])[0] for count in (50, 1))
    assert (together.low, together.high) == pytest.approx((one.low, one.high), rel=0.02)


def test_warm_up_goes_on_until_times_agree():
    assert not steady([1.0, 1.0])
    assert not steady([1.0, 1.0, 1.2])
    assert steady([9.0, 1.0, 1.05, 1.0])
    assert steady([1.0, 2.0] * 10)


def session(*seconds):
    """A session whose runs take the given times, again and again; and the list of the runs so far."""
    runs, times = [], cycle(seconds)
    made = Session(lambda *_: Running(infer=lambda x: x, precision=Precision.FP32, on="CPU"), None, 1)

    def timed(_):
        runs.append(next(times))
        return runs[-1]

    made.time, made.output = timed, None
    return made, runs


def test_the_first_run_of_a_turn_does_not_count():
    fast, runs = session(0.75, 0.5, 0.25)
    fast.warm_up(None, 0)
    assert (fast.turn(1.0), len(runs)) == ([0.25, 0.75], 4)
    assert (fast.turn(0), len(runs)) == ([0.25], 6)


def test_a_long_run_counts_at_once():
    slow, runs = session(2 * latency.LONG)
    slow.warm_up(None, 0)
    assert (slow.turn(1.0), len(runs)) == ([2 * latency.LONG], 2)


@pytest.fixture
def entrant(monkeypatch):
    """An entrant whose turns take what is said, and the order in which such entrants have theirs."""
    monkeypatch.setattr(latency, "REST", 0)
    order = []

    def make(name, *turns):
        times = cycle(turns)

        def call(method, seconds):
            assert (method, seconds) == ("turn", latency.TURN)
            order.append(name)
            if (run := next(times)) is None:
                raise BackendError("out of memory")
            return [run]

        return Entrant(Contender(name, None), SimpleNamespace(call=call))

    return make, order


def test_an_entrant_has_turns_enough_and_not_much_longer_than_its_seconds(entrant):
    slow = entrant[0]("slow", 5.0)
    for turns in range(latency.LEAST_TURNS):
        assert slow.progress(20) == turns / latency.LEAST_TURNS
        slow.go(20)
    assert slow.progress(20) == 1
    assert slow.progress(100) == 5 * latency.LEAST_TURNS / 100


def test_a_turn_is_a_fifth_of_the_seconds_where_these_are_few():
    asked = []
    hurried = Entrant(Contender("any", None), SimpleNamespace(call=lambda _, seconds: asked.append(seconds) or [1.0]))
    hurried.go(1.0)
    assert asked == [1.0 / latency.LEAST_TURNS]


def test_a_failed_turn_is_the_last(entrant):
    broken = entrant[0]("broken", 0.5, None)
    latency.take_turns([broken], 20)
    assert (broken.turns, str(broken.stopped), broken.progress(20)) == ([[0.5]], "out of memory", 1)


def test_a_fast_entrant_s_turns_lie_between_a_slow_one_s(entrant):
    make, order = entrant
    latency.take_turns([make("a", 1.0), make("b", 4.0)], 24.0)
    assert (order[:2], order.count("a"), order.count("b")) == (["a", "b"], 24, 6)
    slow = [place for place, name in enumerate(order) if name == "b"]
    assert set(np.diff(slow)) == {5}


def test_a_worker_tells_why_a_call_failed_and_lives_on():
    with Worker(partial(list, "ab")) as worker:
        with pytest.raises(BackendError, match="pop index out of range"):
            worker.call("pop", 7)
        assert worker.call("pop", 0) == "a"


def test_a_gpu_s_memory_is_what_is_taken_since_before_the_model_was_loaded(monkeypatch):
    free = [9 * 2**30, 7 * 2**30, 8 * 2**30]
    monkeypatch.setattr(latency, "free_on_gpu", lambda: free.pop(0))
    session = Session(lambda *_: Running(lambda x: x, Precision.FP16, "any on GPU", on_gpu=True), None, None)
    assert session.gpu_memory() == 2 * 2**30
    session = Session(lambda *_: Running(lambda x: x, Precision.FP32, "any on CPU"), None, None)
    assert (session.warm_up(1, 0), session.run() >= 0) == (1, True)
    monkeypatch.setattr(latency, "free_on_gpu", lambda: None)
    assert session.gpu_memory() is None


def test_a_process_s_largest_memory_is_known_where_linux_does_not_tell_it(monkeypatch, tmp_path):
    told = peak_memory()
    monkeypatch.setattr("sanrt.runtime.runs.timing.PROCESS_STATUS", tmp_path / "none")
    assert peak_memory() > 0
    assert told > 2**24
