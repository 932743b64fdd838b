"""Sizes of pictures and tiles that an engine is built for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from sanrt.errors import UsageError
from sanrt.model.spec import ModelSpec, Precision


class Size(NamedTuple):
    """Pictures per batch, and their height and width in pixels."""

    batch: int
    height: int
    width: int

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """NCHW, RGB."""
        return self.batch, 3, self.height, self.width

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read `1x180x320`; raises UsageError for anything else."""
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
            raise UsageError(f"size {text!r}: expected BATCHxHEIGHTxWIDTH, positive whole numbers such as 1x180x320")
        return cls(*map(int, parts))


SMALLEST, USUAL, LARGEST = Size(1, 4, 4), Size(1, 180, 320), Size(1, 1080, 1920)
"""The sizes of a profile that says nothing else; `default_profile` may have a smaller largest one."""

LARGEST_SIZES = LARGEST, Size(1, 720, 1280), Size(1, 540, 960), Size(1, 360, 640)
"""Largest sizes of default profiles, for networks that take more and more memory."""
DEFAULT_BYTES = 3 * 2**30
"""Activations of a default profile's largest size: two pictures at once then fit a GPU of 8 GiB."""


@dataclass(frozen=True)
class Profile:
    """The sizes one optimisation profile takes: from `min` to `max`, fastest at `opt`."""

    min: Size = SMALLEST
    opt: Size = USUAL
    max: Size = LARGEST

    def __post_init__(self) -> None:
        if any(not low <= best <= high for low, best, high in zip(self.min, self.opt, self.max, strict=True)):
            raise UsageError(f"profile {self}: expected min <= opt <= max in batch, height and width")

    def __str__(self) -> str:
        return f"{self.min} .. {self.opt} .. {self.max}"

    def takes(self, size: Size) -> bool:
        """Whether pictures of this size are within the profile."""
        return all(low <= n <= high for low, n, high in zip(self.min, size, self.max, strict=True))

    def distance(self, size: Size) -> float:
        """How far the size is from the one that the profile is tuned for, as a ratio of pixels (1 is none)."""
        ratio = (size.batch * size.height * size.width) / (self.opt.batch * self.opt.height * self.opt.width)
        return max(ratio, 1 / ratio)


def activation_estimate(spec: ModelSpec, size: Size) -> int:
    """An upper estimate of a network's activations in an engine of the spec's precision, bytes.

    Between body and tail eleven maps of C channels and two of the tail's C * s^2 are held: 43 C values of two bytes a pixel
    at x4 in fp16, where TensorRT-RTX 1.7 states 39 to 42, and at x2 and x3 a few less. bf16 graphs end in fp32, and 8-bit
    convolutions put out fp32: a third map of the tail. Of maps of more than 2^31 values TensorRT holds fewer. In fp32
    attention is not fused, and its scores come on top.
    """
    arch, large, small = spec.architecture, 2, 11
    if spec.quantisation or spec.precision == Precision.BF16:
        large, small = 3, 12
    values = arch.channels * (large * arch.scale**2 + small)
    return values * (4 if spec.precision == Precision.FP32 else 2) * size.batch * size.height * size.width


def default_profile(spec: ModelSpec) -> Profile:
    """The profile of an engine for which no sizes were named: single pictures, as large as common GPUs can hold."""
    fits = (size for size in LARGEST_SIZES if activation_estimate(spec, size) <= DEFAULT_BYTES)
    return Profile(max=next(fits, LARGEST_SIZES[-1]))


TILES = Profile(Size(1, 1, 1), Size(1, 256, 256), Size(1, 512, 512))
"""The default tiles of stage engines, without their halo."""


MAX_KEYS = 2**18
"""Most keys of one region in a stage engine; a region has a quarter as many keys as pixels."""


@dataclass(frozen=True)
class Limits:
    """The sizes that a backend takes, where they were settled when it was built."""

    profiles: tuple[Profile, ...] = ()
    """Sizes of whole pictures; none where any will do."""
    tiles: Profile | None = None
    """Sizes of its stages' tiles, without their halo; None where any will do, or there are no stages."""
    activations: Callable[[Size], int] | None = None
    """About the bytes that whole pictures of a size take; None where that is not known of this backend."""

    def take(self, height: int, width: int) -> bool:
        """Whether a whole picture may have this size."""
        return not self.profiles or any(profile.takes(Size(1, height, width)) for profile in self.profiles)

    @property
    def side(self) -> int | None:
        """Side of the largest square picture; None where any will do."""
        return max((min(profile.max[1:]) for profile in self.profiles), default=None)

    @property
    def tile(self) -> int | None:
        """Side of the largest tile of its stages."""
        return min(self.tiles.max[1:]) if self.tiles else None

    @property
    def keys(self) -> int | None:
        """Most keys of a region in its stages; None where any number will do."""
        return MAX_KEYS if self.tiles else None

    def __str__(self) -> str:
        return ", ".join(f"{p.min.width} x {p.min.height} to {p.max.width} x {p.max.height}" for p in self.profiles)
