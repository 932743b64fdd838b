"""SAN on NumPy and sanrt's CPU kernels; maps are (rows, columns, channels)."""

from __future__ import annotations

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
from sanrt.kernels.cpu.schedule import Program, Step, moments_of
from sanrt.kernels.cpu.soca import Gate, moments_rows
from sanrt.kernels.cpu.tail import REACH, TAPS, Tail, edges
from sanrt.kernels.cpu.winograd import Convolution, Map, Products, method_of, product_shape, whole_vectors
from sanrt.kernels.cpu.workers import Workers
from sanrt.model.contract import TAIL_HALO, Moments
from sanrt.model.spec import ModelSpec

BAND = 256
"""Rows of the trunk that are turned to pixels together."""
GATHER = 32
"""Rows whose moments are taken together."""
TURN = Lock()
"""One picture at a time in a process: each takes all threads, and the limit on NumPy's own is the whole process'."""


@dataclass(frozen=True)
class Trunk:
    """The maps of one size, and the programs that run over them: one for each group, one for the last skip connection."""

    first: Map
    """The head's features."""
    shared: Map
    """Of the first attention; afterwards times gamma."""
    x: Map
    features: Map
    gates: list[Array]
    moments: Array
    programs: list[Program]

    def fits(self, height: int, width: int) -> bool:
        return (self.x.height, self.x.width) == (height, width)


