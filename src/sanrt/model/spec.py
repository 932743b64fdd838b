"""The numbers that describe a SAN: read off a checkpoint, written into an ONNX, kept beside an engine. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from sanrt.errors import ModelError, UsageError

SCALES = (2, 3, 4, 8)
MIN_SIDE = 4
"""Smallest height and width in pixels: each of the 2 x 2 regions pools its keys and values by 2."""

MAX_SQRT_ITERATIONS = 22
"""More Newton-Schulz steps than this raise float32's rounding of a rank-deficient covariance, such as a 4 x 4 picture's."""

MAX_REGIONS = 1000
"""Most k of the k x k attention regions that a person may ask for."""
MOST = 10_000
"""Blocks, regions a side or square-root steps beyond which a description is taken for damaged."""

PREFIX = "sanrt."
STAGE = PREFIX + "stage"
"""Metadata key of graphs that are one stage of the network: the stage's name."""
DESCRIPTION_DIGEST = PREFIX + "description_digest"
"""Metadata key: `description_digest` of all other `sanrt.*` entries."""
TENSORS_DIGEST = PREFIX + "tensors_digest"
"""Metadata key: SHA-256 of a graph's weights as they were written (`tensors_digest` in `sanrt.model.graph`)."""


class Precision(StrEnum):
    """Type of convolutions and attention; SOCA's statistics and square root are fp32 in all of them."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT16 = "int16"
    """16-bit integers in the convolutions' products, all else fp32; stages fp32. Only sanrt's own CPU kernels have it."""


GRAPH_PRECISIONS = (Precision.FP32, Precision.FP16, Precision.BF16)
"""The precisions that graphs and engines are written in."""


class QuantisedType(StrEnum):
    """8-bit types of quantised convolutions: their inputs and weights; sums and biases are wider."""

    INT8 = "int8"
    FP8 = "fp8"
    """e4m3: four bits of exponent, three of mantissa, largest magnitude 448."""


def parse_scale(value: object) -> int:
    """A scale that SAN has, from any whole number, NumPy's included; UsageError names those that there are."""
    try:
        scale = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        scale = -1
    if scale not in SCALES:
        raise UsageError(f"scale {value}: expected {', '.join(map(str, SCALES))}")
    return scale


def parse_precision(name: str) -> Precision:
    """The precision of that name; UsageError names those that there are, and what makes a model in 8 bits."""
    if name in tuple(Precision):
        return Precision(name)
    made = f" `sanrt build --{name}` makes a model that computes in it;" if name in tuple(QuantisedType) else ""
    raise UsageError(f"precision {name!r}:{made} expected {', '.join(Precision)}")


@dataclass(frozen=True)
class Quantisation:
    """Which convolutions compute in 8 bits, and their ranges: the largest magnitudes represented, larger ones saturate."""

    type: QuantisedType
    ranges: Mapping[str, float]
    """Convolution -> its input's; symmetric, so zero stays zero."""
    outputs: Mapping[str, float]
    """Convolution -> its output's, for backends whose convolutions put out 8 bits (`GraphOptions.requantised`)."""


class Attention(StrEnum):
    """The operators that softmax(q k^T) v is written in."""

    MATMUL = "matmul"
    """MatMul, Softmax, MatMul on 4-D tensors: standard operators, and the form that TensorRT fuses."""
    MULTI_HEAD = "multi-head"
    """ONNX Runtime's com.microsoft.MultiHeadAttention, which forms no L x L matrix."""


class PixelLayout(StrEnum):
    """How an exported graph takes and gives pictures."""

    FLOAT_NCHW = "float32-nchw"
    """float32 (B, 3, H, W), 0..value_range; not clipped where it comes out."""
    UINT8_NHWC = "uint8-nhwc"
    """uint8 (B, H, W, 3); clipped and rounded to the nearest byte where it comes out."""


@dataclass(frozen=True)
class GraphOptions:
    """A variant of the graph; the defaults are what `sanrt export` writes."""

    precision: Precision = Precision.FP32
    attention: Attention = Attention.MATMUL
    attention_width: int = 0
    """Pad the inner attention channels with zeros to at least this (TensorRT fuses from 16)."""
    regions: int = 2
    kernels: bool = False
    """SOCA by sanrt's own CUDA kernels: nodes that only TensorRT with `sanrt.kernels.cuda.plugins` understands."""
    requantised: bool = False
    """int8 in ONNX Runtime's form: unsigned, the outputs rounded too; only between such does it convolve in 8 bits."""
    stage: str = ""
    """One stage of the network, for exact streaming (`stage_model` in `sanrt.model.graph`); empty is the whole network."""


