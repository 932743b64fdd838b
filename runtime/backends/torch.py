"""The PyTorch reference network as a backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy.typing as npt

from sanrt.arrays import Array
from sanrt.errors import BackendError, OutOfMemoryError, first_line
from sanrt.extras import install_command
from sanrt.model.spec import MIN_SIDE, ModelSpec, Precision
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.sizes import Limits
from sanrt.runtime.backends.protocol import (
    BackendStatus,
    RunOptions,
    Stages,
    fork_error,
    library_version,
    require_precision,
)

if TYPE_CHECKING:
    from sanrt.model.san import SAN

NAME = "torch"
USED_IN: set[int] = set()
"""Processes, among this one and those it was forked from, that loaded a model: in a child of such a one OpenMP hangs."""


def status() -> BackendStatus:
    """Whether PyTorch is installed."""
    if installed := library_version("torch"):
        return BackendStatus(NAME, installed, True, "runs on the CPU")
    return BackendStatus(NAME, None, False, "torch is not installed", install_command("export"))


def load(model: Path, options: RunOptions) -> TorchBackend:
    """Load an exported fp32 ONNX (its weights, not its graph) or a checkpoint."""
    return TorchBackend(model, options)


class TorchBackend:
    """The network on the CPU, in float32."""

    name = NAME
    streams = True
    memory = None
    engine_digest = None
    strips = None
    limits = Limits()
    maps = None
    device = "CPU"

    def __init__(self, model: Path, options: RunOptions) -> None:
        import torch

        require_precision(NAME, options, Precision.FP32)
        torch.set_num_threads(options.threads or min(torch.get_num_threads(), machine.cores()))
        self.net, self.spec = network(model, options.regions)

    def infer(self, pictures: Array) -> Array:
        return self.infer_with_regions(pictures, self.spec.regions)

    def infer_with_regions(self, pictures: Array, regions: int) -> Array:
        self.net.attention.regions = regions
        return call(lambda x: [self.net(x)], pictures)[0]

    def stages(self) -> Stages:
        return self

    def run(self, stage: str, *inputs: npt.NDArray[Any]) -> list[Array]:
        """The network is its own stages."""
        from sanrt.model.stages import run_stage

        return call(partial(run_stage, self.net, stage), *inputs)

    def close(self) -> None:
        del self.net

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def network(model: Path, regions: int) -> tuple[SAN, ModelSpec]:
    """The network of an exported fp32 ONNX or of a checkpoint, for k x k regions, in evaluation mode on the CPU."""
    if USED_IN - {os.getpid()}:
        raise fork_error(NAME)
    USED_IN.add(os.getpid())
    net, spec = exported_network(model) if model.suffix.lower() == ".onnx" else checkpoint_network(model)
    net.attention.regions = regions
    return net, replace(spec, regions=regions, min_side=regions * MIN_SIDE // 2)


def checkpoint_network(path: Path) -> tuple[SAN, ModelSpec]:
    """The network of a checkpoint, and what it is."""
    from sanrt.model.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    arch = checkpoint.architecture
    return checkpoint.network(), ModelSpec(arch, checkpoint.digest, checkpoint.origin, arch.sqrt_iterations or 0)


def exported_network(model: Path) -> tuple[SAN, ModelSpec]:
    """The network with an exported ONNX's weights, and what it is."""
    import torch

    from sanrt.model.exported import read_model
    from sanrt.model.san import SAN

    spec, weights = read_model(model)
    if spec.quantisation:
        raise BackendError(f"{model}: torch runs no {spec.quantisation.type} model; expected the fp32 one it was made of")
    # The exported model's own number of steps, which --sqrt-iterations may have set, not the checkpoint's.
    net = SAN(replace(spec.architecture, sqrt_iterations=spec.iterations))
    net.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in weights.items()})
    return net.eval().requires_grad_(False), spec


def call(function: Callable[..., list[Any]], *inputs: npt.NDArray[Any]) -> list[Array]:
    """Arrays in, tensors through the function, arrays out; torch's errors become ours."""
    import torch

    try:
        with torch.inference_mode():
            return [output.numpy() for output in function(*map(torch.from_numpy, inputs))]
    except RuntimeError as error:
        text = first_line(error)
        if "memory" in text or "alloc" in text:
            raise OutOfMemoryError(f"torch ran out of memory ({text})") from error
        raise BackendError(f"torch failed ({text})") from error
