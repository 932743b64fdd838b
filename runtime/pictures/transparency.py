"""Colours under full transparency, which nobody sees and the network would mix into the edges of what is seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FARTHEST = np.iinfo(np.uint16).max
"""Pixels; hidden ones farther from every visible one keep their colours."""


def fill_hidden(colours: Array, alpha: Array) -> Array:
    """(H, W, 3) colours of any type with those where the (H, W) opacity is 0 taken from the nearest visible pixel.

    Nearest by rows and columns passed. The array itself is returned if nothing is hidden, or nothing visible.
    """
    if alpha.all() or not alpha.any():
        return colours
    filled, distance = colours.copy(), distances(alpha)
    spread_down(filled, distance)
    spread_down(filled[::-1], distance[::-1])
    spread_sideways(filled, distance)
    return filled


def distances(alpha: Array) -> npt.NDArray[np.uint16]:
    """(H, W) opacity -> how far the nearest visible pixel is, as far as is known before anything is spread."""
    return np.where(alpha == 0, np.uint16(FARTHEST), np.uint16(0))


def spread_down(colours: Array, distance: Array, above: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
    """Take each row's colours from the row above where that is nearer to a visible pixel, in place, from the top on.

    above: colours and distances of the row over the first one; returned are those of the last row.
    """
    for row, away in zip(colours, distance, strict=True):
        if above is not None and away.any():
            beyond = np.minimum(above[1], FARTHEST - 1) + np.uint16(1)
            nearer = beyond < away
            row[nearer], away[nearer] = above[0][nearer], beyond[nearer]
        above = row, away
    assert above is not None
    return above[0].copy(), above[1].copy()


def spread_sideways(colours: Array, distance: Array) -> None:
    """The same from column to column, in both directions."""
    if distance.any():
        columns, away = colours.transpose(1, 0, 2), distance.T
        spread_down(columns, away)
        spread_down(columns[::-1], away[::-1])
