"""Says in one line what is wrong with a clone without symbolic links; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

for part in ("export", "kernels", "runtime"):
    if not (Path(__file__).parent / "src" / "sanrt" / part).is_dir():
        raise SystemExit(
            f"src/sanrt/{part} is no link to the folder {part}/: this clone was made without symbolic links; "
            "clone again with `git clone -c core.symlinks=true` (on Windows in developer mode), or install a wheel"
        )
setup()
