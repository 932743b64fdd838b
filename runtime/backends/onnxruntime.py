"""ONNX Runtime on the CPU, with region attention as its fused MultiHeadAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy.typing as npt

from sanrt.arrays import Array
from sanrt.errors import BackendError, ModelError, OutOfMemoryError, first_line
from sanrt.extras import install_command
from sanrt.model.spec import Attention, GraphOptions, Precision, QuantisedType
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.models import read_spec, spec_in
from sanrt.runtime.artifacts.sizes import Limits
from sanrt.runtime.artifacts.variants import derived_model
from sanrt.runtime.backends.protocol import BackendStatus, RunOptions, Stages, library_version, require_precision
from sanrt.runtime.backends.registry import OPEN_STAGES

NAME = "onnxruntime"
CPU_FORM = GraphOptions(attention=Attention.MULTI_HEAD, requantised=True)
"""The variant of an exported model that runs on the CPU."""


def status() -> BackendStatus:
    """Whether ONNX Runtime is installed."""
    if installed := library_version("onnxruntime", "onnxruntime-gpu"):
        return BackendStatus(NAME, installed, True, "runs on the CPU")
    return BackendStatus(NAME, None, False, "onnxruntime is not installed", install_command("cpu"))


def load(model: Path, options: RunOptions) -> OnnxRuntimeBackend:
    """Load an exported fp32 ONNX (its MultiHeadAttention variant is what runs)."""
    return OnnxRuntimeBackend(model, options)


class OnnxRuntimeBackend:
    """One inference session."""

    name = NAME
    streams = True
    memory = None
    engine_digest = None
    infer_with_regions = None
    strips = None
    limits = Limits()
    device = "CPU"

    def __init__(self, model: Path, options: RunOptions) -> None:
        require_precision(NAME, options, Precision.FP32)
        self.model, self.options = model, options
        graph = derived_model(model, replace(CPU_FORM, regions=options.regions))
        self.session = open_session(graph, model, options)
        self.spec = spec_in(BytesIO(graph), str(model))

    def infer(self, pictures: Array) -> Array:
        try:
            output: Array = self.session.run(None, {"input": pictures})[0]
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise run_error(error) from error
        return output

    def stages(self) -> Stages:
        return OnnxRuntimeStages(self.model, self.options, CPU_FORM, open_session)

    def close(self) -> None:
        self.session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OnnxRuntimeStages:
    """A session per stage, opened when it is first run; only the last few stay open, as every session keeps its memory."""

    maps = None

    def __init__(
        self, model: Path, options: RunOptions, form: GraphOptions, opener: Callable[[bytes, Path, RunOptions], Any]
    ) -> None:
        """`opener` makes the InferenceSession of a graph of the model."""

        def open_stage(stage: str) -> Any:
            return opener(derived_model(model, replace(form, stage=stage)), model, options)

        self.session = lru_cache(maxsize=OPEN_STAGES)(open_stage)

    def run(self, stage: str, *inputs: npt.NDArray[Any]) -> list[Array]:
        session = self.session(stage)
        feed = {node.name: array for node, array in zip(session.get_inputs(), inputs, strict=True)}
        try:
            outputs: list[Array] = session.run(None, feed)
        except Exception as error:
            raise run_error(error) from error
        return outputs


def open_session(graph: bytes | Path, model: Path, options: RunOptions) -> Any:
    """An InferenceSession on the CPU of an ONNX, in memory or in a file, that was made of `model`."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads or machine.cores()
    settings.log_severity_level = 3
    return session_on(graph, model, settings, ["CPUExecutionProvider"])


def session_on(graph: bytes | Path, model: Path, settings: Any, providers: list[Any]) -> Any:
    """An InferenceSession; raises ModelError, naming the model, for a graph that onnxruntime refuses."""
    import onnxruntime

    spec = read_spec(graph) if isinstance(graph, Path) else spec_in(BytesIO(graph), str(model))
    if spec.coarsest == QuantisedType.FP8:
        # Beyond that, onnxruntime 1.32 drops a Relu in front of an fp8 QuantizeLinear.
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        return onnxruntime.InferenceSession(graph, settings, providers=providers)
    except Exception as error:
        raise ModelError(f"{model}: onnxruntime cannot load it ({first_line(error)})") from error


def run_error(error: Exception) -> BackendError:
    """Tell a lack of memory from other failures."""
    text = first_line(error)
    if "allocate" in text.lower() or "bad_alloc" in text:
        return OutOfMemoryError(f"onnxruntime ran out of memory ({text})")
    return BackendError(f"onnxruntime failed ({text})")
