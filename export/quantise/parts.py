"""The parts of a network that may compute in 8 bits: which there are, and which convolutions form each."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from sanrt.errors import UsageError
from sanrt.model.spec import Architecture, Quantisation


def quantisable_parts(arch: Architecture) -> list[str]:
    """Names of the residual blocks, the convolutions that end groups, and the upsampling ones, in the network's order."""
    groups = [
        name
        for group in range(arch.groups)
        for name in (*(f"groups.{group}.blocks.{block}" for block in range(arch.blocks)), f"groups.{group}.conv")
    ]
    return [*groups, *(f"upsampler.{2 * layer}" for layer in range(len(arch.upsampling)))]


def convolutions_of(part: str) -> list[str]:
    """Names of a part's convolutions; a residual block has two, every other part is one."""
    return [f"{part}.conv1", f"{part}.conv2"] if ".blocks." in part else [part]


def matching_parts(parts: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The parts that match any of the shell-style patterns; raises UsageError for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(part, pattern) for part in parts):
            raise UsageError(f"{pattern!r}: no such part; expected a name or pattern among {parts[0]} .. {parts[-1]}")
    return [part for part in parts if any(fnmatchcase(part, pattern) for pattern in patterns)]


def restricted_to(quantisation: Quantisation, parts: Sequence[str]) -> Quantisation:
    """A quantisation with the ranges of these parts' convolutions only."""
    names = [name for part in parts for name in convolutions_of(part)]
    inputs, outputs = ({name: known[name] for name in names} for known in (quantisation.ranges, quantisation.outputs))
    return Quantisation(quantisation.type, inputs, outputs)
