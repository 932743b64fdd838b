"""Weights files: the official SAN checkpoints (`.pt`) and sanrt's own (`.safetensors`), both loaded strictly."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sanrt.errors import CheckpointError, first_line
from sanrt.files import write_whole
from sanrt.model.bundled import bundled_checkpoint as bundled_checkpoint
from sanrt.model.san import SAN
from sanrt.model.spec import SCALES, Architecture

OFFICIAL_NAMES = (
    (r"sub_mean\.", "mean_in."),
    (r"add_mean\.", "mean_out."),
    (r"head\.0\.", "head."),
    (r"tail\.0\.", "upsampler."),
    (r"tail\.1\.", "tail."),
    (r"non_local\.non_local\.theta\.", "attention.query."),
    (r"non_local\.non_local\.phi\.0\.", "attention.key."),
    (r"non_local\.non_local\.g\.0\.", "attention.value."),
    (r"non_local\.non_local\.W\.", "attention.out."),
    (r"RG\.(\d+)\.rcab\.(\d+)\.conv_first\.0\.", r"groups.\1.blocks.\2.conv1."),
    (r"RG\.(\d+)\.rcab\.(\d+)\.conv_first\.2\.", r"groups.\1.blocks.\2.conv2."),
    (r"RG\.(\d+)\.soca\.conv_du\.0\.", r"groups.\1.soca.down."),
    (r"RG\.(\d+)\.soca\.conv_du\.2\.", r"groups.\1.soca.up."),
    (r"RG\.(\d+)\.conv_last\.", r"groups.\1.conv."),
    (r"gamma$", "gamma"),
)
"""The official files' parameter names (patterns, matched from the start) and ours."""

OFFICIAL_UNUSED = re.compile(r"conv_last\.|non_local\.soca\.|RG\.\d+\.gamma$")
"""Tensors of the official files that the official forward pass never reads."""

GENUINE = {
    "9f63f0f060a9f6885118541939ed2ce290cd0f124a5e60dabe6805491322e64d": "the official SAN x4 (BI degradation) weights",
}
"""SHA-256 of published files that sanrt can vouch for."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded weights file."""

    path: Path
    architecture: Architecture
    tensors: Mapping[str, Tensor]
    """float32, by our names."""
    digest: str
    """SHA-256 of the file."""
    origin: str
    """The file's own description of its origin."""

    def network(self) -> SAN:
        """The network with these weights, in evaluation mode on the CPU, float32."""
        net = SAN(self.architecture)
        net.load_state_dict(dict(self.tensors))
        return net.eval().requires_grad_(False)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read an official `.pt` or a sanrt `.safetensors`; architecture and scale are read off the tensors.

    Raises CheckpointError when the file cannot be read, is no SAN, or holds unknown, missing, misshapen or infinite tensors.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); expected a SAN checkpoint") from error
    digest = hashlib.sha256(data).hexdigest()
    if data[8:9] == b"{":
        tensors, settings = read_safetensors(path)
        origin = str(settings.get("origin", "a sanrt checkpoint"))
    else:
        tensors, settings = ours_from_official(path, read_pickle(path)), {}
        origin = GENUINE.get(digest, "a checkpoint in the official SAN format (not one whose digest sanrt knows)")
    arch = architecture_of(path, tensors, settings)
    check_shapes(path, tensors, arch)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity, expected numbers; its training diverged")
    return Checkpoint(path, arch, tensors, digest, origin)


