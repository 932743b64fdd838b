"""The latency benchmark: what a row holds, what it says of bad arguments, and that a failure stops nobody else."""

import json
import sys
from dataclasses import replace
from functools import partial
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.measure
from benchmarks import contenders, latency
from benchmarks.contenders import Contender, Running, Session, centred_by_matrix, open_backend, steady
from benchmarks.latency import Entrant, Interval, Measured, Row, comparison, read_report, with_share
from benchmarks.measure import Limits, Size, Worker, intervals, operations, picture, run_command
from sanrt.errors import BackendError, UsageError
from sanrt.model.spec import Architecture, Precision
from tests.benchmarks.broken import dying, failing

MEASURE_LIMITS = latency.measure_limits
ARCH = Architecture(scale=2, groups=1, blocks=1, channels=16, reduction=4)
SMALL = Size(20, 16)


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Known at once: measuring the machine takes seconds."""
    monkeypatch.setattr(latency, "measure_limits", lambda worker: {"fp32": 1e10, "bf16": 1e10, "copy": 1e10})


@pytest.fixture
def measure(monkeypatch, tmp_path, capsys):
    """Run the command in this process: its exit status, its report and what it complained of."""

    def run(*arguments):
        report = tmp_path / "report.json"
        fixed = ["--size", "20x16", "--seconds", "0", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["latency.py", *fixed, *map(str, arguments), "--json", str(report)])
        with pytest.raises(SystemExit) as end:
            run_command("latency", latency.latency)
        return end.value.code, json.loads(report.read_text()) if report.exists() else None, capsys.readouterr()

    return run


def test_a_report_holds_a_row_with_its_accuracy_memory_and_share(measure, tiny_model, tmp_path):
    status, report, shown = measure("--model", tiny_model(), "--backend", "onnxruntime", "--plot", tmp_path / "plot.png")
    assert status == 0
    (row,) = report["rows"]
    found = row["measured"]
    assert (row["name"], row["size"], found["precision"]) == ("onnxruntime", "20x16", "fp32")
    assert found["runs"] == latency.LEAST_TURNS
    assert found["psnr"] > 80
    assert found["peak"] > 2**24
    assert found["share"] == pytest.approx(found["rate"] / report["limits"]["fp32"])
    assert found["rate"] == pytest.approx(operations(ARCH, SMALL) / found["p50"]["value"])
    assert {"cpu", "cores", "versions", "load"} <= report["environment"].keys()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "onnxruntime, fp32" in shown.out


def test_a_failing_backend_is_a_row_that_says_why_and_the_rest_go_on(measure, monkeypatch, tiny_model):
    contenders = [
        Contender("broken", failing),
        Contender("killed", dying),
        Contender("hungry", failing, needed=lambda size: 2**60),
        Contender("onnxruntime bf16", partial(open_backend, "onnxruntime", Precision.BF16)),
        Contender("onnxruntime", partial(open_backend, "onnxruntime", None)),
    ]
    monkeypatch.setattr(latency, "chosen", lambda *_: contenders)
    status, report, shown = measure("--model", tiny_model())
    assert status == 1
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["broken"]["reason"] == "no such instruction"
    assert "exit 9" in rows["killed"]["reason"]
    assert "runs in fp32" in rows["onnxruntime bf16"]["reason"]
    assert "needs" in rows["hungry"]["reason"]
    assert [row["failed"] for row in report["rows"]] == [True, True, False, True, False]
    assert rows["onnxruntime"]["measured"]
    assert "no such instruction" in shown.out


def test_other_regions_are_those_of_the_reference_too_and_leave_out_who_has_the_paper_s_alone(measure, tiny_model):
    backends = "--backend", "native", "--precision", "fp32", "--backend", "onnxruntime-plain"
    status, report, _ = measure("--model", tiny_model(), *backends, "--regions", "4")
    assert status == 0
    ours, plain = report["rows"]
    assert (ours["size"], plain["measured"]) == ("20x16, k=4", None)
    assert ours["measured"]["psnr"] > 80
    assert ours["measured"]["rate"] == pytest.approx(operations(ARCH, SMALL, 4) / ours["measured"]["p50"]["value"])
    assert plain["reason"] == "has the paper's 2 x 2 regions only"


@pytest.mark.parametrize(("size", "k"), [("160x90", 2), ("640x360", 4)])
def test_regions_by_size_are_those_of_a_run(size, k):
    assert latency.case(size, "auto").regions == k
    assert latency.case(size, "2") == latency.Case(*map(int, size.split("x")))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--backend", "tensorflow"], "unknown backend 'tensorflow'"),
        (["--model", "nowhere.onnx"], "nowhere.onnx: no such model"),
        (["--size", "0x64"], "size '0x64'"),
        (["--size", "64"], "size '64'"),
        (["--scale", "5"], "--scale 5"),
        (["--compare", "nowhere.json"], "--compare nowhere.json"),
        (["--plot", "nowhere/plot.png"], "nowhere/plot.png"),
        (["--plot", "plot.doc"], "--plot plot.doc"),
        (["--paper", "--model", "some.onnx"], "expected one of them"),
        (["--regions", "many"], "--regions many"),
        (["--regions", "9"], "--regions 9"),
    ],
)
def test_bad_arguments_are_told_in_one_line(measure, arguments, told):
    status, report, shown = measure(*arguments)
    assert (status, report, shown.out) == (1, None, "")
    assert shown.err.count("\n") == 1
    assert told in shown.err


@pytest.mark.parametrize("scale", [2, 3, 8])
def test_operations_are_those_that_pytorch_counts(live_network, scale):
    net = live_network(scale=scale, groups=2, blocks=2, channels=32, reduction=4)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it does not count the fused kernel
        net(torch.rand(1, 3, 32, 64) * 255)
    assert operations(net.arch, Size(64, 32)) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_official_formula_is_the_same_network(live_network):
    soca = live_network().groups[0].soca
    features = torch.randn(1, 16, 9, 7)
    torch.testing.assert_close(centred_by_matrix(soca, features), soca(features), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torch-bf16", "torch-mxm", "onnxruntime-plain", "openvino-plain"])
def test_a_baseline_computes_the_network(tiny_model, name):
    from benchmarks.contenders import BASELINES

    if name.startswith("openvino"):
        pytest.importorskip("openvino")
    x = latency.network_input(latency.picture(SMALL), 255)
    session = Session(BASELINES[name].open, tiny_model(), 1)
    reference = Session(partial(open_backend, "torch", None), tiny_model(), 1).warm_up(x, 0)
    assert latency.psnr(session.warm_up(x, 0), reference) > (40 if session.facts()[0] == "bf16" else 80)


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
    slow, runs = session(2 * contenders.LONG)
    slow.warm_up(None, 0)
    assert (slow.turn(1.0), len(runs)) == ([2 * contenders.LONG], 2)


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

        return Entrant(Contender(name, failing), SimpleNamespace(call=call))

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
    hurried = Entrant(Contender("any", failing), SimpleNamespace(call=lambda _, seconds: asked.append(seconds) or [1.0]))
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


def row(seconds, spread=0.0, on="torch on CPU", name="torch"):
    p50 = Interval(seconds, seconds - spread, seconds + spread)
    return Row(SMALL, name, Measured("fp32", on, p50, p50, p50, 3, 3, 1e9, None, 2**20, None, None))


def test_comparison_tells_ratios_and_whether_intervals_are_apart(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(latency.report("net", {}, {}, [row(0.1, 0.01), row(0.05, name="auto")])))
    old = read_report(path)

    def compared(*rows):
        columns = [map(str, column.cells) for column in comparison("net", list(rows), old).columns]
        return [cells[1:] for cells in zip(*columns, strict=True)]

    slower = compared(row(0.2, 0.01), row(0.1, name="auto"))
    assert slower[0][3:] == ("2.00", "apart", "2.00", "2.00", "within intervals")
    assert slower[1][3:] == ("2.00", "apart", "", "", "")
    assert compared(row(0.2, 0.01), row(0.05, name="auto"))[0][5:] == ("2.00", "4.00", "apart")
    assert compared(row(0.115, 0.01))[0][3:] == ("1.15", "within intervals", "", "", "")
    path.write_text("[]")
    with pytest.raises(UsageError, match="not a report"):
        read_report(path)


def test_limits_are_those_of_this_machine(monkeypatch):
    monkeypatch.setattr(benchmarks.measure, "MATRIX", 64)
    monkeypatch.setattr(benchmarks.measure, "COPIED", 2**16)
    limits = Limits(1)
    assert all(1e6 < rate < 1e15 for rate in (limits.product("fp32"), limits.product("bf16"), limits.copy()))


def test_a_share_is_of_the_limit_of_what_it_ran_on():
    assert with_share(row(1.0), {"fp32": 4e9}).measured.share == 0.25
    assert with_share(row(1.0, on="torch-cuda on H100"), {"fp32": 4e9}).measured.share is None
    assert with_share(row(1.0, on="torch-cuda on H100"), {"fp32": 4e9, "gpu fp32": 1e10}).measured.share == 0.1
    found = row(1.0)
    int16 = replace(found, measured=replace(found.measured, precision="int16"))
    assert with_share(int16, {"fp32": 4e9, "bf16": 5e9}).measured.share == 0.2


def test_a_gpu_s_memory_is_what_is_taken_since_before_the_model_was_loaded(monkeypatch):
    free = [9 * 2**30, 7 * 2**30, 8 * 2**30]
    monkeypatch.setattr(contenders, "free_on_gpu", lambda: free.pop(0))
    session = Session(lambda *_: Running(lambda x: x, Precision.FP16, "any on GPU", on_gpu=True), None, None)
    assert session.gpu_memory() == 2 * 2**30
    session = Session(lambda *_: Running(lambda x: x, Precision.FP32, "any on CPU"), None, None)
    assert (session.warm_up(1, 0), session.run() >= 0) == (1, True)
    monkeypatch.setattr(contenders, "free_on_gpu", lambda: None)
    assert session.gpu_memory() is None


def test_a_gpu_s_limits_are_measured_where_there_is_one():
    answers = {"product": 1e12, "copy": 1e11, "gpu": True}
    worker = SimpleNamespace(call=lambda method, *_: answers[method])
    assert set(MEASURE_LIMITS(worker)) == {"fp32", "bf16", "copy", "gpu fp32", "gpu fp16", "gpu bf16", "gpu copy"}
    answers["gpu"] = False
    assert set(MEASURE_LIMITS(worker)) == {"fp32", "bf16", "copy"}


def test_pictures_have_the_asked_size():
    assert picture(Size(200, 20)).shape == (20, 200, 3)
    assert picture(Size(5, 4)).shape == (4, 5, 3)
