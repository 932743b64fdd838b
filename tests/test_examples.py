"""The examples do what their first lines say, and are short."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sanrt import Upscaler
from sanrt.runtime.host import gpus

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CAT = EXAMPLES / "cat.png"
MOST_LINES = 40


def run(name: str, *words: object, folder: Path) -> str:
    """What an example prints; in a folder of its own, as a user's working folder."""
    done = subprocess.run([sys.executable, EXAMPLES / name, *map(str, words)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cat() -> tuple[np.ndarray, np.ndarray]:
    """The picture, and its result."""
    image = pytest.importorskip("PIL.Image")
    small = np.asarray(image.open(CAT))
    with Upscaler.load(4, models="nowhere") as upscaler:
        return small, upscaler(small)


def pixels(source: Path | io.BytesIO) -> np.ndarray:
    return np.asarray(pytest.importorskip("PIL.Image").open(source).convert("RGB"))


def test_examples_are_numbered_short_and_listed():
    programs = sorted(path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))
    assert [path.name[:3] for path in programs] == [f"{number:02}_" for number in range(1, len(programs) + 1)]
    for path in programs:
        assert f"]({path.name})" in (EXAMPLES / "README.md").read_text()
        assert path.suffix == ".ipynb" or len(path.read_text().splitlines()) < MOST_LINES


def test_an_array_is_enlarged(cat, tmp_path):
    told = run("01_library.py", folder=tmp_path)
    assert "<Upscaler bundled weights san_x4: SAN x4" in told
    assert "(72, 48) -> (192, 288, 3) uint8; [(64, 64, 3), (20, 28)]" in told
    assert (pixels(tmp_path / "large.png") == cat[1]).all()


def test_a_folder_is_enlarged_and_what_became_of_each_picture_is_told(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cat.png").write_bytes(CAT.read_bytes())
    assert "out/cat.webp: written in" in run("02_folder.py", "in", "out", folder=tmp_path)
    assert "out/cat.webp: there already" in run("02_folder.py", "in", "out", folder=tmp_path)
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    command = [sys.executable, EXAMPLES / "02_folder.py", "in", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("in/bad.png: ")


def test_a_service_answers_threads_that_ask_at_once(cat, tmp_path):
    command = [sys.executable, EXAMPLES / "03_service.py", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as service:
        try:
            address = f"http://localhost:{service.stdout.readline().split()[-1]}"

            def ask(body: bytes) -> np.ndarray:
                with urllib.request.urlopen(urllib.request.Request(address, data=body), timeout=120) as answer:
                    return pixels(io.BytesIO(answer.read()))

            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(ask, [CAT.read_bytes()] * 4))
            assert all((answer == cat[1]).all() for answer in answers)
            with pytest.raises(urllib.error.HTTPError, match="400"):
                ask(b"no picture")
        finally:
            service.kill()


def test_an_exported_model_runs_in_plain_onnxruntime(cat, tiny_model, tmp_path):
    pytest.importorskip("onnxruntime")
    run("04_onnxruntime.py", tiny_model(3), CAT, "large.png", folder=tmp_path)
    with Upscaler.load(tiny_model(3), backend="onnxruntime") as upscaler:
        assert abs(pixels(tmp_path / "large.png").astype(int) - upscaler(cat[0])).max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not gpus().devices, reason=f"needs an NVIDIA GPU: {gpus().problem}")
def test_an_engine_runs_in_plain_tensorrt(cat, tiny_model, tmp_path):
    pytest.importorskip("tensorrt")
    import sanrt

    info, _ = sanrt.build_engine(tiny_model(3), tmp_path / "tiny.engine", precision="fp32", flavor="tensorrt")
    run("05_tensorrt.py", info.path, CAT, "large.png", folder=tmp_path)
    with Upscaler.load(tiny_model(3), backend="torch") as upscaler:
        assert abs(pixels(tmp_path / "large.png").astype(int) - upscaler(cat[0])).max() <= 2


def test_the_notebook_shows_what_its_cells_make(cat, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    cells = [
        cell for cell in json.loads((EXAMPLES / "06_notebook.ipynb").read_text())["cells"] if cell["cell_type"] == "code"
    ]
    space: dict[str, object] = {}
    for cell in cells:
        exec("".join(cell["source"]), space)
    shown = cells[-1]["outputs"][0]["data"]["image/png"]
    stored, made = pixels(io.BytesIO(base64.b64decode(shown))), np.asarray(space["sheet"])
    assert stored.shape == made.shape
    assert abs(stored.astype(int) - made).mean() < 0.5
