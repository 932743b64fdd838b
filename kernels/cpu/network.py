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
from sanrt.kernels.cpu import attention, schedule, soca
from sanrt.kernels.cpu.ir import aligned, this_processor
from sanrt.kernels.cpu.schedule import ConvolutionSchedule, Step
from sanrt.kernels.cpu.soca import Gate, StripMoments, empty_moments
from sanrt.kernels.cpu.tail import TAPS, Tail, edges
from sanrt.kernels.cpu.windows import MapWindow
from sanrt.kernels.cpu.winograd import (
    Arithmetic,
    Convolution,
    PaddedMap,
    microkernel_shape,
    whole_vectors,
    winograd_transform,
)
from sanrt.kernels.cpu.workers import Workers
from sanrt.model.contract import TAIL_HALO, Moments, RowFile
from sanrt.model.spec import ModelSpec
from sanrt.wording import option

MOMENTS_ROWS = 32
"""Rows of a tile whose moments are taken by one thread, then merged: float32 sums over many more would lose digits."""
COMPUTE_LOCKS: dict[int, Lock] = {}
"""By process, see `compute_lock`."""


@dataclass(frozen=True)
class Trunk:
    """The maps between head and tail for pictures of one size, and the schedules that run over them.

    A group's SOCA gate needs the statistics of the whole picture, so there is a schedule up to each gate and one after.
    """

    first: PaddedMap | None
    """The head's features; None where they are made again whenever they are needed."""
    shared: MapWindow
    """The result of the first attention, which every group adds; kept times gamma, as the groups add it."""
    x: MapWindow
    """The input of the present group."""
    hidden: MapWindow
    """What is between the two convolutions of a block."""
    features: MapWindow
    """The result of the present group's residual blocks."""
    gates: list[Array]
    moments: StripMoments
    schedules: list[ConvolutionSchedule]
    bands: Bands | None
    """None where all maps are whole in memory."""

    @property
    def windows(self) -> tuple[MapWindow, ...]:
        """All maps but the first."""
        return self.shared, self.x, self.hidden, self.features

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        return self.x.map.height, self.x.map.width


@dataclass(frozen=True)
class Bands:
    """How the network goes over a picture of which memory holds a part at a time: in bands of full width."""

    rows: int
    """Height of a band, about."""
    memory: int
    """Bytes for maps in memory; with less than the least that bands need they take that."""
    new_file: Callable[[int, int], RowFile]
    """Makes a file for so many rows of so many bytes."""