class Network:
    """The weights, the threads, and the maps that were used last, for another picture or tile of the same size."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Array], threads: int, products: Products) -> None:
        if products is Products.INT16 and not this_processor().pairs:
            raise BackendError("native has no int16 on this processor (on x86-64 it needs AVX-512BW); use --precision fp32")
        self.spec, self.arch, self.weights, self.products = spec, spec.architecture, weights, products
        # NumPy's own threads would fight with ours.
        self.one_thread = partial(ThreadpoolController().limit, limits=1, user_api="blas")
        self.maps: dict[str, Map] = {}
        conv = {name: self.convolution(name) for name in self.names()}
        self.head = conv["head"]
        self.blocks = [
            [tuple(conv[f"groups.{g}.blocks.{b}.conv{i}"] for i in (1, 2)) for b in range(self.arch.blocks)]
            for g in range(self.arch.groups)
        ]
        self.last = [conv[f"groups.{g}.conv"] for g in range(self.arch.groups)]
        self.gates = [self.gate(g) for g in range(self.arch.groups)]
        tail = Tail(weights, self.arch.channels)
        self.tail, self.edges = Convolution(*tail.composed(), products), list(edges(tail))
        parts = [weights[f"attention.{part}.weight"][:, :, 0, 0] for part in ("query", "key", "value")]
        self.inner = np.concatenate(parts).T.copy()
        self.inner_bias = np.concatenate([weights[f"attention.{part}.bias"] for part in ("query", "key", "value")])
        self.held: Trunk | None = None
        # Compiled now, so that every failure to compile is one to load.
        attention.kernels(self.arch.attention_channels)
        soca.kernels(whole_vectors(self.arch.channels))
        for outputs, taps in {(each.outputs, each.method.taps) for each in (*conv.values(), self.tail)}:
            schedule.kernels(products, product_shape(outputs)[0], taps)
        self.workers = Workers(threads)

    def names(self) -> list[str]:
        """The 3 x 3 convolutions before the network's end, in their order."""
        end = "upsampler.", "tail."
        return [
            n.removesuffix(".weight") for n, w in self.weights.items() if w.shape[2:] == (3, 3) and not n.startswith(end)
        ]

    def convolution(self, name: str) -> Convolution:
        """A convolution by its parameters' name."""
        return Convolution(self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.products)

    def run(self, *steps: Step) -> None:
        """Steps that are run once."""
        Program(list(steps), self.workers).run()

    def close(self) -> None:
        """End the threads and free the maps."""
        with TURN:
            self.workers.close()
            self.clear()

    def clear(self) -> None:
        """Free the maps."""
        self.held = None
        self.maps.clear()

    def map(self, name: str, height: int, width: int, channels: int | None = None, taps: int = 3) -> Map:
        """A map to write to, that a convolution of such taps reads; the last one of each name is kept."""
        held, channels = self.maps.get(name), channels or self.arch.channels
        if held is None or not held.holds(height, width, channels):
            self.maps.pop(name, None)
            held = self.maps[name] = Map.zeros(height, width, channels, method_of(self.products, taps))
        return held.shortened(height)

    def by_rows(self, count: int, work: Callable[[slice], object]) -> None:
        """work(rows) on every thread, each with its share of the rows."""
        threads = self.workers.count
        self.workers.run(lambda t: work(slice(count * t // threads, count * (t + 1) // threads)))

    # --- the whole picture ------------------------------------------------------------------------------------------

    def upscale(self, picture: Array, regions: int) -> Array:
        """(1, 3, H, W) float32 -> (1, 3, sH, sW), not clipped; with regions x regions of attention."""
        height, width = picture.shape[2:]
        with TURN, self.one_thread():
            trunk = self.held = self.held if self.held and self.held.fits(height, width) else self.trunk(height, width)
            self.first(picture, trunk.first)
            self.region_attention(trunk.first, trunk.shared, regions)
            self.by_rows(len(trunk.x.array), partial(self.begin, trunk))
            for group, steps in enumerate(trunk.programs):
                steps.run()
                if group < self.arch.groups:
                    self.gates[group](trunk.moments, trunk.gates[group])
            self.region_attention(trunk.x, trunk.features, regions)
            x, first = trunk.features.array, trunk.first.array
            self.by_rows(len(x), lambda rows: np.add(x[rows], first[rows], out=x[rows]))
            return self.pixels(trunk.features, Box(0, 0, height, width))

    def begin(self, trunk: Trunk, rows: slice) -> None:
        """x is what the groups share at first; then that is only needed times gamma."""
        trunk.x.array[rows] = trunk.shared.array[rows]
        trunk.shared.array[rows] *= self.weights["gamma"]

    def trunk(self, height: int, width: int) -> Trunk:
        """The maps and programs of a size."""
        self.held = None
        first, shared, x, hidden, features = (
            Map.zeros(height, width, self.arch.channels, method_of(self.products)) for _ in range(5)
        )
        gates = [aligned(first.array.shape[2:]) for _ in self.blocks]
        moments = moments_of(features, self.products)
        joins = [
            Step(last, features, x, added=x, also=shared, gate=gate) for last, gate in zip(self.last, gates, strict=True)
        ]
        bodies = [self.body_steps(group, x, hidden, features, moments) for group in range(self.arch.groups)]
        steps = [bodies[0], *([join, *body] for join, body in zip(joins[:-1], bodies[1:], strict=True)), joins[-1:]]
        programs = [Program(each, self.workers) for each in steps]
        return Trunk(first, shared, x, features, gates, moments, programs)

    def first(self, picture: Array, out: Map) -> None:
        """The head's features of a picture (1, 3, H, W)."""
        shifted = self.map("shifted", out.height, out.width, 3)
        weight, bias = (self.weights[f"mean_in.{part}"] for part in ("weight", "bias"))
        shifted.pixels[..., :3] = channels_last(picture) @ weight[:, :, 0, 0].T + bias
        self.run(Step(self.head, shifted, out))

    def region_attention(self, x: Map, out: Map, regions: int) -> None:
        """Every region attending to itself."""
        pixels = x.pixels[..., : self.arch.channels]
        query, key, value = self.projected(pixels)
        y = np.empty_like(query, order="C")
        for box in Box(0, 0, x.height, x.width).grid(regions, regions):
            cell = np.s_[box.top : box.bottom, box.left : box.right]
            y[cell] = self.attended(query[cell], pooled(key[cell]), pooled(value[cell]))
        self.restored(y, pixels, out.pixels[..., : self.arch.channels])

    def projected(self, region: Array) -> list[Array]:
        """theta(x), phi(x) and g(x) of (h, w, C): three of (h, w, C / 8)."""
        made = np.empty((*region.shape[:2], len(self.inner_bias)), np.float32)
        self.by_rows(len(made), lambda rows: np.add(region[rows] @ self.inner, self.inner_bias, out=made[rows]))
        return np.split(made, 3, axis=2)

    def attended(self, query: Array, key: Array, value: Array) -> Array:
        """softmax(query key^T) value, of the queries' shape (h, w, C / 8); keys and values of any shape (..., C / 8)."""
        parts = (part.reshape(-1, part.shape[-1]) for part in (query, key, value))
        return attention.attention(self.workers, *parts).reshape(query.shape)

    def restored(self, y: Array, x: Array, out: Array) -> None:
        """W(y) + x into out, of (h, w, C / 8) and (h, w, C)."""
        weight, bias = (self.weights[f"attention.out.{part}"] for part in ("weight", "bias"))
        weight = weight[:, :, 0, 0].T
        self.by_rows(len(y), lambda rows: np.add(y[rows] @ weight + bias, x[rows], out=out[rows]))

    def body_steps(self, group: int, x: Map, hidden: Map, features: Map, moments: Array | None) -> list[Step]:
        """The residual blocks of a group, from x into features."""
        steps = []
        for conv1, conv2 in self.blocks[group]:
            steps += [Step(conv1, x, hidden, relu=True), Step(conv2, hidden, features, added=x)]
            x = features
        steps[-1] = replace(steps[-1], moments=moments)
        return steps

    def moments(self, pixels: Array) -> Moments:
        """Mean and centred scatter over the pixels (h, w, C)."""
        channels, todo = self.arch.channels, iter(range(0, len(pixels), GATHER))
        found: dict[int, tuple[Array, Array, int]] = {}

        def work(_: int) -> None:
            for top in todo:
                found[top] = moments(pixels[top : top + GATHER, :, :channels])

        self.workers.run(work)
        total = Moments(np.zeros(channels), np.zeros((channels, channels)))
        for top in sorted(found):
            total.add(*found[top])
        return total

    def gate(self, group: int) -> Gate:
        """A group's channel attention."""
        prefix = f"groups.{group}.soca"
        parts = {part: self.weights[f"{prefix}.{part}.weight"][:, :, 0, 0] for part in ("down", "up")}
        bias = {part: self.weights[f"{prefix}.{part}.bias"] for part in ("down", "up")}
        down, up, up_bias = map(self.padded, (parts["down"], parts["up"].T, bias["up"]))
        return Gate(self.arch.channels, self.spec.iterations, down, bias["down"], up, up_bias)

    def padded(self, x: Array) -> Array:
        """(..., C) with zeros up to whole vectors."""
        made = aligned((*x.shape[:-1], whole_vectors(self.arch.channels)))
        made[..., : self.arch.channels] = x
        return made

    def pixels(self, trunk: Map, box: Box) -> Array:
        """The picture within a box of the trunk, band by band: (1, 3, sh, sw)."""
        scale, whole = self.arch.scale, Box(0, 0, trunk.height, trunk.width)
        made = np.empty((1, 3, box.height * scale, box.width * scale), np.float32)
        blocks = made.reshape(3, box.height, scale, box.width, scale).transpose(1, 3, 0, 2, 4)
        for band in box.grid(-(-box.height // BAND), 1):
            halo = band.grown(TAIL_HALO, whole)
            done, crop, place = self.enlarged(trunk, halo), band.inside(halo), band.inside(box)
            source, target = done[crop.top : crop.bottom, crop.left : crop.right], blocks[place.top : place.bottom]
            self.by_rows(crop.height, partial(copy_blocks, source, target))
        return made

    def enlarged(self, trunk: Map, box: Box) -> Array:
        """The trunk within a box, as if that were all of it, turned to blocks of pixels: (h, w, 3 s s)."""
        x = self.map("band", box.height, box.width, taps=TAPS)
        source = trunk.pixels[box.top : box.bottom, box.left : box.right]
        self.by_rows(x.height, lambda rows: np.copyto(x.pixels[rows], source[rows]))
        values = 3 * self.arch.scale**2
        done = self.map("pixels", x.height, x.width, values)
        self.run(Step(self.tail, x, done))
        made, count = done.pixels[..., :values], self.workers.count

        def finish(thread: int) -> None:
            for edge in self.edges[thread::count]:
                edge.compute(x.array[: x.height + 2 * REACH, : x.width + 2 * REACH], made)

        self.workers.run(finish)
        return made

    # --- stage by stage ---------------------------------------------------------------------------------------------

    def run_stage(self, stage: str, *inputs: npt.NDArray[Any]) -> list[Array]:
        """One stage of `sanrt.model.graph.stage_model`; maps are (1, C, h, w) there."""
        kind, _, number = stage.partition(".")
        with TURN, self.one_thread():
            self.held = None
            return [np.array(made, order="C") for made in self.stage(kind, int(number or 0), *inputs)]

    def stage(self, kind: str, group: int, *inputs: Any) -> list[Array]:
        """The same, its name taken apart."""
        match kind, inputs:
            case "head", (picture, box):
                first = self.map("x", *picture.shape[2:])
                self.first(picture, first)
                return [self.cropped(first, box)]
            case "keys-values", (x,):
                return [channels_first(pooled(part)) for part in self.projected(channels_last(x))[1:]]
            case "attend", (x, key, value):
                x, key, value = map(channels_last, (x, key, value))
                out = np.empty_like(x, order="C")
                self.restored(self.attended(self.projected(x)[0], key, value), x, out)
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
                gate = self.padded(gate[0, :, 0, 0])
                self.run(Step(self.last[group], self.filled("features", features), joined, gate=gate))
                return [self.cropped(joined, box) + x + self.weights["gamma"] * shared]
            case "tail", (attended, first, box):
                return [self.pixels(self.filled("x", attended + first), Box(*(box // self.arch.scale).tolist()))]
        raise ValueError(f"no stage {kind} of {len(inputs)} inputs")

    def gated(self, group: int, sigma: Array) -> Array:
        """The gate of a covariance, (C, C) -> (C,)."""
        out = aligned((whole_vectors(self.arch.channels),))
        moments = moments_rows(1, len(out))
        moments[0, 0] = 1
        moments[0, 2:, : self.arch.channels][: self.arch.channels] = sigma
        self.gates[group](moments, out)
        return out[: self.arch.channels]

    def filled(self, name: str, x: Array) -> Map:
        """A map that holds x (1, C, h, w)."""
        made = self.map(name, *x.shape[2:])
        made.pixels[..., : x.shape[1]] = channels_last(x)
        made.pixels[..., x.shape[1] :] = 0
        return made

    def cropped(self, x: Map, box: npt.NDArray[np.int64]) -> Array:
        """Part of a map as (1, C, h, w)."""
        top, left, bottom, right = box.tolist()
        return channels_first(x.pixels[top:bottom, left:right, : self.arch.channels])


def channels_last(x: Array) -> Array:
    """(1, C, h, w) -> (h, w, C)."""
    moved: Array = x[0].transpose(1, 2, 0)
    return moved


def channels_first(x: Array) -> Array:
    """(h, w, C) -> (1, C, h, w)."""
    return x.transpose(2, 0, 1)[None]


def copy_blocks(source: Array, target: Array, rows: slice) -> None:
    """Some rows of (h, w, 3 s s) into (h, w, 3, s, s), which is a picture's memory."""
    scale = target.shape[-1]
    values = source[rows].reshape(-1, source.shape[1], *target.shape[2:])
    for i in range(scale):
        for j in range(scale):
            target[rows, ..., i, j] = values[..., i, j]


def pooled(x: Array) -> Array:
    """Maxima of 2 x 2 pixels, an odd last row and column left out: (h, w, C) -> (h // 2, w // 2, C)."""
    height, width = (size // 2 * 2 for size in x.shape[:2])
    largest: Array = reduce(np.maximum, (x[i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)))
    return largest


def moments(pixels: Array) -> tuple[Array, Array, int]:
    """Mean (C,), centred scatter (C, C) and number of the pixels (h, w, C)."""
    rows = pixels.reshape(-1, pixels.shape[2])
    mean: Array = rows.mean(0)
    centred = rows - mean
    return mean, centred.T @ centred, len(rows)
