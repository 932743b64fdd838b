"""The ways of running the network that `benchmarks/latency.py` compares: sanrt's backends, and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sanrt.arrays import Array
from sanrt.errors import UsageError
from sanrt.model.spec import Precision
from sanrt.runtime import host as machine
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import backend_names, status
from sanrt.runtime.runs.latency import Contender, Running, in_precision, own_precisions
from sanrt.runtime.runs.timing import Size, events_usable
from sanrt.runtime.tiling.plan import PAPER_REGIONS

if TYPE_CHECKING:
    from torch import Tensor

AUTO = "auto"
"""The row that the others are compared with."""
CENTRING_COPIES = 3
"""M x M matrices that exist at once while the official formula is evaluated."""


def open_torch(variant: str, device: str, model: Path, threads: int | None) -> Running:
    """PyTorch with what users put around it: nothing (`eager`), 16 bits (`half`), `compile`, or the official M x M (`mxm`).

    What PyTorch does by itself stays as it is: on a GPU, fp32 convolutions in TF32.
    """
    import torch

    from sanrt.runtime.backends.torch import call, network

    torch.set_num_threads(threads or machine.cores())
    net = network(model, PAPER_REGIONS)[0].to(device)
    function: Callable[[Tensor], Tensor] = net
    precision = Precision.FP32
    if variant == "half":
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        precision = Precision.BF16 if device == "cpu" else Precision.FP16
        half = torch.bfloat16 if device == "cpu" else torch.float16

        def function(x: Tensor) -> Tensor:
            with torch.autocast(device, half):
                y: Tensor = net(x.to(memory_format=torch.channels_last))
            return y.float().contiguous()
    elif variant == "compile":
        function = torch.compile(net, dynamic=False)
    elif variant == "mxm":
        for group in net.groups:
            setattr(group.soca, "forward", partial(centred_by_matrix, group.soca))  # noqa: B010

    def infer(x: Array) -> Array:
        output: Array = call(lambda x: [function(x.to(device)).cpu()], x)[0]
        return output

    on = "CPU" if device == "cpu" else torch.cuda.get_device_name()
    return Running(infer, precision, f"torch on {on}", device == "cuda")


def centred_by_matrix(soca: Any, features: Tensor) -> Tensor:
    """SOCA with Sigma = X Ibar X^T as formula 6 is written: Ibar = (I - 11^T / M) / M is formed, M x M for M pixels."""
    import torch

    x = features.flatten(2)
    pixels = x.shape[2]
    one = torch.eye(pixels, device=x.device)
    centring = (one - torch.ones_like(one) / pixels) / pixels
    gated: Tensor = features * soca.gate(x @ centring @ x.transpose(1, 2))
    return gated


def matrix_bytes(size: Size) -> int:
    """Bytes that the M x M covariance needs."""
    return CENTRING_COPIES * 4 * size.pixels**2


def open_onnxruntime_plain(model: Path, threads: int | None) -> Running:
    """ONNX Runtime on the exported file as it is."""
    from sanrt.runtime.backends.onnxruntime import open_session

    session = open_session(model, model, RunOptions(threads=threads))
    return Running(lambda x: session.run(None, {"input": x})[0], Precision.FP32, "onnxruntime on CPU")


def open_openvino_plain(model: Path, threads: int | None) -> Running:
    """OpenVINO on the exported file as it is; it chooses the precision by itself."""
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads or machine.cores()})
    names = {"f32": Precision.FP32, "bf16": Precision.BF16, "f16": Precision.FP16}
    precision = names[compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()]
    return Running(lambda x: compiled(x)[0], precision, "openvino on CPU")


def baselines() -> Iterator[Contender]:
    """The ways of running the network that sanrt's backends are compared with."""
    yield Contender("torch-bf16", partial(open_torch, "half", "cpu"))
    yield Contender("torch-compile", partial(open_torch, "compile", "cpu"), slow_to_start=True)
    yield Contender("torch-mxm", partial(open_torch, "mxm", "cpu"), matrix_bytes)
    yield Contender("onnxruntime-plain", open_onnxruntime_plain)
    yield Contender("openvino-plain", open_openvino_plain)
    yield Contender("gpu-torch", partial(open_torch, "eager", "cuda"), needs_gpu=True)
    yield Contender("gpu-torch-fp16", partial(open_torch, "half", "cuda"), needs_gpu=True)
    yield Contender("gpu-torch-compile", partial(open_torch, "compile", "cuda"), needs_gpu=True, slow_to_start=True)
    yield Contender("gpu-torch-mxm", partial(open_torch, "mxm", "cuda"), matrix_bytes, needs_gpu=True)


BASELINES = {each.name: each for each in baselines()}
"""The baselines by name, as `--backend` takes them."""


def chosen(names: list[str], precisions: list[Precision]) -> list[Contender]:
    """The named contenders in each precision, or everything that is installed; raises UsageError for an unknown name."""
    known = (AUTO, *backend_names(), *BASELINES)
    if unknown := set(names) - set(known):
        raise UsageError(f"unknown backend {min(unknown)!r}; expected {', '.join(known)}")
    names = list(dict.fromkeys(names)) or [name for name in known if runs_here(name)]
    contenders = []
    for name in names:
        wanted = list(dict.fromkeys(precisions)) or own_precisions(name)
        contenders += [BASELINES[name]] if name in BASELINES else [in_precision(name, each) for each in wanted]
    return contenders


def runs_here(name: str) -> bool:
    """Whether a contender takes part unasked: what is behind it is installed, and starts within seconds."""
    if name not in BASELINES:
        return name == AUTO or status(name).usable
    baseline = BASELINES[name]
    there = events_usable() if baseline.needs_gpu else status(name.split("-")[0]).usable
    return there and not baseline.slow_to_start
