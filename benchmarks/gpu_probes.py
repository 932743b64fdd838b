"""What the steps of `benchmarks/gpu.py` measure in processes of their own: `python -m benchmarks.gpu_probes NAME [DEVICE]`.

Each prints what it found as its last line, and exits with an error where a promise is not kept. DEVICE is `cuda`; with
`cpu` the same code runs small on the processor, as a rehearsal.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from sanrt.errors import OutOfMemoryError, SanrtError
from sanrt.model.spec import Architecture

if TYPE_CHECKING:
    from torch import Tensor

    from sanrt.model.san import SAN
    from sanrt.runtime.backends.tensorrt.device import Device

PAPER = Architecture(scale=4, groups=20, blocks=10, channels=64, reduction=16)
SIZES = (90, 160), (180, 320), (270, 480), (360, 640), (540, 960), (720, 1280)
ODD = (1, 16, 7, 9), (2, 48, 33, 65), (1, 64, 101, 203)
"""Tiny maps with tails in every direction, for tools that run a hundred times slower."""
MERGED = 1, 16, 131, 133
"""The smallest sort of map whose gate has its statistics merged by a launch of their own."""


def ceilings(device: str) -> str:
    """The rate of an fp16 product and of a copy: what every other figure is a share of."""
    import torch

    side, count = (8192, 2**32) if device == "cuda" else (256, 2**20)
    a, b = (torch.rand(side, side, device=device).to(torch.float16) for _ in range(2))
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = 2 * side**3 / seconds(lambda: torch.mm(a, b), device)
    copy = 2 * count / seconds(lambda: target.copy_(source), device)
    return f"{product / 1e12:.1f} TFLOP/s of fp16 product, {copy / 1e9:.0f} GB/s of copy"


def device_layer(device: str) -> str:
    """All that TensorRT needs of the CUDA layer, with another thread allocating meanwhile."""
    import torch

    from sanrt.runtime.backends.tensorrt.device import open_device

    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    with open_device(0) as gpu:
        return exercised(gpu, stream)


def exercised(gpu: Device, foreign_stream: int) -> str:
    """Copies, boxes, a graph, another stream, and an allocation that cannot be: raises AssertionError where one is wrong."""
    from sanrt.runtime.backends.tensorrt.device import Grid

    stream, done = gpu.create_stream(), Event()

    def allocate() -> None:
        gpu.activate()
        while not done.is_set():
            gpu.free(gpu.allocate(1 << 20))

    other = Thread(target=allocate)
    other.start()
    try:
        values = np.arange(2 * 6 * 5, dtype=np.float32)
        host, back = gpu.allocate_host(values.nbytes), gpu.allocate_host(values.nbytes)
        host[:] = values.view(np.uint8)
        a, b = (gpu.allocate(values.nbytes) for _ in range(2))
        gpu.to_device(a, host, stream)
        gpu.follow(stream, foreign_stream)
        gpu.copy(b, a, values.nbytes, stream)
        box = Grid(a, 2, 6, 5), (0, 0), Grid(a, 2, 6, 5), (3, 2)
        gpu.copy_box(Grid(b, 2, 6, 5), box[1], box[2], box[3], 3, 3, stream)
        gpu.to_host(back, b, stream)
        gpu.synchronize(stream)
        expected = values.reshape(2, 6, 5).copy()
        expected[:, :3, :3] = values.reshape(2, 6, 5)[:, 3:6, 2:5]
        assert np.array_equal(back.view(np.float32).reshape(2, 6, 5), expected), "a box was copied wrongly"
        told = "no graphs"
        if gpu.graphs:
            graph = gpu.capture(stream, lambda: gpu.copy(b, a, values.nbytes, stream))
            gpu.launch(graph, stream)
            gpu.to_host(back, b, stream)
            gpu.synchronize(stream)
            assert np.array_equal(back.view(np.float32), values), "a graph did not do its work"
            gpu.destroy_graph(graph)
            told = "a graph captured and launched"
        try:
            gpu.allocate(1 << 40)
        except OutOfMemoryError:
            pass
        else:
            raise AssertionError("1 TB was allocated")
        gpu.free(gpu.allocate(1 << 20))
        for address in (a, b):
            gpu.free(address)
        for buffer in (host, back):
            gpu.free_host(buffer)
    finally:
        done.set()
        other.join()
        gpu.destroy_stream(stream)
    return f"{gpu.name}: boxes, {told}, another stream followed, 1 TB refused and gone on, beside a thread that allocates"


def kernels(device: str) -> str:
    """Every kernel once on odd shapes, the experimental ones too, for compute-sanitizer."""
    import torch

    from sanrt.kernels.cuda.operators import region_attention, residual, soca_gate

    count = 0
    for batch, channels, height, width in (*ODD, MERGED):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.rand(batch, channels, height, width, device=device).to(dtype)
            hidden = channels // 4
            down, up = (torch.rand(n, m, 1, 1, device=device).to(dtype) for n, m in ((hidden, channels), (channels, hidden)))
            weights = down, down[:, 0, 0, 0].contiguous(), up, up[:, 0, 0, 0].contiguous()
            soca_gate(x, *weights, 5)
            soca_gate(x, *weights, 5, experimental=True)
            count += 2
            if (batch, channels, height, width) in ODD:
                maps = torch.rand(batch, 3 * 8, height, width, device=device).to(dtype)
                region_attention(maps, 2, experimental=dtype != torch.float32)
                region_attention(maps, 2)
                residual(x, x[0, :, 0, 0].contiguous(), x)
                count += 3
    if device == "cuda":
        torch.cuda.synchronize()
    return f"{count} launches on odd shapes"


def one_of_each(device: str) -> str:
    """One convolution, and attention and gate both ways, at 320 x 180, for ncu."""
    import torch

    from sanrt.kernels.cuda.operators import region_attention, soca_gate

    height, width = (180, 320) if device == "cuda" else (18, 32)
    x, weight = torch.rand(1, 64, height, width, device=device), torch.rand(64, 64, 3, 3, device=device)
    x, weight = (t.half().contiguous(memory_format=torch.channels_last) for t in (x, weight))
    torch.nn.functional.conv2d(x, weight, padding=1)
    maps = torch.rand(1, 24, height, width, device=device).half()
    down, up = (torch.rand(n, m, 1, 1, device=device).half() for n, m in ((4, 64), (64, 4)))
    for experimental in (False, True):
        region_attention(maps, 2, experimental)
        soca_gate(x, down, down[:, 0, 0, 0].contiguous(), up, up[:, 0, 0, 0].contiguous(), 5, experimental)
    return "a convolution, and attention and gate both ways, were launched"


def experiments(device: str) -> str:
    """The paper's network with each experiment alone and with all, beside the measured kernels and torch.compile.

    The table has a row for each: milliseconds, and PSNR to fp32. What cannot be had says why.
    """
    import torch

    from sanrt.kernels.cuda.experimental import Experiment
    from sanrt.runtime.backends.torch_cuda import CudaNetwork, prepared, without_tf32

    net, (height, width) = (
        (network(PAPER), (180, 320)) if device == "cuda" else (network(Architecture(4, 1, 1, 16, 4)), (18, 32))
    )
    x = 255 * torch.rand(1, 3, height, width, device=device)
    with without_tf32():
        exact = net.to(device)(x).double()
    found: list[str] = []

    def add(name: str, make: Callable[[], Callable[[Tensor], Tensor]]) -> None:
        try:
            run = make()
            loss = (run(x).double() - exact).square().mean().clamp_min(1e-12)
            psnr = float(10 * torch.log10(255**2 / loss))
            found.append(f"{name} {1e3 * seconds(partial(run, x), device):.2f} ms {psnr:.1f} dB")
        except SanrtError as error:
            found.append(f"{name}: {error}")
        print(found[-1], flush=True)

    def ours(*chosen: Experiment) -> Callable[[Tensor], Tensor]:
        if device == "cuda":
            return CudaNetwork(net, experiments=chosen)
        return prepared(net, torch.bfloat16, experiments=chosen)

    def compiled() -> Callable[[Tensor], Tensor]:
        half = copy.deepcopy(net).to(device, torch.float16 if device == "cuda" else torch.bfloat16)
        half = half.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        how: dict[str, Any] = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "eager"}
        run: Callable[[Tensor], Tensor] = torch.compile(half, dynamic=False, **how)
        kind = half.head.weight.dtype
        return lambda x: run(x.to(kind, memory_format=torch.channels_last)).clone()

    add("measured", ours)
    for experiment in Experiment:
        add(experiment, partial(ours, experiment))
    add("all", partial(ours, *Experiment))
    add("torch.compile", compiled)
    return "; ".join(found)


def cudnn_graph(device: str) -> str:
    """cuDNN's convolution with bias and sums in one kernel, against PyTorch's convolution and the passes after it."""
    import torch

    from sanrt.kernels.cuda.operators import residual, summed_convolution

    found = []
    for height, width in ((180, 320), (720, 1280)) if device == "cuda" else ((18, 32),):
        x, *maps = (torch.rand(1, 64, height, width, device=device).half() for _ in range(3))
        weight, bias = torch.rand(64, 64, 3, 3, device=device).half() / 600, torch.rand(64, device=device).half()
        x, weight, *maps = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, *maps))

        def passes(maps: list[Tensor], x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            y: Tensor = residual(torch.nn.functional.conv2d(x, weight, None, padding=1), bias, maps[0])
            return sum(maps[1:], y)

        for sums in (maps[:1], maps):
            fused, plain = partial(summed_convolution, x, weight, bias, sums), partial(passes, sums)
            assert (fused() - plain()).abs().max() < 0.05, f"cuDNN's graph of {len(sums)} sums computes something else"
            times = [1e6 * seconds(call, device) for call in (fused, plain)]
            found.append(f"{width} x {height}, {len(sums)} sums: {times[0]:.1f} us (in passes {times[1]:.1f})")
    return "; ".join(found)


def autotuned_group(device: str) -> str:
    """One residual group under torch.compile's longest search against eager, and whether it computes the same."""
    import torch

    group, x = paper_part(device)
    compiled: Any = torch.compile(group, mode="max-autotune" if device == "cuda" else "default", dynamic=False)
    worst = float((compiled(x) - group(x)).abs().max())
    times = [1e3 * seconds(partial(call, x), device) for call in (group, compiled)]
    return f"one group: eager {times[0]:.2f} ms, max-autotune {times[1]:.2f} ms, at most {worst:.3g} apart"


