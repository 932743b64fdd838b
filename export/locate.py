"""Where an ONNX begins to differ from the PyTorch reference: both stage by stage, on one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from sanrt.arrays import Array
from sanrt.errors import UsageError
from sanrt.export.samples import Picture
from sanrt.export.squareroot import socas
from sanrt.export.tensors import Probe
from sanrt.export.validate import reference_network, source_checkpoint
from sanrt.model.graph import QUANTISED_LARGEST
from sanrt.model.san import SAN
from sanrt.model.soca import covariance
from sanrt.model.spec import Precision, Quantisation, QuantisedType
from sanrt.runtime.artifacts.models import read_spec
from sanrt.runtime.tiling.upscaling import network_input
from sanrt.wording import option

JUMP = 10.0
"""A stage is to blame when its error is this many times that of every stage before it."""
USUAL = {
    Precision.FP32: 1e-5,
    Precision.FP16: 1e-3,
    Precision.BF16: 8e-3,
    QuantisedType.INT8: 3e-3,
    QuantisedType.FP8: 3e-3,
}
"""Relative errors that rounding alone makes within a few stages; jumps are counted from here. (8-bit rounding is in the
reference too; that of a value between two steps may still go either way.)"""
LOWEST = {QuantisedType.INT8: 128.0, QuantisedType.FP8: 448.0}
"""ONNX's int8 saturates at -128."""


@dataclass(frozen=True)
class StageError:
    """One tensor of the graph."""

    stage: str
    """The tensor's name; a convolution's is its parameters' name."""
    error: float
    """Root mean square of the difference, relative to the reference's; NaN where the graph's is not finite."""


@dataclass(frozen=True)
class Location:
    """All stages in the order of computation, and the first at which the error jumps."""

    stages: tuple[StageError, ...]
    jump: StageError | None


def locate(artifact: Path, picture: Picture, checkpoint: Path | None = None) -> Location:
    """Compare every convolution, every block and group, and every part of every SOCA on an RGB uint8 picture."""
    if artifact.suffix != ".onnx":
        raise UsageError(
            f"{artifact}: --locate needs an ONNX, engines keep no intermediate results; name the one it was built from"
        )
    spec = read_spec(artifact)
    if spec != spec.open:
        raise UsageError(
            f"{artifact}: --locate needs float32 pictures of any size; export without {option('io')} and {option('shape')}"
        )
    net = reference_network(source_checkpoint(spec, artifact, checkpoint), spec)
    if spec.quantisation:
        round_alike(net, spec.quantisation)
    x = network_input(picture, spec.architecture.value_range)
    expected = reference_stages(net, x)
    found = graph_stages(artifact, list(expected), x)
    stages = tuple(StageError(name, relative_error(expected[name], y)) for name, y in found.items())
    return Location(stages, first_jump(stages, USUAL[spec.coarsest]))


def round_alike(net: SAN, quantisation: Quantisation) -> None:
    """Make the reference round what the graph rounds to 8 bits, so that only what is wrong differs."""

    def rounded(values: Tensor, largest: Tensor | float) -> Tensor:
        scale = torch.as_tensor(largest).clamp_min(torch.finfo(torch.float32).tiny) / QUANTISED_LARGEST[quantisation.type]
        steps = (values / scale).clamp(-LOWEST[quantisation.type], QUANTISED_LARGEST[quantisation.type])
        whole = steps.round() if quantisation.type == QuantisedType.INT8 else steps.to(torch.float8_e4m3fn).float()
        return whole * scale

    for name, largest in quantisation.ranges.items():
        conv = net.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        conv.weight.data = rounded(conv.weight.data, conv.weight.data.abs().amax((1, 2, 3), keepdim=True))
        conv.register_forward_pre_hook(lambda _, inputs, largest=largest: rounded(inputs[0], largest))


def relative_error(expected: Array, found: Array) -> float:
    """|found - expected| / |expected|, root mean square."""
    scale = float(np.sqrt(np.square(expected.astype(np.float64)).mean())) or 1.0
    return float(np.sqrt(np.square(found.astype(np.float64) - expected).mean())) / scale


def first_jump(stages: Sequence[StageError], usual: float) -> StageError | None:
    """The first stage whose error is JUMP times the usual and the largest so far, or not finite."""
    largest = usual
    for stage in stages:
        if not stage.error <= JUMP * largest:
            return stage
        largest = max(largest, stage.error)
    return None


@torch.inference_mode()
def reference_stages(net: SAN, x: Array) -> dict[str, Array]:
    """The reference's intermediate results by the graph's tensor names, in the order of computation."""
    kept: dict[str, Array] = {}

    def keep(*names: str, of: Callable[[Any, Any], Tensor]) -> Callable[..., None]:
        """A hook for a module that is called as often as there are names."""
        remaining = iter(names)

        def hook(module: nn.Module, inputs: Any, output: Any = None) -> None:
            kept[next(remaining)] = of(inputs, output).float().numpy().copy()

        return hook

    def output_of(module: nn.Module, *names: str) -> None:
        module.register_forward_hook(keep(*names, of=lambda _, output: output))

    def input_of(module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(keep(name, of=lambda inputs, _: inputs[0]))

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("attention."):
            output_of(module, {"head": "first", "mean_out": "output"}.get(name, name))
    output_of(net.attention, "shared", "attended")
    for g, soca in enumerate(socas(net)):
        sigma = keep(f"groups.{g}.soca.covariance", of=lambda inputs, _: covariance(inputs[0]))
        soca.register_forward_pre_hook(sigma)
        input_of(soca.down, f"groups.{g}.soca.z.map")
        output_of(soca, f"groups.{g}.gated")
    for g, group in enumerate(net.groups):
        for i, block in enumerate(group.get_submodule("blocks").children()):
            last = i + 1 == net.arch.blocks
            output_of(block, f"groups.{g}.features" if last else f"groups.{g}.blocks.{i}.out")
        if g:
            input_of(group, f"groups.{g - 1}.out")
    input_of(net.upsampler, "trunk")
    net(torch.from_numpy(x))
    return kept


def graph_stages(path: Path, names: Sequence[str], x: Array) -> dict[str, Array]:
    """A graph's intermediate results by ONNX Runtime, for those of the names that it has, in their order."""
    model = onnx.load(path)
    made = {output for node in model.graph.node for output in node.output}
    return Probe(model, [name for name in names if name in made])(x)
