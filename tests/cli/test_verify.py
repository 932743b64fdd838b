import hashlib
import json

import numpy as np
import pytest
import pyvips
from typer.testing import CliRunner

from sanrt.cli import app
from sanrt.errors import OutOfMemoryError, UsageError
from sanrt.runtime.backends.default_variant import prefer
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.pictures.codec import SourcePicture
from sanrt.runtime.runs import record as records
from sanrt.runtime.tiling.streaming import Streaming


@pytest.fixture
def recorded(tmp_path, tiny_model):
    """A run over two pictures, one exactly streamed: (record, folder of the results)."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for name, side in ("a", 40), ("b", 24):
        pixels = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
        pyvips.Image.new_from_array(pixels).write_to_file(str(tmp_path / "in" / f"{name}.png"))
    arguments = [
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--model",
        str(tiny_model(2)),
        "--tile",
        "32",
        "--threads",
        "1",
    ]
    done = CliRunner().invoke(app, ["run", *arguments, "--memory", "1G", "--record", str(tmp_path / "run.jsonl")])
    assert done.exit_code == 0, done.output
    return tmp_path / "run.jsonl", tmp_path / "out"


def verify(record, *options):
    return CliRunner().invoke(app, ["verify", str(record), *options])


def test_a_record_tells_what_each_result_depends_on(recorded):
    entries = [json.loads(line) for line in recorded[0].read_text().splitlines()]
    assert [entry["tiling"] for entry in entries] == ["exact", "whole"]
    assert {entry["backend"] for entry in entries} <= {"native", "onnxruntime", "openvino"}
    assert all(len(entry[name]) == 64 for entry in entries for name in ("source_digest", "output_digest", "model_digest"))
    assert all(set(entry["seconds"]) == {"read", "upscale", "write"} for entry in entries)


def test_a_record_that_has_a_backend_s_earlier_name_is_verified(recorded, tmp_path, tiny_model):
    record = tmp_path / "native.jsonl"
    words = ["--model", str(tiny_model(2)), "--backend", "native", "--threads", "1", "--record", str(record)]
    done = CliRunner().invoke(app, ["run", str(tmp_path / "in"), str(tmp_path / "native"), *words])
    assert done.exit_code == 0, done.output
    entries = [json.loads(line) for line in record.read_text().splitlines()]
    record.write_text("".join(f"{json.dumps({**entry, 'backend': 'winograd'})}\n" for entry in entries))
    assert {entry.backend for entry in records.read_record(record)} == {"native"}
    assert verify(record).exit_code == 0


def test_a_record_names_the_preferred_variant_that_ran(tmp_path, tiny_model):
    exported, variant = tmp_path / "san_x2.onnx", tmp_path / "san_x2.variant.onnx"
    for path in exported, variant:
        path.write_bytes(tiny_model(2).read_bytes())
    prefer(exported, variant, "torch", None)
    pyvips.Image.black(20, 20, bands=3).write_to_file(str(tmp_path / "a.png"))
    arguments = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--models", str(tmp_path), "--scale", "2"]
    done = CliRunner().invoke(app, ["run", *arguments, "--threads", "1", "--record", str(tmp_path / "run.jsonl")])
    assert done.exit_code == 0, done.output
    entry = json.loads((tmp_path / "run.jsonl").read_text())
    assert (entry["model"], entry["backend"]) == (str(variant), "torch")
    assert "1 same, bit for bit" in verify(tmp_path / "run.jsonl").output


def test_unchanged_results_are_reproduced_bit_for_bit(recorded):
    done = verify(recorded[0])
    assert done.exit_code == 0
    assert "2 same, bit for bit" in done.output


@pytest.mark.parametrize("precision", ["fp32", "int16"])
def test_exact_results_of_native_are_those_of_whole_bit_for_bit(tmp_path, tiny_model, precision):
    if precision == "int16":
        ir = pytest.importorskip("sanrt.kernels.cpu.ir")
        if not ir.this_processor().pmadd:
            pytest.skip("no int16 on this processor")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 50, 4), np.uint8)
    pyvips.Image.new_from_array(pixels).copy(interpretation="srgb").write_to_file(str(tmp_path / "a.png"))
    entries = []
    for number, tiling in enumerate((["whole"], ["exact", "--tile", "16"], ["exact", "--tile", "64", "--memory", "512M"])):
        record = tmp_path / f"{number}.jsonl"
        arguments = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--model", str(tiny_model(2)), "--overwrite"]
        arguments += ["--backend", "native", "--precision", precision, "--threads", "2", "--record", str(record)]
        done = CliRunner().invoke(app, ["run", *arguments, "--tiling", *tiling])
        assert done.exit_code == 0, done.output
        entries.append(json.loads(record.read_text()))
    assert [entry["tiling"] for entry in entries] == ["whole", "exact", "exact"]
    assert len({entry["output_digest"] for entry in entries}) == 1
    for number in range(3):
        assert "1 same, bit for bit" in verify(tmp_path / f"{number}.jsonl").output


def test_a_result_of_another_engine_is_not_replayed(recorded):
    record, _ = recorded
    entries = [json.loads(line) for line in record.read_text().splitlines()]
    assert [entry["engine_digest"] for entry in entries] == [None, None]
    entries[0]["engine_digest"] = "ab" * 32
    record.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    done = verify(record)
    assert done.exit_code == 1
    assert "another engine than SHA-256 abababababab... runs it now" in done.output
    assert "1 same, bit for bit" in done.output


def test_a_tampered_result_differs_and_one_within_a_step_is_close(recorded):
    record, folder = recorded
    for name, change in ("a", 40), ("b", 1):
        path = str(folder / f"{name}.png")
        pixels = pyvips.Image.new_from_file(path).numpy().copy()
        pixels[5, 5, 0] = pixels[5, 5, 0] + change if pixels[5, 5, 0] < 128 else pixels[5, 5, 0] - change
        pyvips.Image.new_from_array(pixels).write_to_file(path)
    done = verify(record)
    assert done.exit_code == 1
    assert "a.png: differs (largest difference 40.00 of 255, and the file changed since the run)" in done.output
    assert "b.png: same, within rounding (largest difference 1.00 of 255" in done.output


def test_a_changed_source_cannot_be_replayed(recorded):
    record, folder = recorded
    (folder.parent / "in" / "a.png").write_bytes((folder.parent / "in" / "b.png").read_bytes())
    done = verify(record, "--sample", "1")
    assert done.exit_code == 1
    assert "a.png: cannot be replayed" in done.output
    assert "changed since the run" in done.output


@pytest.mark.parametrize("made_up", [{"precision": "fp12"}, {"tiling": "diagonal"}])
def test_settings_that_sanrt_has_not_are_one_clear_line(recorded, made_up):
    entry = json.loads(recorded[0].read_text().splitlines()[0])
    recorded[0].write_text(json.dumps({**entry, **made_up}) + "\n")
    done = verify(recorded[0])
    assert isinstance(done.exception, UsageError)
    assert f"not a record of this sanrt ('{next(iter(made_up.values()))}' is not a valid" in str(done.exception)


def test_a_model_is_loaded_once_for_all_its_results(recorded, monkeypatch):
    loads = []
    monkeypatch.setattr(records, "load_backend", lambda *key: loads.append(key) or load_backend(*key))
    assert "2 same, bit for bit" in verify(recorded[0]).output
    assert len(loads) == 1


def test_a_file_that_is_no_record_is_one_clear_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"source": 1}\n')
    done = verify(tmp_path / "x.jsonl")
    assert "not a record of this sanrt" in str(done.exception)


def test_a_record_on_a_full_disk_is_one_error_and_a_dry_run_writes_none(recorded, tiny_model):
    folder = recorded[0].parent
    arguments = ["run", str(folder / "in"), str(folder / "again"), "--model", str(tiny_model(2)), "--threads", "1"]
    with pytest.raises(UsageError, match="/dev/full: cannot be written"):
        CliRunner().invoke(app, [*arguments, "--record", "/dev/full"], catch_exceptions=False)
    assert CliRunner().invoke(app, [*arguments, "--dry-run", "--record", str(folder / "dry.jsonl")]).exit_code != 0
    assert not (folder / "dry.jsonl").exists()


def test_the_digest_in_a_record_is_of_the_file_as_it_was_written(tmp_path, tiny_model, monkeypatch):
    pyvips.Image.black(24, 24, bands=3).write_to_file(str(tmp_path / "a.png"))
    written = {}
    real = records.Recorder.entry

    def entry(recorder, outcome):
        written["content"] = outcome.job.destination.read_bytes()
        outcome.job.destination.unlink()  # by somebody, between the two
        return real(recorder, outcome)

    monkeypatch.setattr(records.Recorder, "entry", entry)
    arguments = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--model", str(tiny_model(2)), "--threads", "1"]
    done = CliRunner().invoke(app, ["run", *arguments, "--record", str(tmp_path / "run.jsonl")])
    assert done.exit_code == 0, done.output
    (entry,) = records.read_record(tmp_path / "run.jsonl")
    assert entry.output_digest == hashlib.sha256(written["content"]).hexdigest()


def test_after_an_out_of_memory_the_record_names_what_really_ran_and_its_replay_is_the_same(
    tmp_path, tiny_model, monkeypatch
):
    from sanrt.runtime.backends import onnxruntime

    pixels = np.random.default_rng(1).integers(0, 256, (70, 90, 3)).astype(np.uint8)
    pyvips.Image.new_from_array(pixels).write_to_file(str(tmp_path / "a.png"))
    infer, calls = onnxruntime.OnnxRuntimeBackend.infer, []

    def full_once(self, pictures):
        calls.append(pictures.shape)
        if len(calls) == 1:
            raise OutOfMemoryError("onnxruntime ran out of memory")
        return infer(self, pictures)

    monkeypatch.setattr(onnxruntime.OnnxRuntimeBackend, "infer", full_once)
    words = ["--model", str(tiny_model(2)), "--backend", "onnxruntime", "--record", str(tmp_path / "run.jsonl")]
    done = CliRunner().invoke(app, ["run", str(tmp_path / "a.png"), str(tmp_path / "b.png"), *words])
    assert done.exit_code == 0, done.output
    (entry,) = records.read_record(tmp_path / "run.jsonl")
    assert (entry.tiling, entry.tile) == ("exact", 45)
    assert "b.png: exact in tiles of 45" in done.output
    assert "1 same, bit for bit" in verify(tmp_path / "run.jsonl").output


def test_a_streamed_file_is_done_again_in_smaller_tiles_after_an_out_of_memory(tmp_path, tiny_model, monkeypatch):
    pixels = np.random.default_rng(2).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    pyvips.Image.new_from_array(pixels).write_to_file(str(tmp_path / "a.png"))
    words = ["--model", str(tiny_model(2)), "--backend", "onnxruntime", "--tile", "48", "--memory", "1G"]
    CliRunner().invoke(app, ["run", str(tmp_path / "a.png"), str(tmp_path / "expected.png"), *words])
    run, calls = Streaming.run, []

    def full_once(self, sink):
        calls.append(self.tile)
        if len(calls) == 1:
            raise OutOfMemoryError("onnxruntime ran out of memory")
        run(self, sink)

    monkeypatch.setattr(Streaming, "run", full_once)
    words += ["--record", str(tmp_path / "run.jsonl")]
    done = CliRunner().invoke(app, ["run", str(tmp_path / "a.png"), str(tmp_path / "b.png"), *words])
    assert done.exit_code == 0, done.output
    assert calls == [48, 24]
    (entry,) = records.read_record(tmp_path / "run.jsonl")
    assert (entry.tiling, entry.tile) == ("exact", 24)
    first, second = (pyvips.Image.new_from_file(str(tmp_path / name)).numpy() for name in ("expected.png", "b.png"))
    assert np.abs(first.astype(int) - second).max() <= 1


def test_a_picture_whose_result_would_not_fit_is_refused_before_it_is_decoded(tmp_path, tiny_model, monkeypatch):
    pyvips.Image.black(9000, 9000, bands=3).copy(interpretation="srgb").write_to_file(str(tmp_path / "a.png"))

    def decode(self, top, bottom):
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(SourcePicture, "_decode", decode)
    words = ["--model", str(tiny_model(2)), "--backend", "onnxruntime", "--tiling", "whole", "--memory", "1G"]
    done = CliRunner().invoke(app, ["run", str(tmp_path / "a.png"), str(tmp_path / "b.png"), *words])
    assert done.exit_code == 1
    assert "18000 x 18000 result takes" in done.output


def test_half_a_line_of_a_killed_run_is_left_out_and_later_entries_are_whole(recorded, tmp_path, caplog):
    record, _ = recorded
    first, second = record.read_text().splitlines()
    record.write_text(f"{first}\n{second[:200]}")
    assert [entry.output for entry in records.read_record(record)] == [json.loads(first)["output"]]
    assert "1 lines were cut short by killed runs and are left out" in caplog.text
    with records.open_record(record) as file:
        file.write(f"{second}\n")
    assert len(records.read_record(record)) == 2


def test_an_empty_record_is_an_error(tmp_path):
    (tmp_path / "record.jsonl").touch()
    with pytest.raises(UsageError, match="has no entries; expected what `sanrt run --record` wrote"):
        records.read_record(tmp_path / "record.jsonl")


def test_a_file_that_is_no_record_is_not_written_to(tmp_path, tiny_model, recorded):
    picture = tmp_path / "in" / "a.png"
    before = picture.read_bytes()
    words = ["--model", str(tiny_model(2)), "--backend", "onnxruntime", "--record", str(picture)]
    with pytest.raises(UsageError, match="no record of sanrt's"):
        CliRunner().invoke(
            app, ["run", str(tmp_path / "in" / "b.png"), str(tmp_path / "c.png"), *words], catch_exceptions=False
        )
    assert picture.read_bytes() == before


@pytest.mark.parametrize("facts", [{"encoding": {}}, {"recipe": {"unknown": 1}}])
def test_a_record_with_settings_that_sanrt_has_not_is_refused_in_one_line(recorded, facts):
    record, _ = recorded
    entry = json.loads(record.read_text().splitlines()[0])
    record.write_text(json.dumps({**entry, **facts}) + "\n")
    with pytest.raises(UsageError, match="not a record of this sanrt"):
        records.read_record(record)
