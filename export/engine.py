"""TensorRT and TensorRT-RTX engines from an exported ONNX: typed graph, build, proof, engine and JSON. Needs no torch."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import onnx

from sanrt.errors import BackendError, BuildError, ModelError, UsageError
from sanrt.export import proof as proofs
from sanrt.export.stages import input_ranges
from sanrt.extras import extra, install_command
from sanrt.files import cache_folder, require_writable, source_digest
from sanrt.model.exported import read_model
from sanrt.model.graph import san_model, stage_model
from sanrt.model.spec import GraphOptions, ModelSpec, Precision
from sanrt.runtime.artifacts.engines import (
    RTX_GPUS,
    BuildOptions,
    EngineInfo,
    Identity,
    Proof,
    check_fresh,
    default_path,
    read_engine,
    read_engine_bytes,
    save_engine,
    stage_archive,
)
from sanrt.runtime.artifacts.flavors import EXTRAS, TITLES, Flavor, installed_version
from sanrt.runtime.artifacts.variants import model_digest
from sanrt.runtime.backends.tensorrt.device import Device, open_device
from sanrt.runtime.backends.tensorrt.library import TensorRTLog, import_flavor
from sanrt.version import __version__
from sanrt.wording import option

FUSED_WIDTH = 16
"""Fewest inner attention channels for which TensorRT has one kernel for the whole attention."""
WHOLE = "network"
"""Key of the one graph that is not a stage."""
RTX_TARGETS = re.compile(r"SM\d+")
"""Names of TensorRT-RTX's compute capabilities."""


class BuildProgress(Protocol):
    """Follows TensorRT's nested phases while it builds."""

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of that many steps begins within `parent`."""
        ...

    def step(self, phase: str, step: int) -> None:
        """A step of the phase is done."""
        ...

    def finish(self, phase: str) -> None:
        """The phase is over."""
        ...


def choose_flavor(device: int = 0) -> Flavor:
    """TensorRT where it and that GPU are, else TensorRT-RTX; raises BackendError when neither is installed."""
    if installed_version(Flavor.TENSORRT) and gpu_present(device):
        return Flavor.TENSORRT
    if installed_version(Flavor.RTX):
        return Flavor.RTX
    raise BackendError(
        f"neither TensorRT (with a GPU) nor TensorRT-RTX is here; {install_command('rtx')} (it needs no GPU to build)"
    )


def gpu_present(device: int) -> bool:
    """Whether a CUDA device can be opened."""
    try:
        open_device(device).close()
    except BackendError:
        return False
    return True


def build_engine(
    model: Path,
    options: BuildOptions,
    output: Path | None = None,
    progress: BuildProgress | None = None,
    device: int = 0,
) -> tuple[EngineInfo, bool]:
    """Build an exported fp32 ONNX into an engine beside it (or at `output`); False when an equal one was already there.

    device: the GPU that TensorRT builds on, and for; TensorRT-RTX needs none.
    With `options.stages` it is a set of engines, one per stage, each proved as a whole one is.

    Raises BuildError, ModelError, BackendError or UsageError, and KeyboardInterrupt after a clean stop. Whatever is
    raised, no file is left behind.
    """
    trt = import_flavor(options.flavor)
    if options.kernels:
        register_kernels(trt, options.flavor)
    spec, graphs = typed_graphs(model, options)
    code = source_digest("sanrt.model", "sanrt.export", *["sanrt.kernels"] * options.kernels)
    made_by = f"{__version__}, source {code[:16]}"
    identity = Identity(
        model_digest(model), options, installed_version(options.flavor) or "", target(trt, options, device), made_by
    )
    path = output or default_path(model, identity)
    if (existing := reusable(path, identity)) is not None:
        with suppress(OSError):
            path.touch()  # what was asked for last is what `sanrt run` takes
        return existing, False
    require_writable(path, "choose another place with -o")
    cancel, timings = Event(), timings_file(options, identity)
    monitor = monitor_class(trt)(progress, cancel)
    with open_device(device) if options.flavor == Flavor.TENSORRT else nullcontext() as gpu:
        built = [compile_proved(trt, graph, options, monitor, cancel, timings, gpu) for graph in graphs.values()]
    engines = dict(zip(graphs, (engine for engine, _ in built), strict=True))
    findings = proofs.check_proof(
        proofs.merge_proofs([found for _, found in built]),
        options.precision,
        options.allow_precision,
        options.allow_unfused_attention,
    )
    content = stage_archive(engines) if options.stages else engines[WHOLE]
    digest = hashlib.sha256(content).hexdigest()
    beside = os.path.relpath(model.resolve(), path.parent.resolve())
    info = EngineInfo(path, spec, beside, identity, len(content), digest, findings)
    save_engine(info, content)
    return info, True


def compile_proved(
    trt: Any,
    graph: onnx.ModelProto,
    options: BuildOptions,
    monitor: Any,
    cancel: Event,
    timings: str | None,
    gpu: Device | None,
) -> tuple[bytes, Proof]:
    """Compile a graph, on a GPU where one is needed: the engine's bytes, and the proof from its layers."""
    trt_log = TensorRTLog(trt, keep=True)
    engine_bytes = interruptible(lambda: compile_engine(trt, graph, options, trt_log, monitor, timings), cancel, gpu)
    layers, source = layer_list(trt, options.flavor, engine_bytes, trt_log)
    return engine_bytes, proofs.prove(graph, layers, source, activation_memory(trt_log))


