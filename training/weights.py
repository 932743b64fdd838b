"""Trained weights from whatever holds them: a state of training or a weights file that sanrt reads."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sanrt.model.checkpoint import architecture_of, check_shapes, load_checkpoint
from sanrt.model.san import SAN
from training.state import AVERAGE, read_compact


def trained_network(path: Path) -> SAN:
    """The averaged weights of a compact state, or any weights that sanrt reads; float32, evaluation mode."""
    tensors = averaged(path)
    if not tensors:
        return load_checkpoint(path).network()
    arch = architecture_of(path, tensors, {})
    check_shapes(path, tensors, arch)
    net = SAN(arch)
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)


def averaged(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a compact state by name; none in any other file."""
    if path.suffix != ".safetensors":
        return {}
    tensors, _ = read_compact(path)
    return {key.removeprefix(AVERAGE): t for key, t in tensors.items() if key.startswith(AVERAGE)}


def start_from(net: SAN, path: Path) -> None:
    """Take all weights of a network like this one, or the body (head, attention, groups) of another scale's."""
    given = trained_network(path)
    same = given.arch.scale == net.arch.scale
    tensors = {n: t for n, t in given.state_dict().items() if same or not n.startswith(("upsampler.", "tail."))}
    net.load_state_dict(net.state_dict() | tensors)
