"""What the tests of `sanrt run` on Ray and on object stores share."""

from __future__ import annotations

import sys

import pytest

from sanrt.cli import main


@pytest.fixture
def sanrt(tiny_model, monkeypatch, capfd):
    """Calls `sanrt run ARGUMENTS` with the tiny model, if no other is given; returns exit status, stdout, stderr."""

    def call(*arguments):
        first = ["--models", tiny_model(2).parent, "--scale", 2, "--backend", "onnxruntime", "--threads", 1]
        monkeypatch.setattr(sys, "argv", ["sanrt", "run", *map(str, [*first, *arguments])])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return call
