"""Trained weights from whatever holds them: a state of training or a weights file that sanrt reads."""

from __future__ import annotations

from pathlib import Path

from sanrt.model.checkpoint import load_checkpoint
from sanrt.model.san import SAN


def trained_network(path: Path) -> SAN:
    """The averaged weights of a compact state, or any weights that sanrt reads; float32, evaluation mode."""
    return load_checkpoint(path).network()


def start_from(net: SAN, path: Path) -> None:
    """Take all weights of a network like this one, or the body (head, attention, groups) of another scale's."""
    given = trained_network(path)
    same = given.arch.scale == net.arch.scale
    tensors = {n: t for n, t in given.state_dict().items() if same or not n.startswith(("upsampler.", "tail."))}
    net.load_state_dict(net.state_dict() | tensors)
