"""The scaling benchmark: pictures double until a limit, and growth is the exponent of a power law."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import scaling
from benchmarks.measure import run_command
from benchmarks.scaling import Point, exponent, growth, measure, sizes
from sanrt.errors import BackendError
from sanrt.runtime.runs.timing import Size
from sanrt.runtime.tiling.options import Tiling


class Fake:
    """A worker whose pictures take seconds by their pixels; it fails above some."""

    def __init__(self, most=2**40):
        self.most = most

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, method, pixels):
        count = pixels.shape[0] * pixels.shape[1]
        if count > self.most:
            raise BackendError("out of memory")
        return count**1.5 / 1e6, 100, 100 + 8 * count


def test_pictures_double_up_to_the_largest():
    assert [*map(str, sizes(Size(200, 160)))] == ["64x64", "128x64", "128x128", "200x160"]
    assert [*map(str, sizes(Size(256, 256), 4))] == ["64x64", "128x128", "256x256"]
    assert [*map(str, sizes(Size(64, 64)))] == ["64x64"]


def test_exponents_are_those_of_the_power_law(monkeypatch):
    assert exponent([1, 10, 100], [3.0, 30.0, 300.0]) == pytest.approx(1)
    monkeypatch.setattr(scaling, "Worker", lambda make: make())
    points, end = measure(Fake, Tiling.WHOLE, sizes(Size(512, 256)), 1e9)
    assert [each.size.pixels for each in points] == [2**n for n in range(12, 18)]
    assert "--largest" in end
    assert "pixels^1.50" in growth(points)
    assert "pixels^1.00" in growth(points)


def test_it_stops_before_a_picture_that_takes_too_long_and_at_one_that_fails(monkeypatch):
    monkeypatch.setattr(scaling, "Worker", lambda make: make())
    clock = iter(range(10**6))
    monkeypatch.setattr(scaling, "time", SimpleNamespace(monotonic=lambda: next(clock) / 1e3))
    points, end = measure(Fake, Tiling.WHOLE, sizes(Size(8192, 8192)), 3.0)
    assert points[-1].size.pixels ** 1.5 / 1e6 <= 3.0 < (2 * points[-1].size.pixels) ** 1.5 / 1e6 + 0.1
    assert "--minutes" in end
    points, end = measure(lambda: Fake(2**14), Tiling.EXACT, sizes(Size(8192, 8192)), 1e9)
    assert len(points) == 3
    assert end == "256x128 failed: out of memory"


def test_few_pictures_have_no_fit():
    assert "too few" in growth([Point(Tiling.WHOLE, Size(64, 64), 1.0, 0, 1)])


@pytest.fixture
def command(monkeypatch, tiny_model, capsys):
    """Run the command in this process: its exit status, and what it printed."""

    def run(*arguments):
        fixed = ["--model", str(tiny_model()), "--backend", "onnxruntime", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["scaling.py", *fixed, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_command("scaling", scaling.scaling)
        return end.value.code, capsys.readouterr()

    return run


def test_both_ways_have_a_table(command, tmp_path):
    status, shown = command("--largest", "64x64", "--json", tmp_path / "a.json")
    assert status == 0
    found = json.loads((tmp_path / "a.json").read_text())["points"]
    assert [each["size"] for each in found["onnxruntime, whole"]] == ["64x64"]
    assert shown.out.count("64x64") == 2
    assert shown.out.count("stopped at --largest") == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--largest", "0x64"], "size '0x64'"), (["--minutes", "0"], "--minutes 0"), (["--step", "3"], "--step 3")],
)
def test_bad_arguments_are_told_in_one_line(command, arguments, told):
    status, shown = command(*arguments)
    assert status == 1
    assert shown.err.count("\n") == 1
    assert told in shown.err


def test_the_plot_has_a_line_for_each_backend_and_tiling(tmp_path):
    pytest.importorskip("matplotlib")
    points = [Point(Tiling.WHOLE, size, 1e-6 * size.pixels, 0, 100 * size.pixels) for size in sizes(Size(256, 256))]
    scaling.draw({"native:int16, whole": points, "native:fp32, exact": points[:2]}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
