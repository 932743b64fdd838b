"""sanrt's own CPU kernels: Winograd convolutions and attention without its matrix, in fp32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from sanrt.errors import BackendError, OutOfMemoryError
from sanrt.model.spec import MIN_SIDE
from sanrt.runtime import machine
from sanrt.runtime.backends import Array, BackendStatus, RunOptions, Stages, fp32_only, library_version
from sanrt.runtime.derived import derived_weights
from sanrt.runtime.engines import Limits
from sanrt.runtime.models import read_spec

if TYPE_CHECKING:
    from sanrt.runtime.winograd import Network

NAME = "winograd"


def status() -> BackendStatus:
    """Whether llvmlite, which compiles the kernels, is installed; `auto` takes it where it was measured."""
    installed = library_version("llvmlite")
    if installed and library_version("threadpoolctl"):
        vectors = [name for name in ("AVX-512", "AVX2") if name in machine.cpu_features()]
        reason = f"runs on the CPU ({vectors[0] if vectors else 'no AVX2: slow on x86, not measured elsewhere'})"
        return BackendStatus(NAME, installed, True, reason, automatic=bool(vectors))
    missing = "threadpoolctl" if installed else "llvmlite"
    return BackendStatus(NAME, installed, False, f"{missing} is not installed", "pip install 'sanrt[cpu]'")


def load(model: Path, options: RunOptions) -> WinogradBackend:
    """Load an exported fp32 ONNX: its weights, not its graph."""
    return WinogradBackend(model, options)


class WinogradBackend:
    """The network on the CPU, in float32."""

    name = NAME
    streams = True
    memory = None
    engine_digest = None
    limits = Limits()
    maps = None
    device = "CPU"

    def __init__(self, model: Path, options: RunOptions) -> None:
        from sanrt.runtime.winograd import Network

        fp32_only(NAME, options)
        spec, k = read_spec(model), options.regions
        if spec.quantisation:
            raise BackendError(
                f"{model}: winograd runs no {spec.quantisation.type} model; expected the fp32 one it was made of"
            )
        self.spec = replace(spec, regions=k, min_side=k * MIN_SIDE // 2)
        self.network: Network = Network(self.spec, derived_weights(model), options.threads or machine.cores())

    def infer(self, pictures: Array) -> Array:
        try:
            return np.concatenate([self.network.upscale(picture) for picture in pictures[:, None]])
        except MemoryError as error:
            self.network.maps.clear()
            raise OutOfMemoryError("winograd ran out of memory") from error

    def stages(self) -> Stages:
        return self

    def run(self, stage: str, *inputs: npt.NDArray[Any]) -> list[Array]:
        """The network is its own stages."""
        try:
            return self.network.run_stage(stage, *inputs)
        except MemoryError as error:
            self.network.maps.clear()
            raise OutOfMemoryError("winograd ran out of memory") from error

    def close(self) -> None:
        self.network.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
