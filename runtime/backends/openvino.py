"""OpenVINO on the CPU, in bf16 where this processor is faster in it and the model stays near fp32."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from sanrt.arrays import Array, psnr
from sanrt.errors import BackendError, ModelError, OutOfMemoryError
from sanrt.extras import install_command
from sanrt.model.spec import Attention, GraphOptions, Precision
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.models import model_title, read_spec, spec_in
from sanrt.runtime.artifacts.sizes import Limits
from sanrt.runtime.artifacts.variants import cache_folders, cached_for, derived_model
from sanrt.runtime.backends.protocol import BackendStatus, RunOptions, Stages, library_version
from sanrt.runtime.backends.registry import OPEN_STAGES
from sanrt.wording import NOTICE

log = logging.getLogger(__name__)

NAME = "openvino"

HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16"}
"""None for fp16: with OpenVINO's hint for it, SOCA's sums over a picture would overflow."""
KEPT_FP32 = re.compile(r"(^|\.)soca\.|^features\.|^(mean_in|head|first|tail|mean_out|output|pixels)")
"""Nodes that stay fp32 beside bf16, as in the engines' graphs: SOCA, the first and last convolution, the mean shifts."""

WARM_SIDE = 8
"""Side of each region in the picture that warms the attention up, pixels."""
ATTENTION_STAGE = "attend"

TRIAL_SIDE, TRIAL_ROUNDS = 64, 5
MIN_PSNR = 50.0
"""bf16 against fp32 on the trial picture, in dB of the value range; below it is not chosen."""
MIN_GAIN = 1.1
"""bf16 must be this much faster than fp32 to be worth its error."""


def status() -> BackendStatus:
    """Whether OpenVINO is installed; `auto` may take it on processors with AMX, where bf16 is far faster than fp32."""
    if installed := library_version("openvino"):
        features = {"AMX-BF16", "AVX512-BF16"} & set(machine.cpu_features())
        reason = f"runs on the CPU ({', '.join(sorted(features)) or 'no bf16'})"
        return BackendStatus(NAME, installed, True, reason, automatic="AMX-BF16" in features)
    return BackendStatus(NAME, None, False, "openvino is not installed", install_command("openvino"))


def load(model: Path, options: RunOptions) -> OpenVinoBackend:
    """Load an exported fp32 ONNX; its MultiHeadAttention variant runs, which OpenVINO fuses: no L x L matrix."""
    return OpenVinoBackend(model, options)


def refusal(model: Path, options: RunOptions) -> str | None:
    """Why `auto` should not take it for a model: bf16 is all that can make it the fastest here, but for 8-bit models."""
    if read_spec(model).quantisation:
        return None
    precision = options.precision or chosen_precision(graph_of(model, options), model, options)
    return None if precision is Precision.BF16 else f"it would run {model} in {precision}, where sanrt's own code is faster"


def graph_of(model: Path, options: RunOptions) -> bytes:
    """The variant of a model that runs."""
    return derived_model(model, GraphOptions(attention=Attention.MULTI_HEAD, regions=options.regions))


class OpenVinoBackend:
    """One compiled model and its request."""

    name = NAME
    streams = True
    memory = None
    engine_digest = None
    infer_with_regions = None
    strips = None
    limits = Limits()
    device = "CPU"

    def __init__(self, model: Path, options: RunOptions) -> None:
        graph = graph_of(model, options)
        spec = spec_in(BytesIO(graph), str(model))
        precision = options.precision or chosen_precision(graph, model, options)
        self.model, self.options = model, replace(options, precision=precision)
        self.spec = replace(spec, precision=precision)
        self.request = compiled(graph, model, precision, options)
        warm_up(self.request, (1, 3, WARM_SIDE * options.regions, WARM_SIDE * options.regions))

    def infer(self, pictures: Array) -> Array:
        return infer(self.request, pictures)[0]

    def stages(self) -> Stages:
        return OpenVinoStages(self.model, self.options)

    def close(self) -> None:
        self.request = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OpenVinoStages:
    """A request per stage, compiled when it is first run; only the last few stay, as each keeps its memory."""

    maps = None

    def __init__(self, model: Path, options: RunOptions) -> None:
        def request(stage: str) -> Any:
            graph = derived_model(model, GraphOptions(attention=Attention.MULTI_HEAD, stage=stage))
            made = compiled(graph, model, options.precision or Precision.FP32, options)
            if stage == ATTENTION_STAGE:
                arch = read_spec(model).architecture
                keys = (1, arch.attention_channels, WARM_SIDE, WARM_SIDE)
                warm_up(made, (1, arch.channels, WARM_SIDE, WARM_SIDE), keys, keys)
            return made

        self.request: Callable[[str], Any] = lru_cache(maxsize=OPEN_STAGES)(request)

    def run(self, stage: str, *inputs: npt.NDArray[Any]) -> list[Array]:
        return infer(self.request(stage), *inputs)


