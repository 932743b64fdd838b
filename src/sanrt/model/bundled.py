"""The weights that ship with sanrt, and others in its safetensors format: found and read without torch or onnx."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sanrt.errors import CheckpointError, first_line
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


@dataclass(frozen=True)
class Weights:
    """A sanrt safetensors file."""

    spec: ModelSpec
    tensors: Mapping[str, Array]
    """float32, by the reference network's names, in the order of its layers."""


def bundled_checkpoint(scale: int) -> Path:
    """The weights that ship with sanrt for a scale (2, 3, 4 or 8)."""
    path = FOLDER / f"san_x{scale}{SUFFIX}"
    if not path.exists():
        raise CheckpointError(f"no bundled weights for x{scale}: sanrt ships {shipped()}; pass --checkpoint PATH for others")
    return path


def shipped() -> str:
    """The scales that have bundled weights, for messages."""
    return ", ".join(f"x{s}" for s in SCALES if (FOLDER / f"san_x{s}{SUFFIX}").exists()) or "none"


def read_weights(path: Path) -> Weights:
    """A network from a safetensors file that sanrt wrote; its graph has the root's steps that it was trained with.

    Raises CheckpointError for any other file: official checkpoints, and networks trained with the exact root, whose number
    of steps is measured, are made into models by `sanrt export --checkpoint`.
    """
    import numpy as np  # here, as `sanrt --help` does not wait for it

    content, tensors, settings = read_safetensors(path)
    try:
        facts = json.loads(settings["sanrt"])
        root, value_range, origin = facts["sqrt_iterations"], float(facts["value_range"]), str(facts["origin"])
        arch = architecture_of(tensors, value_range, root)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path}: not the weights of a sanrt network ({first_line(error)}); "
            f"make a model of it with `sanrt export --checkpoint {path}`"
        ) from error
    expected, found = dict(arch.parameters()), {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            wanted, there = (list(shapes[name]) if name in shapes else "none" for shapes in (expected, found))
            raise CheckpointError(f"{path}: tensor {name} is {there}, expected {wanted} for {arch.name}")
        if tensors[name].dtype.name not in FLOATS or not np.isfinite(tensors[name]).all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN, infinity or no floats; expected numbers")
    if not isinstance(root, int) or root < 1:
        raise CheckpointError(
            f"{path}: trained with the exact root, whose steps are measured; run `sanrt export --checkpoint {path}`"
        )
    spec = ModelSpec(arch, hashlib.sha256(content).hexdigest(), origin, root, version=__version__)
    return Weights(spec, {name: tensors[name].astype(np.float32) for name in expected})


def read_safetensors(path: Path) -> tuple[bytes, dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """A file's bytes, its tensors, and the settings beside them; raises CheckpointError when it cannot be read."""
    with extra("cpu", f"{path}: reading weights"):
        from safetensors import SafetensorError
        from safetensors.numpy import load
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); expected weights") from error
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return content, tensors, dict(header.get("__metadata__", {}))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged safetensors file, or of types that NumPy has not ({first_line(error)}); copy it again"
        ) from error


def architecture_of(tensors: Mapping[str, Any], value_range: float, sqrt_iterations: int | None) -> Architecture:
    """Scale, G, m, C and r from the tensors' names and shapes; raises KeyError, IndexError or ValueError for no SAN's."""
    channels = tensors["head.weight"].shape[0]
    hidden = tensors["groups.0.soca.down.weight"].shape[0]
    stages = sum(name.startswith("upsampler.") and name.endswith(".weight") for name in tensors)
    scale = 3 if tensors["upsampler.0.weight"].shape[0] == 9 * channels else 2**stages
    if scale not in SCALES or channels % 8 or not 0 < hidden <= channels:
        raise ValueError(f"scale {scale}, {channels} channels, {hidden} hidden")
    return Architecture(
        scale=scale,
        groups=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("groups.")),
        blocks=1 + max(int(name.split(".")[3]) for name in tensors if name.startswith("groups.0.blocks.")),
        channels=channels,
        reduction=channels // hidden,
        value_range=value_range,
        sqrt_iterations=sqrt_iterations,
    )
