"""Packed pictures and tiny runs that several tests share."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import torch

from sanrt.model.spec import Architecture
from training.pack import pack
from training.tiles import Tiles, reduce
from training.train import Plan, Schedule

TINY = Architecture(scale=2, groups=1, blocks=1, channels=16, reduction=4)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and dev/, of blocky pictures."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(1)
    for kind, sizes in {"train": [(100, 150), (96, 50)], "dev": [(60, 70), (50, 48)]}.items():
        (folder / kind).mkdir()
        for index, (height, width) in enumerate(sizes):
            pixels = random.integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), np.uint8).repeat(6, 0).repeat(6, 1)
            path = folder / kind / f"{index}.png"
            pyvips.Image.new_from_array(pixels[:height, :width].copy()).write_to_file(str(path))
    return folder


@pytest.fixture(scope="session")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, packed without loss, with two worn versions for x2."""
    out = tmp_path_factory.mktemp("packed")
    pack(photos, out, quality=0, photo_scale=[2], versions=2, drawings=0, part_size=0.002, side=48, dev_side=48)
    return out


@pytest.fixture(scope="session")
def tiles() -> Tiles:
    """Five tiles of 48 px at x2 in two versions."""
    high = torch.randint(0, 256, (5, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    low = reduce(high, 2)
    return Tiles(high, torch.stack([low, 255 - low]))


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    """`plan(seconds=10, ...)`: a tiny run in which the tests' clock ticks once a step."""

    def make(seconds: float = 10, **changes: Any) -> Plan:
        schedule = Schedule(rate=1e-3, seconds=seconds, warmup=2, decay=0.3)
        made = Plan(tmp_path / "run", TINY, schedule, batch=2, patch=8, half=False, save_every=3, score_every=4)
        return replace(made, **changes)

    return make
