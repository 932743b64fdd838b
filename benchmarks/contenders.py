"""The ways of running the network that `benchmarks/latency.py` compares: sanrt's backends, and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Size, events_usable, free_on_gpu, peak_memory, timed, timed_by_events
from sanrt.arrays import Array
from sanrt.errors import UsageError
from sanrt.model.spec import Precision
from sanrt.runtime import host as machine
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import backend_names, load_unguarded, status
from sanrt.runtime.host import free_host_memory
from sanrt.runtime.tiling.plan import PAPER_REGIONS

if TYPE_CHECKING:
    from torch import Tensor

AUTO = "auto"
"""The row that the others are compared with."""
STEADY, STEADY_RUNS, MOST_WARM_UPS = 1.1, 3, 20
"""Warm-up ends when the last STEADY_RUNS times lie within this ratio, or after this many."""
LONG = 5.0
"""Seconds of a run that cold caches and a processor at rest, a few hundredths of a second, do not change."""
CENTRING_COPIES = 3
"""M x M matrices that exist at once while the official formula is evaluated."""


class LeftOut(Exception):
    """A contender cannot take part at a size; no failure."""


@dataclass(frozen=True)
class Running:
    """A loaded network."""

    infer: Callable[[Array], Array]
    """float32 (1, 3, H, W) -> (1, 3, sH, sW)."""
    precision: Precision
    """The type of convolutions and attention, as it runs here."""
    on: str
    """The library that runs it, and the device: `torch on CPU`."""
    on_gpu: bool = False
    infer_with_regions: Callable[[Array, int], Array] | None = None
    """The same with k x k attention regions, as `Backend.infer_with_regions`; None where it has the paper's only."""


@dataclass(frozen=True)
class Contender:
    """One way of running the network."""

    name: str
    open: Callable[[Path, int | None], Running]
    """(model, threads), called in the contender's own process."""
    needed: Callable[[Size], int] | None = None
    """Bytes without which it is left out at a size."""
    needs_gpu: bool = False
    slow_to_start: bool = False
    """It only takes part when asked for."""


class Session:
    """A contender in its own process: warms up, then runs the same picture again and again."""

    def __init__(self, open_: Callable[[Path, int | None], Running], model: Path, threads: int | None) -> None:
        free = free_on_gpu()
        self.running = open_(model, threads)
        self.free_at_first = free if self.running.on_gpu else None
        self.time = timed_by_events if self.running.on_gpu and events_usable() else timed

    def facts(self) -> tuple[Precision, str]:
        """Precision, and what runs it."""
        return self.running.precision, self.running.on

    def takes(self, regions: int) -> bool:
        """Whether it runs with k x k regions."""
        return regions == PAPER_REGIONS or self.running.infer_with_regions is not None

    def warm_up(self, picture: Array, patience: float, regions: int = PAPER_REGIONS) -> Array:
        """Run a new picture until its times are steady, or for `patience` seconds; its output."""
        self.picture, self.infer = picture, self.running.infer
        if regions != PAPER_REGIONS and (other := self.running.infer_with_regions):
            self.infer = lambda picture: other(picture, regions)
        times = [self.run()]
        while not steady(times) and sum(times) < patience:
            times.append(self.run())
        self.long = times[-1] > LONG
        return self.output

    def turn(self, seconds: float) -> list[float]:
        """Times of runs one after the other that together take `seconds`; unless they are LONG, the first does not count."""
        if not self.long:
            self.run()
        times = [self.run()]
        while sum(times) < seconds:
            times.append(self.run())
        return times

    def run(self) -> float:
        """Seconds of one run; backends return arrays on the host, so on a GPU both copies are in it."""

        def infer() -> None:
            self.output = self.infer(self.picture)

        return self.time(infer)

    def peak(self) -> int:
        """Largest resident size so far, bytes."""
        return peak_memory()

    def gpu_memory(self) -> int | None:
        """Bytes of the GPU's memory that are taken since before the model was loaded: pools keep their largest size."""
        now = free_on_gpu()
        return None if self.free_at_first is None or now is None else self.free_at_first - now


def steady(times: list[float]) -> bool:
    """Whether the last few times agree, or there are enough of them."""
    last = times[-STEADY_RUNS:]
    return len(times) >= MOST_WARM_UPS or (len(last) == STEADY_RUNS and max(last) <= STEADY * min(last))


def open_backend(name: str, precision: Precision | None, model: Path, threads: int | None) -> Running:
    """One of sanrt's backends, as `sanrt run` uses it."""
    backend = load_unguarded(name, model, RunOptions(threads=threads, precision=precision))
    on, on_gpu = f"{backend.name} on {backend.device}", backend.memory is not None
    return Running(backend.infer, backend.spec.precision, on, on_gpu, backend.infer_with_regions)


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


def in_precision(name: str, precision: Precision | None) -> Contender:
    """One of sanrt's backends; None is its own choice."""
    return Contender(f"{name} {precision}" if precision else name, partial(open_backend, name, precision))


def own_precisions(name: str) -> list[Precision | None]:
    """The precisions that a backend is measured in unless told: its own choice, and both where that is a choice of two."""
    fast = {"openvino": (Precision.BF16, {"AMX-BF16", "AVX512-BF16"}), "native": (Precision.INT16, {"AVX512-VNNI"})}
    precision, features = fast.get(name, (None, set[str]()))
    return [Precision.FP32, precision] if features & set(machine.cpu_features()) else [None]


def runs_here(name: str) -> bool:
    """Whether a contender takes part unasked: what is behind it is installed, and starts within seconds."""
    if name not in BASELINES:
        return name == AUTO or status(name).usable
    baseline = BASELINES[name]
    there = events_usable() if baseline.needs_gpu else status(name.split("-")[0]).usable
    return there and not baseline.slow_to_start


def require_memory(contender: Contender, size: Size) -> None:
    """Raise LeftOut where a contender's own matrices exceed the free memory of what it runs on."""
    needed = contender.needed(size) if contender.needed else 0
    free = (free_on_gpu() or 0) if contender.needs_gpu else free_host_memory()
    if needed > free:
        raise LeftOut(f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