def save_checkpoint(path: Path, net: SAN, origin: str, dtype: torch.dtype = torch.float16) -> None:
    """Write a network as sanrt safetensors; raises CheckpointError if `dtype` cannot hold a weight, or FileError."""
    tensors = {name: t.detach().to(dtype).contiguous() for name, t in net.state_dict().items()}
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise CheckpointError(f"{path}: {name} does not fit {dtype}; save it as torch.float32")
    arch = net.arch
    settings = {"value_range": arch.value_range, "sqrt_iterations": arch.sqrt_iterations, "origin": origin}
    write_whole(path, save(tensors, {"sanrt": json.dumps(settings)}))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """float32 tensors by our names, and the settings that no tensor's shape tells."""
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("sanrt", "{}"))
            if not isinstance(settings, dict):
                raise ValueError(f"its settings are {settings!r}")
            return {name: file.get_tensor(name).float() for name in file.keys()}, settings  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged safetensors file ({first_line(error)}); copy or download it again"
        ) from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file; nothing in it is ever executed."""
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, with pages of text, for a file that is none of its own
        raise CheckpointError(
            f"{path}: not a torch weights file, or one that holds more than tensors; "
            "expected an official SAN .pt or a sanrt .safetensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{path}: holds {type(state).__name__}, expected a dictionary of tensors (a state_dict)")
    return {str(name): t.float() for name, t in state.items()}


def ours_from_official(path: Path, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename by OFFICIAL_NAMES, drop OFFICIAL_UNUSED, refuse anything else."""
    tensors = {}
    for name, tensor in official.items():
        for pattern, ours in OFFICIAL_NAMES:
            renamed, hits = re.subn(f"^{pattern}", ours, name)
            if hits:
                tensors[renamed] = tensor
                break
        else:
            if not OFFICIAL_UNUSED.match(name):
                raise CheckpointError(
                    f"{path}: unknown tensor {name} {list(tensor.shape)}; expected an official SAN checkpoint"
                )
    return tensors


def architecture_of(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Architecture:
    """Scale, G, m, C and r from the tensors' names and shapes; the rest from the file's settings."""
    for name in ("head.weight", "groups.0.blocks.0.conv1.weight", "groups.0.soca.down.weight", "upsampler.0.weight"):
        if name not in tensors:
            raise CheckpointError(f"{path}: no tensor {name}; expected a SAN checkpoint")
    channels = len(tensors["head.weight"])
    stages = sum(bool(re.fullmatch(r"upsampler\.\d+\.weight", name)) for name in tensors)
    scale = 3 if len(tensors["upsampler.0.weight"]) == 9 * channels else 2**stages
    hidden = len(tensors["groups.0.soca.down.weight"])
    if scale not in SCALES or channels % 8 or not hidden:
        raise CheckpointError(
            f"{path}: scale {scale}, {channels} channels, {hidden} hidden; expected x2, x3, x4 or x8 and C a multiple of 8"
        )
    value_range, iterations = numeric_settings(path, settings)
    return Architecture(
        scale=scale,
        groups=count(path, tensors, "groups."),
        blocks=count(path, tensors, "groups.0.blocks."),
        channels=channels,
        reduction=channels // hidden,
        value_range=value_range,
        sqrt_iterations=iterations,
    )


def numeric_settings(path: Path, settings: Mapping[str, Any]) -> tuple[float, int | None]:
    """Value range and square-root steps; an official file, which says neither, has 255 and 5."""
    value_range, iterations = settings.get("value_range", 255.0), settings.get("sqrt_iterations", 5)
    numbers = isinstance(value_range, int | float) and isinstance(iterations, int | None)
    if not numbers or not 0 < value_range < math.inf or (iterations is not None and iterations < 1):
        raise CheckpointError(
            f"{path}: value range {value_range}, square-root steps {iterations}; expected positive numbers"
        )
    return float(value_range), iterations


def count(path: Path, tensors: Mapping[str, Tensor], prefix: str) -> int:
    """The count of numbers that follow `prefix` in the names; raises CheckpointError unless they are 0, 1, 2, ..."""
    numbers = {int(m[1]) for name in tensors if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    if gaps := set(range(len(numbers))) - numbers:
        raise CheckpointError(
            f"{path}: no tensor {prefix}{min(gaps)}.*, though there is {prefix}{max(numbers)}; expected no gap"
        )
    return len(numbers)


def check_shapes(path: Path, tensors: Mapping[str, Tensor], arch: Architecture) -> None:
    """Raise CheckpointError naming a tensor that is missing, unknown or of the wrong shape."""
    with torch.device("meta"):
        expected = {name: list(t.shape) for name, t in SAN(arch).state_dict().items()}
    for name in expected.keys() | tensors.keys():
        found = list(tensors[name].shape) if name in tensors else "none"
        if found != expected.get(name, "none"):
            raise CheckpointError(f"{path}: tensor {name} is {found}, expected {expected.get(name, 'none')} for {arch.name}")
