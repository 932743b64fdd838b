"""`sanrt bench` as typed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from sanrt.cli import main
from sanrt.runtime.backends.registry import status


@pytest.fixture
def bench(monkeypatch, capsys):
    """`bench(*words)`, as short as can be: exit status, stdout, stderr."""

    def call(*words: object):
        monkeypatch.setattr(sys, "argv", ["sanrt", "bench", "--seconds", "0", "--threads", "1", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return (stopped.value.code or 0, *capsys.readouterr())

    return call


def rows(out: str, size: str) -> dict[tuple[str, str], list[str]]:
    """The table's rows of a size: figures by backend and precision."""
    found = [line.split() for line in out.splitlines() if line.startswith(f"{size} ")]
    return {(row[1], row[2]): row[3:] for row in found}


def test_a_row_holds_times_rates_memory_and_accuracy(bench, tiny_model, tmp_path):
    words = ["--backend", "native", "--precision", "fp32", "--backend", "onnxruntime", "--size", "20x16", "--size", "8x8"]
    status, out, err = bench(tiny_model(2), *words, "--json", tmp_path / "figures.json")
    assert (status, err) == (0, "")
    assert str(tiny_model(2)) in out
    small, large = rows(out, "8x8"), rows(out, "20x16")
    assert set(small) == set(large) == {("native", "fp32"), ("onnxruntime", "fp32")}
    median, p90, rate, megapixels, memory, psnr = map(float, large["native", "fp32"])
    assert 0 < median <= p90
    assert rate == pytest.approx(1000 / median, rel=0.1)
    assert megapixels == pytest.approx(rate * 320 / 1e6, abs=0.001)
    assert memory > 16
    assert psnr > 80
    figures = json.loads((tmp_path / "figures.json").read_text())
    (found,) = [each for each in figures if each["name"] == "native fp32" and each["size"]["width"] == 20]
    assert found["timing"]["p50"]["value"] == pytest.approx(median / 1e3, abs=1e-4)


def test_without_names_every_backend_that_is_usable_takes_part_and_the_others_are_told(bench, tiny_model, monkeypatch):
    names = ("native", "onnxruntime", "torch-cuda")
    monkeypatch.setattr("sanrt.runtime.backends.registry.AUTO_ORDER", names)
    code, out, _ = bench(tiny_model(2), "--size", "8x8")
    assert code == 0
    assert {name for name, _ in rows(out, "8x8")} == {name for name in names if status(name).usable}
    assert status("torch-cuda").usable or "left out: torch-cuda, " in out


def test_a_backend_that_fails_is_a_row_and_a_reason_and_the_exit_status(bench, tiny_model):
    code, out, _ = bench(
        tiny_model(2), "--backend", "onnxruntime", "--backend", "native", "--precision", "int16", "--size", "8x8"
    )
    assert code == 1
    assert "failed" in rows(out, "8x8")["onnxruntime", "int16"]
    assert "8x8 onnxruntime int16: backend onnxruntime runs in fp32" in out
    assert ("native", "int16") in rows(out, "8x8")


def test_a_model_with_8_bit_parts_is_compared_with_the_one_it_was_made_of(bench, tiny_model, tmp_path):
    onnx = pytest.importorskip("onnx")
    from sanrt.export.quantise.calibration import RangeMethod, measure_ranges
    from sanrt.export.samples import Sample
    from sanrt.export.scene import natural_scene
    from sanrt.model.exported import read_model
    from sanrt.model.graph import san_model
    from sanrt.model.spec import Quantisation, QuantisedType

    spec, weights = read_model(tiny_model(2))
    ranges = measure_ranges(spec, weights, [Sample("scene", natural_scene(32, 32), None)], RangeMethod.MIN_MAX)
    quantised = replace(spec, quantisation=Quantisation(QuantisedType.INT8, ranges.inputs, ranges.outputs))
    onnx.save(san_model(quantised, weights), tmp_path / "san_x2.int8.onnx")
    words = [tmp_path / "san_x2.int8.onnx", "--backend", "onnxruntime", "--size", "20x16"]
    status, _, err = bench(*words)
    assert status == 2
    assert f"expected that as {tmp_path / 'san_x2.onnx'} beside it" in err
    (tmp_path / "san_x2.onnx").write_bytes(tiny_model(2).read_bytes())
    status, out, err = bench(*words)
    assert (status, err) == (0, "")
    assert "int8 in part" in out
    assert 20 < float(rows(out, "20x16")["onnxruntime", "fp32"][-1]) < 80


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--size", "9"], "size '9'"),
        (["--backend", "tensorflow"], "unknown backend 'tensorflow'"),
        (["--scale", "3"], "is for x2"),
        (["--weights", "fast"], "has its own"),
        (["--json", f"{__file__}/figures.json"], "there is no folder"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(bench, tiny_model, words, told):
    status, out, err = bench(tiny_model(2), *words)
    assert (status, out) == (1 if "--json" in words else 2, "")
    assert told in err
    assert len(err.splitlines()) == 1
