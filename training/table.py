"""What the bundled weights score, as the README tells it: `python -m training.table EVAL`, with EVAL/Set5/x4/HR and kin."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.quality import Method, PictureSet, as_jpeg, model_method, picture_set, score_all
from sanrt.errors import SanrtError
from sanrt.model.bundled import WeightsKind, has_bundled
from sanrt.model.spec import SCALES
from training.command import run
from training.data import read_rgb
from training.degrade import bicubic
from training.wear import DEV_QUALITIES

ROOT = Path(__file__).resolve().parents[1]
SCORES = ROOT / "training" / "scores.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- scores -->\n", "<!-- end of scores -->\n"
"""What stands around the table in the README."""

PAPER = {2: (38.31, 34.07), 3: (34.75, 30.59), 4: (32.64, 28.92), 8: (27.22, 25.14)}
"""Set5 and Set14 of the paper's SAN, by scale (its table 3), dB."""

JPEG_SCALES = 2, 4
"""Scored on JPEG sources too."""

Scores = Mapping[str, float]
"""Mean Y-PSNR in dB by `WHAT SET SCALE`, such as `clean Set5 x4` or `photo Set5 x4 JPEG 60`."""


def table(
    sets: Annotated[Path, typer.Argument(help="Folder with Set5/x4/HR, Set5/x4/LR and so on.")],
    backend: Annotated[str, typer.Option(help="What runs the weights.")] = "torch",
) -> None:
    """Score bicubic and the bundled weights, on JPEG sources too; write training/scores.json and the README's tables."""
    found = {name: round(value, 3) for scale in SCALES for name, value in scores(sets, scale, backend)}
    SCORES.write_text(json.dumps(found, indent=1) + "\n")
    README.write_text(with_table(README.read_text(), rendered(found)))
    print(rendered(found))


def scores(sets: Path, scale: int, backend: str) -> Iterator[tuple[str, float]]:
    """The scores of one scale."""
    kinds = [kind for kind in WeightsKind if has_bundled(scale, kind)]
    with ExitStack() as stack:
        methods = [Method("bicubic", None, lambda pair, scale: bicubic(read_rgb(pair.low), scale))]
        for kind in kinds:
            method = stack.enter_context(model_method(f"{scale}:{kind}", backend))
            methods.append(Method(kind, scale, method.upscale))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows, _ = score_all(methods, list(test_sets(sets, scale, folder)))
        yield from ((f"{row.method} {row.set}", row.psnr) for row in rows)


def test_sets(sets: Path, scale: int, folder: Path) -> Iterator[PictureSet]:
    """Set5 and Set14, and at some scales Set5 saved as JPEG, which is written into a folder."""
    for name in ("Set5", "Set14"):
        place = sets / name / f"x{scale}"
        clean = picture_set(f"{name} x{scale}", place / "HR", place / "LR")
        yield clean
        if name == "Set5" and scale in JPEG_SCALES:
            yield from (as_jpeg(clean, quality, folder) for quality in DEV_QUALITIES)


def rendered(found: Scores) -> str:
    """Tables in Markdown: every scale on clean pictures, and some on JPEG sources."""
    names = ["bicubic", *(kind for kind in WeightsKind if any(key.startswith(f"{kind} ") for key in found))]
    heads = [f"x{scale}" for scale in SCALES]
    lines = [f"| Set5 / Set14 | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in names:
        cells = [" / ".join(cell(found, f"{name} {each} {head}") for each in ("Set5", "Set14")) for head in heads]
        lines.append(f"| {label(name)} | {' | '.join(cells)} |")
    lines.append(f"| the paper's SAN | {' | '.join(f'{a:.2f} / {b:.2f}' for a, b in PAPER.values())} |")
    for scale in JPEG_SCALES:
        lines += ["", f"| Set5 x{scale}, saved first as | " + " | ".join(f"JPEG {q}" for q in DEV_QUALITIES) + " |"]
        lines.append("|---" * (len(DEV_QUALITIES) + 1) + "|")
        for name in names:
            cells = [cell(found, f"{name} Set5 x{scale} JPEG {quality}") for quality in DEV_QUALITIES]
            lines.append(f"| {label(name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def label(name: str) -> str:
    """A method's name in the table."""
    return name if name == "bicubic" else f"`{name}`"


def cell(found: Scores, name: str) -> str:
    """A score, or a dash where nothing ships."""
    return f"{found[name]:.2f}" if name in found else "-"


def with_table(readme: str, lines: str) -> str:
    """The README with its table replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SanrtError(f"{README}: no place for the table; expected {BEGIN.strip()} and {END.strip()}")
    return before + begin + lines + end + after


if __name__ == "__main__":
    run(table)