def little_memory(device: str) -> str:
    """Six sizes one after another in a small share of the memory: recordings are dropped, not pictures."""
    import torch

    from sanrt.runtime.backends.torch_cuda import CudaNetwork, Graphs, prepared

    net, smaller = network(Architecture(4, 4, 4, 32, 8)), 8 if device == "cpu" else 1
    sizes = [(height // smaller, width // smaller) for height, width in SIZES]
    run: Callable[[Tensor, int], Tensor]
    if device == "cpu":
        run = Graphs(lambda x, k: prepared(net, torch.float32), lambda: None, 2)
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 5 * 2**30 / total))
        run = CudaNetwork(net)
    with torch.inference_mode():
        for _ in range(2):
            for height, width in sizes:
                y = run(255 * torch.rand(1, 3, height, width, device=device), 2)
                assert torch.isfinite(y).all(), f"{width} x {height} is not finite"
    return f"{2 * len(sizes)} pictures of {len(sizes)} sizes in 5 GiB"


def streamed(device: str) -> str:
    """Exact streaming against the whole picture, and with more regions, on the GPU's own stages."""
    import torch

    from sanrt.model.spec import ModelSpec
    from sanrt.runtime.backends.torch_cuda import TorchStages
    from sanrt.runtime.tiling.featuremaps import FeatureStore
    from sanrt.runtime.tiling.streaming import ArraySource, Streaming

    arch = Architecture(4, 4, 4, 32, 8)
    net, (height, width) = network(arch), (720, 1280) if device == "cuda" else (48, 64)
    x, found = 255 * torch.rand(1, 3, height, width), []
    stages = TorchStages(net, torch.device(device), torch.float32)
    for regions in (2, 4):
        y = np.empty((1, 3, height * 4, width * 4), np.float32)

        def sink(box: Any, part: Any, y: Any = y) -> None:
            y[:, :, box.top : box.bottom, box.left : box.right] = part

        spec = ModelSpec(arch, "0" * 64, "seeded", 5, regions=regions)
        store = FeatureStore(2**32, device=stages.maps, device_memory=2**32)
        started = time.perf_counter()
        Streaming(stages, spec, ArraySource(x.numpy()), store, max(16, height // 3), regions).run(sink)
        took = time.perf_counter() - started
        net.attention.regions = regions
        with torch.inference_mode():
            whole = net.to(device)(x.to(device)).cpu().numpy()
        worst = float(np.abs(whole - y).max())
        assert worst < 0.05, f"{regions} x {regions} regions: {worst:.3g} of 255 apart"
        found.append(f"{regions} x {regions} regions {took:.2f} s, at most {worst:.2g} of 255 apart")
    return f"{width} x {height} exactly: " + "; ".join(found)


def rtx_here(device: str) -> str:
    """Whether TensorRT-RTX runs on this GPU: the validity of engines and a build for the GPU at hand."""
    from sanrt.export.engine import build_engine
    from sanrt.runtime.artifacts.engines import BuildOptions, read_engine_bytes
    from sanrt.runtime.artifacts.flavors import Flavor
    from sanrt.runtime.artifacts.sizes import Profile, Size
    from sanrt.runtime.backends.tensorrt.library import TensorRTLog, engine_from_bytes, import_flavor

    trt, answers = import_flavor(Flavor.RTX), []
    with TemporaryDirectory() as folder:
        model = exported(Path(folder), Architecture(2, 1, 1, 32, 8))
        for gpus in ((), ("sm80",), ("sm89",)):
            options = BuildOptions(Flavor.RTX, gpus=gpus, profiles=(Profile(max=Size(1, 270, 480)),))
            info, _ = build_engine(model, options, Path(folder) / f"{'-'.join(gpus)}x.engine")
            trt_log, content = TensorRTLog(trt), read_engine_bytes(info)
            runtime = trt.Runtime(trt_log.logger)
            validity, why = runtime.get_engine_validity(content[: runtime.engine_header_size])
            opened = engine_from_bytes(trt, trt_log, content) is not None
            answers.append(f"{info.identity.gpu}: {validity} {why}, {'opened' if opened else trt_log.first}")
    return "; ".join(answers)


PROBES: dict[str, Callable[[str], str]] = {
    probe.__name__: probe
    for probe in (
        ceilings,
        device_layer,
        kernels,
        one_of_each,
        cudnn_graph,
        experiments,
        autotuned_group,
        little_memory,
        streamed,
        rtx_here,
    )
}


def network(arch: Architecture) -> SAN:
    """A network of seeded weights whose attention and skips count."""
    import torch

    from sanrt.model.san import SAN

    torch.manual_seed(0)
    net = SAN(arch).eval().requires_grad_(False)
    torch.nn.init.constant_(net.gamma, 0.3)
    return net


def exported(folder: Path, arch: Architecture) -> Path:
    """The same as an ONNX."""
    from sanrt.model.graph import san_model
    from sanrt.model.spec import ModelSpec

    weights = {name: tensor.numpy() for name, tensor in network(arch).state_dict().items()}
    path = folder / "san_x2.onnx"
    path.write_bytes(san_model(ModelSpec(arch, "0" * 64, "seeded", 5), weights).SerializeToString())
    return path


def paper_part(device: str) -> tuple[Any, Tensor]:
    """A group of the paper's network, and a map that it takes; in half precision on a GPU."""
    import torch

    arch = PAPER if device == "cuda" else Architecture(4, 1, 1, 16, 4)
    dtype = torch.float16 if device == "cuda" else torch.float32
    group = network(Architecture(4, 1, arch.blocks, arch.channels, arch.reduction)).groups[0]
    height, width = (180, 320) if device == "cuda" else (18, 32)
    group = group.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return group, torch.rand(1, arch.channels, height, width, device=device).to(dtype)


def seconds(call: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest of ten runs after three; by CUDA events on a GPU."""
    import torch

    times: list[float] = []
    for _ in range(13):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return min(times[3:])


def main(name: str, device: str = "cuda") -> int:
    """Run a probe; its error is one line."""
    import torch

    try:
        with torch.inference_mode():
            print(PROBES[name](device))
    except (SanrtError, AssertionError, ImportError) as error:
        print(f"{name}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
