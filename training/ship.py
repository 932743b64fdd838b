"""Turn a state of training into the weights that ship: `python -m training.ship STATE --scale 4 --weights photo`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer

from sanrt.arrays import psnr
from sanrt.errors import CheckpointError, ParityError
from sanrt.model.bundled import SUFFIX, WeightsKind, bundled_name
from sanrt.model.checkpoint import load_checkpoint, save_checkpoint
from sanrt.model.san import SAN
from training.command import run
from training.data import Picture, read_rgb, to_tensor
from training.weights import trained_network

SOURCES = Path(__file__).resolve().with_name("sources.csv")
"""Who made the pictures: some of the licences ask that it goes where the weights go."""

WEIGHTS = Path(__file__).resolve().parents[1] / "src" / "sanrt" / "model" / "weights"

SAME = 60.0
"""PSNR in dB that rounding the weights must leave between the outputs: an RMS difference of a quarter of a grey level."""

ORIGIN = "trained by sanrt's recipe on 110 free photographs (training/README.md, training/sources.csv)"


def ship(
    checkpoint: Annotated[Path, typer.Argument(help="decayed.safetensors of `python -m training.train`.")],
    scale: Annotated[int, typer.Option(help="The scale it must be of; names the output.")],
    origin: Annotated[str, typer.Option(help="What the file says of itself.")] = ORIGIN,
    out: Annotated[Path | None, typer.Option(help="[default: in src/sanrt/model/weights]")] = None,
    picture: Annotated[Path | None, typer.Option(help="Picture to verify on. [default: a generated one]")] = None,
    weights: Annotated[WeightsKind, typer.Option(help="What it is for; names the output.")] = WeightsKind.CLEAN,
) -> None:
    """Write the network as fp16 safetensors, load that file again and compare both on a picture."""
    net = trained_network(checkpoint)
    if net.arch.scale != scale:
        raise CheckpointError(f"{checkpoint}: {net.arch.name}; expected scale {scale}")
    path = out or WEIGHTS / f"{bundled_name(scale, weights)}{SUFFIX}"
    partial = path.with_suffix(".partial")
    try:
        save_checkpoint(partial, net, origin)
        likeness = likeness_on(read_rgb(picture) if picture else pattern(), net, load_checkpoint(partial).network())
        if likeness < SAME:
            raise ParityError(f"{checkpoint}: fp16 weights give {likeness:.1f} dB PSNR to the fp32 ones; expected >= {SAME}")
        partial.replace(path)
        shutil.copyfile(SOURCES, path.with_name(SOURCES.name))
    finally:
        partial.unlink(missing_ok=True)
    print(f"{path}: {net.arch.name}, {path.stat().st_size / 1e6:.2f} MB, {likeness:.1f} dB PSNR to the fp32 outputs")


def pattern(side: int = 96) -> Picture:
    """Smooth waves of growing frequency with a hard-edged square: uint8 (side, side, 3)."""
    y, x = np.mgrid[:side, :side] / side
    card = np.stack([127.5 + 120 * np.sin((8 + 12 * colour) * (x * x + y)) for colour in range(3)], 2)
    card[side // 3 : side // 2, side // 3 : side // 2] = (255, 32, 0)
    return card.astype(np.uint8)


def upscaled(net: SAN, picture: Picture) -> npt.NDArray[np.float32]:
    """Output for a uint8 (H, W, 3) picture: float (3, sH, sW), 0..255, not clipped."""
    ratio = net.arch.value_range / 255
    with torch.inference_mode():
        output: npt.NDArray[np.float32] = (net(to_tensor(picture[None]) * ratio)[0] / ratio).numpy()
    return output


def likeness_on(picture: Picture, first: SAN, second: SAN) -> float:
    """PSNR between two networks' outputs for a picture, in dB."""
    return psnr(upscaled(first, picture), upscaled(second, picture))


if __name__ == "__main__":
    run(ship)
