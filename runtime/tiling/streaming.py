"""Exact streaming: SAN over tiles with the whole picture's statistics, so that no pixel depends on the tile.

Channel attention (SOCA) and region attention look at the whole picture. Each stage of the network is therefore run over
all tiles before the next one begins: convolutions with a halo that is cut off again, SOCA's covariance merged from the
tiles' means and scatters, the keys and values of a whole region gathered before any of its pixels attends to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np

from sanrt.arrays import Array
from sanrt.geometry import Box
from sanrt.model.contract import HEAD_HALO, JOIN_HALO, TAIL_HALO, Moments
from sanrt.model.spec import Architecture, ModelSpec
from sanrt.runtime.backends.protocol import FeatureMap, PixelSink, PixelSource, Progress, Stages
from sanrt.runtime.pictures.codec import SourcePicture
from sanrt.runtime.pictures.transparency import distances, spread_down, spread_sideways
from sanrt.runtime.tiling.featuremaps import FeatureStore

MAX_PAIRS = 2**26
"""Pairs of a query and a key in one call, for backends that form their matrix (256 MiB of float32)."""

STRIP_ROWS = 256
"""Rows that are decoded at a time, about."""


def no_progress(share: float) -> None:
    """Tell nobody."""


@dataclass
class Streaming:
    """One picture on its way through the stages."""

    stages: Stages
    spec: ModelSpec
    source: PixelSource
    store: FeatureStore
    tile: int
    """Largest side of a tile, in input pixels without the halo."""
    regions: int
    """k of the k x k attention regions."""
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        self.picture = Box(0, 0, *self.source.size)

    @property
    def arch(self) -> Architecture:
        return self.spec.architecture

    def run(self, sink: PixelSink) -> None:
        """Upscale the picture into `sink`."""
        with self.store:
            # The maps that are used most come first, as the first ones get the memory.
            features, x, shared = (self.store.new(self.arch.channels, *self.source.size) for _ in range(3))
            self.attention(self.first, shared)
            for g in range(self.arch.groups):
                before = x if g else shared
                gate = self.body(g, before, features)
                self.join(g, features, gate, before, shared, x)
            self.attention(x.read, x)
            self.tail(x, sink)

    def done(self, box: Box) -> None:
        """Count one tile of one of the passes as done: a body and a join per group, two attentions, the tail."""
        self.progress(box.area / self.picture.area / (2 * self.arch.groups + 3))

    def first(self, box: Box) -> Any:
        """The first feature map, made again wherever it is needed: that is cheaper than keeping it."""
        halo = box.grown(HEAD_HALO, self.picture)
        return self.stages.run("head", self.source.read(halo), box.inside(halo).array())[0]

    def attention(self, x: Callable[[Box], Any], out: FeatureMap) -> None:
        """Region attention of x; `out` may be what x reads."""
        for region in self.picture.grid(self.regions, self.regions):
            key, value = self.keys_values(x, region)
            for box in region.tiles(min(self.tile, max(1, isqrt(MAX_PAIRS // key[0, 0].size)))):
                out.write(box, self.stages.run("attend", x(box), key, value)[0])
                self.done(box)

    def keys_values(self, x: Callable[[Box], Any], region: Box) -> tuple[Array, Array]:
        """Pooled keys and values (1, C/8, 1, L) of a whole region; pooling leaves out an odd last row and column."""
        height, width = region.height // 2, region.width // 2
        shape = (1, self.arch.attention_channels, height, width)
        key, value = np.empty(shape, np.float32), np.empty(shape, np.float32)
        for pooled in Box(0, 0, height, width).tiles(max(self.tile // 2, 1)):
            box = pooled.scaled(2)
            where = np.s_[:, :, pooled.top : pooled.bottom, pooled.left : pooled.right]
            box = Box(region.top + box.top, region.left + box.left, region.top + box.bottom, region.left + box.right)
            key[where], value[where] = self.stages.run("keys-values", x(box))
        return key.reshape(1, shape[1], 1, -1), value.reshape(1, shape[1], 1, -1)

    def body(self, group: int, x: FeatureMap, features: FeatureMap) -> Array:
        """A group's residual blocks over all tiles; returns the gate of the whole picture's covariance."""
        moments = Moments(np.zeros(self.arch.channels), np.zeros((self.arch.channels,) * 2))
        for box in self.picture.tiles(self.tile):
            halo = box.grown(self.arch.body_halo, self.picture)
            part, mean, scatter = self.stages.run(f"body.{group}", x.read(halo), box.inside(halo).array())
            features.write(box, part)
            moments.add(mean[0, :, 0], scatter[0], box.area)
            self.done(box)
        gate: Array = self.stages.run(f"gate.{group}", moments.covariance)[0]
        return gate

    def join(
        self, group: int, features: FeatureMap, gate: Array, x: FeatureMap, shared: FeatureMap, out: FeatureMap
    ) -> None:
        """A group's gated last convolution and its skip connections over all tiles; `out` may be x."""
        for box in self.picture.tiles(self.tile):
            halo = box.grown(JOIN_HALO, self.picture)
            inputs = features.read(halo), gate, x.read(box), shared.read(box), box.inside(halo).array()
            out.write(box, self.stages.run(f"join.{group}", *inputs)[0])
            self.done(box)

    def tail(self, attended: FeatureMap, sink: PixelSink) -> None:
        """Upscale what attended and the first feature map, tile by tile."""
        scale = self.arch.scale
        for box in self.picture.tiles(self.tile):
            halo = box.grown(TAIL_HALO, self.picture)
            crop = box.inside(halo).scaled(scale).array()
            part = self.stages.run("tail", attended.read(halo), self.first(halo), crop)[0]
            sink(box.scaled(scale), part)
            self.done(box)


