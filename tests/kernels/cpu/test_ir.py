"""Compiled CPU kernels and their cache."""

from __future__ import annotations

from hashlib import sha256

import pytest

pytest.importorskip("llvmlite")

from sanrt.kernels.cpu import ir


def test_compiled_code_is_kept_and_used_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = []
    for _ in range(2):
        module = ir.Module(ir.this_processor())
        with module.function("nothing", 1, 0):
            pass
        code.append(module.machine_code())
        module.compile()["nothing"](0)
    assert code[0] == code[1]
    (kept,) = (tmp_path / "sanrt" / "kernels").iterdir()
    for damaged in b"", kept.read_bytes()[:-9]:
        kept.write_bytes(damaged)
        assert module.machine_code() == code[0]
    kept.write_bytes(sha256(b"as it was kept").digest() + b"as it was kept")
    assert module.machine_code() == b"as it was kept"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert ir.Module(ir.this_processor()).machine_code()
