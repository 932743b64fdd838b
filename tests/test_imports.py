"""What is imported when: the optional packages only where they are needed, the heavy ones only when they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import numpy as np
import pytest
import pyvips

from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import BACKENDS, load_backend

OPTIONAL = (
    "torch",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "onnxscript",
    "safetensors",
    "cuda",
    "pycuda",
    "llvmlite",
    "threadpoolctl",
    "starlette",
    "uvicorn",
    "python_multipart",
    "prometheus_client",
    "tritonclient",
)
NEEDS = {
    "sanrt.serve": {"starlette", "uvicorn", "python_multipart", "prometheus_client"},
    "sanrt.export": {"torch", "safetensors", "onnx", "tritonclient"},
    "sanrt.kernels.cpu": {"llvmlite", "threadpoolctl"},
    "sanrt.kernels.cuda": {"torch"},
    "sanrt.model": {"torch", "safetensors", "onnx"},
}
"""The only packages that may need an extra when they are imported, and which."""

BLOCKED = """
import sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: None if name in {blocked!r} else found(name, path, target)
"""
"""Code after which top-level packages are as good as not installed."""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def modules() -> list[str]:
    folders = {name: import_module(name).__path__ for name in ("sanrt", "sanrt.export", "sanrt.runtime", "sanrt.kernels")}
    found = {module.name for name, path in folders.items() for module in walk_packages(path, f"{name}.")}
    return sorted(found - {"sanrt.__main__"})


def test_everything_can_be_imported_here():
    assert len(modules()) > 30
    for name in modules():
        import_module(name)


def test_the_runtime_and_the_command_line_can_be_imported_without_any_extra():
    names = [name for name in modules() if not name.startswith(tuple(NEEDS))]
    assert "sanrt.runtime.runs.pipeline" in names
    assert "sanrt.cli.export" in names
    for backend in BACKENDS.values():
        assert backend in names
    done = python(
        BLOCKED.format(blocked=OPTIONAL) + f"\nimport importlib\nfor name in {names}: importlib.import_module(name)"
    )
    assert done.returncode == 0, done.stderr


def test_without_any_extra_every_backend_says_how_to_get_it():
    code = BLOCKED.format(blocked=OPTIONAL) + (
        "\nimport importlib.metadata as m\n"
        "def none(name): raise m.PackageNotFoundError(name)\n"
        "m.version = none\n"
        "from sanrt.runtime.backends.registry import BACKENDS, status\n"
        "for name in BACKENDS:\n"
        "    s = status(name)\n"
        "    words = s.reason + s.remedy\n"
        "    assert not s.usable and ('pip install' in words or 'NVIDIA' in words), s\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["export", "--help"], ["serve", "--help"]])
def test_help_loads_nothing_heavy(command):
    code = (
        "import sys, sanrt.cli\nsys.argv[0] = 'sanrt'\ntry: sanrt.cli.main()\nfinally: print('\\n' + ' '.join(sys.modules))"
    )
    loaded = set(python(code, *command).stdout.splitlines()[-1].split())
    assert "sanrt.cli.run" in loaded
    assert not loaded & {*OPTIONAL, "numpy", "pyvips", "psutil", "rich"}


def test_running_an_exported_model_loads_neither_torch_nor_onnx(tiny_model, tmp_path):
    load_backend("onnxruntime", tiny_model(2), RunOptions()).close()
    source = tmp_path / "a.png"
    pyvips.Image.new_from_array(np.zeros((8, 8, 3), np.uint8)).write_to_file(str(source))
    code = "import sys, sanrt.cli\nsys.argv[0] = 'sanrt'\ntry: sanrt.cli.main()\nfinally: print(' '.join(sys.modules))"
    options = ["--model", tiny_model(2), "--backend", "onnxruntime"]
    done = python(code, "run", source, tmp_path / "b.png", *options)
    assert (tmp_path / "b.png").exists(), done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "onnx", "rich", "safetensors"}


def test_the_package_itself_brings_only_what_it_is_asked_for():
    done = python("import sys, sanrt; assert 'numpy' not in sys.modules; sanrt.Upscaler; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_with_the_base_install_alone_bundled_weights_upscale_and_nothing_is_written_but_the_result(tmp_path):
    pyvips.Image.new_from_array(np.zeros((8, 8, 3), np.uint8)).write_to_file(str(tmp_path / "a.png"))
    folder = tmp_path / "working"
    folder.mkdir(mode=0o555)
    beyond_base = [name for name in OPTIONAL if name not in ("llvmlite", "threadpoolctl", "safetensors")]
    code = BLOCKED.format(blocked=beyond_base) + (
        "\nimport importlib.metadata as m\nreal = m.version\n"
        "def version(name):\n"
        "    if name.startswith(('torch', 'onnx', 'openvino', 'tensorrt')): raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "import sys, sanrt.cli\nsys.argv[0] = 'sanrt'\nsanrt.cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(tmp_path / "a.png"), str(tmp_path / "b.png")],
        cwd=folder,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "native on CPU" in done.stdout
    assert pyvips.Image.new_from_file(str(tmp_path / "b.png")).width == 32
    assert not list(folder.iterdir())


@pytest.mark.parametrize("command", ["run", "plan"])
def test_the_help_names_every_backend_in_the_order_of_auto(command):
    from sanrt.runtime.backends.registry import AUTO_ORDER, BACKENDS

    words = " ".join(python("import sanrt.cli; sanrt.cli.main()", command, "--help").stdout.split())
    assert f"{', '.join(AUTO_ORDER[:-1])} or {AUTO_ORDER[-1]}; auto takes the first of these" in words
    assert set(AUTO_ORDER) == set(BACKENDS)


@pytest.mark.parametrize(
    ("library", "told"), [("pyvips", "pyvips[binary] does not load here ("), ("llvmlite", "llvmlite does not load here (")]
)
def test_a_library_that_does_not_load_on_a_system_is_told_in_one_line(library, told, tmp_path):
    pyvips.Image.new_from_array(np.zeros((8, 8, 3), np.uint8)).write_to_file(str(tmp_path / "a.png"))
    code = f"import sys\nsys.modules[{library!r}] = None\nimport sanrt.cli\nsys.argv[0] = 'sanrt'\nsanrt.cli.main()"
    done = python(code, "run", tmp_path / "a.png", tmp_path / "b.png", "--backend", "native")
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert len(lines) == 1, done.stderr
    assert told in lines[0]
    assert "docs/systems.md" in lines[0]


def test_the_benchmarks_begin_with_what_their_page_names():
    root = Path(__file__).resolve().parents[1]
    names = sorted(path.stem for path in (root / "benchmarks").glob("*.py"))
    absent = ("PIL", "matplotlib", "openvino", "ray", "starlette", "tensorrt")
    code = f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n" + "".join(f"import benchmarks.{n}\n" for n in names)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