@dataclass(frozen=True)
class ArraySource:
    """A picture in memory, as the network takes it."""

    pixels: Array
    """(1, 3, H, W)."""

    @property
    def size(self) -> tuple[int, int]:
        _, _, height, width = self.pixels.shape
        return height, width

    def read(self, box: Box) -> Array:
        return np.ascontiguousarray(self.pixels[:, :, box.top : box.bottom, box.left : box.right])


@dataclass(frozen=True)
class MapSource:
    """A decoded picture, kept in its own number format."""

    pixels: FeatureMap
    size: tuple[int, int]
    factor: np.float32
    """From the format's values to the network's."""

    def read(self, box: Box) -> Array:
        scaled: Array = self.pixels.read(box).astype(np.float32) * self.factor
        return scaled


def decoded(source: SourcePicture, store: FeatureStore, value_range: float, keep_hidden: bool = False) -> MapSource:
    """All pixels of a picture file, in a map: tiles want them in no order that a decoder could follow.

    Unless they are kept, colours under full transparency are those of the nearest visible pixels, as in `fill_hidden`.
    """
    info = source.info
    pixels = store.new(3, info.height, info.width, info.dtype)
    strips = list(Box(0, 0, info.height, info.width).grid(-(-info.height // STRIP_ROWS), 1))
    away = store.new(1, info.height, info.width, np.uint16) if info.alpha and not keep_hidden else None
    above = None
    for rows in strips:
        colours = source.rgb(rows.top, rows.height)
        if away:
            distance = distances(source.alpha(rows.top, rows.height))
            above = spread_down(colours, distance, above)
            away.write(rows, distance[None, None])
        pixels.write(rows, colours.transpose(2, 0, 1)[None])
    if away:
        spread_up(pixels, away, strips)
    return MapSource(pixels, (info.height, info.width), np.float32(value_range / np.iinfo(info.dtype).max))


def spread_up(pixels: FeatureMap, away: FeatureMap, strips: Sequence[Box]) -> None:
    """Spread colours from the last strip to the first one, and sideways; `away` holds the distances."""
    below = None
    for rows in reversed(strips):
        colours, distance = pixels.read(rows)[0].transpose(1, 2, 0), away.read(rows)[0, 0]
        below = spread_down(colours[::-1], distance[::-1], below)
        spread_sideways(colours, distance)
        pixels.write(rows, np.ascontiguousarray(colours.transpose(2, 0, 1)[None]))
