"""SOCA's kernels as ahead-of-time TensorRT plugins: the engine holds their PTX and runs without Python.

TensorRT-RTX has no such plugins, full TensorRT has from 10.13 on.

Two plugins, because a plugin launches one kernel: `sanrt::soca_statistics` and `sanrt::soca_gate`, the two launches of
soca.py. Their PTX is compiled for the GPU at hand when the engine is loaded. Region attention has no plugin: TensorRT fuses
it itself (sanrt.model.graph writes it in that form).
Compiled, and registered with TensorRT's bindings; never run on a GPU.

Annotations are evaluated here (no `from __future__ import annotations`): TensorRT reads them off the functions.
"""

from typing import Any

import numpy as np

from sanrt.errors import BackendError
from sanrt.kernels.cuda.nvrtc import ARCHITECTURES, CudaSource
from sanrt.kernels.cuda.soca import CHANNELS, GATE_THREADS, max_merged_rows, partial_size
from sanrt.wording import option

NAMESPACE = "sanrt"


def register(trt: Any) -> None:
    """Register both plugins with a TensorRT module, once; raises BackendError for one that cannot hold them.

    They are then what an ONNX node of domain `sanrt` and type `soca_statistics` or `soca_gate` stands for, as
    `sanrt.model.graph` writes them with `GraphOptions(kernels=True)`.
    """
    if not hasattr(trt, "QuickPluginCreationRequest") or not hasattr(trt, "IPluginV3QuickAOTBuild"):
        raise BackendError(
            f"{option('kernels', 'fused')}: {trt.__name__} {getattr(trt, '__version__', '')} has no ahead-of-time plugins; "
            f"expected TensorRT 10.13 or later, not TensorRT-RTX; build with {option('kernels', 'none')}"
        )
    if trt_lacks_numpy(trt.__version__, np.__version__):
        raise BackendError(
            f"{option('kernels', 'fused')}: TensorRT {trt.__version__} cannot give plugins their numbers with NumPy "
            f"{np.__version__}; "
            f"pip install 'numpy<2.4', or TensorRT 11.2 or later, or build with {option('kernels', 'none')}"
        )
    import tensorrt.plugin as trtp

    if not hasattr(getattr(trtp.op, NAMESPACE, None), "soca_statistics"):
        register_statistics(trt, trtp)
        register_gate(trt, trtp)


def trt_lacks_numpy(trt: str, numpy: str) -> bool:
    """Whether TensorRT's bindings make a number of an array of one, as before 11.2, which NumPy refuses from 2.4 on."""
    before, since = (tuple(int(part) for part in version.split(".")[:2]) for version in (trt, numpy))
    return before < (11, 2) and since >= (2, 4)


def soca_source(trt: Any, dtype: Any, channels: int) -> CudaSource:
    """soca.cu for a TensorRT tensor's number format; raises BackendError for one that it does not support."""
    scalars = {trt.DataType.HALF: "Half", trt.DataType.BF16: "BFloat", trt.DataType.FLOAT: "float"}
    if dtype not in scalars or channels not in CHANNELS:
        raise BackendError(
            f"{option('kernels', 'fused')}: SOCA over {channels} channels of {dtype}; expected "
            f"{', '.join(map(str, CHANNELS))} channels "
            f"of fp16, bf16 or fp32; build with {option('kernels', 'none')}"
        )
    return CudaSource("soca", (f"SCALAR={scalars[dtype]}", f"CHANNELS={channels}"))


def portable_ptx(source: CudaSource) -> bytes:
    """PTX for the oldest architecture, which later ones run too."""
    return source.ptx(ARCHITECTURES[0])


def register_statistics(trt: Any, trtp: Any) -> None:
    """soca_statistics: x (B, C, H, W) -> float32 partials (B, blocks, partial_size), and an int32 that is not used.

    There are max_merged_rows blocks whatever the size, some of them perhaps without pixels, and soca_gate merges all of
    them: groups would need counters that somebody has set to zero.
    """

    def description(x: trtp.TensorDesc, channels: int) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        partials = (x.shape_expr[0], max_merged_rows(channels), partial_size(channels))
        return trtp.from_shape_expr(partials, dtype=trt.float32), trtp.from_shape_expr((1,), dtype=trt.int32)

    def formats(
        x: trtp.TensorDesc, channels: int, outputs: tuple[trtp.TensorDesc, trtp.TensorDesc]
    ) -> list[trtp.AutoTuneCombination]:
        layouts = "LINEAR" if x.dtype == trt.DataType.FLOAT or channels % 8 else "LINEAR*HWC8"
        names = {trt.DataType.HALF: "FP16", trt.DataType.BF16: "BF16", trt.DataType.FLOAT: "FP32"}
        return [trtp.AutoTuneCombination(f"{names[x.dtype]}, FP32, INT32", f"{layouts}, LINEAR, LINEAR")]

    def implementation(
        x: trtp.TensorDesc, channels: int, outputs: tuple[trtp.TensorDesc, trtp.TensorDesc], tactic: int
    ) -> tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        source = soca_source(trt, x.dtype, channels)
        batch, _, height, width = (x.shape_expr[i] for i in range(4))
        launch = trtp.KernelLaunchParams(grid_x=max_merged_rows(channels), grid_y=batch, block_x=4 * channels)
        kernel = "soca_statistics_nhwc" if x.format == trt.TensorFormat.HWC8 else "soca_statistics_nchw"
        return kernel, portable_ptx(source), launch, integers(trtp, height * width, 1)

    name = f"{NAMESPACE}::soca_statistics"
    trtp.register(name)(description)
    trtp.autotune(name)(formats)
    trtp.aot_impl(name)(implementation)


def register_gate(trt: Any, trtp: Any) -> None:
    """soca_gate: partials, W_D (h, C, 1, 1), b_D, W_U (C, h, 1, 1), b_U -> gates (B, C, 1, 1) of the weights' dtype."""

    def description(
        partials: trtp.TensorDesc,
        down: trtp.TensorDesc,
        down_bias: trtp.TensorDesc,
        up: trtp.TensorDesc,
        up_bias: trtp.TensorDesc,
        channels: int,
        hidden: int,
        iterations: int,
    ) -> trtp.TensorDesc:
        return trtp.from_shape_expr((partials.shape_expr[0], channels, 1, 1), dtype=down.dtype)

    def implementation(
        partials: trtp.TensorDesc,
        down: trtp.TensorDesc,
        down_bias: trtp.TensorDesc,
        up: trtp.TensorDesc,
        up_bias: trtp.TensorDesc,
        channels: int,
        hidden: int,
        iterations: int,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        source = soca_source(trt, down.dtype, channels)
        launch = trtp.KernelLaunchParams(grid_x=partials.shape_expr[0], block_x=GATE_THREADS)
        return (
            "soca_gate",
            portable_ptx(source),
            launch,
            integers(trtp, max_merged_rows(channels), max_merged_rows(channels), iterations, hidden),
        )

    name = f"{NAMESPACE}::soca_gate"
    trtp.register(name)(description)
    trtp.aot_impl(name)(implementation)


def integers(trtp: Any, *values: Any) -> Any:
    """A kernel's integer arguments, which TensorRT passes after the inputs and before the outputs."""
    arguments = trtp.SymIntExprs(len(values))
    for i, value in enumerate(values):
        arguments[i] = trtp.SymInt32(value)
    return arguments
