"""What a clone installs: a wheel and an sdist of plain files, and types that an editor sees from outside."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, words)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def tracked() -> list[str]:
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT)
    if listed.returncode:
        pytest.skip("needs git's list of the files; this is no clone")
    return [name for name in listed.stdout.splitlines() if os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The files that a clone has, its links as links."""
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def wheel(clone) -> Path:
    done = run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", "made", cwd=clone)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (clone / "made").glob("sanrt-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel's content, as pip would lay it out."""
    folder = tmp_path_factory.mktemp("site")
    ZipFile(wheel).extractall(folder)
    return folder


def source_modules() -> set[str]:
    """Every .py file of the package, as the wheel should name it."""
    folders = {
        "src/sanrt/": "sanrt/",
        "export/": "sanrt/export/",
        "runtime/": "sanrt/runtime/",
        "kernels/": "sanrt/kernels/",
    }
    return {
        place + name.removeprefix(folder)
        for name in tracked()
        for folder, place in folders.items()
        if name.startswith(folder) and name.endswith(".py")
    }


def test_the_wheel_holds_every_module_as_a_plain_file_and_nothing_else(wheel):
    entries = ZipFile(wheel).infolist()
    modules = {entry.filename for entry in entries if entry.filename.endswith(".py")}
    assert modules == source_modules()
    assert all(entry.filename.startswith(("sanrt/", "sanrt-")) for entry in entries)
    names = {entry.filename for entry in entries}
    assert {"sanrt/model/weights/san_x4.safetensors", "sanrt/kernels/cuda/soca.cu", "sanrt/py.typed"} <= names


def test_every_module_of_the_wheel_can_be_imported(installed, tmp_path):
    code = (
        "import importlib, pkgutil, sanrt\n"
        f"assert sanrt.__file__.startswith({str(installed)!r}), sanrt.__file__\n"
        "for module in pkgutil.walk_packages(sanrt.__path__, 'sanrt.'):\n"
        "    if module.name != 'sanrt.__main__': importlib.import_module(module.name)\n"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words", [("-c", "from sanrt import Upscaler"), ("-m", "sanrt", "--help"), ("benchmarks/quality.py", "--help")]
)
def test_the_clone_s_root_does_not_hide_the_installed_package(words, clone, installed):
    done = run(sys.executable, *words, cwd=clone, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr


def test_the_benchmark_of_quality_tells_its_options_with_the_base_install_alone(clone, installed):
    code = (
        "import runpy, sys\n"
        "sys.modules |= dict.fromkeys(['torch', 'onnx', 'onnxruntime', 'openvino'])  # none of them can be imported\n"
        "sys.argv = ['quality.py', '--help']\n"
        "runpy.run_path('benchmarks/quality.py', run_name='__main__')"
    )
    done = run(sys.executable, "-c", code, cwd=clone, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


def test_the_sdist_holds_plain_files(clone):
    code = "from setuptools.build_meta import build_sdist; print(build_sdist('made'))"
    done = run(sys.executable, "-c", code, cwd=clone)
    assert done.returncode == 0, done.stderr
    (made,) = (clone / "made").glob("sanrt-*.tar.gz")
    with tarfile.open(made) as archive:
        entries = {entry.name.partition("/")[2]: entry for entry in archive.getmembers()}
    assert entries["src/sanrt/runtime/host.py"].isreg()
    assert entries["src/sanrt/kernels/cuda/soca.cu"].isreg()


def test_a_clone_without_links_says_so_in_one_line(clone, tmp_path):
    broken = tmp_path / "clone"
    shutil.copytree(clone, broken, symlinks=True, ignore=shutil.ignore_patterns("made", "build"))
    (broken / "src/sanrt/runtime").unlink()
    (broken / "src/sanrt/runtime").write_text("../../runtime")
    done = run(sys.executable, "setup.py", "--version", cwd=broken)
    assert done.returncode == 1
    assert "core.symlinks=true" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_mypy_sees_the_types_of_an_editable_install_from_another_folder(tmp_path):
    pytest.importorskip("mypy")
    import sanrt

    if not Path(sanrt.__file__).is_relative_to(ROOT):
        pytest.skip("needs an editable install of this clone")
    (tmp_path / "use.py").write_text("from sanrt import Upscaler\nreveal_type(Upscaler.__call__)\n")
    done = run(sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache", "use.py", cwd=tmp_path)
    assert "Overload" in done.stdout, done.stdout
    assert "ndarray" in done.stdout


def test_extras_that_build_engines_bring_no_torch_and_those_that_compile_kernels_have_nvrtc():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {extra: {re.match(r"[\w-]+", line)[0] for line in lines} for extra, lines in extras.items()}
    assert {extra for extra, found in names.items() if "torch" in found} == {"export", "kernels"}
    assert {"rtx", "trt"} == {extra for extra, found in names.items() if "polygraphy" in found}
    assert all("nvidia-cuda-nvrtc" in names[extra] for extra in ("kernels", "trt"))
