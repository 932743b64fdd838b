"""PSNR and SSIM of any model against bicubic by the papers' protocol: `python benchmarks/quality.py --help`.

Both are taken on luma (BT.601, 16..235), with `scale` pixels shaved off every side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Annotated

import numpy as np
import pyvips
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is its own folder, not the repository

from benchmarks.measure import run_command
from sanrt.arrays import psnr
from sanrt.errors import PictureError, UsageError
from sanrt.export.metrics import shaved_luma, ssim
from sanrt.model.bundled import WeightsKind, bundled_checkpoint, has_bundled
from sanrt.model.spec import SCALES
from sanrt.runtime.backends.protocol import Backend, RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.runs.suitable_weights import suits_photo
from sanrt.runtime.tiling.upscaling import network_input, network_output
from training.data import Picture, picture_files, read_rgb
from training.degrade import bicubic, degrade

CROP = 160
"""Side of the sheet's crops, high-resolution pixels."""

LABEL = 30
"""Height of the sheet's labels, pixels."""


@dataclass(frozen=True)
class Pair:
    """One low-resolution picture and its truth."""

    low: Path
    high: Path


@dataclass(frozen=True)
class PictureSet:
    """Pairs of one scale, in the order of their names."""

    name: str
    scale: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Method:
    """A way to upscale: bicubic, a model, or the pictures that another program wrote."""

    name: str
    scale: int | None
    """The only scale it knows; None takes all."""
    upscale: Callable[[Pair, int], Picture]


@dataclass(frozen=True)
class Score:
    """How near a method's output comes to the true picture, on luma."""

    psnr: float
    """dB; infinite for equal pictures."""
    ssim: float
    """At most 1."""


@dataclass(frozen=True)
class Row:
    """One method's scores on one set, averaged over its pictures."""

    set: str
    scale: int
    method: str
    psnr: float
    ssim: float
    pictures: Mapping[str, Score]


def quality(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Checkpoint, ONNX, or bundled weights: 2, 3, 4, 8; 4:photo, 4:fast; 4:auto as `run` chooses."),
    ] = None,
    set_: Annotated[list[Path] | None, typer.Option("--set", help="Folder that holds HR/ and LR/.")] = None,
    hr: Annotated[Path | None, typer.Option(help="High-resolution pictures.")] = None,
    lr: Annotated[Path | None, typer.Option(help="The same pictures in low resolution, with the same names.")] = None,
    scale: Annotated[int | None, typer.Option(help="Without --lr: make the low resolution of --hr, by bicubic.")] = None,
    jpeg_: Annotated[
        list[int] | None,
        typer.Option("--jpeg", min=1, max=100, help="Save the low resolution as JPEG of this quality first (4:2:0)."),
    ] = None,
    outputs: Annotated[
        list[Path] | None, typer.Option(help="Another program's upscaled pictures, to be scored too.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="[default: onnxruntime for an ONNX, torch for a checkpoint]")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write every score to this file.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Draw crops of LR, every method and HR into this PNG.")] = None,
) -> None:
    """Score models against bicubic: PSNR and SSIM on Y, `scale` pixels shaved. Repeat --model, --set, --jpeg for more."""
    with ExitStack() as stack:
        made = Path(stack.enter_context(TemporaryDirectory(prefix="sanrt-quality-")))
        if hr and scale and not lr:
            lr = reduced(hr, scale, made / "LR")
        sets = picture_sets(set_ or [], hr, lr)
        sets = [as_jpeg(each, quality, made) for each in sets for quality in jpeg_] if jpeg_ else sets
        methods = [Method("bicubic", None, lambda pair, scale: bicubic(read_rgb(pair.low), scale))]
        methods += [stack.enter_context(model_method(name, backend)) for name in model or []]
        methods += [output_method(folder, sets) for folder in outputs or []]
        require_sets(methods, sets)
        rows, crops = score_all(methods, sets)
    Console().print(table(rows))
    if json_:
        json_.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if sheet:
        pyvips.Image.arrayjoin(crops, across=1).write_to_file(str(sheet))


def picture_sets(folders: list[Path], hr: Path | None, lr: Path | None) -> list[PictureSet]:
    """The sets that the arguments name; raises UsageError when they name none, or half of one."""
    if (hr is None) != (lr is None):
        raise UsageError("--hr goes with --lr or --scale: give both folders, or --set with a folder that holds HR/ and LR/")
    named = [(short_name(folder), folder / "HR", folder / "LR") for folder in folders]
    if hr and lr:
        named.append((short_name(hr.parent), hr, lr))
    if not named:
        raise UsageError("no pictures to score: give --set DIR (with HR/ and LR/ in it), or --hr DIR and --lr DIR")
    return [picture_set(*each) for each in named]


def short_name(folder: Path) -> str:
    """The last two parts of a path: a test set is usually kept as NAME/SCALE."""
    return "/".join(folder.resolve().parts[-2:])


