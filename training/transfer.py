"""Give one scale what another learned: `python -m training.transfer WEIGHTS BEFORE AFTER OUT`.

The difference that a training made in one network is added to another, as in "Editing Models with Task Arithmetic"
(Ilharco et al., ICLR 2023): x2 `clean`, x4 `clean` and x4 `photo` give an x2 for photographs without a step of training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sanrt.errors import CheckpointError
from sanrt.model.checkpoint import save_checkpoint
from sanrt.model.san import SAN
from training.command import run
from training.weights import trained_network


def transfer(
    weights: Annotated[
        Path, typer.Argument(help="What is to learn; like the next two of training, the official code or sanrt.")
    ],
    before: Annotated[Path, typer.Argument(help="A network of the same groups, blocks and channels, of any scale.")],
    after: Annotated[Path, typer.Argument(help="What that became by training.")],
    out: Annotated[Path, typer.Argument(help="File for the changed weights.")],
    share: Annotated[float, typer.Option(help="Of the difference that is added.")] = 0.7,
) -> None:
    """Add what a training changed in one network to another, and write it."""
    net, old, new = (trained_network(path) for path in (weights, before, after))
    for path, other in ((before, old), (after, new)):
        if replace(other.arch, scale=net.arch.scale) != net.arch:
            raise CheckpointError(
                f"{path}: {other.arch.name}; expected the sizes of {weights}, {net.arch.name}, at any scale"
            )
    add_difference(net, old, new, share)
    save_checkpoint(out, net, f"{weights.stem} + {share:g} ({after.stem} - {before.stem})")


def add_difference(net: SAN, before: SAN, after: SAN, share: float) -> None:
    """Add share * (after - before) to every tensor that all three have in the same shape, but the tail, each scale's own."""
    own, old, new = (each.state_dict() for each in (net, before, after))
    for name, tensor in own.items():
        if not name.startswith("tail.") and name in old and tensor.shape == old[name].shape == new[name].shape:
            tensor.add_(new[name] - old[name], alpha=share)


if __name__ == "__main__":
    run(transfer)