class Network:
    """Weights, threads and the maps used last, which are used again for a picture or tile of the same size.

    May be called from several threads, and in a process forked from the one that made it; see `compute_lock`.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Array], threads: int, arithmetic: Arithmetic) -> None:
        if arithmetic is Arithmetic.INT16 and not this_processor().pmadd:
            raise BackendError(
                f"native has no int16 on this processor (on x86-64 it needs AVX-512BW); use {option('precision', 'fp32')}"
            )
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
        self.query, self.key_value = self.projection("query"), self.projection("key", "value")
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

    def projection(self, *parts: str) -> tuple[Array, Array]:
        """Weight (C, outputs) and bias of 1 x 1 convolutions of the attention, side by side."""
        weight = np.concatenate([self.weights[f"attention.{part}.weight"][:, :, 0, 0] for part in parts])
        return weight.T.copy(), np.concatenate([self.weights[f"attention.{part}.bias"] for part in parts])

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

    # --- parts of the network ---------------------------------------------------------------------------------------

    def head_features(self, picture: Array, out: PaddedMap, top: int = 0, height: int | None = None) -> None:
        """The head's features of the rows of a picture from `top` on, which is on the tiles' grid, as many as `out` has.

        picture: (1, 3, h, W), those rows and one more on either side where the picture, of that height, has one.
        """
        border, height = self.head.transform.border, height or out.height
        shifted = self.map("shifted", out.height, out.width, 3)
        above, below = min(top, border), min(height - top - out.height, border)
        rows = shifted.array[border - above : border + out.height + below, border : border + out.width, :3]
        weight, bias = (self.weights[f"mean_in.{part}"] for part in ("weight", "bias"))
        shifted.array[: border - above] = 0
        rows[:] = channels_last(picture) @ weight[:, :, 0, 0].T + bias
        self.run(Step(self.head, shifted, out))

    def queries(self, pixels: Array) -> Array:
        """Queries (the paper's theta(x)) of whole rows (h, W, C): (h, W, C / 8)."""
        return self.projected(pixels, self.query)

    def keys_values(self, pixels: Array) -> tuple[Array, Array]:
        """Keys and values (phi(x), g(x)) of the same, not pooled."""
        key, value = np.split(self.projected(pixels, self.key_value), 2, axis=2)
        return key, value

    def projected(self, pixels: Array, weight_bias: tuple[Array, Array]) -> Array:
        """A 1 x 1 convolution of (h, w, C): one matrix product per row, so that the cut into rows changes no bit."""
        weight, bias = weight_bias
        made = np.empty((*pixels.shape[:2], len(bias)), np.float32)

        def work(rows: slice) -> None:
            np.matmul(pixels[rows], weight, out=made[rows])
            np.add(made[rows], bias, out=made[rows])

        self.workers.by_rows(len(made), work)
        return made

    def attended(self, query: Array, key: Array, value: Array) -> Array:
        """softmax(query key^T) value, in the queries' shape (h, w, C / 8); keys and values of any shape (..., C / 8)."""
        parts = (part.reshape(-1, part.shape[-1]) for part in (query, key, value))
        return attention.attention(self.workers, *parts).reshape(query.shape)

    def attention_output(self, y: Array, x: Array, out: Array) -> None:
        """Write W(y) + x into out: y (h, w, C / 8), x and out (h, w, C)."""
        weight, bias = (self.weights[f"attention.out.{part}"] for part in ("weight", "bias"))
        weight = weight[:, :, 0, 0].T

        def work(rows: slice) -> None:
            np.matmul(y[rows], weight, out=out[rows])
            np.add(out[rows], bias, out=out[rows])
            np.add(out[rows], x[rows], out=out[rows])

        self.workers.by_rows(len(y), work)

    def body_steps(
        self, group: int, x: PaddedMap, hidden: PaddedMap, features: PaddedMap, moments: StripMoments | None
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

    def tail_blocks(self, x: PaddedMap) -> Array:
        """The tail's result for features, as if there were no others: blocks of pixels (h, w, 3 s s)."""
        values = 3 * self.arch.scale**2
        done = self.map("pixels", x.height, x.width, values)
        self.run(Step(self.tail, x, done))
        made, count = done.pixels[..., :values], self.workers.count

        def finish(thread: int) -> None:
            for edge in self.border[thread::count]:
                edge.compute(x.array[: x.height + 2 * TAIL_HALO, : x.width + 2 * TAIL_HALO], made)

        self.workers.run(finish)
        return made

    def put_blocks(self, blocks: Array, picture: Array) -> None:
        """Shuffle blocks (h, w, 3 s s) into pixels (3, sh, sw)."""
        height, width, scale = *blocks.shape[:2], self.arch.scale
        target = picture.reshape(3, height, scale, width, scale).transpose(1, 3, 0, 2, 4)
        self.workers.by_rows(height, partial(copy_blocks, blocks, target))

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
                return [channels_first(pooled(part)) for part in self.keys_values(channels_last(x))]
            case "attend", (x, key, value):
                x, key, value = map(channels_last, (x, key, value))
                out = np.empty_like(x, order="C")
                self.attention_output(self.attended(self.queries(x), key, value), x, out)
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
                blocks = self.tail_blocks(self.filled("band", attended + first, TAPS))
                made = np.empty((3, blocks.shape[0] * self.arch.scale, blocks.shape[1] * self.arch.scale), np.float32)
                self.put_blocks(blocks, made)
                top, left, bottom, right = box.tolist()
                return [made[None, :, top:bottom, left:right]]
        raise ValueError(f"no stage {kind} of {len(inputs)} inputs")

    def gated(self, group: int, sigma: Array) -> Array:
        """The gate of a covariance, (C, C) -> (C,)."""
        out = aligned((whole_vectors(self.arch.channels),))
        moments = empty_moments(1, len(out))  # of one strip with one pixel, so that its scatter is the covariance
        moments[0, 0] = 1
        moments[0, 2:, : self.arch.channels][: self.arch.channels] = sigma
        self.gates[group](moments, out)
        return out[: self.arch.channels]

    def filled(self, name: str, x: Array, taps: int = 3) -> PaddedMap:
        """A map with the content of x (1, C, h, w), padded for a convolution with such taps."""
        height, width = x.shape[2:]
        made = self.map(name, height, width, taps=taps)
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
