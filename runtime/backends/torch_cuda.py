"""The PyTorch network on a GPU: half precision, channels-last, sanrt's kernels, one CUDA graph for each shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sanrt.arrays import Array
from sanrt.errors import BackendError, OutOfMemoryError, first_line
from sanrt.geometry import Box
from sanrt.model.contract import STAGE_INPUTS, STAGE_MAPS
from sanrt.model.spec import GRAPH_PRECISIONS, Precision
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.sizes import Limits
from sanrt.runtime.backends.protocol import BackendStatus, FeatureMap, RunOptions, Stages, library_version, require_precision
from sanrt.runtime.backends.torch import network

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sanrt.model.san import SAN

NAME = "torch-cuda"
MOST_GRAPHS = 4
"""Graphs kept at once: each holds the memory of its shape's intermediate results."""


def status() -> BackendStatus:
    """Whether a CUDA build of PyTorch, the kernels' compiler and a GPU are here; imports none of them."""
    installed, found = library_version("torch"), machine.gpus()
    if not installed or "+cpu" in installed or not library_version("nvidia-cuda-nvrtc"):
        reason = "a CUDA build of torch and nvidia-cuda-nvrtc are not both installed"
        return BackendStatus(NAME, installed, False, reason, "pip install 'sanrt[kernels]'")
    if found.problem:
        return BackendStatus(NAME, installed, False, found.problem, "install NVIDIA's driver and reboot")
    return BackendStatus(NAME, installed, True, f"runs on {found.devices[0].name}")


def load(model: Path, options: RunOptions) -> TorchCudaBackend:
    """Load an exported fp32 ONNX (its weights, not its graph) or a checkpoint."""
    return TorchCudaBackend(model, options)