def typed_graphs(model: Path, options: BuildOptions) -> tuple[ModelSpec, dict[str, onnx.ModelProto]]:
    """The graphs that TensorRT builds from an exported fp32 one, by name: the whole network, or each of its stages.

    Precision is in the graph, and attention in the form that is fused; TensorRT fuses none in fp32.
    """
    spec, weights = read_model(model)
    width = 0 if options.precision == Precision.FP32 else FUSED_WIDTH
    variant = GraphOptions(options.precision, attention_width=width, kernels=options.kernels)
    stages = spec.architecture.stages if options.stages else ()
    graphs = {stage: stage_model(spec, weights, replace(variant, stage=stage)) for stage in stages}
    return replace(spec, precision=options.precision), graphs or {WHOLE: san_model(spec, weights, variant)}


def register_kernels(trt: Any, flavor: Flavor) -> None:
    """Make sanrt's plugins known to TensorRT; raises UsageError for TensorRT-RTX, which has no plugins in Python."""
    if flavor != Flavor.TENSORRT:
        raise UsageError(
            f"{option('kernels', 'fused')}: TensorRT-RTX takes no plugins; use {option('flavor', 'tensorrt')}, or "
            f"{option('kernels', 'none')}"
        )
    from sanrt.kernels.cuda.plugins import register

    register(trt)


def target(trt: Any, options: BuildOptions, device: int) -> str:
    """The GPU part of an engine's identity; raises UsageError for targets that the flavour does not build for."""
    if options.flavor == Flavor.TENSORRT:
        if options.gpus:
            raise UsageError(
                f"{option('gpu')}: TensorRT builds for the GPU it runs on; only {option('flavor', 'rtx')} takes targets"
            )
        with open_device(device) as gpu:
            return f"{gpu.name} {gpu.capability}"
    if options.timing_cache:
        raise UsageError(f"{option('timing-cache')}: TensorRT-RTX has no timing cache; leave it out")
    known = sorted((n.lower() for n in dir(trt.ComputeCapability) if RTX_TARGETS.fullmatch(n)), key=lambda n: int(n[2:]))
    if unknown := [gpu for gpu in options.gpus if gpu not in known]:
        raise UsageError(f"{option('gpu')} {unknown[0]!r}: TensorRT-RTX builds for {', '.join(known)} (comma-separated)")
    return ",".join(options.gpus or RTX_GPUS)


def reusable(path: Path, identity: Identity) -> EngineInfo | None:
    """The engine at `path` when it is intact and exactly what would be built."""
    try:
        info = read_engine(path)
        if info.identity != identity:
            return None
        check_fresh(info)
        read_engine_bytes(info)
    except ModelError:
        return None
    return info


def interruptible(work: Callable[[], bytes], cancel: Event, gpu: Device | None = None) -> bytes:
    """Run `work` beside this thread, so that Ctrl-C arrives at once; `cancel` then asks it to stop, and it is waited for."""
    with ThreadPoolExecutor(1, initializer=gpu.activate if gpu else None) as pool:
        future = pool.submit(work)
        try:
            return future.result()
        except BaseException:
            cancel.set()
            raise


def compile_engine(
    trt: Any, graph: onnx.ModelProto, options: BuildOptions, trt_log: TensorRTLog, monitor: Any, timings: str | None
) -> bytes:
    """The serialised engine; `trt_log` and `monitor` must outlive the call."""
    choose_polygraphy(trt, options.flavor)
    from polygraphy.backend.trt import EngineBytesFromNetwork
    from polygraphy.exception import PolygraphyException

    # Not Polygraphy's network, whose builder logs to one logger of the process: RTX's layers are listed in the log alone.
    # No error recorder here: TensorRT-RTX 1.7 destroys the parser after its network and crashes on the recorder.
    builder = trt.Builder(trt_log.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt_log.logger)
    if not parser.parse(graph.SerializeToString()):
        raise BuildError(f"{TITLES[options.flavor]} cannot parse the graph ({parser.get_error(0).desc()})")
    loader, told = builder_config(trt, graph, options, monitor, timings), len(trt_log.errors)
    try:
        config = loader(builder, network)
    except TypeError as error:  # the bindings' answer to timings that are none
        if timings is None:
            raise
        raise BuildError(f"{timings}: damaged, expected TensorRT's timings; remove it, or name another file") from error
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, it would round the inputs of SOCA's fp32 products to 10 bits
    if timings and (refused := trt_log.errors[told:]):
        raise BuildError(f"{timings}: TensorRT refuses these timings ({refused[0][1]}); name another file")
    try:
        return bytes(EngineBytesFromNetwork((builder, network, parser), config, save_timing_cache=timings)())
    except PolygraphyException as error:
        raise BuildError(f"{TITLES[options.flavor]} cannot build the engine: {trt_log.first}") from error


