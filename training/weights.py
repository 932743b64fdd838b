"""Trained weights from whatever holds them: a state of training or a weights file that sanrt reads."""

from __future__ import annotations

from pathlib import Path

import torch

from sanrt.model.checkpoint import load_checkpoint
from sanrt.model.san import SAN
from training.network import bilinear_kernels, enlarging, pass_channels


def trained_network(path: Path) -> SAN:
    """The averaged weights of a compact state, or any weights that sanrt reads; float32, evaluation mode."""
    return load_checkpoint(path).network()


def start_from(net: SAN, path: Path) -> None:
    """Take the weights of a network like this one, or what another scale's has in common with it.

    That is the body (head, attention, groups). Where this network only doubles once more, it is all: the doublings that
    are new begin as bilinear upscaling.
    """
    given = trained_network(path)
    factors, known = net.arch.upsampling, given.arch.upsampling
    further = factors[: len(known)] == known
    tensors = {n: t for n, t in given.state_dict().items() if further or not n.startswith(("upsampler.", "tail."))}
    net.load_state_dict(net.state_dict() | tensors)
    if further:
        with torch.no_grad():
            for conv in enlarging(net)[len(known) :]:
                pass_channels(conv, bilinear_kernels(2), conv.in_channels)
