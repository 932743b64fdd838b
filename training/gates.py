"""Does second-order attention earn its place? `python -m training.gates CHECKPOINT FOLDER` with FOLDER/HR and FOLDER/LR."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sanrt.arrays import psnr
from sanrt.errors import PictureError
from sanrt.export.metrics import y_psnr
from sanrt.model.san import SAN
from sanrt.model.soca import SOCA
from training.command import run
from training.data import Picture, picture_files, read_rgb
from training.ship import upscaled
from training.weights import trained_network

PART, MARGIN = 48, 8
"""Side of the parts that pictures are compared on, and what of it is left out; low-resolution pixels."""


@dataclass(frozen=True)
class GroupGates:
    """One group's channel gates over all pictures."""

    spread: float
    """Standard deviation over the pictures, averaged over the channels."""
    lowest: float
    highest: float


@dataclass(frozen=True)
class Report:
    """What the gates do, and what they are worth."""

    groups: tuple[GroupGates, ...]
    y_psnr: float
    """dB, mean over the pictures."""
    frozen_y_psnr: float
    """The same with every gate fixed at its mean over the pictures."""
    exact_root_psnr: float
    """dB between the outputs with the exact square root and with the trained one; infinite when equal."""
    whole_psnr: float
    """dB within parts of a side of PART, less their margins, when the picture goes through the network whole."""
    parts_psnr: float
    """The same when every part goes on its own, so with gates by its own statistics, as in training."""


class FrozenSOCA(nn.Module):
    """SOCA whose gates (C) no longer depend on the picture."""

    def __init__(self, gates: Tensor) -> None:
        super().__init__()
        self.gates = gates[:, None, None]

    def forward(self, features: Tensor) -> Tensor:
        return features * self.gates


def gates(
    checkpoint: Annotated[Path, typer.Argument(help="Of training, the official code or sanrt.")],
    folder: Annotated[Path, typer.Argument(help="Folder that holds HR/ and LR/.")],
) -> None:
    """Report SOCA's gates over pictures, the dB lost when they are frozen, and how far the exact root would lead."""
    net = trained_network(checkpoint)
    report = report_on(net, read_pairs(folder, net.arch.scale))
    Console().print(table(report))
    print(f"Y-PSNR                            {report.y_psnr:.3f} dB")
    print(
        f"  gates frozen at their means     {report.frozen_y_psnr:.3f} dB, {report.y_psnr - report.frozen_y_psnr:.3f} lost"
    )
    print(f"Exact root against the trained one: outputs at {report.exact_root_psnr:.1f} dB PSNR")
    print(f"Parts of {PART} px: {report.whole_psnr:.3f} dB in whole pictures, {report.parts_psnr:.3f} dB each on its own")


def read_pairs(folder: Path, scale: int) -> list[tuple[Picture, Picture]]:
    """Low and high resolution of every picture; raises PictureError where they do not belong together."""
    names = [path.name for path in picture_files(folder / "LR")]
    if len(names) < 2:
        raise PictureError(f"{folder / 'LR'}: {len(names)} pictures; expected at least 2, to see gates differ")
    pairs = []
    for name in names:
        if not (folder / "HR" / name).is_file():
            raise PictureError(f"{folder / 'HR' / name}: no such picture; expected one for every picture of {folder / 'LR'}")
        low, high = read_rgb(folder / "LR" / name), read_rgb(folder / "HR" / name)
        if high.shape != (low.shape[0] * scale, low.shape[1] * scale, 3):
            raise PictureError(f"{folder / 'HR' / name}: not x{scale} of its LR picture, as the checkpoint's scale demands")
        pairs.append((low, high))
    return pairs


def report_on(net: SAN, pairs: list[tuple[Picture, Picture]]) -> Report:
    """Measure a network on (low, high) pictures of its scale."""
    seen = logits_on(net, [low for low, _ in pairs]).sigmoid()
    means = seen.mean(1)
    frozen, exact = deepcopy(net), deepcopy(net)
    for group, gate in zip(frozen.groups, means, strict=True):
        group.soca = FrozenSOCA(gate)
    for soca in socas(exact):
        soca.sqrt_iterations = None
    return Report(
        groups=tuple(GroupGates(g.std(0).mean().item(), g.min().item(), g.max().item()) for g in seen),
        y_psnr=mean_y_psnr(net, pairs),
        frozen_y_psnr=mean_y_psnr(frozen, pairs),
        exact_root_psnr=float(np.mean([psnr(upscaled(net, low), upscaled(exact, low)) for low, _ in pairs])),
        whole_psnr=mean_part_psnr(net, pairs, whole=True),
        parts_psnr=mean_part_psnr(net, pairs, whole=False),
    )


def socas(net: SAN) -> list[SOCA]:
    """The second-order attention of every group, in order."""
    return [module for module in net.modules() if isinstance(module, SOCA)]


def logits_on(net: SAN, pictures: list[Picture]) -> Tensor:
    """Every gate for every picture before its sigmoid: (G, pictures, C)."""
    seen: list[list[Tensor]] = [[] for _ in net.groups]
    hooks = [
        soca.up.register_forward_hook(lambda _, __, logits, rows=rows: rows.append(logits.flatten()))
        for soca, rows in zip(socas(net), seen, strict=True)
    ]
    for picture in pictures:
        upscaled(net, picture)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.stack(rows) for rows in seen])


def mean_y_psnr(net: SAN, pairs: list[tuple[Picture, Picture]]) -> float:
    """Y-PSNR of the rounded outputs, `scale` pixels shaved, averaged over the pictures; dB."""
    outputs = (upscaled(net, low).clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0) for low, _ in pairs)
    return float(np.mean([y_psnr(output, high, net.arch.scale) for output, (_, high) in zip(outputs, pairs, strict=True)]))


def mean_part_psnr(net: SAN, pairs: list[tuple[Picture, Picture]], whole: bool) -> float:
    """`part_psnr` averaged over the pictures that have a part; NaN where none has."""
    found = [part_psnr(net, low, high, whole) for low, high in pairs if min(low.shape[:2]) >= PART]
    return float(np.mean(found)) if found else np.nan


def part_psnr(net: SAN, low: Picture, high: Picture, whole: bool) -> float:
    """PSNR of all channels within the parts of a picture: cut from its result, or from results of their own; dB."""
    scale, inner = net.arch.scale, slice(net.arch.scale * MARGIN, net.arch.scale * (PART - MARGIN))
    result, errors = upscaled(net, low) if whole else None, []
    for top in range(0, low.shape[0] - PART + 1, PART - 2 * MARGIN):
        for left in range(0, low.shape[1] - PART + 1, PART - 2 * MARGIN):
            rows, columns = (slice(scale * first, scale * (first + PART)) for first in (top, left))
            part = upscaled(net, low[top : top + PART, left : left + PART]) if result is None else result[:, rows, columns]
            truth = high[rows, columns].transpose(2, 0, 1).astype(np.float32)
            errors.append(np.square(part.clip(0, 255) - truth)[:, inner, inner].mean())
    return float(10 * np.log10(255**2 / np.mean(errors)))


def table(report: Report) -> Table:
    """The gates of every group, for a terminal."""
    shown = Table("group", "spread over pictures", "lowest", "highest", title="SOCA's gates")
    for index, group in enumerate(report.groups):
        shown.add_row(str(index), f"{group.spread:.5f}", f"{group.lowest:.3f}", f"{group.highest:.3f}")
    return shown


if __name__ == "__main__":
    run(gates)
