"""What every backend provides, and what the rest of the runtime may ask of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, Self, runtime_checkable

from sanrt.arrays import Array
from sanrt.errors import BackendError, require_number
from sanrt.geometry import Box
from sanrt.model.contract import Needs, RowFile
from sanrt.model.spec import MAX_REGIONS, ModelSpec, Precision
from sanrt.runtime.artifacts.sizes import Limits
from sanrt.wording import option


class Stages(Protocol):
    """A network in the stages of `sanrt.model.graph.stage_model`, each run as often as there are tiles."""

    @property
    def maps(self) -> DeviceMaps | None:
        """Where the stages run on a GPU and their feature maps can stay there."""
        ...

    def run(self, stage: str, *inputs: Any) -> list[Any]:
        """Outputs of a stage, arrays (the first one of STAGE_MAPS is a part of `maps`); raises as `Backend.infer` does."""
        ...


Progress = Callable[[float], None]
"""Told the share of a picture's work that was just done; the shares of one attempt at a picture sum to 1."""


class PixelSource(Protocol):
    """A picture to upscale."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        ...

    def read(self, box: Box) -> Array:
        """Its pixels as (1, 3, h, w) float32, 0..value_range."""
        ...


PixelSink = Callable[[Box, Array], None]
"""Takes finished pixels (1, 3, h, w), not clipped, and where they go in the output; in reading order of tiles."""


@dataclass(frozen=True)
class StripOptions:
    """How one picture goes through a network by strips."""

    rows: int
    """Height of a strip, about."""
    regions: int
    """k of the k x k attention regions."""
    memory: int
    """Bytes of the host's memory to keep within, if at all possible."""
    new_file: Callable[[int, int], RowFile]
    """Makes a file for so many rows of so many bytes, for maps that exceed the memory."""


class Strips(Protocol):
    """A network that goes over a picture in strips of full width by itself."""

    def needed(self, height: int, width: int, rows: int | None, memory: int = 0) -> Needs:
        """What a picture takes whole (None), or in strips of such height: the least, or more within `memory` bytes."""
        ...

    def run(self, source: PixelSource, sink: PixelSink, options: StripOptions, progress: Progress) -> None:
        """Upscale a picture with sides of at least spec.min_side: the very numbers of `infer`; raises as that does."""
        ...


class Backend(Protocol):
    """One loaded model, ready to run; a context manager."""

    name: str
    """The backend's name, as `--backend` takes it."""
    device: str
    """What it runs on, for people: `CPU`, `NVIDIA H100`."""
    spec: ModelSpec
    """Description of the loaded model, with the precision that it runs in here."""

    @property
    def streams(self) -> bool:
        """Whether it has stages, for exact streaming."""
        ...

    @property
    def memory(self) -> int | None:
        """Bytes of a GPU's own memory that were free when the model was loaded; None where it runs in the host's."""
        ...

    @property
    def engine_digest(self) -> str | None:
        """SHA-256 of the TensorRT engine that runs; None where none does."""
        ...

    @property
    def limits(self) -> Limits:
        """The sizes that `infer` and the stages take."""
        ...

    def infer(self, pictures: Array) -> Array:
        """float32 (B, 3, H, W), 0..value_range -> float32 (B, 3, sH, sW), not clipped; sides at least spec.min_side.

        Raises OutOfMemoryError when memory does not suffice, BackendError for anything else.
        """
        ...

    @property
    def infer_with_regions(self) -> Callable[[Array, int], Array] | None:
        """For k x k attention regions: `infer` calls it with its spec's. None where the model was loaded for those alone."""
        ...

    @property
    def strips(self) -> Strips | None:
        """For exact streaming without stages; None where the backend has only those."""
        ...

    def stages(self) -> Stages:
        """The network stage by stage, for exact streaming; raises BackendError where the backend has none."""
        ...

    def close(self) -> None:
        """Free everything; the backend is of no use afterwards."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


@runtime_checkable
class ReportsProgress(Protocol):
    """What a backend has besides if it can say how far it is within a picture."""

    def infer_reporting(self, pictures: Array, regions: int, progress: Progress) -> Array:
        """`infer` with k x k attention regions; `progress` is told each share of the work that was done, to 1 at most."""
        ...


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here; a row of `sanrt doctor`."""

    name: str
    version: str | None
    """Version of the library behind it; None when it is not installed."""
    usable: bool
    reason: str
    """Why not, or what it would run on."""
    remedy: str = ""
    """The command that makes it usable, where there is one."""
    automatic: bool = True
    """Whether `auto` takes it here when it is usable; else it is a last resort."""


@dataclass(frozen=True)
class RunOptions:
    """How a model is loaded; the same for every backend."""

    threads: int | None = None
    """CPU threads; None is one per core."""
    precision: Precision | None = None
    """Type of convolutions and attention; None is the backend's own choice, told by its `spec.precision`."""
    regions: int = 2
    """k of the k x k attention regions."""
    device: int = 0
    """Index of the GPU, where there are several."""

    def __post_init__(self) -> None:
        require_number("threads", self.threads, 1)
        require_number("regions", self.regions, 1, MAX_REGIONS)
        require_number("device", self.device, 0)


def library_version(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for distribution in distributions:
        with suppress(PackageNotFoundError):
            return version(distribution)
    return None


def require_precision(name: str, options: RunOptions, *known: Precision) -> None:
    """Raise BackendError when a precision is asked for that a backend does not have."""
    if options.precision not in (None, *known):
        raise BackendError(
            f"backend {name} runs in {' or '.join(known)}, {options.precision} was asked for; use "
            f"{option('precision', known[0])}"
        )


class FeatureMap(Protocol):
    """One (C, H, W) map of any element type.

    Parts of maps in the host's memory are arrays. Those of maps on a GPU are what its backend's stages take and give, and
    good only until the next stage has run.
    """

    def read(self, box: Box) -> Any:
        """A part (1, C, h, w), contiguous; on the host a copy."""
        ...

    def write(self, box: Box, part: Any) -> None:
        """Replace a part; (1, C, h, w)."""
        ...

    def close(self) -> None:
        """Free its memory or its file."""
        ...


class DeviceMaps(Protocol):
    """Float32 feature maps in the memory of the GPU that a backend's stages run on."""

    def new(self, channels: int, height: int, width: int) -> FeatureMap:
        """A map with undefined content; raises OutOfMemoryError."""
        ...

    def fetch(self, part: Any) -> Array:
        """Part of a map, or a map that a stage gave, as a float32 array on the host."""
        ...

    def finite(self, part: Any) -> bool:
        """Whether a map that a stage gave is finite everywhere."""
        ...


def fork_error(name: str) -> BackendError:
    """For a backend whose library was used before this process was forked."""
    return BackendError(
        f"backend {name} was in use before this process was forked, and its threads do not survive that; "
        "load models only after the fork, start processes with spawn, or take backend native"
    )