def picture_set(name: str, high: Path, low: Path) -> PictureSet:
    """Pair up two folders; raises PictureError where names or sizes do not match."""
    highs, lows = pictures_by_name(high), pictures_by_name(low)
    if single := highs.keys() ^ lows.keys():
        raise PictureError(f"{min(single)}: found in only one of {high} and {low}; expected the same names in both")
    pairs = tuple(Pair(lows[stem], highs[stem]) for stem in sorted(lows))
    scale = scale_of(pairs[0])
    if scale not in SCALES:
        raise PictureError(f"{name}: HR is x{scale} of LR; expected one of {', '.join(f'x{s}' for s in SCALES)}")
    for pair in pairs:
        require_size(pair.high, size(pair.high), size(pair.low), scale)
    return PictureSet(name, scale, pairs)


def reduced(high: Path, scale: int, folder: Path) -> Path:
    """A folder with the pictures of another one, reduced by bicubic as the papers do; PictureError for odd sizes."""
    if scale not in SCALES:
        raise UsageError(f"--scale {scale}: expected {', '.join(map(str, SCALES))}")
    folder.mkdir()
    for stem, path in pictures_by_name(high).items():
        width, height = size(path)
        if width % scale or height % scale:
            raise PictureError(f"{path}: {width} x {height} px; expected multiples of {scale}: cut it")
        vips_image(degrade(read_rgb(path), scale)).write_to_file(str(folder / f"{stem}.png"))
    return folder


def as_jpeg(pictures: PictureSet, quality: int, folder: Path) -> PictureSet:
    """The same set with its low resolution saved as JPEG."""
    place = Path(mkdtemp(dir=folder))
    pairs = [replace(pair, low=place / f"{pair.low.stem}.jpg") for pair in pictures.pairs]
    for pair, clean in zip(pairs, pictures.pairs, strict=True):
        vips_image(read_rgb(clean.low)).jpegsave(str(pair.low), Q=quality, subsample_mode="on", keep="none")
    return replace(pictures, name=f"{pictures.name} JPEG {quality}", pairs=tuple(pairs))


def pictures_by_name(folder: Path) -> dict[str, Path]:
    """The pictures directly in a folder, by name without suffix; raises PictureError when there are none."""
    if not folder.is_dir():
        raise PictureError(f"{folder}: no such folder; expected one with pictures")
    found = {path.stem: path for path in picture_files(folder) if path.parent == folder}
    if not found:
        raise PictureError(f"{folder}: holds no pictures; expected PNG, JPEG, WebP or TIFF files")
    return found


def size(path: Path) -> tuple[int, int]:
    """Width and height, from the file's header."""
    try:
        image = pyvips.Image.new_from_file(str(path))
    except pyvips.Error as error:
        raise PictureError(f"{path}: cannot be read as a picture; replace it or take it out") from error
    return image.width, image.height


def scale_of(pair: Pair) -> int:
    """The factor by which the high-resolution picture is wider."""
    return round(size(pair.high)[0] / size(pair.low)[0])


def require_size(path: Path, found: tuple[int, int], low: tuple[int, int], scale: int) -> None:
    """Raise PictureError unless a picture is `scale` times the low-resolution one."""
    expected = low[0] * scale, low[1] * scale
    if found != expected:
        raise PictureError(
            f"{path}: {found[0]} x {found[1]} px; expected {expected[0]} x {expected[1]}, x{scale} of its LR picture"
        )


def open_model(path: Path, backend: str | None) -> Backend:
    """Load an ONNX with onnxruntime, a checkpoint with torch, or any with `backend`."""
    return load_backend(backend or ("onnxruntime" if path.suffix == ".onnx" else "torch"), path, RunOptions())


@contextmanager
def model_method(name: str, backend: str | None) -> Iterator[Method]:
    """A loaded model as a method; its output is clipped and rounded to uint8."""
    number, _, kind = name.partition(":")
    if number.isdigit() and int(number) not in SCALES:
        raise UsageError(f"--model {name}: no such scale; expected 2, 3, 4 or 8, or a file")
    if number.isdigit() and kind not in ("", "auto", *WeightsKind):
        raise UsageError(f"--model {name}: no such weights; expected {number}:{f', {number}:'.join(['auto', *WeightsKind])}")
    with ExitStack() as stack:
        if not number.isdigit():
            model = stack.enter_context(open_model(Path(name), backend))
            yield Method(name, model.spec.architecture.scale, lambda pair, _: upscaled(model, pair.low))
            return
        scale = int(number)
        kinds = [WeightsKind.CLEAN, WeightsKind.PHOTO] if kind == "auto" else [WeightsKind(kind or WeightsKind.CLEAN)]
        networks = {
            each: stack.enter_context(open_model(bundled_checkpoint(scale, each), backend))
            for each in kinds
            if each is kinds[0] or has_bundled(scale, each)
        }

        def upscale(pair: Pair, scale: int) -> Picture:
            photo = len(networks) > 1 and suits_photo(pair.low)
            return upscaled(networks[WeightsKind.PHOTO if photo else kinds[0]], pair.low)

        yield Method(f"sanrt x{name}", scale, upscale)


