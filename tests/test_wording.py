"""Messages name options as their reader writes them, whichever part of sanrt says them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import partial

import pytest

import sanrt
from sanrt.cli import app
from sanrt.errors import UsageError
from sanrt.runtime.runs.timing import Worker
from sanrt.wording import in_python, on_command_line, option, worded
from tests.test_architecture import modules

COMMANDS = ("sanrt.cli", "sanrt.export.quantise", "sanrt.export.triton", "sanrt.export.locate", "sanrt.serve")
"""Packages and modules that only commands use. What requests are answered, tests/serve holds."""
PROGRAMS = ("sanrt.extras", "sanrt.export.polygraphy", "sanrt.kernels.cuda.nvrtc", "sanrt.runtime.artifacts.engines")
"""Modules with arguments of other programs, or of commands that are to be written down."""
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def said(path):
    """Every text of a module with its node, without docstrings and what stands in backquotes, which is a command."""
    tree = ast.parse(path.read_text())
    seen = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):  # from the outside in: a formatted text comes before its pieces
        if isinstance(node, ast.JoinedStr):
            seen |= {id(piece) for piece in node.values}
            pieces = [piece.value if isinstance(piece, ast.Constant) else "?" for piece in node.values]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in seen:
            pieces = [node.value]
        else:
            continue
        yield node, re.sub(r"`[^`]*`", "", "".join(pieces))


def test_an_option_is_named_as_its_reader_writes_it():
    assert option("tile", 64) == "tile=64"
    assert option("keep-hidden-colours", True) == "keep_hidden=True"
    assert option("precision", "fp32") == "precision='fp32'"
    assert option("memory") == "`memory`"
    with worded(on_command_line):
        assert [option("tile", 64), option("overwrite", True), option("memory")] == ["--tile 64", "--overwrite", "--memory"]
        assert option("size", (30, 20)) == "--size 30x20"
    assert option("flatten", "white") == "background=(255, 255, 255)"
    assert [option("kernels", "none"), option("codec", "none")] == ["kernels=False", "codec='none'"]


def test_only_the_command_line_s_own_modules_write_options_out():
    written = [
        f"{name}:{node.lineno}: {text!r}"
        for name, path in sorted(modules().items())
        if not name.startswith(COMMANDS + PROGRAMS)
        for node, text in said(path)
        if OPTION.search(text)
    ]
    assert not written, "\n".join(written)


def test_the_library_advises_what_a_program_can_write(tmp_path):
    with pytest.raises(UsageError, match="`lossless`: changes nothing in png files; leave it out, or choose format='webp'"):
        sanrt.upscale_files(a_picture(tmp_path), lossless=True)


def test_the_command_line_advises_what_a_person_can_type(tmp_path):
    command = [sys.executable, "-m", "sanrt", "run", str(a_picture(tmp_path)), "--lossless"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.startswith("sanrt: --lossless: changes nothing in png files; leave it out, or choose --format webp")


def test_a_program_that_has_called_a_command_is_told_in_its_own_words_again(tmp_path):
    with pytest.raises(UsageError, match="--lossless: changes"):
        app(["run", str(a_picture(tmp_path)), "--lossless"], standalone_mode=False)
    assert option("lossless") == in_python("lossless", None)


def test_a_measuring_process_has_the_words_of_the_one_that_started_it():
    with worded(on_command_line), Worker(partial(partial, option, "tile", 64)) as worker:
        assert worker.call("__call__") == "--tile 64"


def a_picture(folder):
    import numpy as np
    import pyvips

    path = folder / "a.png"
    pyvips.Image.new_from_array(np.zeros((8, 8, 3), np.uint8)).write_to_file(str(path))
    return path