def builder_config(trt: Any, graph: onnx.ModelProto, options: BuildOptions, monitor: Any, timings: str | None) -> Any:
    """Polygraphy's loader of a builder's configuration: what the options say and the graph does not."""
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, Profile

    profiles = [Profile() for _ in options.profiles]
    for profile, sizes in zip(profiles, options.profiles, strict=True):
        for name, values in input_ranges(graph, sizes).items():
            profile.add(name, *values)
    common = {
        "profiles": profiles,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "builder_optimization_level": options.level,
        "memory_pool_limits": options.workspace and {trt.MemoryPoolType.WORKSPACE: options.workspace << 20},
        # Activations for the size that runs, not for the largest of the profile: TensorRT-RTX's own choice, not TensorRT's.
        "preview_features": [trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10],
        "progress_monitor": monitor,
    }
    if options.flavor == Flavor.TENSORRT:
        return CreateConfig(load_timing_cache=timings, **common)
    targets = [divmod(int(gpu.removeprefix("sm")), 10) for gpu in options.gpus]
    return CreateConfigRTX(compute_capabilities=targets or None, **common)


def choose_polygraphy(trt: Any, flavor: Flavor) -> None:
    """Set Polygraphy to a flavour; BackendError where this process has used it for the other: 0.53 has one per process."""
    with extra(EXTRAS[flavor], "sanrt build"):
        from polygraphy import config as polygraphy_config
        from polygraphy.logger import G_LOGGER

    rtx = flavor == Flavor.RTX
    if "polygraphy.backend.trt" in sys.modules and rtx != polygraphy_config.USE_TENSORRT_RTX:
        raise BackendError(f"{TITLES[flavor]}: this process has built for the other TensorRT; build in another process")
    polygraphy_config.USE_TENSORRT_RTX = rtx
    sys.modules.setdefault("tensorrt_rtx" if rtx else "tensorrt", trt)  # of RTX's, only the bindings are installed
    G_LOGGER.module_severity = G_LOGGER.CRITICAL  # what matters is raised


@cache
def monitor_class(trt: Any) -> Callable[[BuildProgress | None, Event], Any]:
    """A class of IProgressMonitor that reports to a BuildProgress, if any, and stops the build once `cancel` is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """TensorRT calls it from the building thread, and from its own."""

        def __init__(self, progress: BuildProgress | None, cancel: Event) -> None:
            trt.IProgressMonitor.__init__(self)
            self.progress, self.cancel = progress, cancel

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if self.progress:
                self.progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if self.progress:
                self.progress.step(phase_name, step)
            return not self.cancel.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if self.progress:
                self.progress.finish(phase_name)

    return Monitor


def timings_file(options: BuildOptions, identity: Identity) -> str | None:
    """Where TensorRT keeps its timings: the file that was named, or one per GPU and version; TensorRT-RTX has none."""
    if options.flavor == Flavor.RTX:
        return None
    name = re.sub(r"[^\w.]+", "-", f"{identity.gpu}-{identity.version}.cache")
    path = options.timing_cache or cache_folder() / "timings" / name
    require_writable(path, f"choose another place with {option('timing-cache')}")
    return str(path)


def layer_list(trt: Any, flavor: Flavor, engine_bytes: bytes, trt_log: TensorRTLog) -> tuple[list[proofs.Layer], str]:
    """The engine's layers: from the build log of TensorRT-RTX, which needs no GPU, or TensorRT's engine inspector."""
    if flavor == Flavor.RTX:
        return proofs.layers_from_log(trt_log.messages), "build log"
    engine = trt.Runtime(trt_log.logger).deserialize_cuda_engine(engine_bytes)
    if engine is None:
        raise BuildError(f"{TITLES[flavor]} cannot load the engine it just built: {trt_log.first}")
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return proofs.layers_from_inspector(text), "engine inspector"


def activation_memory(trt_log: TensorRTLog) -> int | None:
    """Bytes of activations at the largest profile, as the build log states them."""
    stated = (re.match(r"Total Activation Memory: (\d+) bytes", message) for message in trt_log.messages)
    return max((int(match[1]) for match in stated if match), default=None)
