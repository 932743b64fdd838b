"""`sanrt run` within the tests' own process, with a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sanrt.cli import main
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from tests.commands import command


@pytest.fixture
def models(tiny_model) -> Path:
    """A folder with the tiny x2 model, already prepared for its backend."""
    load_backend("onnxruntime", tiny_model(2), RunOptions()).close()
    return tiny_model(2).parent


@pytest.fixture
def sanrt(models, tmp_path, monkeypatch, capfd):
    """Calls `sanrt run ARGUMENTS`, or `plan`, with the tiny model in `tmp_path`; returns exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, scale=2, word="run"):
        monkeypatch.setattr(sys, "argv", ["sanrt", word, *command(models, *arguments, scale=scale)[4:]])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return call
