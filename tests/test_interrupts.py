"""Ctrl-C and SIGTERM on the command line, at chosen lines; `python -m tests.interrupt` sends them at random moments."""

from __future__ import annotations

import _thread
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import pyvips

from sanrt.runtime.runs.videos import WAITING, opened_in, waiting

BEGINNING = """
import signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal({number})

sys.meta_path.insert(0, Interrupting())
sys.argv = ["sanrt", *sys.argv[1:]]
from sanrt.__main__ import main
main()
"""
WITHIN = """
import signal, sys
from sanrt.interrupts import EndSignals

try:
    with EndSignals() as signals:
        {body}
except KeyboardInterrupt:
    signal.raise_signal(signal.SIGINT)
    print(*done, signals.status)
"""


def python(code: str, *arguments) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["sanrt.interrupts", "sanrt.cli", "typer", "sanrt.cli.verify", "numpy"])
def test_an_interrupt_while_modules_are_imported_is_one_line_and_130(tmp_path, module):
    pyvips.Image.new_from_array(np.zeros((8, 8, 3), np.uint8)).pngsave(str(tmp_path / "a.png"))
    found = python(BEGINNING.format(module=module, number=2), "run", tmp_path / "a.png", tmp_path / "b.png")
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "sanrt: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_sigterm_ends_a_command_as_an_interrupt_does_with_143(tmp_path):
    found = python(BEGINNING.format(module="typer", number=15), "doctor")
    assert (found.returncode, found.stdout, found.stderr) == (143, "", "sanrt: interrupted\n")


def test_signals_that_the_parent_ignores_stay_ignored():
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + BEGINNING.format(module="typer", number=2)
    assert python(code, "--version").returncode == 0


def test_what_comes_while_an_interrupt_is_cleaned_up_after_is_passed_over():
    body = """
        import contextlib
        done = []
        def cleaning():
            try:
                yield
            finally:
                signal.raise_signal(signal.SIGINT)
                try:
                    open("/no/such/file")
                except OSError:
                    signal.raise_signal(signal.SIGTERM)
                done.append("cleaned")
        with contextlib.closing(cleaning()) as parts:
            for _ in parts:
                try:
                    signal.raise_signal(signal.SIGINT)
                finally:
                    signal.raise_signal(signal.SIGTERM)
                    done.append("up")
    """
    found = python(WITHIN.format(body=body.strip()))
    assert (found.stdout, found.stderr) == ("up cleaned 143\n", "")


def test_an_interrupt_that_falls_into_a_finalizer_is_raised_again():
    body = """
        import time
        done = ["ended"]
        class Finalized:
            def __del__(self):
                signal.raise_signal(signal.SIGINT)
        Finalized()
        time.sleep(60)
        done = ["lost"]
    """
    found = python(WITHIN.format(body=body.strip()))
    assert (found.stdout, found.stderr) == ("ended 130\n", "")


class Encoder:
    """Interrupts the main thread while it encodes the first frame."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int]] = []

    def tell(self, what: str) -> None:
        self.done.append((what, threading.get_ident()))

    def open(self, file: None) -> None:
        self.tell("open")

    def add(self) -> None:
        if len(self.done) == 1:
            _thread.interrupt_main()
        self.tell("begin")
        time.sleep(0.2)
        self.tell("end")

    def close(self) -> None:
        self.tell("close")


@pytest.mark.parametrize("begun", [1, WAITING + 1])
def test_an_encoder_is_closed_by_its_own_thread_and_never_while_it_works(begun):
    encoder = Encoder()

    def hand_over() -> None:
        with opened_in(pool, encoder, None), waiting(pool) as later:
            for _ in range(begun):
                later(encoder.add)

    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        hand_over()
    frames = len(encoder.done) // 2 - 1
    assert [what for what, _ in encoder.done] == ["open", *["begin", "end"] * frames, "close"]
    assert len({thread for _, thread in encoder.done}) == 1


def test_a_file_whose_writer_was_interrupted_at_once_is_removed_on_exit_and_not_by_a_forked_child(tmp_path):
    code = """
import os, sys
from pathlib import Path
from sanrt.files import locked_file
unfinished, file = locked_file(Path(sys.argv[1]) / "a.png")
if child := os.fork():
    os.waitpid(child, 0)
    print(unfinished.exists())
    raise KeyboardInterrupt
"""
    assert python(code, tmp_path).stdout == "True\n"
    assert not list(Path(tmp_path).iterdir())
