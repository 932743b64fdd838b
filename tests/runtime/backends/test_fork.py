"""A model in a process that was forked after it was loaded: it works there, or says why not; nothing waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from sanrt.runtime.backends.registry import status

PARENT = """
import os, sys, threading
from pathlib import Path
import numpy as np
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend

name, model = sys.argv[1], Path(sys.argv[2])
pixels = np.full((1, 3, 24, 32), 90, np.float32)
load = lambda: load_backend(name, model, RunOptions(threads=3))
backend = load()
expected = backend.infer(pixels)

def same(backend):
    print("same" if np.array_equal(backend.infer(pixels), expected) else "differs", flush=True)

def keep_on():
    while True:
        backend.infer(pixels)

def forked(child, end=os._exit):
    pid = os.fork()
    if not pid:
        try:
            child()
        except Exception as error:
            print(type(error).__name__, error, flush=True)
        end(0)
    print("status", os.waitpid(pid, 0)[1], flush=True)

"""


def run(name, model, code):
    """What a process prints that has the model loaded and runs `code`; what hangs is ended, and told."""
    if not status(name).usable:
        pytest.skip(f"{name}: {status(name).reason}")
    process = [sys.executable, "-W", "ignore", "-c", PARENT + code + "\nos._exit(0)", name, str(model)]
    with subprocess.Popen(
        process, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as done:
        try:
            return done.communicate(timeout=60)[0].splitlines()
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, signal.SIGKILL)
            return [*done.communicate()[0].splitlines(), "hangs"]


def test_native_goes_on_in_a_forked_process(tiny_model):
    assert run("native", tiny_model(), "forked(lambda: same(backend))\nsame(backend)") == ["same", "status 0", "same"]


def test_native_goes_on_in_a_process_that_was_forked_in_the_middle_of_a_picture(tiny_model):
    code = "threading.Thread(target=keep_on, daemon=True).start()\nfor _ in range(5): forked(lambda: same(backend))"
    assert run("native", tiny_model(), code) == ["same", "status 0"] * 5


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_other_backends_say_in_a_forked_process_that_they_do_not_work_there(name, tiny_model):
    error, ended, parent = run(name, tiny_model(), "forked(lambda: same(backend))\nsame(backend)")
    assert error.startswith(f"BackendError backend {name} was in use before this process was forked")
    assert error.endswith("load models only after the fork, start processes with spawn, or take backend native")
    assert (ended, parent) == ("status 0", "same")


@pytest.mark.parametrize("name", ["native", "openvino"])
@pytest.mark.parametrize("last", ["None", "backend.close()", "globals().pop('backend')"])
def test_a_forked_process_ends_whatever_it_does_with_the_model(name, last, tiny_model):
    """Not so with onnxruntime 1.32, whose exit handlers hang even if it was only imported, nor PyTorch: its may crash."""
    assert run(name, tiny_model(), f"forked(lambda: {last}, sys.exit)")[-1:] == ["status 0"]


@pytest.mark.parametrize("name", ["native", "onnxruntime", "openvino"])
def test_a_model_may_be_loaded_anew_in_a_forked_process(name, tiny_model):
    assert run(name, tiny_model(), "forked(lambda: same(load()))") == ["same", "status 0"]


def test_torch_that_was_used_before_the_fork_is_not_loaded_after_it(tiny_model):
    error, ended = run("torch", tiny_model(), "forked(lambda: same(load()))")
    assert error.startswith("BackendError backend torch was in use before this process was forked")
    assert ended == "status 0"
