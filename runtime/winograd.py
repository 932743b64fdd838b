"""SAN on NumPy and sanrt's CPU kernels; maps are (rows, columns, channels)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial, reduce
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from sanrt.kernels.attention_cpu import attention, kernels
from sanrt.kernels.threads import Workers
from sanrt.kernels.winograd import Convolution, Map
from sanrt.model.spec import ModelSpec
from sanrt.runtime.featuremaps import Box
from sanrt.runtime.streaming import TAIL_HALO, Moments

Array = npt.NDArray[np.float32]

MIN_TRACE = 1e-10
"""As in `sanrt.model.soca`: below this a covariance counts as zero."""
BAND = 64
"""Rows of the trunk that are upscaled together: the large maps behind them are never whole in memory."""
GATHER = 32
"""Rows whose moments are taken together."""
TURN = Lock()
"""One picture at a time in a process: each takes all threads, and the limit on NumPy's own is the whole process'."""


class Network:
    """The weights, the threads, and the maps that were used last, for another picture or tile of the same size."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Array], threads: int) -> None:
        self.spec, self.arch, self.weights = spec, spec.architecture, weights
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
        self.upsamplers = [conv[name] for name in conv if name.startswith("upsampler")]
        self.tail = self.tail_to_pixels()
        parts = [weights[f"attention.{part}.weight"][:, :, 0, 0] for part in ("query", "key", "value")]
        self.inner = np.concatenate(parts).T.copy()
        self.inner_bias = np.concatenate([weights[f"attention.{part}.bias"] for part in ("query", "key", "value")])
        kernels(self.arch.attention_channels)  # compiled now, so that every failure to compile is one to load
        self.workers = Workers(threads)

    def names(self) -> list[str]:
        """The 3 x 3 convolutions in their order, but for the tail."""
        return [n.removesuffix(".weight") for n, w in self.weights.items() if w.shape[2:] == (3, 3) and n != "tail.weight"]

    def convolution(self, name: str) -> Convolution:
        """A convolution by its parameters' name."""
        weight = self.weights[f"{name}.weight"]
        shuffle = round((len(weight) / self.arch.channels) ** 0.5) if name.startswith("upsampler") else 1
        return Convolution(weight, self.weights[f"{name}.bias"], shuffle)

    def tail_to_pixels(self) -> Convolution:
        """The last convolution with the mean shift behind it folded in."""
        shift = self.weights["mean_out.weight"][:, :, 0, 0].astype(np.float64)
        weight = np.einsum("po,ocij->pcij", shift, self.weights["tail.weight"])
        bias = shift @ self.weights["tail.bias"] + self.weights["mean_out.bias"]
        return Convolution(weight.astype(np.float32), bias.astype(np.float32))

    def close(self) -> None:
        """End the threads and free the maps."""
        with TURN:
            self.workers.close()
            self.maps.clear()

    def map(self, name: str, height: int, width: int, channels: int | None = None) -> Map:
        """A map to write to; the last one of each name is kept."""
        held, channels = self.maps.get(name), channels or self.arch.channels
        if held is None or not held.fits(height, width, channels):
            self.maps.pop(name, None)
            held = self.maps[name] = Map.zeros(height, width, channels)
        return held

    # --- the whole picture ------------------------------------------------------------------------------------------

    def upscale(self, picture: Array) -> Array:
        """(1, 3, H, W) float32 -> (1, 3, sH, sW), not clipped."""
        height, width = picture.shape[2:]
        with TURN, self.one_thread():
            first, shared, x, features = (self.map(n, height, width) for n in ("first", "shared", "x", "features"))
            self.first(picture, first)
            self.region_attention(first, shared)
            x.array[:] = shared.array
            for g in range(self.arch.groups):
                self.body(g, x, features)
                gate = self.gate(g, self.moments(features.pixels).covariance[0])
                self.join(g, features, gate, x, shared)
            self.region_attention(x, features)
            np.add(features.array, first.array, out=features.array)
            return self.pixels(features, Box(0, 0, height, width))

    def first(self, picture: Array, out: Map) -> None:
        """The head's features of a picture (1, 3, H, W)."""
        shifted = self.map("shifted", out.height, out.width, 3)
        weight, bias = (self.weights[f"mean_in.{part}"] for part in ("weight", "bias"))
        shifted.pixels[..., :3] = picture[0].transpose(1, 2, 0) @ weight[:, :, 0, 0].T + bias
        self.head(self.workers, shifted, out)

    def region_attention(self, x: Map, out: Map) -> None:
        """Every region attending to itself."""
        for box in Box(0, 0, x.height, x.width).grid(self.spec.regions, self.spec.regions):
            cell = np.s_[box.top : box.bottom, box.left : box.right]
            region = x.pixels[cell][..., : self.arch.channels]
            query, key, value = self.projected(region)
            out.pixels[cell][..., : self.arch.channels] = self.attended(region, query, pooled(key), pooled(value))

    def projected(self, region: Array) -> list[Array]:
        """theta(x), phi(x) and g(x) of (h, w, C): three of (h, w, C / 8)."""
        return np.split(region @ self.inner + self.inner_bias, 3, axis=2)

    def attended(self, x: Array, query: Array, key: Array, value: Array) -> Array:
        """W(softmax(query key^T) value) + x; keys and values of any shape (..., C / 8)."""
        inner = self.arch.attention_channels
        y = attention(self.workers, query.reshape(-1, inner), key.reshape(-1, inner), value.reshape(-1, inner))
        weight, bias = (self.weights[f"attention.out.{part}"] for part in ("weight", "bias"))
        y = y @ weight[:, :, 0, 0].T + bias
        done: Array = y.reshape(x.shape) + x
        return done

    def body(self, group: int, x: Map, features: Map) -> None:
        """The residual blocks of a group, from x into features."""
        hidden = self.map("hidden", x.height, x.width)
        for conv1, conv2 in self.blocks[group]:
            conv1(self.workers, x, hidden, relu=True)
            conv2(self.workers, hidden, features, add=x)
            x = features

    def moments(self, pixels: Array) -> Moments:
        """Mean and centred scatter over the pixels (h, w, C)."""
        channels, todo = self.arch.channels, iter(range(0, len(pixels), GATHER))
        found: dict[int, tuple[Array, Array, int]] = {}

        def work() -> None:
            for top in todo:
                found[top] = moments(pixels[top : top + GATHER, :, :channels])

        self.workers.run(work)
        total = Moments(np.zeros(channels), np.zeros((channels, channels)))
        for top in sorted(found):
            total.add(*found[top])
        return total

    def gate(self, group: int, sigma: Array) -> Array:
        """sigmoid(W_U relu(W_D z)), z the row means of Sigma^(1/2): (C, C) -> (C,)."""
        z = newton_schulz_sqrt(sigma, self.spec.iterations).mean(1)
        prefix = f"groups.{group}.soca"
        down, up = (self.weights[f"{prefix}.{part}.weight"][:, :, 0, 0] for part in ("down", "up"))
        hidden = np.maximum(down @ z + self.weights[f"{prefix}.down.bias"], 0)
        with np.errstate(over="ignore"):
            gate: Array = 1 / (1 + np.exp(-(up @ hidden + self.weights[f"{prefix}.up.bias"])))
        return gate

    def join(self, group: int, features: Map, gate: Array, x: Map, shared: Map) -> None:
        """The gated last convolution and both skip connections, into x."""
        skip, gamma = self.map("skip", x.height, x.width).array, self.weights["gamma"]

        np.add(x.array, np.multiply(shared.array, gamma, out=skip), out=x.array)
        self.last[group](self.workers, features, x, add=x, gate=gate)

    def pixels(self, trunk: Map, box: Box) -> Array:
        """The picture within a box of the trunk, band by band: (1, 3, sh, sw)."""
        scale, whole = self.arch.scale, Box(0, 0, trunk.height, trunk.width)
        parts = []
        for band in box.grid(-(-box.height // BAND), 1):
            halo = band.grown(TAIL_HALO, whole)
            x = self.map("band", halo.height, halo.width)
            x.pixels[:] = trunk.pixels[halo.top : halo.bottom, halo.left : halo.right]
            done, crop = self.upscaled(x), band.inside(halo).scaled(scale)
            parts.append(np.ascontiguousarray(channels_first(done[crop.top : crop.bottom, crop.left : crop.right])))
        return np.concatenate(parts, axis=2)

    def upscaled(self, x: Map) -> Array:
        """All pixels (sh, sw, 3) of a band of the trunk."""
        for i, upsampler in enumerate(self.upsamplers):
            larger = self.map(f"larger{i}", x.height * upsampler.shuffle, x.width * upsampler.shuffle)
            upsampler(self.workers, x, larger)
            x = larger
        done = self.map("pixels", x.height, x.width, 3)
        self.tail(self.workers, x, done)
        return done.pixels[..., :3]

    # --- stage by stage ---------------------------------------------------------------------------------------------

    def run_stage(self, stage: str, *inputs: npt.NDArray[Any]) -> list[Array]:
        """One stage of `sanrt.model.graph.stage_model`; maps are (1, C, h, w) there."""
        kind, _, number = stage.partition(".")
        with TURN, self.one_thread():
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
                return [channels_first(self.attended(x, self.projected(x)[0], key, value))]
            case "body", (x, box):
                features = self.map("features", *x.shape[2:])
                self.body(group, self.filled("x", x), features)
                part = self.cropped(features, box)
                found = self.moments(channels_last(part))
                return [part, found.mean.astype(np.float32)[None, :, None], found.scatter.astype(np.float32)[None]]
            case "gate", (sigma,):
                return [self.gate(group, sigma[0])[None, :, None, None]]
            case "join", (features, gate, x, shared, box):
                out = self.map("x", *features.shape[2:])
                self.last[group](self.workers, self.filled("features", features), out, gate=gate[0, :, 0, 0])
                return [self.cropped(out, box) + x + self.weights["gamma"] * shared]
            case "tail", (attended, first, box):
                return [self.pixels(self.filled("x", attended + first), Box(*(box // self.arch.scale).tolist()))]
        raise ValueError(f"no stage {kind} of {len(inputs)} inputs")

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


def newton_schulz_sqrt(sigma: Array, iterations: int) -> Array:
    """Square root by coupled Newton-Schulz steps (formulas 8 to 10): (C, C) float32."""
    eye = np.eye(len(sigma), dtype=np.float32)
    trace = max(sigma.trace(), np.float32(MIN_TRACE))
    y, z = sigma / trace, eye
    for _ in range(iterations):
        half = 1.5 * eye - 0.5 * (z @ y)
        y, z = y @ half, half @ z
    root: Array = (y * np.sqrt(trace)).astype(np.float32)
    return root
