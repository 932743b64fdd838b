"""Command lines that tests run."""

from __future__ import annotations

import sys
from pathlib import Path


def command(models: Path, *arguments, scale=2) -> list[str]:
    defaults = ["--models", models, "--scale", scale, *([] if "--backend" in arguments else ["--backend", "onnxruntime"])]
    return [sys.executable, "-m", "sanrt", "run", *map(str, [*defaults, *arguments])]
