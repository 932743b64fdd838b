"""ONNX Runtime on an NVIDIA GPU: its CUDA provider with the pictures bound to device memory."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any, Self

import numpy as np

from sanrt.arrays import Array
from sanrt.errors import BackendError
from sanrt.extras import install_command
from sanrt.model.spec import GRAPH_PRECISIONS, Architecture, Attention, GraphOptions, Precision
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.models import read_spec, spec_in
from sanrt.runtime.artifacts.sizes import Limits
from sanrt.runtime.artifacts.variants import derived_model
from sanrt.runtime.backends.gpu import cuda_of, gpu_status
from sanrt.runtime.backends.onnxruntime import OnnxRuntimeStages, run_error, session_on
from sanrt.runtime.backends.protocol import BackendStatus, RunOptions, Stages, library_version, require_precision
from sanrt.wording import option

NAME = "onnxruntime-cuda"
PROVIDER = "CUDAExecutionProvider"
FUSED_MULTIPLE = 8


def status(device: int = 0) -> BackendStatus:
    """Whether the GPU build of ONNX Runtime is installed, alone, and a GPU with a driver for its CUDA is here."""
    installed = library_version("onnxruntime-gpu")
    cpu_build = library_version("onnxruntime") is not None
    if installed and cpu_build:
        reason = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other"
        remedy = f"pip uninstall -y onnxruntime onnxruntime-gpu && {install_command('gpu')}"
        return BackendStatus(NAME, installed, False, reason, remedy)
    if not installed:
        remedy = f"pip uninstall -y onnxruntime && {install_command('gpu')}" if cpu_build else install_command("gpu")
        return BackendStatus(NAME, None, False, "onnxruntime-gpu is not installed", remedy)
    return gpu_status(NAME, installed, device, cuda_of("onnxruntime", "capi/build_and_package_info.py"))


def load(model: Path, options: RunOptions) -> OnnxRuntimeCudaBackend:
    """Load an exported fp32 ONNX, or its typed variant for fp16 and bf16."""
    return OnnxRuntimeCudaBackend(model, options)


class OnnxRuntimeCudaBackend:
    """One session; the buffers of the last shape stay on the GPU."""

    name = NAME
    engine_digest = None
    infer_with_regions = None
    strips = None
    limits = Limits()

    def __init__(self, model: Path, options: RunOptions) -> None:
        require_precision(NAME, options, *GRAPH_PRECISIONS)
        precision = options.precision or Precision.FP32
        self.form = GraphOptions(attention=Attention.MULTI_HEAD, attention_width=fused_width(read_spec(model).architecture))
        graph = derived_model(model, replace(self.form, precision=precision, regions=options.regions))
        self.model, self.options = model, options
        self.streams = precision is Precision.FP32
        self.device = device_name(options.device)
        self.memory = machine.free_gpu_memory(options.device)
        self.session = open_cuda_session(graph, model, options)
        self.spec = replace(spec_in(BytesIO(graph), str(model)), precision=precision)
        self.binding = lru_cache(maxsize=1)(self.bind)

    def bind(self, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
        """Input and output buffers on the GPU for one shape, and the binding of both."""
        import onnxruntime

        scale = self.spec.architecture.scale
        shapes = {"input": shape, "output": (*shape[:2], shape[2] * scale, shape[3] * scale)}
        source, target = (
            onnxruntime.OrtValue.ortvalue_from_shape_and_type(s, np.float32, "cuda", self.options.device)
            for s in shapes.values()
        )
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("input", source)
        binding.bind_ortvalue_output("output", target)
        return binding, source, target

    def infer(self, pictures: Array) -> Array:
        try:
            binding, source, target = self.binding(pictures.shape)
            source.update_inplace(np.ascontiguousarray(pictures))
            self.session.run_with_iobinding(binding)
            output: Array = target.numpy()
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise run_error(error) from error
        return output

    def stages(self) -> Stages:
        """As every backend's; feature maps live on the host, so every stage copies its tile to the GPU and back."""
        if not self.streams:
            raise BackendError(
                f"{NAME} streams in fp32 only, {self.options.precision} was asked for; use {option('precision', 'fp32')}"
            )
        return OnnxRuntimeStages(self.model, self.options, self.form, open_cuda_session)

    def close(self) -> None:
        self.binding.cache_clear()
        self.session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fused_width(arch: Architecture) -> int:
    """Inner attention channels, padded to a multiple of 8 as ONNX Runtime's fused attention takes them.

    Without that it forms the scores of all pairs in memory, which in fp16 may overflow besides.
    """
    return FUSED_MULTIPLE * ceil(arch.attention_channels / FUSED_MULTIPLE)


def device_name(index: int) -> str:
    """The GPU's name; raises BackendError for an index that is none."""
    devices = machine.gpus().devices
    if not 0 <= index < len(devices):
        raise BackendError(f"GPU {index} is not there; the driver shows {len(devices)}, numbered from 0")
    return devices[index].name


def open_cuda_session(graph: bytes, model: Path, options: RunOptions) -> Any:
    """A session whose first provider is CUDA: onnxruntime itself would go on with the CPU when it cannot start CUDA."""
    import onnxruntime

    onnxruntime.preload_dlls()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    provider = (PROVIDER, {"device_id": str(options.device), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"})
    session = session_on(graph, model, settings, [provider])
    if session.get_providers()[0] != PROVIDER:
        raise BackendError(
            f"{NAME}: the CUDA provider does not start, most often as CUDA or cuDNN libraries are missing; "
            f"{install_command('gpu')}"
        )
    return session