class TorchCudaBackend:
    """The network on a GPU, fp16 unless another precision is asked for."""

    name = NAME
    engine_digest = None
    streams = True
    limits = Limits()

    def __init__(self, model: Path, options: RunOptions) -> None:
        import torch

        require_precision(NAME, options, *GRAPH_PRECISIONS)
        self.reference, spec = network(model, options.regions)
        precision = options.precision or Precision.FP16
        dtypes = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
        self.dtype = dtypes[precision]
        self.net = CudaNetwork(self.reference, options.device, self.dtype)
        self.device = torch.cuda.get_device_name(options.device)
        self.memory: int | None = torch.cuda.mem_get_info(options.device)[0]
        self.spec = replace(spec, precision=precision)

    def infer(self, pictures: Array) -> Array:
        return self.infer_with_regions(pictures, self.spec.regions)

    def infer_with_regions(self, pictures: Array, regions: int) -> Array:
        import torch

        with cuda_errors_about(self.device):
            output: Array = self.net(torch.from_numpy(pictures), regions).cpu().numpy()
        return output

    def stages(self) -> Stages:
        """In plain PyTorch, without sanrt's kernels, which take whole pictures."""
        return self.own_stages

    @cached_property
    def own_stages(self) -> TorchStages:
        return TorchStages(self.reference, self.net.device, self.dtype)

    def close(self) -> None:
        del self.net, self.reference
        self.__dict__.pop("own_stages", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def without_tf32() -> Iterator[None]:
    """fp32 convolutions in fp32: PyTorch's own choice on a GPU is TF32, whose products have ten bits."""
    from torch.backends import cudnn

    allowed, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = allowed


@contextmanager
def cuda_errors_about(device: str) -> Iterator[None]:
    """torch's errors as ours."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemoryError("torch ran out of GPU memory") from error
    except RuntimeError as error:
        raise BackendError(f"torch failed on {device} ({first_line(error)})") from error


class TorchStages:
    """The network's stages on one device; maps stay there, in float32, which holds what overflowed in half precision."""

    def __init__(self, net: SAN, device: torch.device, dtype: torch.dtype) -> None:
        import copy

        self.net = typed(copy.deepcopy(net), dtype).to(device)
        self.device, self.dtype = device, dtype

    @property
    def maps(self) -> TorchStages:
        """They make their own maps."""
        return self

    def run(self, stage: str, *inputs: Any) -> list[Any]:
        import torch

        from sanrt.model.stages import run_stage

        kind = stage.partition(".")[0]
        with cuda_errors_about(str(self.device)), torch.inference_mode(), without_tf32():
            given = map(self.placed, STAGE_INPUTS[kind], inputs)
            outputs = run_stage(self.net, stage, *given)
            kept = outputs[:1] if kind in STAGE_MAPS else []
            return [*kept, *map(self.fetch, outputs[len(kept) :])]

    def placed(self, name: str, given: Any) -> Tensor:
        """An input on the device: maps in the network's type, pixels and statistics in float32, boxes on the host."""
        import torch

        tensor = torch.as_tensor(given)
        if name == "crop":
            return tensor
        return tensor.to(self.device, torch.float32 if name in ("pixels", "sigma") else self.dtype)

    def new(self, channels: int, height: int, width: int) -> FeatureMap:
        import torch

        with cuda_errors_about(str(self.device)):
            return TorchMap(torch.empty((1, channels, height, width), device=self.device))

    def fetch(self, part: Tensor) -> Array:
        array: Array = part.float().cpu().numpy()
        return array

    def finite(self, part: Tensor) -> bool:
        return bool(part.isfinite().all())


@dataclass
class TorchMap:
    """A feature map as one tensor."""

    tensor: Tensor | None

    def read(self, box: Box) -> Tensor:
        assert self.tensor is not None
        return self.tensor[:, :, box.top : box.bottom, box.left : box.right]

    def write(self, box: Box, part: Tensor | Array) -> None:
        import torch

        self.read(box).copy_(torch.as_tensor(part))

    def close(self) -> None:
        self.tensor = None


class CudaNetwork:
    """Pictures (B, 3, H, W), float, 0..value_range, on any device -> (B, 3, scale * H, scale * W), float32, on the GPU.

    Convolutions and attention run in `dtype`, SOCA's statistics and square root and the mean shifts in float32. The first
    picture of a shape is run, then captured; later ones replay its graph. Not for use by two threads at once.
    dtype: float16 if left out. exact_as: as in `use_kernels`.
    Raises BackendError without a GPU; torch's own OutOfMemoryError passes through.
    """

    def __init__(
        self,
        net: SAN,
        device: int = 0,
        dtype: torch.dtype | None = None,
        exact_as: int | None = None,
    ) -> None:
        import torch

        if not torch.cuda.is_available():
            raise BackendError("torch: no CUDA GPU here, or a PyTorch built without CUDA; run it on the CPU")
        self.device = torch.device("cuda", device)
        self.net = prepared(net, dtype or torch.float16, exact_as).to(self.device)
        self.regions = self.net.attention.regions
        self.graphs = Graphs(self.captured, MOST_GRAPHS)

    def __call__(self, x: Tensor, regions: int | None = None) -> Tensor:
        """regions: k of the k x k attention regions, the network's own if left out."""
        import torch

        with torch.inference_mode(), torch.cuda.device(self.device), without_tf32():
            return self.graphs(x, regions or self.regions)

    def captured(self, x: Tensor, regions: int) -> Callable[[Tensor], Tensor]:
        """A function that replays the network as recorded for x's shape and for such regions."""
        import torch

        self.net.attention.regions = regions
        given = torch.empty(x.shape, dtype=torch.float32, device=self.device)
        given.copy_(x)
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Libraries choose algorithms, compilers compile and kernels load outside the recording.
            for _ in range(2):
                self.net(given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result: Tensor = self.net(given)

        def replay(x: Tensor) -> Tensor:
            given.copy_(x)
            graph.replay()
            return result.clone()

        return replay


class Graphs:
    """One recording for each shape and k, made by `capture` when first seen; the least recently used ones are dropped."""

    def __init__(self, capture: Callable[[Tensor, int], Callable[[Tensor], Tensor]], most: int) -> None:
        self.capture, self.most = capture, most
        self.replays: dict[tuple[int, ...], Callable[[Tensor], Tensor]] = {}

    def __call__(self, x: Tensor, regions: int) -> Tensor:
        shape = *x.shape, regions
        replay = self.replays.pop(shape, None)
        if replay is None:
            # Dropped before the new one is made, so that its memory can be used.
            while len(self.replays) >= self.most:
                del self.replays[next(iter(self.replays))]
            replay = self.capture(x, regions)
        self.replays[shape] = replay
        return replay(x)


def prepared(net: SAN, dtype: torch.dtype, exact_as: int | None = None) -> SAN:
    """A copy of `net` with the kernels' operators, channels-last, in `dtype` but for its two mean shifts (float32)."""
    from sanrt.kernels.cuda.operators import use_kernels

    return typed(use_kernels(net, exact_as), dtype)


def typed(net: SAN, dtype: torch.dtype) -> SAN:
    """`net` itself, changed to channels-last and `dtype` but for its two mean shifts (float32)."""
    import copy

    import torch
    from torch import nn

    class Cast(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.dtype = dtype

        def forward(self, x: Tensor) -> Tensor:
            return x.to(self.dtype, memory_format=torch.channels_last)

    shift_in, shift_out = copy.deepcopy(net.mean_in), copy.deepcopy(net.mean_out)
    net = net.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.mean_in = nn.Sequential(shift_in, Cast(dtype))  # type: ignore[assignment]
    net.mean_out = nn.Sequential(Cast(torch.float32), shift_out)  # type: ignore[assignment]
    return net
