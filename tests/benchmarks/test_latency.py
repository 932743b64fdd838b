"""The latency benchmark: what a row holds, what it says of bad arguments, and that a failure stops nobody else."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.measure
from benchmarks import latency
from benchmarks.contenders import centred_by_matrix
from benchmarks.latency import Row, comparison, read_report
from benchmarks.measure import Limits, operations, picture, run_command
from sanrt.arrays import psnr
from sanrt.errors import UsageError
from sanrt.model.spec import Architecture, Precision
from sanrt.runtime.runs import latency as runs
from sanrt.runtime.runs.latency import Case, Contender, Result, Session, Timing, open_backend
from sanrt.runtime.runs.timing import Interval, Size
from sanrt.runtime.tiling.upscaling import network_input
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
    assert found["runs"] == runs.LEAST_TURNS
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
    x = network_input(picture(SMALL), 255)
    session = Session(BASELINES[name].open, tiny_model(), 1)
    reference = Session(partial(open_backend, "torch", None), tiny_model(), 1).warm_up(x, 0)
    assert psnr(session.warm_up(x, 0), reference) > (40 if session.facts()[0] == "bf16" else 80)


def result(seconds, spread=0.0, on="torch on CPU", name="torch", precision=Precision.FP32):
    p50 = Interval(seconds, seconds - spread, seconds + spread)
    return Result(Case(SMALL.width, SMALL.height), name, Timing(precision, on, p50, p50, p50, 3, 3, 2**20, None, None))


def row(*arguments, **options):
    return Row(result(*arguments, **options), 1e9)


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
    on_gpu, rate = "torch-cuda on H100", operations(ARCH, SMALL)

    def share(limits, **options):
        return latency.row(result(1.0, **options), ARCH, limits).share

    assert share({"fp32": 4 * rate}) == 0.25
    assert share({"fp32": 4 * rate}, on=on_gpu) is None
    assert share({"fp32": 4 * rate, "gpu fp32": 10 * rate}, on=on_gpu) == pytest.approx(0.1)
    assert share({"fp32": 4 * rate, "bf16": 5 * rate}, precision=Precision.INT16) == pytest.approx(0.2)


def test_a_gpu_s_limits_are_measured_where_there_is_one():
    answers = {"product": 1e12, "copy": 1e11, "gpu": True}
    worker = SimpleNamespace(call=lambda method, *_: answers[method])
    assert set(MEASURE_LIMITS(worker)) == {"fp32", "bf16", "copy", "gpu fp32", "gpu fp16", "gpu bf16", "gpu copy"}
    answers["gpu"] = False
    assert set(MEASURE_LIMITS(worker)) == {"fp32", "bf16", "copy"}


def test_pictures_have_the_asked_size():
    assert picture(Size(200, 20)).shape == (20, 200, 3)
    assert picture(Size(5, 4)).shape == (4, 5, 3)
