"""Reading an ONNX file's description without onnx."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from sanrt.errors import ModelError
from sanrt.runtime.artifacts.models import onnx_metadata, read_spec


def metadata_of(path):
    with path.open("rb") as file:
        return onnx_metadata(file, str(path))


def test_the_metadata_is_what_onnx_reads(tiny_model):
    path = tiny_model(scale=3)
    assert metadata_of(path) == {p.key: p.value for p in onnx.load(path).metadata_props}
    assert read_spec(path).architecture.scale == 3


def test_values_of_any_length_and_alphabet_survive(tmp_path):
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    metadata = {"empty": "", "long": "x" * 70000, "größe": "…", "": "no key"}
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, tmp_path / "m.onnx")
    assert metadata_of(tmp_path / "m.onnx") == metadata


def test_every_cut_of_a_file_is_an_error_or_lacks_what_was_cut(tiny_model, tmp_path):
    whole = tiny_model().read_bytes()
    path = tmp_path / "cut.onnx"
    for kept in [*range(0, 40), *range(len(whole) - 400, len(whole))]:
        path.write_bytes(whole[:kept])
        # Cut between two entries it is a whole file without the last ones.
        assert "cut.onnx" in error_of(path) or "sanrt.description_digest" not in metadata_of(path)
    assert "sanrt.description_digest" in metadata_of(tiny_model())


def error_of(path):
    """What reading a model raises; empty if it can be read."""
    try:
        read_spec(path)
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("content", [b"just text", b"\x89PNG\r\n\x1a\n" + bytes(50), b"\xff" * 30, bytes(30)])
def test_other_files_are_one_clear_line(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.onnx: not "):
        read_spec(tmp_path / "m.onnx")


def test_a_missing_file_is_told_with_what_makes_one(tmp_path):
    with pytest.raises(ModelError, match=r"No such file.*sanrt export"):
        read_spec(tmp_path / "none.onnx")


def test_nothing_is_kept_beside_weights_that_ship_however_they_are_named(monkeypatch):
    from sanrt.model.bundled import FOLDER, bundled_checkpoint
    from sanrt.runtime.artifacts.variants import cache_folders

    monkeypatch.chdir(FOLDER.parent)
    weights = bundled_checkpoint(2)
    relative = Path(FOLDER.name) / weights.name
    assert relative.is_file()
    assert cache_folders(relative) == cache_folders(weights)
    assert len(cache_folders(relative)) == 1
