"""The PyTorch network on a GPU: half precision, channels-last, sanrt's kernels, one CUDA graph for each shape."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sanrt.arrays import Array
from sanrt.errors import BackendError, OutOfMemoryError, first_line
from sanrt.extras import install_command
from sanrt.geometry import Box
from sanrt.kernels.cuda.experimental import Experiment, requested
from sanrt.kernels.cuda.nvrtc import ARCHITECTURES
from sanrt.model.contract import STAGE_INPUTS, STAGE_MAPS
from sanrt.model.spec import GRAPH_PRECISIONS, Precision
from sanrt.runtime.artifacts.sizes import Limits
from sanrt.runtime.backends.gpu import cuda_of, gpu_status, version_numbers
from sanrt.runtime.backends.protocol import BackendStatus, FeatureMap, RunOptions, Stages, library_version, require_precision
from sanrt.runtime.backends.torch import network

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sanrt.model.san import SAN

NAME = "torch-cuda"
OUT_OF_MEMORY = "ALLOC_FAILED", "out of memory"
"""What cuBLAS, cuDNN and the driver say when memory does not suffice."""
MOST_GRAPHS = 4
"""Graphs kept at once: each holds the memory of its shape's intermediate results."""


def status(device: int = 0) -> BackendStatus:
    """Whether a CUDA build of PyTorch, the kernels' compiler and a GPU for both are here; imports none of them."""
    installed, nvrtc = library_version("torch"), library_version("nvidia-cuda-nvrtc")
    if not installed or "+cpu" in installed or not nvrtc:
        reason = "a CUDA build of torch and nvidia-cuda-nvrtc are not both installed"
        return BackendStatus(NAME, installed, False, reason, install_command("kernels"))
    needs = max((cuda_of("torch", "version.py"), nvrtc), key=version_numbers)
    return gpu_status(NAME, installed, device, needs, ARCHITECTURES[0])


def load(model: Path, options: RunOptions) -> TorchCudaBackend:
    """Load an exported fp32 ONNX (its weights, not its graph) or a checkpoint."""
    return TorchCudaBackend(model, options)


class TorchCudaBackend:
    """The network on a GPU, fp16 unless another precision is asked for."""

    name = NAME
    engine_digest = None
    strips = None
    streams = True
    limits = Limits()

    def __init__(self, model: Path, options: RunOptions) -> None:
        import torch

        require_precision(NAME, options, *GRAPH_PRECISIONS)
        self.reference, spec = network(model, options.regions)
        precision = options.precision or Precision.FP16
        dtypes = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
        self.dtype = dtypes[precision]
        self.net = CudaNetwork(self.reference, options.device, self.dtype, experiments=requested())
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
    try:
        yield
    except RuntimeError as error:
        if lacks_memory(error):
            raise OutOfMemoryError("torch ran out of GPU memory") from error
        raise BackendError(f"torch failed on {device} ({first_line(error)})") from error


def lacks_memory(error: BaseException) -> bool:
    """Whether a GPU's memory did not suffice: torch has a kind for its own allocations; what libraries say is text."""
    import torch

    return isinstance(error, torch.cuda.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


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
    dtype: float16 if left out. exact_as, experiments: as in `use_kernels`; experiments are held against the measured kernels
    first. Raises BackendError without a GPU, and for a wrong experiment or one not for `dtype`; torch's errors pass through.
    """

    def __init__(
        self,
        net: SAN,
        device: int = 0,
        dtype: torch.dtype | None = None,
        exact_as: int | None = None,
        experiments: Collection[Experiment] = (),
    ) -> None:
        import torch

        if not torch.cuda.is_available():
            raise BackendError("torch: no CUDA GPU here, or a PyTorch built without CUDA; run it on the CPU")
        self.device = torch.device("cuda", device)
        dtype = dtype or torch.float16
        if experiments:
            from sanrt.kernels.cuda.selfcheck import check_experiments

            with torch.inference_mode(), without_tf32():
                check_experiments(experiments, net.arch.channels, self.device, dtype)
        self.net = prepared(net, dtype, exact_as, experiments).to(self.device)
        self.regions = self.net.attention.regions
        self.graphs = Graphs(self.captured, torch.cuda.empty_cache, MOST_GRAPHS)

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
        # Other threads may go on allocating and copying meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result: Tensor = self.net(given)

        def replay(x: Tensor) -> Tensor:
            given.copy_(x)
            graph.replay()
            return result.clone()

        return replay


class Graphs:
    """One recording for each shape and k, made by `capture` when first seen; the least recently used ones are dropped.

    Each recording keeps the memory of its intermediate results. Where that is missed all are dropped, `release` gives their
    memory back, and the one that is wanted is made once more.
    """

    def __init__(
        self, capture: Callable[[Tensor, int], Callable[[Tensor], Tensor]], release: Callable[[], None], most: int
    ) -> None:
        self.capture, self.release, self.most = capture, release, most
        self.replays: dict[tuple[int, ...], Callable[[Tensor], Tensor]] = {}

    def __call__(self, x: Tensor, regions: int) -> Tensor:
        try:
            return self.replayed(x, regions)
        except RuntimeError as error:
            if not self.replays or not lacks_memory(error):
                raise
        self.replays.clear()
        self.release()
        return self.replayed(x, regions)

    def replayed(self, x: Tensor, regions: int) -> Tensor:
        shape = *x.shape, regions
        if shape in self.replays:
            self.replays[shape] = self.replays.pop(shape)  # the most recently used is the last
        else:
            # Dropped before the new one is made, so that its memory can be used.
            while len(self.replays) >= self.most:
                del self.replays[next(iter(self.replays))]
            self.replays[shape] = self.capture(x, regions)
        return self.replays[shape](x)


def prepared(net: SAN, dtype: torch.dtype, exact_as: int | None = None, experiments: Collection[Experiment] = ()) -> SAN:
    """A copy of `net` with the kernels' operators, channels-last, in `dtype` but for its two mean shifts (float32)."""
    from sanrt.kernels.cuda.operators import use_kernels

    return typed(use_kernels(net, exact_as, experiments), dtype)


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
