"""Let SOCA's gates follow the picture less: `python -m training.damp WEIGHTS OUT PACK`.

For weights trained on patches alone: on whole photographs, whose statistics they never saw, their gates go too far.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from sanrt.model.checkpoint import save_checkpoint
from sanrt.model.san import SAN
from training.command import run
from training.data import Picture
from training.gates import logits_on, socas
from training.network import biases
from training.tiles import load_tiles
from training.weights import trained_network

PATCHES = 48


def damp(
    weights: Annotated[Path, typer.Argument(help="Of training, the official code or sanrt.")],
    out: Annotated[Path, typer.Argument(help="File for the changed weights.")],
    data: Annotated[Path, typer.Argument(help="Folder of pictures packed by training.pack.")],
    strength: Annotated[float, typer.Option(help="Share of the gates' response that stays; 0 makes them constant.")] = 0.5,
    patch: Annotated[int, typer.Option(help="Side of the patches over which gates are averaged, pixels.")] = 96,
) -> None:
    """Draw the gates' logits towards their means over some patches, and write the network."""
    net = trained_network(weights)
    tiles = load_tiles(data, net.arch.scale, photo=False, device=torch.device("cpu"))
    low, _ = tiles.patches(tiles.draw(PATCHES, patch, 0, 0)[0], patch)
    draw_together(net, [picture.permute(1, 2, 0).numpy().astype("uint8") for picture in low], strength)
    save_checkpoint(out, net, f"{weights.name} with gates at {strength:g} of their response")


def draw_together(net: SAN, pictures: list[Picture], strength: float) -> None:
    """Make every gate's logit l into strength * l + (1 - strength) * its mean over the pictures."""
    means = logits_on(net, pictures).mean(1)
    with torch.no_grad():
        for soca, mean in zip(socas(net), means, strict=True):
            soca.up.weight.mul_(strength)
            biases(soca.up).mul_(strength).add_(mean, alpha=1 - strength)


if __name__ == "__main__":
    run(damp)