@dataclass(frozen=True)
class Architecture:
    """SAN's hyper-parameters (section 4 of the paper; its network is G=20, m=10, C=64, r=16)."""

    scale: int
    """Upscaling factor: 2, 3, 4 or 8."""
    groups: int
    """G, the number of local-source residual attention groups (LSRAG)."""
    blocks: int
    """m, the residual blocks of each group."""
    channels: int
    """C, the feature channels."""
    reduction: int
    """r, by which SOCA's hidden layer is narrower than C."""
    value_range: float = 255.0
    """Pixels run from 0 to this, in and out."""
    sqrt_iterations: int | None = 5
    """Newton-Schulz steps of SOCA's square root as trained; None is the exact root (eigendecomposition)."""

    def __post_init__(self) -> None:
        """Raise UsageError for numbers that no network has."""
        counts = (self.scale, self.groups, self.blocks, self.channels, self.reduction)
        if any(type(count) is not int for count in counts) or self.scale not in SCALES:
            raise UsageError(f"scale {self.scale}; expected {', '.join(map(str, SCALES))}, and whole numbers for the rest")
        if min(self.groups, self.blocks) < 1 or self.groups * self.blocks > MOST:
            raise UsageError(f"{self.groups} groups of {self.blocks} blocks; expected 1 to {MOST} blocks in all")
        if self.channels < 1 or self.channels % 8 or not 1 <= self.reduction <= self.channels:
            raise UsageError(
                f"{self.channels} channels, in SOCA reduced by {self.reduction}; expected a multiple of 8, and 1 or more"
            )
        steps = self.sqrt_iterations
        if steps is not None and (type(steps) is not int or not 0 < steps <= MOST):
            raise UsageError(f"{steps!r} square-root steps; expected 1 to {MOST}, or None for the exact root")
        if type(self.value_range) not in (int, float) or not 0 < self.value_range < math.inf:
            raise UsageError(f"pixels of 0..{self.value_range!r}; expected a number above 0")

    @property
    def attention_channels(self) -> int:
        """Inner channels of the region-level non-local module (C/8)."""
        return self.channels // 8

    @property
    def gate_channels(self) -> int:
        """Inner channels of SOCA's gate: C/r, rounded down, so that several r name the same network."""
        return self.channels // self.reduction

    @property
    def body_halo(self) -> int:
        """Pixels to each side that a group's features depend on: one for each of the blocks' 3 x 3 convolutions."""
        return 2 * self.blocks

    @property
    def upsampling(self) -> tuple[int, ...]:
        """Factors of the sub-pixel convolutions, in order: one of 3 for x3, else one of 2 for every doubling."""
        return (3,) if self.scale == 3 else (2,) * (self.scale.bit_length() - 1)

    @property
    def stages(self) -> tuple[str, ...]:
        """Every stage of the network, as exact streaming runs it."""
        grouped = [f"{kind}.{g}" for g in range(self.groups) for kind in ("body", "gate", "join")]
        return "head", "keys-values", "attend", *grouped, "tail"

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the reference network's `state_dict`, in no particular order."""
        c, inner, hidden = self.channels, self.attention_channels, self.gate_channels

        def conv(name: str, inputs: int, outputs: int, kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
            yield f"{name}.weight", (outputs, inputs, kernel, kernel)
            yield f"{name}.bias", (outputs,)

        yield from conv("mean_in", 3, 3, 1)
        yield from conv("head", 3, c, 3)
        for part in ("query", "key", "value"):
            yield from conv(f"attention.{part}", c, inner, 1)
        yield from conv("attention.out", inner, c, 1)
        yield "gamma", (1,)
        for g in range(self.groups):
            for b in range(self.blocks):
                yield from conv(f"groups.{g}.blocks.{b}.conv1", c, c, 3)
                yield from conv(f"groups.{g}.blocks.{b}.conv2", c, c, 3)
            yield from conv(f"groups.{g}.soca.down", c, hidden, 1)
            yield from conv(f"groups.{g}.soca.up", hidden, c, 1)
            yield from conv(f"groups.{g}.conv", c, c, 3)
        for layer, factor in enumerate(self.upsampling):
            yield from conv(f"upsampler.{2 * layer}", c, c * factor**2, 3)
        yield from conv("tail", c, 3, 3)
        yield from conv("mean_out", 3, 3, 1)

    @property
    def name(self) -> str:
        """Short name for people, such as `SAN x4 (G=4 m=4 C=64 r=16)`."""
        return f"SAN x{self.scale} (G={self.groups} m={self.blocks} C={self.channels} r={self.reduction})"


@dataclass(frozen=True)
class ModelSpec:
    """Everything a runtime needs to know of an exported model; written by `export`, never guessed."""

    architecture: Architecture
    weights_digest: str
    """SHA-256 of the checkpoint file."""
    weights_origin: str
    """The checkpoint's own description of its origin."""
    iterations: int
    """Newton-Schulz steps in the graph."""
    precision: Precision = Precision.FP32
    """Type of convolutions and attention; SOCA's root is always fp32."""
    regions: int = 2
    """k: attention works within k x k regions of the picture."""
    min_side: int = MIN_SIDE
    """Smallest height and width that the graph takes; pad smaller pictures and crop."""
    multiple: int = 1
    """Height and width must be multiples of this."""
    version: str = ""
    """The sanrt that wrote it."""
    quantisation: Quantisation | None = None
    """Convolutions in 8 bits, in every graph written for this model; the others are in `precision`."""
    layout: PixelLayout = PixelLayout.FLOAT_NCHW
    """How the exported file's own graph takes pictures; backends run its weights in graphs of float32."""
    shape: tuple[int, int, int] | None = None
    """Batch, height and width that the exported file's own graph is fixed to; None leaves them open."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """The measurements made at export (parity, square root, quantisation); `sanrt info` shows them."""

    @property
    def open(self) -> ModelSpec:
        """The same network with float32 pictures of any size, as the graphs that backends run take them."""
        return replace(self, layout=PixelLayout.FLOAT_NCHW, shape=None)

    @property
    def coarsest(self) -> Precision | QuantisedType:
        """The coarsest type that the network computes in, by which its outputs are judged."""
        return self.quantisation.type if self.quantisation else self.precision

    @property
    def computes(self) -> str:
        """The types that it computes in, for people: `fp32`, `int8 + fp16`."""
        return f"{self.quantisation.type} + {self.precision}" if self.quantisation else str(self.precision)

    def to_metadata(self) -> dict[str, str]:
        """Flat strings for ONNX `metadata_props`: every key begins with `sanrt.`, every value is JSON."""
        return {PREFIX + name: json.dumps(value) for name, value in asdict(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], subject: str) -> ModelSpec:
        """Read what `to_metadata` wrote; `subject` names the file in errors."""
        if PREFIX + "architecture" not in metadata:
            raise ModelError(
                f"{subject}: not a sanrt model (it has no sanrt.* metadata); make one with `sanrt export --scale 4`"
            )
        try:
            known = {f.name: json.loads(metadata[PREFIX + f.name]) for f in fields(cls) if PREFIX + f.name in metadata}
            known["architecture"] = Architecture(**known["architecture"])
            known["precision"] = Precision(known.get("precision", Precision.FP32))
            known["layout"] = PixelLayout(known.get("layout", PixelLayout.FLOAT_NCHW))
            known["shape"] = tuple(known["shape"]) if known.get("shape") else None
            if quantised := known.get("quantisation"):
                known["quantisation"] = Quantisation(
                    QuantisedType(quantised["type"]), quantised["ranges"], quantised["outputs"]
                )
            spec = cls(**known)
            require_sensible(spec)
            return spec
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError, UsageError) as error:
            raise ModelError(
                f"{subject}: its sanrt.* metadata cannot be read ({error}); export it again with `sanrt export`"
            ) from error


def require_sensible(spec: ModelSpec) -> None:
    """Raise ValueError for a description that no network fits: types, ranges and multiples that `export` never writes."""
    quantised = spec.quantisation
    if any(type(count) is not int or count < 1 for count in (spec.regions, spec.min_side, spec.multiple)):
        raise ValueError("regions or sides that no network has")
    if spec.regions > MOST:
        raise ValueError(f"{spec.regions} x {spec.regions} regions")
    if type(spec.iterations) is not int or not 0 <= spec.iterations <= MOST:
        raise ValueError(f"{spec.iterations} square-root steps in the graph")
    sides = spec.shape or (1, spec.min_side, spec.min_side)
    if len(sides) != 3 or any(type(side) is not int or side < 1 for side in sides) or min(sides[1:]) < spec.min_side:
        raise ValueError(f"a fixed shape of {sides}")
    words = (spec.weights_digest, spec.weights_origin, spec.version)
    if not all(isinstance(text, str) for text in words) or not isinstance(spec.report, Mapping):
        raise ValueError("texts or a report of another kind")
    largest = [*quantised.ranges.values(), *quantised.outputs.values()] if quantised else []
    if quantised and not quantised.ranges.keys() <= quantised.outputs.keys():
        raise ValueError("8-bit convolutions without the ranges of their outputs")
    if not all(type(each) in (int, float) and 0 <= each < math.inf for each in largest):
        raise ValueError("ranges of 8-bit convolutions that are no numbers")


def description_digest(metadata: Mapping[str, str]) -> str:
    """SHA-256 of the `sanrt.*` entries of a file's metadata, this digest itself left out; it shows that one was edited."""
    entries = sorted(item for item in metadata.items() if item[0].startswith(PREFIX) and item[0] != DESCRIPTION_DIGEST)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
