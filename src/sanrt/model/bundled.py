"""The weights that ship with sanrt, and others in its safetensors format: found and read without torch or onnx."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sanrt.errors import CheckpointError, UsageError, first_line, system_reason
from sanrt.extras import extra
from sanrt.model.spec import SCALES, Architecture, ModelSpec
from sanrt.version import __version__

if TYPE_CHECKING:
    import numpy as np

    from sanrt.arrays import Array

SUFFIX = ".safetensors"
FOLDER = Path(str(files("sanrt.model") / "weights"))
FLOATS = ("float16", "float32", "float64")
"""The types that weights are stored in; all are computed with as float32, or what is made of it."""


PHOTO_QUALITY = 92
"""The JPEG quality up to which `photo` is better than `clean` at every scale, on pictures that neither learned from."""


class WeightsKind(StrEnum):
    """What bundled weights are for."""

    CLEAN = "clean"
    """Pictures that were never compressed with loss: the paper's degradation."""
    PHOTO = "photo"
    """Photographs saved as JPEG: compressed, slightly blurred or noisy ones."""
    FAST = "fast"
    """As clean, by a network of a quarter of the size."""


@dataclass(frozen=True)
class Weights:
    """A sanrt safetensors file."""

    spec: ModelSpec
    tensors: Mapping[str, Array]
    """float32, by the reference network's names, in the order of its layers."""


def bundled_name(scale: int, kind: WeightsKind = WeightsKind.CLEAN) -> str:
    """What the files of bundled weights, and of their exported models, are called before the suffix."""
    return f"san_x{scale}" + ("" if kind is WeightsKind.CLEAN else f"_{kind}")


def bundled_checkpoint(scale: int, kind: WeightsKind = WeightsKind.CLEAN) -> Path:
    """The weights that ship with sanrt for a scale (2, 3, 4 or 8) and a kind of pictures; UsageError without any."""
    if not has_bundled(scale, kind):
        raise UsageError(f"no {kind} weights for x{scale}; sanrt ships {shipped()}, choose one of these")
    return FOLDER / f"{bundled_name(scale, kind)}{SUFFIX}"


def has_bundled(scale: int, kind: WeightsKind) -> bool:
    """Whether such weights ship with sanrt."""
    return (FOLDER / f"{bundled_name(scale, kind)}{SUFFIX}").exists()


def shipped() -> str:
    """The bundled weights, for messages: `clean for x2, x4; photo for x4`."""
    found = {kind: ", ".join(f"x{scale}" for scale in SCALES if has_bundled(scale, kind)) for kind in WeightsKind}
    return "; ".join(f"{kind} for {scales}" for kind, scales in found.items() if scales) or "none"


def shipped_weights(digest: str) -> Weights | None:
    """The bundled weights with this SHA-256 of their file; None if sanrt ships none such."""
    for path in sorted(FOLDER.glob(f"*{SUFFIX}")):
        if hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            return read_weights(path)
    return None


def read_weights(path: Path) -> Weights:
    """A network from a safetensors file that sanrt wrote; its graph has the root's steps that it was trained with.

    Raises CheckpointError for any other file: official checkpoints, and networks trained with the exact root, whose number
    of steps is measured, are made into models by `sanrt export --checkpoint`. A file that is as it was is not read again.
    """
    identity: tuple[int, ...] = ()
    with suppress(OSError):  # which reading it will tell
        now = path.stat()
        identity = now.st_ino, now.st_size, now.st_mtime_ns
    return weights_in(path, identity)


@lru_cache(maxsize=1)
def weights_in(path: Path, identity: tuple[int, ...]) -> Weights:
    """The same of a file with such a place, size and time of change; the last one is kept, as loading asks several times."""
    import numpy as np  # here, as `sanrt --help` does not wait for it

    content, tensors, settings = read_safetensors(path)
    arch = architecture_of(path, tensors, settings)
    check_shapes(path, tensors, arch)
    for name, tensor in tensors.items():
        if tensor.dtype.name not in FLOATS or not np.isfinite(tensor).all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN, infinity or no floats; expected numbers")
    if not settings or arch.sqrt_iterations is None:
        reason = "trained with the exact root, whose steps are measured" if settings else "says nothing of its training"
        raise CheckpointError(f"{path}: {reason}; make a model of it with `sanrt export --checkpoint {path}`")
    digest, origin = hashlib.sha256(content).hexdigest(), str(settings.get("origin", "a sanrt checkpoint"))
    spec = ModelSpec(arch, digest, origin, arch.sqrt_iterations, version=__version__)
    weights = {name: tensors[name].astype(np.float32) for name, _ in arch.parameters()}
    for tensor in weights.values():
        tensor.setflags(write=False)
    return Weights(spec, weights)


def read_safetensors(path: Path) -> tuple[bytes, dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """A file's bytes, its tensors, and sanrt's settings, if any; raises CheckpointError when it cannot be read."""
    with extra("cpu", f"{path}: reading weights"):
        from safetensors import SafetensorError
        from safetensors.numpy import load
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({system_reason(error)}); expected weights") from error
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return content, tensors, dict(json.loads(header.get("__metadata__", {}).get("sanrt", "{}")))
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged safetensors file, or of types that NumPy has not ({first_line(error)}); copy it again"
        ) from error


def architecture_of(path: Path, tensors: Mapping[str, Any], settings: Mapping[str, Any]) -> Architecture:
    """Scale, G, m, C and r from the names and shapes of tensors, of any library's; the rest from the file's settings."""
    sizes = {}
    for name in ("head.weight", "groups.0.soca.down.weight", "upsampler.0.weight"):
        if name not in tensors:
            raise CheckpointError(f"{path}: no tensor {name}; expected a SAN checkpoint")
        if len(tensors[name].shape) != 4:
            raise CheckpointError(f"{path}: tensor {name} is {list(tensors[name].shape)}, expected a convolution's weights")
        sizes[name] = len(tensors[name])
    channels, hidden, first = sizes.values()
    stages = sum(bool(re.fullmatch(r"upsampler\.\d+\.weight", name)) for name in tensors)
    try:
        return Architecture(
            scale=3 if first == 9 * channels else 2**stages,
            groups=count(path, tensors, "groups."),
            blocks=count(path, tensors, "groups.0.blocks."),
            channels=channels,
            reduction=channels // hidden if hidden else 0,
            value_range=settings.get("value_range", 255.0),
            sqrt_iterations=settings.get("sqrt_iterations", 5),
        )
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from error


def count(path: Path, tensors: Mapping[str, Any], prefix: str) -> int:
    """The count of numbers that follow `prefix` in the names; raises CheckpointError unless they are 0, 1, 2, ..."""
    numbers = {int(m[1]) for name in tensors if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    if gaps := set(range(len(numbers))) - numbers:
        raise CheckpointError(
            f"{path}: no tensor {prefix}{min(gaps)}.*, though there is {prefix}{max(numbers)}; expected no gap"
        )
    return len(numbers)


def check_shapes(path: Path, tensors: Mapping[str, Any], arch: Architecture) -> None:
    """Raise CheckpointError naming a tensor that is missing, unknown or of the wrong shape."""
    expected = {name: list(shape) for name, shape in arch.parameters()}
    for name in dict.fromkeys([*expected, *tensors]):
        found = list(tensors[name].shape) if name in tensors else "none"
        if found != expected.get(name, "none"):
            raise CheckpointError(f"{path}: tensor {name} is {found}, expected {expected.get(name, 'none')} for {arch.name}")
