"""Weights files: SAN checkpoints by the official names or by sanrt's own, as torch files or safetensors, loaded strictly."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sanrt.errors import CheckpointError, first_line, system_reason
from sanrt.files import write_whole
from sanrt.model.bundled import architecture_of, check_shapes
from sanrt.model.bundled import bundled_checkpoint as bundled_checkpoint
from sanrt.model.san import SAN
from sanrt.model.spec import Architecture

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

OFFICIAL_TENSOR, OUR_TENSOR = "RG.0.rcab.0.conv_first.0.weight", "groups.0.blocks.0.conv1.weight"
"""A tensor that every SAN has and no other network, by which one is found in a file."""
AVERAGES = {"ema", "swa", "avg", "average", "averaged"}
"""Parts of the name of a moving average of weights, which is what its training was for."""

NUMPY_FUNCTIONS: list[Any] = [np.float64().__reduce__()[0], np.empty(0).__reduce__()[0]]
"""What NumPy's scalars and arrays are read with."""
PLAIN_DATA: list[Any] = [
    argparse.Namespace,
    datetime,
    PosixPath,
    np.ndarray,
    np.dtype,
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
    *(
        (function, f"numpy.{core}.multiarray.{function.__name__}")
        for function in NUMPY_FUNCTIONS
        for core in ("core", "_core")
    ),
]
"""What training scripts put beside the weights, and what runs no code of a file's choosing when it is read."""

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
    """Read a SAN's weights, by the official names or by ours, from a torch file or from safetensors.

    They may lie in a dictionary of any depth, beside an optimiser and the like, and their names may have a prefix, as
    `module.`; of a network and its moving average, the average is taken. Scale and architecture are read off the tensors.
    Raises CheckpointError when the file cannot be read, holds no SAN or several, or one with unknown, missing, misshapen or
    infinite tensors.
    """
    try:
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({system_reason(error)}); expected a SAN checkpoint") from error
    content, settings = read_safetensors(path) if is_safetensors else (read_pickle(path), {})
    entries = flattened(content)
    prefix, official = only_network(path, entries)
    found = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
    tensors = require_plain(path, renamed(path, found) if official else found)
    arch = architecture_of(path, tensors, settings)
    check_shapes(path, tensors, arch)
    tensors = {name: tensor.detach().float() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity, expected numbers; its training diverged")
    layout = "the official SAN format (not one whose digest sanrt knows)" if official else "sanrt's format"
    origin = settings.get("origin") or GENUINE.get(digest) or f"a checkpoint in {layout}"
    origin = f"{origin}, its {prefix[:-1]}" if prefix else str(origin)
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
    """The tensors, and the settings that no tensor's shape tells."""
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("sanrt", "{}"))
            if not isinstance(settings, dict):
                raise ValueError(f"its settings are {settings!r}")
            return {name: file.get_tensor(name) for name in file.keys()}, settings  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged safetensors file ({first_line(error)}); copy or download it again"
        ) from error


def read_pickle(path: Path) -> Any:
    """The content of a torch file; nothing in it is ever executed."""
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(PLAIN_DATA):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, with pages of text, for a file that is none of its own
        code = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        found = f"holds {code[1]}, which would be code to run" if code else "not a torch weights file, or a damaged one"
        raise CheckpointError(
            f"{path}: {found}; expected the weights alone, as torch.save(network.state_dict(), PATH) writes them"
        ) from error


def flattened(content: Any) -> dict[str, Any]:
    """The values of dictionaries in dictionaries, by their names joined with dots; none for anything else.

    A dictionary that is there twice is taken once: one could contain itself.
    """
    entries: dict[str, Any] = {}
    waiting, seen = deque([("", content)]), set()
    while waiting:
        prefix, value = waiting.popleft()
        if not isinstance(value, Mapping):
            entries[prefix[:-1]] = value
        elif id(value) not in seen:
            seen.add(id(value))
            waiting += [(f"{prefix}{name}.", each) for name, each in value.items()]
    return entries


def only_network(path: Path, entries: Mapping[str, Any]) -> tuple[str, bool]:
    """The prefix of the names that make up the one SAN in a file, and whether they are the official names."""
    found = {
        name.removesuffix(tensor): official
        for name in entries
        for tensor, official in ((OFFICIAL_TENSOR, True), (OUR_TENSOR, False))
        if f".{name}".endswith(f".{tensor}")
    }
    averages = [prefix for prefix in found if AVERAGES & set(re.split(r"[._]", prefix))]
    chosen = averages if len(averages) == 1 else list(found)
    if not chosen:
        names = ", ".join(filter(None, list(entries)[:3])) or "no tensors"
        raise CheckpointError(
            f"{path}: holds no SAN (but {names}); expected its weights, by the official names or by sanrt's"
        )
    if len(chosen) > 1:
        names = ", ".join(prefix[:-1] or "one without a prefix" for prefix in chosen)
        raise CheckpointError(f"{path}: holds several networks ({names}); save the weights of one of them alone")
    return chosen[0], found[chosen[0]]


def renamed(path: Path, official: Mapping[str, Any]) -> dict[str, Any]:
    """The same by our names: by OFFICIAL_NAMES, without OFFICIAL_UNUSED; raises CheckpointError for anything else."""
    tensors = {}
    for name, tensor in official.items():
        for pattern, ours in OFFICIAL_NAMES:
            renamed, hits = re.subn(f"^{pattern}", ours, name)
            if hits:
                tensors[renamed] = tensor
                break
        else:
            if not OFFICIAL_UNUSED.match(name):
                shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise CheckpointError(f"{path}: unknown tensor {name} {shape}; expected an official SAN checkpoint")
    return tensors


def require_plain(path: Path, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same; raises CheckpointError for what is not a tensor of floating-point numbers, all of them in the file."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            kinds = {
                "without data (on the meta device)": tensor.is_meta,
                "quantised": tensor.is_quantized,
                "nested": tensor.is_nested,
                f"{tensor.layout}": tensor.layout is not torch.strided,
                f"{tensor.dtype}": not tensor.is_floating_point(),
            }
            found = next((kind for kind, is_so in kinds.items() if is_so), "")
        else:
            found = type(tensor).__name__
        if found:
            raise CheckpointError(f"{path}: tensor {name} is {found}, expected floating-point numbers, all of them stored")
    return dict(tensors)
