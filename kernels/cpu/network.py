"""The whole network on the CPU, by sanrt's kernels and NumPy; maps are (rows, columns, channels) here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from sanrt.arrays import Array
from sanrt.errors import BackendError
from sanrt.geometry import Box
from sanrt.kernels.cpu import attention, schedule, soca
from sanrt.kernels.cpu.ir import aligned, this_processor
from sanrt.kernels.cpu.schedule import ConvolutionSchedule, Step, moments_of
from sanrt.kernels.cpu.soca import Gate, empty_moments
from sanrt.kernels.cpu.tail import TAPS, Tail, edges
from sanrt.kernels.cpu.winograd import (
    Arithmetic,
    Convolution,
    PaddedMap,
    microkernel_shape,
    whole_vectors,
    winograd_transform,
)
from sanrt.kernels.cpu.workers import Workers
from sanrt.model.contract import TAIL_HALO, Moments
from sanrt.model.spec import ModelSpec

TAIL_BAND_ROWS = 256
"""Rows of features that go through the tail at a time: its result has 3 s s channels, as much memory as the picture."""
MOMENTS_ROWS = 32
"""Rows of a tile whose moments are taken by one thread, then merged: float32 sums over many more would lose digits."""
COMPUTE_LOCKS: dict[int, Lock] = {}
"""By process, see `compute_lock`."""


@dataclass(frozen=True)
class Trunk:
    """The maps between head and tail for pictures of one size, and the schedules that run over them.

    A group's SOCA gate needs the statistics of the whole picture, so there is a schedule up to each gate and one after.
    """

    first: PaddedMap
    """The head's features."""
    shared: PaddedMap
    """The result of the first attention, which every group adds; kept times gamma, as the groups add it."""
    x: PaddedMap
    """The input of the present group."""
    features: PaddedMap
    """The result of the present group's residual blocks; at the end, what the tail reads."""
    gates: list[Array]
    moments: Array
    schedules: list[ConvolutionSchedule]

    def fits(self, height: int, width: int) -> bool:
        return (self.x.height, self.x.width) == (height, width)


