"""The words of `sanrt run` and `sanrt plan`: their arguments and options, and how each is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from sanrt.cli.formats import FORMATS, written_format
from sanrt.cli.models import known_scale, precision_name, weights_kind
from sanrt.cli.panels import panel
from sanrt.model.bundled import WeightsKind
from sanrt.model.spec import Precision
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.tiling.options import Tiling

COLOURS = {
    "aqua": "#00ffff",
    "black": "#000000",
    "blue": "#0000ff",
    "fuchsia": "#ff00ff",
    "gray": "#808080",
    "green": "#008000",
    "grey": "#808080",
    "lime": "#00ff00",
    "maroon": "#800000",
    "navy": "#000080",
    "olive": "#808000",
    "orange": "#ffa500",
    "purple": "#800080",
    "red": "#ff0000",
    "silver": "#c0c0c0",
    "teal": "#008080",
    "white": "#ffffff",
    "yellow": "#ffff00",
}
"""The colours that CSS 2.1 has names for."""

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
LEAST_MEMORY = 2**29


def region_count(text: str) -> int | None:
    """A typer parser: k of `--regions`; None for auto."""
    if text == "auto":
        return None
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= 1000:
        raise typer.BadParameter(f"{text}: expected auto or a number from 1 to 1000")
    return int(text)


def colour(text: str) -> tuple[int, int, int]:
    """8-bit RGB of a colour's name, `#rgb` or `#rrggbb`; raises typer.BadParameter for anything else."""
    digits = COLOURS.get(text.lower(), text)
    if re.fullmatch(r"#[0-9a-fA-F]{3}", digits):
        digits = "#" + "".join(2 * digit for digit in digits[1:])
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", digits):
        raise typer.BadParameter(f"{text}: expected white, black, red, ... or #rrggbb")
    red, green, blue = bytes.fromhex(digits[1:])
    return red, green, blue


def byte_count(text: str) -> int:
    """A typer parser: bytes from `4G`, `4GB`, `4 GiB`, `512M` or a plain number."""
    found = re.fullmatch(r"([0-9]+\.?[0-9]*) ?([KMGT]?)(I?B)?", text.strip().upper())
    if not found:
        raise typer.BadParameter(f"{text}: expected a number of bytes such as 4G or 512M")
    return int(float(found[1]) * UNITS[found[2]])


def memory_size(text: str) -> int:
    """A typer parser: the same, enough to run in."""
    size = byte_count(text)
    if size < LEAST_MEMORY:
        raise typer.BadParameter(f"{text}: expected at least 512M")
    return size


def bounding_size(text: str) -> tuple[int, int]:
    """Width and height from `3840x2160`; raises typer.BadParameter for anything else."""
    found = re.fullmatch(r"([0-9]{1,7})[xX]([0-9]{1,7})", text)
    if not found or not int(found[1]) or not int(found[2]):
        raise typer.BadParameter(f"--size {text}: expected a width and a height such as 3840x2160")
    return int(found[1]), int(found[2])


VIDEO, LARGE, NETWORK, ELSEWHERE = "Videos", "Large pictures", "Network", "Records and clusters"
"""Panels of the help, after the everyday options."""

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUTS... [OUTPUT]",
        show_default=False,
        help="Pictures, videos and folders of them, also s3://...; then the folder of the results, or the file of one. "
        "One path alone: the result lies beside it, as a_x4.png or photos_x4/. - is standard input or output.",
    ),
]
ScaleOption = Annotated[
    int | None, typer.Option(help="2, 3, 4 or 8; 4 unless --model says otherwise.", callback=known_scale)
]
OutscaleOption = Annotated[
    float | None,
    typer.Option(metavar="FACTOR", help="Such as 3.5: enlarged by the next scale up, then reduced to this."),
]
SizeOption = Annotated[
    str | None,
    typer.Option(metavar="WIDTHxHEIGHT", help="Such as 3840x2160: results fit inside, the aspect ratio is kept."),
]
WeightsOption = Annotated[
    WeightsKind | None,
    typer.Option(
        parser=weights_kind,
        metavar="[auto|clean|photo|fast]",
        help="Of the bundled ones; auto takes photo for JPEG files of the qualities at which it is better, else clean.",
    ),
]
ModelOption = Annotated[Path | None, typer.Option(help="The model, instead of the one that `sanrt export` wrote.")]
FormatOption = Annotated[
    Format | None,
    typer.Option(parser=written_format, metavar=FORMATS, help="Of every result; each picture's own if left out."),
]
SuffixOption = Annotated[str, typer.Option(help="Added to every name, such as _x4.")]
IncludeResultsOption = Annotated[
    bool, typer.Option("--include-results", help="Enlarge results of sanrt in folders again; else they are passed over.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace whatever is in the results' places.")]
