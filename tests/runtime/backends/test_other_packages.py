"""Backends that live in other packages: the one that docs/backends.md shows, and what can be wrong with one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import pyvips

DOCS = Path(__file__).resolve().parents[3] / "docs" / "backends.md"


def installed(folder: Path, name: str, code: str, points: dict[str, str]) -> Path:
    """A package as pip would have installed it: a module, and metadata with entry points."""
    (folder / f"{name}.py").write_text(code)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{point} = {module}" for point, module in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[sanrt.backends]", *lines, ""]))
    return folder


@pytest.fixture
def sanrt(tmp_path):
    """`sanrt(*words)` as a program that finds what lies in `tmp_path / "site"`; the finished process."""

    def call(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sanrt", *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "200"}
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    (tmp_path / "site").mkdir()
    return call


@pytest.fixture
def picture(tmp_path) -> np.ndarray:
    samples = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    pyvips.Image.new_from_array(samples).write_to_file(str(tmp_path / "a.png"))
    return samples


def test_the_backend_that_the_docs_show_is_found_listed_and_run(sanrt, picture, tmp_path):
    blocks = dict(re.findall(r"```(toml|python)\n(.*?)```", DOCS.read_text(), re.DOTALL))
    project = tomllib.loads(blocks["toml"])["project"]
    installed(tmp_path / "site", "sanrt_nearest", blocks["python"], project["entry-points"]["sanrt.backends"])
    done = sanrt("run", "a.png", "b.png", "--backend", "nearest", "--scale", 3)
    assert done.returncode == 0, done.stderr
    assert "nearest on CPU" in done.stdout
    written = pyvips.Image.new_from_file(str(tmp_path / "b.png")).numpy()
    assert (written == picture.repeat(3, axis=0).repeat(3, axis=1)).all()
    assert re.search(r"nearest .*1\.0 .*runs on the CPU", sanrt("doctor").stdout)
    refused = sanrt("run", "a.png", "c.png", "--backend", "nearest", "--precision", "fp16")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "nearest runs in fp32" in refused.stderr


def test_auto_takes_no_backend_of_another_package(sanrt, picture, tmp_path):
    blocks = dict(re.findall(r"```(toml|python)\n(.*?)```", DOCS.read_text(), re.DOTALL))
    installed(tmp_path / "site", "sanrt_nearest", blocks["python"], {"nearest": "sanrt_nearest"})
    code = "from sanrt.runtime.backends.registry import status; print(status('nearest').automatic)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (
            "import no_such_library",
            "a backend of package broken 1.0, whose status fails (No module named 'no_such_library')",
        ),
        ("def status(): raise OSError('no chip')", "a backend of package broken 1.0, whose status fails (no chip)"),
        ("", "has no attribute 'status'"),
    ],
)
def test_one_that_is_broken_is_not_usable_and_says_why(sanrt, picture, tmp_path, code, told):
    installed(tmp_path / "site", "broken", code, {"odd": "broken"})
    done = sanrt("run", "a.png", "b.png", "--backend", "odd")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "backend odd is not usable here" in done.stderr
    assert told in done.stderr
    assert sanrt("doctor").returncode == 0
    assert sanrt("run", "a.png", "b.png", "--scale", 2).returncode == 0


def test_one_that_fails_to_load_a_model_is_one_line(sanrt, picture, tmp_path):
    code = (
        "from sanrt.runtime.backends.protocol import BackendStatus\n"
        "def status(): return BackendStatus('odd', '1', True, 'here')\n"
        "def load(model, options): raise KeyError('chip')"
    )
    installed(tmp_path / "site", "broken", code, {"odd": "broken"})
    done = sanrt("run", "a.png", "b.png", "--backend", "odd")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "odd, a backend of package broken 1.0, failed to load it ('chip')" in done.stderr


def test_a_name_that_is_taken_is_passed_over_and_told(sanrt, picture, tmp_path):
    installed(tmp_path / "site", "other", "raise SystemExit", {"native": "other"})
    done = sanrt("run", "a.png", "b.png", "--backend", "native")
    assert (done.returncode, done.stderr) == (0, "")
    assert "backend native of package other 1.0 is passed over: the name is taken" in sanrt("doctor").stderr