def compiled(graph: bytes, model: Path, precision: Precision, options: RunOptions) -> Any:
    """An inference request of a graph that was made of `model`; compiled code is kept where such graphs are.

    Raises BackendError for a precision that it has not here.
    """
    import openvino

    core = openvino.Core()
    available = [p for p in HINTS if p.upper() in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")]
    if precision not in available:
        raise BackendError(f"openvino has no {precision} for this network on this CPU; expected {' or '.join(available)}")
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "INFERENCE_NUM_THREADS": options.threads or machine.cores(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    if folder := next((folder for folder in cache_folders(model) if folder.is_dir() and os.access(folder, os.W_OK)), None):
        settings["CACHE_DIR"] = str(folder / NAME)
    try:
        network = partly_fp32(core, graph) if precision == Precision.BF16 else core.read_model(graph)
        return core.compile_model(network, "CPU", settings).create_infer_request()
    except RuntimeError as error:
        raise ModelError(f"{model}: openvino cannot load it ({cause(error)})") from error


def partly_fp32(core: Any, graph: bytes) -> Any:
    """The graph with a mark at KEPT_FP32; OpenVINO 2026.4 takes such marks only from files in its own format."""
    import openvino

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(core.read_model(graph), path, compress_to_fp16=False)
        layers, weights = ElementTree.parse(path), path.with_suffix(".bin").read_bytes()
    for layer in layers.iter("layer"):
        if layer.get("type") != "Const" and KEPT_FP32.search(layer.get("name", "")):
            ElementTree.SubElement(ElementTree.SubElement(layer, "rt_info"), "attribute", name="precise", version="0")
    return core.read_model(ElementTree.tostring(layers.getroot()), weights)


def warm_up(request: Any, *shapes: tuple[int, ...]) -> None:
    """Run once on zeros: after a first region with a single key, OpenVINO 2026.4 computes every larger one wrongly."""
    infer(request, *(np.zeros(shape, np.float32) for shape in shapes))


def infer(request: Any, *inputs: npt.NDArray[Any]) -> list[Array]:
    """Arrays in, copies of the outputs out; OpenVINO's errors become ours."""
    try:
        # The synchronous call of OpenVINO 2026.4 hides a failure and gives the outputs of the run before.
        request.start_async(list(inputs), share_inputs=True)
        request.wait()
        return [tensor.data.copy() for tensor in request.output_tensors]
    except MemoryError as error:
        raise OutOfMemoryError("openvino ran out of memory") from error
    except RuntimeError as error:
        text = cause(error)
        if "alloc" in text or "memory" in text:
            raise OutOfMemoryError(f"openvino ran out of memory ({text})") from error
        raise BackendError(f"openvino failed ({text})") from error


def cause(error: Exception) -> str:
    """The line of an OpenVINO error that says what happened; the others say where in its source."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return lines[-1] if lines else type(error).__name__


@dataclass(frozen=True)
class PrecisionTrial:
    """bf16 against fp32 on one small picture, on this machine."""

    fp32_seconds: float
    bf16_seconds: float
    psnr: float

    @property
    def precision(self) -> Precision:
        """bf16 where it is near enough and faster."""
        pays = self.psnr >= MIN_PSNR and self.bf16_seconds * MIN_GAIN <= self.fp32_seconds
        return Precision.BF16 if pays else Precision.FP32


def chosen_precision(graph: bytes, model: Path, options: RunOptions) -> Precision:
    """The better precision by a trial that is made once per model, processor, OpenVINO and number of threads."""
    if not {"AMX-BF16", "AVX512-BF16"} & set(machine.cpu_features()):
        return Precision.FP32
    machinery = [machine.cpu_name(), *machine.cpu_features(), str(library_version("openvino")), str(options.threads)]

    def trial() -> bytes:
        log.log(NOTICE, "measuring whether bf16 or fp32 is the faster in openvino here for %s; once", model_title(model))
        return json.dumps(asdict(measure_precisions(graph, model, options))).encode()

    identity = [hashlib.sha256(graph).hexdigest(), *machinery]
    return PrecisionTrial(**json.loads(cached_for(model, "openvino.json", identity, (__package__,), trial))).precision


def measure_precisions(graph: bytes, model: Path, options: RunOptions) -> PrecisionTrial:
    """Both precisions in turns on a seeded picture of coloured squares and noise; the best time of each."""
    random, value_range = np.random.default_rng(0), read_spec(model).architecture.value_range
    squares = np.kron(random.random((1, 3, TRIAL_SIDE // 8, TRIAL_SIDE // 8)), np.ones((8, 8)))
    picture = ((0.9 * squares + 0.1 * random.random(squares.shape)) * value_range).astype(np.float32)
    requests = {p: compiled(graph, model, p, options) for p in HINTS}
    fp32, bf16 = (infer(request, picture)[0] for request in requests.values())
    rounds = [[timed(request, picture) for request in requests.values()] for _ in range(TRIAL_ROUNDS)]
    fp32_seconds, bf16_seconds = map(min, zip(*rounds, strict=True))
    return PrecisionTrial(fp32_seconds, bf16_seconds, psnr(bf16, fp32, value_range))


def timed(request: Any, picture: Array) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    infer(request, picture)
    return time.perf_counter() - start