QualityOption = Annotated[int | None, typer.Option(min=1, max=100, help="Of JPEG, WebP and AVIF.")]
LosslessOption = Annotated[bool, typer.Option("--lossless", help="WebP and AVIF without loss.")]
FlattenOption = Annotated[
    str | None, typer.Option(metavar="COLOUR", help="Lay transparency onto white, black, red, ... or #rrggbb.")
]
CodecOption = Annotated[
    str | None,
    panel(VIDEO)(
        metavar="[h264|hevc|av1|ffv1|prores]",
        help="Or a hardware encoder's name such as h264_nvenc; the source's, or what suits the file, if left out.",
    ),
]
CrfOption = Annotated[
    int | None, panel(VIDEO)(help="Constant rate factor, smaller is better; h264 17, hevc 19, av1 23 if left out.")
]
PresetOption = Annotated[str | None, panel(VIDEO)(help="The encoder's speed, by its own names: slow, or 6 for av1.")]
KeepHiddenOption = Annotated[
    bool,
    typer.Option(
        "--keep-hidden-colours",
        help="Under full transparency (textures of games); else they are the nearest visible ones.",
    ),
]
EnsembleOption = Annotated[bool, typer.Option("--self-ensemble", help="Average over 8 flips and rotations.")]
ModelsOption = Annotated[Path, panel(NETWORK)(help="The folder that `sanrt export` wrote to.")]
BackendOption = Annotated[
    str,
    panel(NETWORK)(
        metavar="[auto|NAME]",
        help="What runs the network: tensorrt, torch-cuda, onnxruntime-cuda, openvino, native, onnxruntime or torch; "
        "auto takes the first of these that is usable.",
    ),
]
PrecisionOption = Annotated[
    Precision | None,
    panel(NETWORK)(
        parser=precision_name,
        metavar=f"[{'|'.join(Precision)}]",
        help="Of convolutions and attention; the backend's own choice if left out.",
    ),
]
ThreadsOption = Annotated[int | None, panel(NETWORK)(min=1, help="CPU threads of the network; all if left out.")]
DeviceOption = Annotated[int | None, panel(NETWORK)(min=0, help="Number of the GPU; 0 if left out.")]
TilingOption = Annotated[Tiling, panel(LARGE)(help="auto is whole if memory suffices, else exact.")]
TileOption = Annotated[
    int | None,
    panel(LARGE)(min=16, help="Cut larger pictures into tiles of this side; with native, exact strips of this height."),
]
OverlapOption = Annotated[int | None, panel(LARGE)(min=0, help="Pixels that overlapped tiles share.")]
MemoryOption = Annotated[
    int | None,
    panel(LARGE)(
        parser=memory_size,
        metavar="SIZE",
        help="Of the host, to stay below, such as 4G; a share of what is free if left out.",
    ),
]
ScratchOption = Annotated[
    Path | None, panel(LARGE)(help="Folder of the files for what exceeds the memory; that of the results if left out.")
]
RegionsOption = Annotated[
    str, panel(LARGE)(metavar="K", help="k of the k x k attention regions; auto is by the picture's size.")
]
