"""Compiled CPU kernels and their cache."""

from __future__ import annotations

from hashlib import sha256

import pytest

pytest.importorskip("llvmlite")

from llvmlite import binding

from sanrt.kernels.cpu import ir
from sanrt.kernels.cpu.winograd import Arithmetic, winograd_transform, write_gemm, write_prefetch


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


@pytest.mark.skipif(not binding.get_default_triple().startswith("x86_64"), reason="VNNI is x86's")
@pytest.mark.parametrize("name", ["cascadelake", "sapphirerapids", "znver4"])
def test_16_bit_products_are_added_by_the_instruction_that_multiplies_them(name):
    found = dict.fromkeys(("avx512f", "avx512bw", "avx512vnni"), True)
    module = ir.Module(ir.described("x86_64-unknown-linux-gnu", name, binding.FeatureMap(found)))
    write_gemm(module, Arithmetic.INT16, 4, write_prefetch(module, 4, winograd_transform(Arithmetic.INT16).tile))
    made = module.machine().emit_assembly(binding.parse_assembly(str(module.module)))
    assert "vpdpwssd" in made
    assert "vpmaddwd" not in made
