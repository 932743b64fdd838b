"""The shapes that engines take: pictures; for stages tiles with their halo, regions' keys, and the values of crops."""

from __future__ import annotations

import json

import onnx

from sanrt.model.contract import HEAD_HALO, JOIN_HALO, STAGE_INPUTS, TAIL_HALO
from sanrt.model.spec import STAGE, Architecture, ModelSpec
from sanrt.runtime.artifacts.sizes import MAX_KEYS, Profile, Size

KEYS = 1, 2**14, MAX_KEYS
"""Smallest, usual and largest number of a region's keys."""

Values = tuple[int, ...]


def input_ranges(graph: onnx.ModelProto, sizes: Profile) -> dict[str, tuple[Values, Values, Values]]:
    """The smallest, usual and largest shape of each input of the network, or of one of its stages for tiles of such sizes.

    Of `crop` they are values, not shapes. The smallest tiles have no halo.
    """
    metadata = {p.key: p.value for p in graph.metadata_props}
    if STAGE not in metadata:
        return {"input": (sizes.min.input_shape, sizes.opt.input_shape, sizes.max.input_shape)}
    arch = ModelSpec.from_metadata(metadata, graph.graph.name).architecture
    kind = json.loads(metadata[STAGE]).partition(".")[0]
    halo = {"head": HEAD_HALO, "body": arch.body_halo, "join": JOIN_HALO, "tail": TAIL_HALO}.get(kind, 0)
    ranges = zip((sizes.min, sizes.opt, sizes.max), (0, halo, halo), KEYS, strict=True)
    low, usual, high = (stage_inputs(arch, kind, *each) for each in ranges)
    return {name: (low[name], usual[name], high[name]) for name in STAGE_INPUTS[kind]}


def stage_inputs(arch: Architecture, kind: str, tile: Size, halo: int, keys: int) -> dict[str, Values]:
    """Shapes of a stage's inputs, whichever it has, for a tile in the middle of a picture, and the values of its crop."""
    least = 2 if kind == "keys-values" else 1  # what is pooled has at least one window
    inner = 1, arch.channels, max(tile.height, least), max(tile.width, least)
    outer = 1, arch.channels, tile.height + 2 * halo, tile.width + 2 * halo
    scale = arch.scale if kind == "tail" else 1
    return {
        "pixels": (1, 3, *outer[2:]),
        "x": outer if kind == "body" else inner,
        **dict.fromkeys(("features", "attended", "first"), outer),
        "shared": inner,
        **dict.fromkeys(("key", "value"), (1, arch.attention_channels, 1, keys)),
        "sigma": (1, arch.channels, arch.channels),
        "gate": (1, arch.channels, 1, 1),
        "crop": tuple(scale * edge for edge in (halo, halo, halo + tile.height, halo + tile.width)),
    }
