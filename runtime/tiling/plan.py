"""How a picture goes through the network: whole, streamed exactly, or in overlapped tiles."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import isqrt

from sanrt.errors import UsageError
from sanrt.model.spec import Architecture

PAPER_REGIONS = 2
"""k of the paper and of the official checkpoints."""

AFFORDABLE = 2**17
"""Pixels of the largest picture that `--regions auto` gives the paper's regions: their cost grows with the square."""

MAX_REGION = 2**14
"""Pixels in a region above that: attention then costs about as much as a small network's convolutions, at any size."""

MAX_TILE = 512
"""Side of the tiles that are chosen: with larger ones the halos, a few per cent already, would save nothing."""

MIN_TILE = 64
"""Smaller tiles would be mostly halo."""


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
class Way:
    """What was chosen for one picture."""

    tiling: Tiling
    """Never AUTO."""
    tile: int
    """Largest side of a tile, the picture's own where it goes whole."""
    regions: int
    """k of the k x k attention regions (of each tile where they overlap)."""

    def __str__(self) -> str:
        tiles = "" if self.tiling is Tiling.WHOLE else f" in tiles of {self.tile}"
        return f"{self.tiling}{tiles}, {self.regions} x {self.regions} regions"


@dataclass(frozen=True)
class Room:
    """Bytes that a run may take."""

    host: int
    """Of the machine's memory."""
    device: int | None = None
    """Of a GPU's own, which the network then runs in; None where it runs in the machine's."""

    @property
    def network(self) -> int:
        """Where the network runs."""
        return self.host if self.device is None else self.device

    def maps(self, arch: Architecture, tile: int) -> tuple[int, int]:
        """What feature maps may take on the host and on the GPU when a tile of this side is in the network."""
        if self.device is None:
            return map_memory(arch, tile, self.host), 0
        return self.host, map_memory(arch, tile, self.device)


def choose_regions(height: int, width: int) -> int:
    """`--regions auto`: 2 up to AFFORDABLE pixels, above it the smallest k whose regions have at most MAX_REGION."""
    k = PAPER_REGIONS
    if height * width > AFFORDABLE:
        while -(-height // k) * -(-width // k) > MAX_REGION and 2 * (k + 1) <= min(height, width):
            k += 1
    return k


def choose_tile(arch: Architecture, memory: int) -> int:
    """The largest side up to MAX_TILE with which a tile in the network takes at most a quarter of the memory."""
    return min(MAX_TILE, max(MIN_TILE, isqrt(memory // 4 // network_bytes(arch)) // 16 * 16))


def choose_overlapped_tile(arch: Architecture, height: int, width: int, room: Room) -> int:
    """The largest side with which a tile in the network fits beside the result: the fewer tiles, the smaller their error."""
    free = room.host - height * width * result_bytes(arch) if room.device is None else room.device
    return max(MIN_TILE, isqrt(max(0, free) // network_bytes(arch)) // 16 * 16)


def map_memory(arch: Architecture, tile: int, memory: int) -> int:
    """What feature maps may take of the memory when a tile of this side is in the network."""
    return max(0, memory - tile**2 * network_bytes(arch))


def fits_whole(arch: Architecture, height: int, width: int, room: Room) -> bool:
    """Whether the network can hold the whole picture, and the host its result."""
    network, result = height * width * network_bytes(arch), height * width * result_bytes(arch)
    if room.device is None:
        return network + result <= room.host
    return network <= room.device and result <= room.host


def result_bytes(arch: Architecture) -> int:
    """Of the float32 result, per input pixel, and of its copy in the picture's own type."""
    return 3 * arch.scale**2 * (4 + 4)


def network_bytes(arch: Architecture) -> int:
    """What the network holds at its peak, per input pixel, as float32.

    That is in the tail: its last convolution's C * s^2 values, their pixel-shuffled copy and another that libraries make to
    reorder memory, beside some ten maps of C channels that the skip connections and blocks keep.
    """
    return 4 * arch.channels * (3 * arch.scale**2 + 10)


def parse_memory(text: str) -> int:
    """Bytes from `4G`, `512M` or a plain number; raises UsageError for anything else."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        size = int(float(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit])
    except (ValueError, KeyError, OverflowError):
        raise UsageError(f"memory {text!r}: expected a number of bytes such as 4G or 512M") from None
    if size < 2**29:
        raise UsageError(f"memory {text!r}: expected at least 512M")
    return size
