"""A streamed picture's run is ended from outside: nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import pyvips


def scratch_files(process, folder):
    """Open files of a process in a folder that have no name any more."""
    names = []
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            names.append(str(descriptor.readlink()))
        except FileNotFoundError:
            continue
    return [name for name in names if name.endswith(" (deleted)") and name.startswith(str(folder))]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_ended_run_leaves_neither_scratch_file_nor_half_a_result(tmp_path, tiny_model, end):
    source, output, scratch = tmp_path / "large.png", tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (900, 900, 3)).astype(np.uint8)
    pyvips.Image.new_from_array(pixels).write_to_file(str(source), compression=0)
    command = [sys.executable, "-m", "sanrt", "run", source, output, "--model", tiny_model(2), "--backend", "onnxruntime"]
    command += ["--tiling", "exact", "--tile", "16", "--threads", "1", "--quiet"]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(scratch)}, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 100
        while not scratch_files(process, output):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(end)
        assert process.wait(100) == (130 if end == signal.SIGINT else -signal.SIGKILL)
    # onnxruntime writes a small file named .ses of its own
    assert [path for path in scratch.iterdir() if path.name != ".ses"] == list(output.iterdir()) == []
