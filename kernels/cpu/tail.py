"""The network's end, from features to pixels, as one convolution, since nothing in it is nonlinear.

Upsampler, tail and mean shift are convolutions of 3 x 3 and 1 x 1 and pixel shuffles. Together they are, at every scale, a
5 x 5 convolution of the features that gives s x s pixels of the picture for each of theirs, with a tenth of the products.

The outermost pixels need weights of their own: there the layers read the maps in between beyond the edges, as zeros, where
the one convolution of zero-padded features would in effect give those maps values beyond their edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import product

import numpy as np
import numpy.typing as npt

from sanrt.arrays import Array
from sanrt.model.contract import TAIL_HALO

Matrix = npt.NDArray[np.float64]

TAPS = 2 * TAIL_HALO + 1
"""Side of the convolution's filter."""


class Side(Enum):
    """Where a pixel of the features lies along one axis."""

    FIRST = "first"
    INNER = "inner"
    LAST = "last"

    def outside(self, start: int, count: int, factor: int) -> npt.NDArray[np.bool_]:
        """Which pixels of a window lie beyond the edge of a map that is `factor` times as large as the features.

        The window has `count` pixels from `start` on, counted from the first that belongs to the features' pixel.
        """
        at = np.arange(start, start + count)
        return at < 0 if self is Side.FIRST else at >= factor if self is Side.LAST else np.zeros(count, bool)

    def slice(self, size: int) -> slice:
        """The indices of such pixels along an axis of `size` pixels."""
        return {Side.FIRST: slice(0, 1), Side.INNER: slice(1, size - 1), Side.LAST: slice(size - 1, size)}[self]


EDGES = [place for place in product(Side, Side) if place != (Side.INNER, Side.INNER)]
"""The eight parts of a picture's border: four sides and four corners."""


@dataclass(frozen=True)
class Layer:
    """A 3 x 3 convolution and the pixel shuffle behind it."""

    weight: Matrix
    bias: Matrix
    shuffle: int


class Tail:
    """The layers from features (h, w, C) to pixels (h, w, 3 s s), with weights named as in `sanrt.model.san.SAN`.

    Channel (c s + i) s + j of the result is colour c in row i, column j of the s x s. In float64: products of up to five
    layers' weights are rounded to float32 once, at the end.
    """

    def __init__(self, weights: Mapping[str, Array], channels: int) -> None:
        exact = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
        shift = exact["mean_out.weight"][:, :, 0, 0]
        bias = shift @ exact["tail.bias"] + exact["mean_out.bias"]
        self.last = Layer(np.einsum("po,ocij->pcij", shift, exact["tail.weight"]), bias, 1)
        found = (n.removesuffix(".weight") for n in exact if n.startswith("upsampler.") and n.endswith(".weight"))
        names = sorted(found, key=lambda name: int(name.rpartition(".")[2]))  # a mapping from a file may be in any order
        self.enlarging = [
            Layer(exact[f"{n}.weight"], exact[f"{n}.bias"], round((len(exact[f"{n}.bias"]) / channels) ** 0.5))
            for n in names
        ]
        self.scale = int(np.prod([layer.shuffle for layer in self.enlarging]))

    def composed(self, rows: Side = Side.INNER, columns: Side = Side.INNER) -> tuple[Array, Array]:
        """Weight (3 s s, C, 5, 5) and bias (3 s s,) of the convolution for pixels at such a place.

        Goes from the picture backwards: `window` is how each of the 3 s s values depends on the map before a layer.
        """
        scale, (colours, channels) = self.scale, self.last.weight.shape[:2]
        # The last layer: each of the s x s pixels depends on its 3 x 3 neighbours, within a window of s + 2.
        pixels = np.zeros((colours, scale, scale, channels, scale + 2, scale + 2))
        for i, j in product(range(scale), repeat=2):
            pixels[:, i, j, :, i : i + 3, j : j + 3] = self.last.weight
        window: Matrix = pixels.reshape(-1, *pixels.shape[3:])
        bias, start, factor = np.repeat(self.last.bias, scale * scale), -1, scale
        for layer in reversed(self.enlarging):
            # The layer pads with zeros, so what lies beyond the edge of its input has no influence.
            window[:, :, rows.outside(start, window.shape[2], factor)] = 0
            window[:, :, :, columns.outside(start, window.shape[3], factor)] = 0
            window, start = unshuffled(window, start, layer.shuffle)
            bias = bias + np.einsum("kohw,o->k", window, layer.bias)
            window, start, factor = transposed_convolution(window, layer.weight), start - 1, factor // layer.shuffle
        assert start == -TAIL_HALO
        assert window.shape[2] == TAPS
        return window.astype(np.float32), bias.astype(np.float32)


def unshuffled(window: Matrix, start: int, shuffle: int) -> tuple[Matrix, int]:
    """A dependence on pixels as one on the channels that a pixel shuffle made them of, and where its window starts there."""
    before, end = start % shuffle, start + window.shape[2]
    window = np.pad(window, [(0, 0), (0, 0), *[(before, -end % shuffle)] * 2])
    values, channels, side = window.shape[:3]
    blocks = window.reshape(values, channels, side // shuffle, shuffle, side // shuffle, shuffle).transpose(0, 1, 3, 5, 2, 4)
    return blocks.reshape(values, channels * shuffle**2, *blocks.shape[4:]), start // shuffle


def transposed_convolution(window: Matrix, weight: Matrix) -> Matrix:
    """A dependence on a 3 x 3 convolution's results as one on its inputs: the window grows by one pixel on every side."""
    values, outputs, side = window.shape[:3]
    flat = window.transpose(0, 2, 3, 1).reshape(-1, outputs)
    made = np.zeros((values, weight.shape[1], side + 2, side + 2))
    for i, j in product(range(3), repeat=2):
        part = (flat @ weight[:, :, i, j]).reshape(values, side, side, -1).transpose(0, 3, 1, 2)
        made[:, :, i : i + side, j : j + side] += part
    return made


class Edge:
    """Computes the pixels of one of EDGES by plain matrix products; they are too few for a kernel to matter."""

    def __init__(self, tail: Tail, rows: Side, columns: Side) -> None:
        weight, self.bias = tail.composed(rows, columns)
        self.rows, self.columns = rows, columns
        self.channels = weight.shape[1]
        self.weight = np.ascontiguousarray(weight.transpose(2, 3, 1, 0)).reshape(-1, len(weight))

    def compute(self, padded: Array, out: Array) -> None:
        """Overwrite this part of the border in out (h, w, 3 s s).

        padded: the features with TAIL_HALO zeros around them, (h + 4, w + 4, C or more channels).
        """
        height, width = out.shape[:2]
        rows, columns = self.rows.slice(height), self.columns.slice(width)
        if not out[rows, columns].size:
            return  # a picture of two pixels has nothing between its first and its last
        part = padded[rows.start : rows.stop + 2 * TAIL_HALO, columns.start : columns.stop + 2 * TAIL_HALO, : self.channels]
        windows = np.lib.stride_tricks.sliding_window_view(part, (TAPS, TAPS), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
        count = windows.shape[0] * windows.shape[1]
        done = windows.reshape(count, -1) @ self.weight + self.bias
        out[rows, columns] = done.reshape(*windows.shape[:2], -1)


def edges(tail: Tail) -> Iterator[Edge]:
    """The eight parts of the border."""
    return (Edge(tail, rows, columns) for rows, columns in EDGES)
