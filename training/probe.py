"""What a machine is good for, in a minute: `python -m training.probe PACK BATCH SECONDS`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from sanrt.model.san import SAN
from sanrt.model.spec import Architecture
from training.command import run
from training.degrade import degrade
from training.device import training_device
from training.learner import Learner
from training.network import initialise
from training.recording import cuda_graph, plain, tape
from training.tiles import Tiles, load_tiles, reduce
from training.train import Plan, Schedule, Stepper, Worker

PATCHES = (64, 96)


def probe(
    data: Annotated[Path, typer.Argument(help="Folder of pictures packed by training.pack.")],
    batch: int,
    seconds: Annotated[float, typer.Argument(help="For each timing.")],
    groups: int = 4,
    channels: int = 64,
    scale: int = 4,
    patch: Annotated[list[int] | None, typer.Option(help="Sides of patches to be timed. [default: 64 and 96]")] = None,
) -> None:
    """Compare the device's arithmetic with the CPU's, a recorded step with a plain one, and time both."""
    device = training_device()
    begun = time.monotonic()
    tiles = load_tiles(data, scale, photo=False, device=device)
    print(f"{len(tiles.high)} tiles read and reduced in {time.monotonic() - begun:.1f} s, {torch.__version__}, {device}")
    lows = reduce(tiles.high[:8], scale).cpu().numpy()
    same = all(np.array_equal(low, degrade(tile.cpu().numpy(), scale)) for low, tile in zip(lows, tiles.high, strict=False))
    print(f"low resolution as on the CPU, to the bit: {'yes' if same else 'NO'}")
    arch = Architecture(scale, groups, 4, channels, 4)
    for side in patch or PATCHES:
        recorded, plainly = (Probe(arch, tiles, batch, side, record) for record in (True, False))
        difference = abs(recorded.losses(10) - plainly.losses(10)).max()
        print(f"patch {side}: largest difference of losses, recorded against plain: {difference:.2e}")
        for name, each in (("recorded", recorded), ("plain", plainly)):
            rate = each.rate(seconds)
            print(f"patch {side}, {name}: {rate:.1f} steps/s, {rate * batch * side**2 / 1e6:.2f} megapixels/s", flush=True)


class Probe:
    """A fresh network and the steps that train it."""

    def __init__(self, arch: Architecture, tiles: Tiles, batch: int, patch: int, record: bool) -> None:
        torch.manual_seed(0)
        net = SAN(arch)
        initialise(net)
        self.device = tiles.high.device
        how = (cuda_graph if self.device.type == "cuda" else tape) if record else plain
        plan = Plan(Path(), arch, Schedule(1e-4, 1, 0, 0), batch, patch, half=True)
        self.stepper = Stepper(Learner(net, self.device, half=True), tiles, plan, Worker(record=how))
        self.done = 0

    def steps(self, number: int) -> None:
        """Do so many steps."""
        for _ in range(number):
            self.stepper.step(self.done, 1e-4)
            self.done += 1

    def losses(self, number: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """The losses of the first steps."""
        self.steps(number)
        found: np.ndarray[tuple[int], np.dtype[np.float32]] = self.stepper.losses[:number].cpu().numpy()
        return found

    def rate(self, seconds: float) -> float:
        """Steps per second, over at least so many seconds."""
        self.steps(1)
        self.wait()
        begun, before = time.monotonic(), self.done
        while time.monotonic() - begun < seconds:
            self.steps(5)
            self.wait()
        return (self.done - before) / (time.monotonic() - begun)

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    run(probe)
