"""The `native` backend: sanrt's own CPU kernels, convolutions in fp32 or 16-bit integers and all else in fp32."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from sanrt.arrays import Array
from sanrt.errors import BackendError, OutOfMemoryError
from sanrt.extras import required
from sanrt.geometry import Box
from sanrt.model.contract import Needs
from sanrt.model.spec import MIN_SIDE, Precision
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.models import read_spec
from sanrt.runtime.artifacts.sizes import Limits
from sanrt.runtime.artifacts.variants import derived_weights
from sanrt.runtime.backends.protocol import (
    BackendStatus,
    PixelSink,
    PixelSource,
    Progress,
    RunOptions,
    Stages,
    StripOptions,
    library_version,
    require_precision,
)
from sanrt.version import __version__
from sanrt.wording import option

if TYPE_CHECKING:
    from sanrt.kernels.cpu.network import Network

log = logging.getLogger(__name__)

NAME = "native"
WIDEST = 2048
"""A weight so many times as large as the mean of its output channel's others leaves these 4 of 16 bits."""


def status() -> BackendStatus:
    """Whether llvmlite, which compiles the kernels, is installed; `auto` prefers it on the kinds of processors measured."""
    installed = library_version("llvmlite")
    if installed and library_version("threadpoolctl"):
        vectors = [name for name in ("AVX-512", "AVX2") if name in machine.cpu_features()]
        reason = f"runs on the CPU ({vectors[0] if vectors else 'vectors of 128 bits, slower and not measured'})"
        return BackendStatus(NAME, __version__, True, reason, automatic=bool(vectors))
    missing = "threadpoolctl" if installed else "llvmlite"
    return BackendStatus(NAME, __version__, False, f"{missing} is not installed", f"pip install {missing}")


def load(model: Path, options: RunOptions) -> NativeBackend:
    """Load an exported fp32 ONNX: its weights, not its graph."""
    with required("llvmlite"):
        import sanrt.kernels.cpu.ir  # noqa: F401
    return NativeBackend(model, options)


def chosen_precision() -> Precision:
    """int16 where one instruction multiplies and adds 16-bit integers (AVX512-VNNI), twice as many as fp32; else fp32."""
    from sanrt.kernels.cpu.ir import this_processor

    fast = "AVX512-VNNI" in machine.cpu_features() and this_processor().pmadd
    return Precision.INT16 if fast else Precision.FP32


def too_wide(weights: Mapping[str, Array]) -> str | None:
    """The first convolution in whose weights one is so large that 16 bits leave nothing of the others; None without any.

    Training makes no such weights: a damaged file has them.
    """
    for name, weight in weights.items():
        if weight.ndim == 4 and weight.shape[-1] > 1:
            magnitudes = np.abs(weight.reshape(len(weight), -1))
            largest = magnitudes.max(1)
            others = (magnitudes.sum(1, dtype=np.float64) - largest) / (magnitudes.shape[1] - 1)
            if ((others > 0) & (largest > WIDEST * others)).any():
                return name
    return None


class NativeBackend:
    """The network on the CPU, whole, by strips or in stages.

    Stages, which other backends use in fp32, are fp32 in either precision: int16 rounds by the tile.
    """

    name = NAME
    streams = True
    memory = None
    engine_digest = None
    limits = Limits()
    device = "CPU"

    def __init__(self, model: Path, options: RunOptions) -> None:
        require_precision(NAME, options, Precision.FP32, Precision.INT16)
        spec, k = read_spec(model).open, options.regions
        if spec.quantisation:
            raise BackendError(
                f"{model}: native runs no {spec.quantisation.type} model; expected the fp32 one it was made of"
            )
        self.weights, self.threads = derived_weights(model), options.threads or machine.cores()
        precision = options.precision or chosen_precision()
        if precision is Precision.INT16 and (name := too_wide(self.weights)):
            problem = (
                f"{model}: {name} has a weight more than {WIDEST} times as large as the others; 16 bits do not hold both"
            )
            if options.precision:
                raise BackendError(
                    f"{problem}; take {option('precision', 'fp32')}, or make the model again if it is damaged"
                )
            log.warning("%s; computed in fp32", problem)
            precision = Precision.FP32
        self.spec = replace(spec, precision=precision, regions=k, min_side=k * MIN_SIDE // 2)
        self.network = self.network_in(precision)

    def network_in(self, precision: Precision) -> Network:
        """A network with the model's weights in a precision."""
        from sanrt.kernels.cpu.network import Network
        from sanrt.kernels.cpu.winograd import Arithmetic

        return Network(self.spec, self.weights, self.threads, Arithmetic(precision))

    @cached_property
    def fp32(self) -> Network:
        """The network in fp32, made when the first stage is asked for."""
        return self.network if self.spec.precision == Precision.FP32 else self.network_in(Precision.FP32)

    def infer(self, pictures: Array) -> Array:
        return self.infer_with_regions(pictures, self.spec.regions)

    def infer_with_regions(self, pictures: Array, regions: int) -> Array:
        return self.infer_reporting(pictures, regions, lambda share: None)

    def infer_reporting(self, pictures: Array, regions: int, progress: Progress) -> Array:
        from sanrt.kernels.cpu.passes import upscale

        def told(share: float) -> None:
            progress(share / len(pictures))

        with out_of_memory_errors(self.network):
            made = [upscale(self.network, picture, regions, told) for picture in pictures[:, None]]
            return made[0] if len(made) == 1 else np.concatenate(made)  # a single one is not copied: it may be large

    @property
    def strips(self) -> NativeStrips:
        return NativeStrips(self.network)

    def stages(self) -> Stages:
        if self.fp32 is not self.network:
            self.network.clear()
        return NativeStages(self.fp32)

    def close(self) -> None:
        self.network.close()
        if "fp32" in vars(self):
            self.fp32.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class NativeStrips:
    """The network over a picture of any size, strip by strip."""

    network: Network

    def needed(self, height: int, width: int, rows: int | None, memory: int = 0) -> Needs:
        from sanrt.kernels.cpu.passes import needed

        return needed(self.network, height, width, rows, memory)

    def run(self, source: PixelSource, sink: PixelSink, options: StripOptions, progress: Progress) -> None:
        from sanrt.kernels.cpu.network import Bands
        from sanrt.kernels.cpu.passes import stream

        height, width = source.size
        bands = Bands(options.rows, options.memory, options.new_file)
        with out_of_memory_errors(self.network):
            stream(
                self.network,
                lambda top, bottom: source.read(Box(top, 0, bottom, width)),
                (height, width),
                options.regions,
                bands,
                sink,
                progress,
            )


class NativeStages:
    """The network, stage by stage."""

    maps = None

    def __init__(self, network: Network) -> None:
        self.network = network

    def run(self, stage: str, *inputs: npt.NDArray[Any]) -> list[Array]:
        with out_of_memory_errors(self.network):
            return self.network.run_stage(stage, *inputs)


@contextmanager
def out_of_memory_errors(network: Network) -> Iterator[None]:
    """Turn a MemoryError into an OutOfMemoryError, and free the maps: the caller goes on with smaller tiles."""
    try:
        yield
    except MemoryError as error:
        network.clear()
        raise OutOfMemoryError("native ran out of memory") from error
