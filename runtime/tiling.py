"""Sizes and tiles: plain arithmetic over sides in pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def padded_side(side: int, min_side: int, multiple: int) -> int:
    """The smallest side that a graph takes and that holds `side` pixels."""
    return -(-max(side, min_side) // multiple) * multiple


def pad(pictures: Array, min_side: int, multiple: int) -> Array:
    """(B, 3, H, W) -> (B, 3, H', W'), its last row and column repeated below and to the right; contiguous."""
    height, width = pictures.shape[2:]
    below, right = padded_side(height, min_side, multiple) - height, padded_side(width, min_side, multiple) - width
    if below or right:
        pictures = np.pad(pictures, ((0, 0), (0, 0), (0, below), (0, right)), mode="edge")
    return np.ascontiguousarray(pictures)


@dataclass(frozen=True)
class TileAxis:
    """One axis of a picture cut into tiles of one size; the last is pulled back to end at the border."""

    side: int
    """Of the picture."""
    limit: int
    """Tiles are no longer than this."""
    overlap: int
    """Neighbours share at least this; at most half of `limit`."""

    @property
    def tile(self) -> int:
        """Every tile's length."""
        return min(self.limit, self.side)

    @property
    def starts(self) -> list[int]:
        """Where the tiles begin."""
        return [*range(0, self.side - self.tile, self.limit - self.overlap), self.side - self.tile]

    def weights(self, scale: int) -> Array:
        """Blending weights (tiles, scale * tile) at the output's resolution: wherever tiles meet, theirs sum to 1.

        Half a sine squared over the overlap, so that a tile counts least where it knows least of its surroundings.
        """
        place = np.arange(scale * self.tile)
        inside = np.minimum(place, place[::-1]) + 0.5
        raw = np.sin(np.pi / 2 * np.minimum(inside / max(scale * self.overlap, 1), 1)) ** 2
        total = np.zeros(scale * self.side)
        for start in self.starts:
            total[scale * start :][: len(raw)] += raw
        return np.stack([raw / total[scale * start :][: len(raw)] for start in self.starts]).astype(np.float32)