class Network:
    """Weights, threads and the maps used last, which are used again for a picture or tile of the same size.

    May be called from several threads, and in a process forked from the one that made it; see `compute_lock`.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Array], threads: int, arithmetic: Arithmetic) -> None:
        if arithmetic is Arithmetic.INT16 and not this_processor().pmadd:
            raise BackendError("native has no int16 on this processor (on x86-64 it needs AVX-512BW); use --precision fp32")
        self.spec, self.arch, self.weights, self.arithmetic = spec, spec.architecture, weights, arithmetic
        # NumPy is called on every thread with its share of the rows; BLAS threads besides would only compete for the cores.
        self.single_threaded_blas = partial(ThreadpoolController().limit, limits=1, user_api="blas")
        self.maps: dict[str, PaddedMap] = {}
        conv = {name: self.convolution(name) for name in self.names()}
        self.head = conv["head"]
        self.blocks = [
            [tuple(conv[f"groups.{g}.blocks.{b}.conv{i}"] for i in (1, 2)) for b in range(self.arch.blocks)]
            for g in range(self.arch.groups)
        ]
        self.group_convolutions = [conv[f"groups.{g}.conv"] for g in range(self.arch.groups)]
        self.gates = [self.new_gate(g) for g in range(self.arch.groups)]
        tail = Tail(weights, self.arch.channels)
        self.tail, self.border = Convolution(*tail.composed(), arithmetic), list(edges(tail))
        parts = [weights[f"attention.{part}.weight"][:, :, 0, 0] for part in ("query", "key", "value")]
        self.qkv_weight = np.concatenate(parts).T.copy()
        self.qkv_bias = np.concatenate([weights[f"attention.{part}.bias"] for part in ("query", "key", "value")])
        self.trunk: Trunk | None = None
        # Compiled now: what fails to compile fails to load, not in the middle of a folder of pictures.
        attention.kernels(self.arch.attention_channels)
        soca.kernels(whole_vectors(self.arch.channels))
        for outputs, taps in {(each.outputs, each.transform.taps) for each in (*conv.values(), self.tail)}:
            schedule.kernels(arithmetic, microkernel_shape(outputs)[0], taps)
        self.workers = Workers(threads)

    def names(self) -> list[str]:
        """Names of the 3 x 3 convolutions before the tail, in the order of the network."""
        end = "upsampler.", "tail."
        return [
            n.removesuffix(".weight") for n, w in self.weights.items() if w.shape[2:] == (3, 3) and not n.startswith(end)
        ]

    def convolution(self, name: str) -> Convolution:
        """The convolution with the parameters `name`.weight and `name`.bias."""
        return Convolution(self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.arithmetic)

    def run(self, *steps: Step) -> None:
        """Run steps once."""
        ConvolutionSchedule(list(steps), self.workers).run()

    def close(self) -> None:
        """End the threads and free the maps."""
        with compute_lock():
            self.workers.close()
            self.clear()

    def clear(self) -> None:
        """Free the maps."""
        self.trunk = None
        self.maps.clear()

    def map(self, name: str, height: int, width: int, channels: int | None = None, taps: int = 3) -> PaddedMap:
        """A map to be written, padded for a convolution with such taps; memory is kept by name for the next of its width."""
        held, channels = self.maps.get(name), channels or self.arch.channels
        if held is None or not held.has_room_for(height, width, channels):
            self.maps.pop(name, None)
            held = self.maps[name] = PaddedMap.zeros(height, width, channels, winograd_transform(self.arithmetic, taps))
        return held.with_height(height)

    def by_rows(self, count: int, work: Callable[[slice], object]) -> None:
        """Call work(rows) on every thread, each with its share of `count` rows."""
        threads = self.workers.count
        self.workers.run(lambda t: work(slice(count * t // threads, count * (t + 1) // threads)))

    # --- the whole picture ------------------------------------------------------------------------------------------

    def upscale(self, picture: Array, regions: int) -> Array:
        """(1, 3, H, W) float32 -> (1, 3, sH, sW), not clipped, with attention over regions x regions."""
        height, width = picture.shape[2:]
        with compute_lock(), self.single_threaded_blas():
            trunk = self.trunk = (
                self.trunk if self.trunk and self.trunk.fits(height, width) else self.new_trunk(height, width)
            )
            self.head_features(picture, trunk.first)
            self.region_attention(trunk.first, trunk.shared, regions)
            self.by_rows(len(trunk.x.array), partial(self.share_attended, trunk))
            for group, steps in enumerate(trunk.schedules):
                steps.run()
                if group < self.arch.groups:
                    self.gates[group](trunk.moments, trunk.gates[group])
            self.region_attention(trunk.x, trunk.features, regions)
            x, first = trunk.features.array, trunk.first.array
            self.by_rows(len(x), lambda rows: np.add(x[rows], first[rows], out=x[rows]))
            return self.pixels(trunk.features, Box(0, 0, height, width))

    def share_attended(self, trunk: Trunk, rows: slice) -> None:
        """Make the first attention's result the first group's input; scale it by gamma for the groups' skip connections."""
        trunk.x.array[rows] = trunk.shared.array[rows]
        trunk.shared.array[rows] *= self.weights["gamma"]

    def new_trunk(self, height: int, width: int) -> Trunk:
        """The maps and schedules for pictures of a size, in place of those before."""
        self.trunk = None  # freed first: both together may exceed the memory
        first, shared, x, hidden, features = (
            PaddedMap.zeros(height, width, self.arch.channels, winograd_transform(self.arithmetic)) for _ in range(5)
        )
        gates = [aligned(first.array.shape[2:]) for _ in self.blocks]
        moments = moments_of(features, self.arithmetic)
        joins = [
            Step(conv, features, x, added=x, also=shared, gate=gate)
            for conv, gate in zip(self.group_convolutions, gates, strict=True)
        ]
        bodies = [self.body_steps(group, x, hidden, features, moments) for group in range(self.arch.groups)]
        # Between two gates: a group's last convolution, gated, and the next group's blocks.
        steps = [bodies[0], *([join, *body] for join, body in zip(joins[:-1], bodies[1:], strict=True)), joins[-1:]]
        schedules = [ConvolutionSchedule(each, self.workers) for each in steps]
        return Trunk(first, shared, x, features, gates, moments, schedules)

    def head_features(self, picture: Array, out: PaddedMap) -> None:
        """The head's features of a picture (1, 3, H, W), into `out`."""
        shifted = self.map("shifted", out.height, out.width, 3)
        weight, bias = (self.weights[f"mean_in.{part}"] for part in ("weight", "bias"))
        shifted.pixels[..., :3] = channels_last(picture) @ weight[:, :, 0, 0].T + bias
        self.run(Step(self.head, shifted, out))

    def region_attention(self, x: PaddedMap, out: PaddedMap, regions: int) -> None:
        """Region-level non-local attention with its skip connection: every pixel attends to its own region."""
        pixels = x.pixels[..., : self.arch.channels]
        query, key, value = self.projected(pixels)
        y = np.empty_like(query, order="C")
        for box in Box(0, 0, x.height, x.width).grid(regions, regions):
            cell = np.s_[box.top : box.bottom, box.left : box.right]
            y[cell] = self.attended(query[cell], pooled(key[cell]), pooled(value[cell]))
        self.attention_output(y, pixels, out.pixels[..., : self.arch.channels])

    def projected(self, region: Array) -> list[Array]:
        """Queries, keys and values (the paper's theta(x), phi(x), g(x)) of (h, w, C): three of (h, w, C / 8)."""
        made = np.empty((*region.shape[:2], len(self.qkv_bias)), np.float32)
        self.by_rows(len(made), lambda rows: np.add(region[rows] @ self.qkv_weight, self.qkv_bias, out=made[rows]))
        return np.split(made, 3, axis=2)

    def attended(self, query: Array, key: Array, value: Array) -> Array:
        """softmax(query key^T) value, in the queries' shape (h, w, C / 8); keys and values of any shape (..., C / 8)."""
        parts = (part.reshape(-1, part.shape[-1]) for part in (query, key, value))
        return attention.attention(self.workers, *parts).reshape(query.shape)

    def attention_output(self, y: Array, x: Array, out: Array) -> None:
        """Write W(y) + x into out: y (h, w, C / 8), x and out (h, w, C)."""
        weight, bias = (self.weights[f"attention.out.{part}"] for part in ("weight", "bias"))
        weight = weight[:, :, 0, 0].T
        self.by_rows(len(y), lambda rows: np.add(y[rows] @ weight + bias, x[rows], out=out[rows]))

    def body_steps(
        self, group: int, x: PaddedMap, hidden: PaddedMap, features: PaddedMap, moments: Array | None
    ) -> list[Step]:
        """The residual blocks of a group, from x into features, which the blocks after the first update in place."""
        steps = []
        for conv1, conv2 in self.blocks[group]:
            steps += [Step(conv1, x, hidden, relu=True), Step(conv2, hidden, features, added=x)]
            x = features
        steps[-1] = replace(steps[-1], moments=moments)
        return steps

    def moments(self, pixels: Array) -> Moments:
        """Mean and centred scatter over the pixels (h, w, C), merged in the order of the rows whatever the threads."""
        channels, todo = self.arch.channels, iter(range(0, len(pixels), MOMENTS_ROWS))
        found: dict[int, tuple[Array, Array, int]] = {}

        def work(_: int) -> None:
            for top in todo:  # next() on a shared range iterator is atomic under the GIL: each item goes to one thread
                found[top] = moments(pixels[top : top + MOMENTS_ROWS, :, :channels])

        self.workers.run(work)
        total = Moments(np.zeros(channels), np.zeros((channels, channels)))
        for top in sorted(found):
            total.add(*found[top])
        return total

    def new_gate(self, group: int) -> Gate:
        """The layers of a group's channel attention."""
        prefix = f"groups.{group}.soca"
        parts = {part: self.weights[f"{prefix}.{part}.weight"][:, :, 0, 0] for part in ("down", "up")}
        bias = {part: self.weights[f"{prefix}.{part}.bias"] for part in ("down", "up")}
        down, up, up_bias = map(self.padded_channels, (parts["down"], parts["up"].T, bias["up"]))
        return Gate(self.arch.channels, self.spec.iterations, down, bias["down"], up, up_bias)

    def padded_channels(self, x: Array) -> Array:
        """(..., C) padded with zeros to whole vectors of channels."""
        made = aligned((*x.shape[:-1], whole_vectors(self.arch.channels)))
        made[..., : self.arch.channels] = x
        return made

    def pixels(self, trunk: PaddedMap, box: Box) -> Array:
        """The tail's result within a box of the features, band by band: (1, 3, sh, sw)."""
        scale, whole = self.arch.scale, Box(0, 0, trunk.height, trunk.width)
        made = np.empty((1, 3, box.height * scale, box.width * scale), np.float32)
        blocks = made.reshape(3, box.height, scale, box.width, scale).transpose(1, 3, 0, 2, 4)
        for band in box.grid(-(-box.height // TAIL_BAND_ROWS), 1):
            halo = band.grown(TAIL_HALO, whole)
            done, crop, place = self.tail_blocks(trunk, halo), band.inside(halo), band.inside(box)
            source, target = done[crop.top : crop.bottom, crop.left : crop.right], blocks[place.top : place.bottom]
            self.by_rows(crop.height, partial(copy_blocks, source, target))
        return made

    def tail_blocks(self, trunk: PaddedMap, box: Box) -> Array:
        """The tail's result for the features within a box, as if there were no others: blocks of pixels (h, w, 3 s s)."""
        x = self.map("band", box.height, box.width, taps=TAPS)
        source = trunk.pixels[box.top : box.bottom, box.left : box.right]
        self.by_rows(x.height, lambda rows: np.copyto(x.pixels[rows], source[rows]))
        values = 3 * self.arch.scale**2
        done = self.map("pixels", x.height, x.width, values)
        self.run(Step(self.tail, x, done))
        made, count = done.pixels[..., :values], self.workers.count

        def finish(thread: int) -> None:
            for edge in self.border[thread::count]:
                edge.compute(x.array[: x.height + 2 * TAIL_HALO, : x.width + 2 * TAIL_HALO], made)

        self.workers.run(finish)
        return made

    # --- stage by stage ---------------------------------------------------------------------------------------------

    def run_stage(self, stage: str, *inputs: npt.NDArray[Any]) -> list[Array]:
        """Run one stage of `sanrt.model.graph.stage_model`, whose maps are (1, C, h, w)."""
        kind, _, number = stage.partition(".")
        with compute_lock(), self.single_threaded_blas():
            self.trunk = None  # a whole picture's maps; streaming has to do with the memory that is left
            return [np.array(made, order="C") for made in self.stage(kind, int(number or 0), *inputs)]

    def stage(self, kind: str, group: int, *inputs: Any) -> list[Array]:
        """The same, given the stage's kind and group; results may be views of maps that the next stage overwrites."""
        match kind, inputs:
            case "head", (picture, box):
                first = self.map("x", *picture.shape[2:])
                self.head_features(picture, first)
                return [self.cropped(first, box)]
            case "keys-values", (x,):
                return [channels_first(pooled(part)) for part in self.projected(channels_last(x))[1:]]
            case "attend", (x, key, value):
                x, key, value = map(channels_last, (x, key, value))
                out = np.empty_like(x, order="C")
                self.attention_output(self.attended(self.projected(x)[0], key, value), x, out)
                return [channels_first(out)]
            case "body", (x, box):
                features = self.map("features", *x.shape[2:])
                hidden = self.map("hidden", *x.shape[2:])
                self.run(*self.body_steps(group, self.filled("x", x), hidden, features, None))
                part = self.cropped(features, box)
                found = self.moments(channels_last(part))
                return [part, found.mean.astype(np.float32)[None, :, None], found.scatter.astype(np.float32)[None]]
            case "gate", (sigma,):
                return [self.gated(group, sigma[0])[None, :, None, None]]
            case "join", (features, gate, x, shared, box):
                joined = self.map("x", *features.shape[2:])
                gate = self.padded_channels(gate[0, :, 0, 0])
                self.run(Step(self.group_convolutions[group], self.filled("features", features), joined, gate=gate))
                return [self.cropped(joined, box) + x + self.weights["gamma"] * shared]
            case "tail", (attended, first, box):
                return [self.pixels(self.filled("x", attended + first), Box(*(box // self.arch.scale).tolist()))]
        raise ValueError(f"no stage {kind} of {len(inputs)} inputs")

    def gated(self, group: int, sigma: Array) -> Array:
        """The gate of a covariance, (C, C) -> (C,)."""
        out = aligned((whole_vectors(self.arch.channels),))
        moments = empty_moments(1, len(out))  # of one strip with one pixel, so that its scatter is the covariance
        moments[0, 0] = 1
        moments[0, 2:, : self.arch.channels][: self.arch.channels] = sigma
        self.gates[group](moments, out)
        return out[: self.arch.channels]

    def filled(self, name: str, x: Array) -> PaddedMap:
        """A map with the content of x (1, C, h, w)."""
        made = self.map(name, *x.shape[2:])
        made.pixels[..., : x.shape[1]] = channels_last(x)
        made.pixels[..., x.shape[1] :] = 0
        return made

    def cropped(self, x: PaddedMap, box: npt.NDArray[np.int64]) -> Array:
        """Part of a map as (1, C, h, w)."""
        top, left, bottom, right = box.tolist()
        return channels_first(x.pixels[top:bottom, left:right, : self.arch.channels])


def compute_lock() -> Lock:
    """Held while a picture is computed: one at a time in a process, whatever the number of networks.

    Each uses all threads, and the limit on the threads of NumPy's BLAS holds for the whole process. A forked process has a
    lock of its own: if a thread held this one at the fork, nobody is there to release it.
    """
    return COMPUTE_LOCKS.setdefault(os.getpid(), Lock())  # atomic under the GIL


def channels_last(x: Array) -> Array:
    """(1, C, h, w) -> (h, w, C)."""
    moved: Array = x[0].transpose(1, 2, 0)
    return moved


def channels_first(x: Array) -> Array:
    """(h, w, C) -> (1, C, h, w)."""
    return x.transpose(2, 0, 1)[None]


def copy_blocks(source: Array, target: Array, rows: slice) -> None:
    """Copy some rows of (h, w, 3 s s) into (h, w, 3, s, s), a view of a picture: the pixel shuffle."""
    scale = target.shape[-1]
    values = source[rows].reshape(-1, source.shape[1], *target.shape[2:])
    for i in range(scale):
        for j in range(scale):
            target[rows, ..., i, j] = values[..., i, j]


def pooled(x: Array) -> Array:
    """2 x 2 max-pooling, which leaves out an odd last row and column: (h, w, C) -> (h // 2, w // 2, C)."""
    height, width = (size // 2 * 2 for size in x.shape[:2])
    largest: Array = reduce(np.maximum, (x[i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)))
    return largest


def moments(pixels: Array) -> tuple[Array, Array, int]:
    """Mean (C,), centred scatter (C, C) and number of the pixels (h, w, C)."""
    rows = pixels.reshape(-1, pixels.shape[2])
    mean: Array = rows.mean(0)
    centred = rows - mean
    return mean, centred.T @ centred, len(rows)