def upscaled(model: Backend, path: Path) -> Picture:
    """A picture file through a model."""
    low, value_range = read_rgb(path), model.spec.architecture.value_range
    return network_output(model.infer(network_input(low, value_range)), low, value_range)


def output_method(folder: Path, sets: list[PictureSet]) -> Method:
    """Another program's pictures as a method; they belong to the one set that is scored."""
    if len(sets) > 1:
        raise UsageError(f"--outputs {folder}: {len(sets)} sets are scored; expected the one set that these pictures are of")
    found = pictures_by_name(folder)
    if missing := {pair.low.stem for pair in sets[0].pairs} - found.keys():
        raise PictureError(f"{folder}: no picture named {min(missing)}; expected one for each of {sets[0].name}")
    for pair in sets[0].pairs:
        path = found[pair.low.stem]
        require_size(path, size(path), size(pair.low), sets[0].scale)
    return Method(short_name(folder), None, lambda pair, _: read_rgb(found[pair.low.stem]))


def require_sets(methods: list[Method], sets: list[PictureSet]) -> None:
    """Raise UsageError for a model that fits none of the sets."""
    scales = {each.scale for each in sets}
    for method in methods:
        if method.scale and method.scale not in scales:
            raise UsageError(
                f"{method.name} upscales x{method.scale}; the pictures are {', '.join(f'x{s}' for s in sorted(scales))}"
            )


def score_all(methods: list[Method], sets: list[PictureSet]) -> tuple[list[Row], list[pyvips.Image]]:
    """Every method on every set of its scale, and one strip of crops for every picture."""
    rows, strips = [], []
    for each in sets:
        fitting = [method for method in methods if method.scale in (None, each.scale)]
        scores: dict[str, dict[str, Score]] = {method.name: {} for method in fitting}
        for pair in track(each.pairs, each.name, console=Console(stderr=True), transient=True):
            high = read_rgb(pair.high)
            results = {method.name: method.upscale(pair, each.scale) for method in fitting}
            for name, output in results.items():
                luma = shaved_luma(output, high, each.scale)
                scores[name][pair.low.stem] = Score(psnr(*luma), ssim(*luma))
            labels = {name: f"{name} {scores[name][pair.low.stem].psnr:.2f} dB" for name in results}
            strips.append(strip(pair, each.scale, high, {labels[name]: output for name, output in results.items()}))
        rows += [summary(each, name, pictures) for name, pictures in scores.items()]
    return rows, strips


def summary(pictures: PictureSet, method: str, scores: dict[str, Score]) -> Row:
    """Mean over the pictures."""
    means = [float(np.mean([getattr(score, name) for score in scores.values()])) for name in ("psnr", "ssim")]
    return Row(pictures.name, pictures.scale, method, means[0], means[1], scores)


def table(rows: list[Row]) -> Table:
    """Scores for a terminal."""
    shown = Table(title="On Y, `scale` pixels shaved")
    for heading in ("set", "method"):
        shown.add_column(heading, overflow="fold")
    for heading in ("PSNR, dB", "SSIM"):
        shown.add_column(heading, justify="right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is None or following.set != row.set
        shown.add_row(row.set, row.method, f"{row.psnr:.2f}", f"{row.ssim:.4f}", end_section=last)
    return shown


def strip(pair: Pair, scale: int, high: Picture, results: Mapping[str, Picture]) -> pyvips.Image:
    """LR, every method's output and HR side by side, where the first method (bicubic) is furthest from the truth."""
    top, left = worst_place(next(iter(results.values())), high)
    low = read_rgb(pair.low).repeat(scale, 0).repeat(scale, 1)
    shown = {f"{pair.low.stem} LR": low, **results, "HR": high}
    cells = [cell(label, picture[top : top + CROP, left : left + CROP]) for label, picture in shown.items()]
    return pyvips.Image.arrayjoin(cells, across=len(cells))


def worst_place(output: Picture, high: Picture) -> tuple[int, int]:
    """Top and left of the crop with the largest squared error, of those half a crop apart."""
    error = np.square(output.astype(float) - high).sum(2)

    def places(axis: int) -> range:
        return range(0, max(high.shape[axis] - CROP, 0) + 1, CROP // 2)

    return max(
        ((top, left) for top in places(0) for left in places(1)),
        key=lambda at: error[at[0] : at[0] + CROP, at[1] : at[1] + CROP].sum(),
    )


def vips_image(picture: Picture) -> pyvips.Image:
    """A uint8 (H, W, 3) picture as libvips has it."""
    return pyvips.Image.new_from_array(np.ascontiguousarray(picture)).copy(interpretation="srgb")


def cell(label: str, crop: Picture) -> pyvips.Image:
    """A crop under its label, on white."""
    text = pyvips.Image.text(label.replace("&", "&amp;").replace("<", "&lt;"), font="sans 10", dpi=72, width=CROP)
    label_line = text.invert().gravity("centre", CROP, LABEL, extend="white")
    framed = vips_image(crop).gravity("north-west", CROP + 4, CROP + 4, extend="white")
    return label_line.colourspace("srgb").join(framed, "vertical", expand=True, background=255)


if __name__ == "__main__":
    run_command("quality", quality)
