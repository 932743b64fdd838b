"""A part of the tests as on macOS and Windows, as far as Linux can play them; `make elsewhere` runs the whole core so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SELECTION = (
    "tests/test_files.py",
    "tests/runtime/test_host.py",
    "tests/runtime/pictures/test_jobs.py",
    "tests/runtime/pictures/test_provenance.py",
    "tests/kernels/cpu/test_workers.py",
    "tests/kernels/cpu/test_ir.py",
    "tests/test_imports.py::test_the_runtime_and_the_command_line_can_be_imported_without_any_extra",
    "tests/test_imports.py::test_with_the_base_install_alone_bundled_weights_upscale_and_nothing_is_written_but_the_result",
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or bool(os.environ.get("SANRT_AS_IF")),
    reason="only Linux plays other systems, and one at a time",
)


def elsewhere(system: str, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SANRT_AS_IF": system, "PYTHONPATH": str(ROOT / "tests" / "elsewhere")}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_files_pictures_kernels_and_the_command_line_work_without_what_only_linux_has(system, tmp_path):
    done = elsewhere(system, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", tmp_path / "inner", *SELECTION)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1].split()[0]) > 90


@pytest.mark.parametrize(
    ("system", "there", "absent"),
    [
        (
            "darwin",
            ["import fcntl", "os.fork"],
            ["os.sched_getaffinity", "open('/proc/self/status')", "os.stat('/proc/version')"],
        ),
        (
            "win32",
            ["ctypes.windll"],
            ["import fcntl", "import resource", "os.fork", "os.register_at_fork", "signal.SIGKILL"],
        ),
    ],
)
def test_what_a_system_has_not_got_is_not_there_for_sanrt_and_is_for_others(system, there, absent):
    """Otherwise the test above would show nothing."""
    code = (
        "import ctypes, os, signal, sys\nfor line in sys.argv[1:]:\n"
        "    try: exec(line)\n    except (ImportError, AttributeError, FileNotFoundError): print(line)"
    )
    as_sanrt = f"exec(compile({code!r}, 'x', 'exec'), {{'__name__': 'sanrt.x'}})"
    assert elsewhere(system, "-c", f"import sys; {as_sanrt}", *there, *absent).stdout.splitlines() == absent
    assert elsewhere(system, "-c", code, *absent).stdout == ""


def test_windows_removes_and_renames_no_open_file_there(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; path = Path(sys.argv[1], 'a'); file = path.open('wb')\n"
        "for act in path.unlink, lambda: path.rename(path.with_name('b')):\n"
        "    try: act()\n    except PermissionError as error: print(error.errno)\n"
        "file.close(); path.unlink(); print('closed')"
    )
    assert elsewhere("win32", "-c", code, tmp_path).stdout.split() == ["13", "13", "closed"]
