"""`sanrt info` as typed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sanrt.cli import main


@pytest.fixture
def info(monkeypatch, capsys):
    """`info(file)`: exit status, stdout, stderr."""

    def call(file):
        monkeypatch.setattr(sys, "argv", ["sanrt", "info", str(file)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as stopped:
            main()
        return (stopped.value.code or 0, *capsys.readouterr())

    return call


def test_a_model_tells_its_network_identity_and_measurements(info, live_network, tmp_path):
    import torch

    from sanrt.export.onnx import ExportOptions, export_onnx
    from sanrt.export.scene import natural_scene
    from sanrt.model.checkpoint import load_checkpoint, save_checkpoint

    save_checkpoint(tmp_path / "own.safetensors", live_network(3), "seeded [not] markup", torch.float32)
    checkpoint = load_checkpoint(tmp_path / "own.safetensors")
    export_onnx(checkpoint, tmp_path / "san_x3.onnx", ExportOptions(picture=natural_scene(32, 32)))
    status, out, _ = info(tmp_path / "san_x3.onnx")
    assert status == 0
    for told in (
        "SAN x3 (G=2 m=1 C=16 r=4)",
        "16 channels reduced to 4; r=4 is read off these",
        "fp32",
        "seeded [not] markup",
        checkpoint.digest,
        "of 255 apart, tolerance ",
        "dB PSNR",
    ):
        assert told in out
    assert "Matrix square roots" in out
    status, out, _ = info(tmp_path / "own.safetensors")
    assert status == 0
    for told in ("SAN x3 (G=2 m=1 C=16 r=4)", "seeded [not] markup", checkpoint.digest, "5 Newton-Schulz steps"):
        assert told in out


def test_a_model_without_measurements_is_described_too(info, tiny_model):
    status, out, _ = info(tiny_model())
    assert status == 0
    assert "5 Newton-Schulz steps" in out


def test_a_model_tells_how_a_program_calls_it(info, tiny_model):
    status, out, err = info(tiny_model(3))
    assert (status, err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if "│" in line]
    assert ["", "in", "input", "batch x 3 x height x width", "float32", "RGB, planar (NCHW), 0..255", ""] in rows
    (output,) = (row for row in rows if row[1] == "out")
    assert output[2:5] == ["output", "batch x 3 x out_height x out_width", "float32"]
    assert "3 times height and width, not clipped" in output[5]
    assert "opset ai.onnx 22" in out


def test_names_types_and_sizes_are_the_files_own(info, tiny_model, tmp_path):
    onnx = pytest.importorskip("onnx")
    from sanrt.model.exported import read_interface

    model = onnx.load(tiny_model())
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 5
    onnx.save(model, tmp_path / "other.onnx")
    (found,) = read_interface(tmp_path / "other.onnx").inputs
    assert (found.name, found.type, found.shape) == ("input", "float16", (5, 3, "height", "width"))


def test_a_model_is_described_without_torch_onnx_or_onnxruntime(tiny_model):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxruntime', 'safetensors']));"
        "from sanrt.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "info", str(tiny_model())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SAN x2" in done.stdout


@pytest.mark.parametrize(
    "name", ["notes.txt", "noending", "damaged.onnx", "damaged.pt", "damaged.safetensors", "damaged.engine"]
)
def test_other_and_damaged_files_are_one_line(info, tmp_path, name):
    (tmp_path / name).write_bytes(b"something else")
    status, out, err = info(tmp_path / name)
    assert (status, out) == (1 if name.startswith("damaged") else 2, "")
    assert err.startswith(f"sanrt: {tmp_path / name}: ")
    assert err.count("\n") == 1
