"""The mark of a result: where it lies in each format, that readers pass over it, and that every change shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pyvips

from sanrt.errors import PictureError
from sanrt.runtime.pictures import provenance
from sanrt.runtime.pictures.codec import Output, write_picture
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.provenance import Provenance, SourceIdentity, identify, is_intact, is_unchanged, read_mark

MADE = Provenance(SourceIdentity("a" * 64, 123, "b" * 32), 4, "c" * 64, "d" * 64)
WRITTEN = [form for form in Format if form.written_as is form]


def written(path: Path, form: Format, made: Provenance | None, **more) -> Path:
    pixels = np.random.default_rng(0).integers(0, 65536, (37, 52, 3)).astype(np.uint16)
    bits = min(16, form.facts.max_bits)
    write_picture(Output(path, form, 52, 37, bits=bits, provenance=made, **more), pixels)
    return path


@pytest.fixture(params=WRITTEN)
def result(request, tmp_path) -> Path:
    return written(tmp_path / f"a{request.param.facts.suffixes[0]}", request.param, MADE)


def test_a_result_says_what_made_it_and_has_the_same_pixels_and_metadata(result, tmp_path):
    form = Format.of_suffix(result)
    plain = written(tmp_path / f"plain{result.suffix}", form, None)
    assert read_mark(result).provenance == MADE
    assert read_mark(plain) is None
    one, other = (pyvips.Image.new_from_file(str(path), fail_on="warning") for path in (result, plain))
    assert np.array_equal(one.numpy(), other.numpy())
    assert set(one.get_fields()) == set(other.get_fields())


def test_the_same_result_has_the_same_bytes(result, tmp_path):
    again = written(tmp_path / f"again{result.suffix}", Format.of_suffix(result), MADE)
    assert again.read_bytes() == result.read_bytes()


def test_every_changed_byte_shows(result):
    data = result.read_bytes()
    assert is_intact(result)
    for at in range(0, len(data), 97):
        result.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert not is_intact(result), f"byte {at} of {len(data)}"
    for changed in (data + b"\0", data[:-1], b"", data[:100]):
        result.write_bytes(changed)
        assert not is_intact(result)


def test_a_mark_is_put_in_the_same_way_whatever_the_files_size(result, monkeypatch):
    whole = result.read_bytes()
    monkeypatch.setattr(provenance, "BLOCK", 100)
    assert written(result, Format.of_suffix(result), MADE).read_bytes() == whole
    assert is_intact(result)


@pytest.mark.parametrize(
    "text", [b"sanrt-result:", b"sanrt-result:{}", b'sanrt-result:{"content":1,"provenance":{"source":3}}']
)
def test_what_only_looks_like_a_mark_is_none(tmp_path, text):
    path = written(tmp_path / "a.tif", Format.TIFF, None)
    path.write_bytes(path.read_bytes() + text)
    assert read_mark(path) is None
    assert not is_intact(path)


def test_a_source_is_told_by_its_content_alone(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"hello")
    identity = identify(path, path)
    assert (identity.size, identity.etag) == (5, "5d41402abc4b2a76b9719d911017c592")
    path.touch()
    assert is_unchanged(identity, path)
    assert not is_unchanged(replace(identity, size=6), path)
    path.write_bytes(b"hallo")
    assert not is_unchanged(identity, path)
    path.unlink()
    with pytest.raises(PictureError, match="cannot be read"):
        identify(path, path)
