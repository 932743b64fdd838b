"""The CUDA kernels against what the hardware allows and against PyTorch: `python benchmarks/kernels.py`.

Bytes and operations are counted first; then each kernel is timed against its floor: SOCA's gate against one read of the
map at the bandwidth of a copy, region attention against the rate of the exponential. Everything is timed inside a CUDA
graph that goes through more maps than the second-level cache holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sanrt.errors import SanrtError
from sanrt.kernels.cuda.operators import attend, edges, region_attention, soca_gate
from sanrt.kernels.cuda.soca import SocaLaunch
from sanrt.model.san import SAN
from sanrt.model.soca import SOCA, covariance
from sanrt.model.spec import Architecture
from sanrt.runtime.backends.torch_cuda import CudaNetwork

SIZES = (180, 320), (360, 640), (720, 1280)
CHANNELS, REGIONS, STEPS = 64, 2, 5
CACHE = 256 * 2**20
"""Bytes that no GPU's second-level cache holds."""
EXPONENTIALS = 16
"""Per multiprocessor and clock, on every architecture from sm_80 to sm_120."""
REPEATS = 20


@dataclass(frozen=True)
class Row:
    """One operator on one size; times in microseconds."""

    name: str
    height: int
    width: int
    work: str
    floor: float
    kernel: float
    experimental: float
    pytorch: float

    def __str__(self) -> str:
        ratios = f"{self.kernel / self.floor:6.2f} x floor {self.pytorch / self.kernel:6.2f} x faster"
        times = f"floor {self.floor:9.1f}  kernel {self.kernel:9.1f}  experimental {self.experimental:9.1f}"
        times += f"  pytorch {self.pytorch:9.1f} us"
        after = f"(experimental {self.experimental / self.floor:.2f} x floor)"
        return f"{self.name:<10} {self.height:>4} x {self.width:<4} {self.work:<34} {times}  {ratios} {after}"


def main() -> int:
    """Print a row for each operator and size, then the whole network and its kernels; 1 without a GPU."""
    if not torch.cuda.is_available():
        print(
            "benchmarks/kernels.py: no CUDA GPU here (or a PyTorch built without CUDA); nothing was measured",
            file=sys.stderr,
        )
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, fp16, channels-last, batch 1")
    try:
        with torch.inference_mode():
            for height, width in SIZES:
                print(soca_row(height, width), flush=True)
                print(attention_row(height, width), flush=True)
            print_network(180, 320)
    except SanrtError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def soca_row(height: int, width: int) -> Row:
    """The gate of one map, statistics and all."""
    module = SOCA(CHANNELS, 16, STEPS).to("cuda", torch.float16)
    maps = cold(CHANNELS, height, width)
    launch = SocaLaunch.of(maps[0])
    read = maps[0].nbytes + 8 * launch.blocks * launch.partials[2]
    products = 4 * CHANNELS**2 * launch.pixels
    targets = [torch.empty_like(x) for x in maps]
    copy = timed([partial(y.copy_, x) for x, y in zip(maps, targets, strict=True)])
    weights = module.down.weight, module.down.bias, module.up.weight, module.up.bias
    kernel, experimental = (timed([partial(soca_gate, x, *weights, STEPS, way) for x in maps]) for way in (False, True))
    pytorch = timed([partial(plain_gate, module, x) for x in maps])
    return Row(
        "soca", height, width, f"{read / 1e6:.1f} MB, {products / 1e9:.2f} GFLOP", copy / 2, kernel, experimental, pytorch
    )


def attention_row(height: int, width: int) -> Row:
    """Region attention of one map of queries, keys and values."""
    maps = cold(3 * CHANNELS // 8, height, width)
    cells = [(b - a) * (d - c) for a, b in edges(height, REGIONS) for c, d in edges(width, REGIONS)]
    keys = [((b - a) // 2) * ((d - c) // 2) for a, b in edges(height, REGIONS) for c, d in edges(width, REGIONS)]
    exponentials = sum(q * k for q, k in zip(cells, keys, strict=True))
    floor = exponentials / exponential_rate() * 1e6
    kernel, experimental = (timed([partial(region_attention, x, REGIONS, way) for x in maps[:4]]) for way in (False, True))
    pytorch = timed([partial(plain_attention, x) for x in maps[:4]])
    return Row(
        "attention",
        height,
        width,
        f"{maps[0].nbytes / 1e6:.1f} MB, {exponentials / 1e9:.2f} G exp",
        floor,
        kernel,
        experimental,
        pytorch,
    )


def plain_gate(module: SOCA, x: Tensor) -> Tensor:
    """The gate as the reference network computes it."""
    return module.gate(covariance(x))


def plain_attention(maps: Tensor) -> Tensor:
    """Attention as the reference network computes it: scaled_dot_product_attention in each region."""
    rows, columns = (edges(size, REGIONS) for size in maps.shape[2:])
    return torch.cat([torch.cat([attend(maps[:, :, a:b, c:d]) for c, d in columns], 3) for a, b in rows], 2)


def print_network(height: int, width: int) -> None:
    """The paper's network x4: the fast path against torch.compile, and where the fast path's time goes."""
    net = SAN(Architecture(scale=4, groups=20, blocks=10, channels=CHANNELS, reduction=16)).eval().requires_grad_(False)
    x = 255 * torch.rand(1, 3, height, width, device="cuda")
    fast = CudaNetwork(net)
    half: nn.Module = net.to("cuda", torch.float16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    compiled = torch.compile(half, mode="reduce-overhead", dynamic=False)
    given = x.half().contiguous(memory_format=torch.channels_last)
    ours, theirs = elapsed(lambda: fast(x)) / 1e3, elapsed(lambda: compiled(given)) / 1e3
    ratio = f"{theirs / ours:.2f} x faster"
    print(f"network    {height:>4} x {width:<4} sanrt {ours:.2f} ms  torch.compile {theirs:.2f} ms  {ratio}")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fast(x)
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=15, max_name_column_width=60))


def cold(channels: int, height: int, width: int) -> list[Tensor]:
    """Random maps, more of them than the cache holds."""
    shape, count = (1, channels, height, width), max(1, CACHE // (2 * channels * height * width))
    maps = (torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(count))
    return [x.contiguous(memory_format=torch.channels_last) for x in maps]


def timed(calls: list[Callable[[], Any]]) -> float:
    """Microseconds of one call: all of them captured in one CUDA graph, the fastest of several replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return elapsed(graph.replay) / len(calls)


def elapsed(call: Callable[[], Any]) -> float:
    """Microseconds on the GPU, the fastest of several after three to warm up."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times: list[float] = []
    for _ in range(3 + REPEATS):
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return min(times[3:])


def exponential_rate() -> float:
    """Exponentials per second at the boost clock."""
    from cuda.bindings import driver

    clock = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CLOCK_RATE
    _, kilohertz = driver.cuDeviceGetAttribute(clock, torch.cuda.current_device())
    return EXPONENTIALS * torch.cuda.get_device_properties(0).multi_processor_count * float(kilohertz) * 1e3


if __name__ == "__main__":
    sys.exit(main())
