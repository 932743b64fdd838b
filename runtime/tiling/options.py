"""What a person may choose about how pictures go through the network. Imports no NumPy, as `sanrt --help` needs it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

from sanrt.errors import UsageError, require_number
from sanrt.model.spec import MAX_REGIONS
from sanrt.runtime.host import free_host_memory

DEFAULT_OVERLAP = 32

PROCESS_MEMORY = 400 * 2**20
"""Interpreter, libraries, picture buffers: what a run holds beside the budget."""

SMALL_MEMORY_SHARE = 4
"""Where that would leave less: one part in so many of what the process may have."""

MEMORY_SHARE = 0.6
"""Share of the free memory that a run takes: the rest is for decoding, encoding and everybody else."""


class Tiling(StrEnum):
    """`--tiling`."""

    AUTO = "auto"
    """Whole where the memory suffices, exact above."""
    WHOLE = "whole"
    EXACT = "exact"
    """Stage by stage over tiles: the whole picture's result, whatever the tile (`sanrt.runtime.tiling.streaming`)."""
    OVERLAP = "overlap"
    """Overlapped, blended tiles, each a picture of its own to the network: faster, and every pixel differs."""


@dataclass(frozen=True)
class UpscaleOptions:
    """How pictures go through the network."""

    tile: int | None = None
    """Cut larger pictures into tiles of at most this side; None cuts only what does not fit the memory."""
    overlap: int | None = None
    """Pixels that overlapped tiles share; None is 32, or a quarter of a smaller tile. Given, it asks for such tiles."""
    self_ensemble: bool = False
    """Average over the 8 flips and rotations (SAN+, section 4 of the paper)."""
    tiling: Tiling = Tiling.AUTO
    regions: int | None = None
    """k of the k x k attention regions; None is by the picture's size (`choose_regions`)."""
    memory: int | None = None
    """Bytes of the host's memory that the process should stay below; None leaves it a share of what is free."""
    scratch: Path | None = None
    """Folder of the scratch files; None is that of the result, or the system's (TMPDIR) for pictures in memory."""
    keep_hidden: bool = False
    """Keep the colours under full transparency, instead of those of the nearest visible pixels."""

    def __post_init__(self) -> None:
        require_number("tile", self.tile, 16)
        require_number("overlap", self.overlap, 0)
        require_number("regions", self.regions, 1, MAX_REGIONS)
        require_number("memory", self.memory, 1)
        if self.tile is not None and self.tiling is Tiling.WHOLE:
            raise UsageError(f"tiles of {self.tile} pixels with {self.tiling} tiling, which has none; leave one out")
        if self.overlap is not None and self.tiling in (Tiling.WHOLE, Tiling.EXACT):
            raise UsageError(f"overlap {self.overlap} with {self.tiling} tiling, which overlaps nothing; leave one out")
        if self.overlap is not None and not 0 <= self.overlap <= (self.tile or 2 * self.overlap) // 2:
            raise UsageError(f"overlap {self.overlap} with tiles of {self.tile}; expected 0 to half a tile")

    @cached_property
    def budget(self) -> int:
        """Bytes of the host's memory for maps, tiles and results; looked up once: a run treats all pictures alike."""
        if self.memory is None:
            return int(free_host_memory() * MEMORY_SHARE)
        return max(self.memory - PROCESS_MEMORY, self.memory // SMALL_MEMORY_SHARE)

    def overlap_of(self, tile: int) -> int:
        """Pixels that overlapped tiles of this side share."""
        return min(
            DEFAULT_OVERLAP if self.overlap is None else self.overlap, tile // 4 if self.overlap is None else tile // 2
        )


def memory_for(budget: int) -> int:
    """The least `UpscaleOptions.memory` that gives such a budget."""
    return min(budget + PROCESS_MEMORY, budget * SMALL_MEMORY_SHARE)
