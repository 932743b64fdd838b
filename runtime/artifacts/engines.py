"""What an engine on disk is: its options, its identity, the JSON beside it, and who may run it. Imports no TensorRT."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

from sanrt.errors import ModelError, UsageError, system_reason
from sanrt.files import cache_folder, remove_leftovers, replacing
from sanrt.model.spec import PREFIX, ModelSpec, Precision
from sanrt.runtime.artifacts.flavors import TITLES, Flavor, installed_version
from sanrt.runtime.artifacts.sizes import TILES, Profile, Size, activation_estimate
from sanrt.runtime.artifacts.variants import model_digest
from sanrt.wording import option

SUFFIX = ".engine"
STAGES_SUFFIX = ".stages"
"""Ending of a set of stage engines, for exact streaming: an uncompressed ZIP archive, one engine per stage by its name."""


RTX_GPUS = ("sm86", "sm89", "sm120", "sm121")
"""GPUs that take TensorRT-RTX engines built without targets: those of its support matrix from Ampere on.

Data centre GPUs (sm80, sm90, sm100, sm103) are not in it. sm80 can be named as a target; whether it runs there is not known.
"""


@dataclass(frozen=True)
class BuildOptions:
    """How an engine, or a set of stage engines, is built; every field is part of its identity."""

    flavor: Flavor
    precision: Precision = Precision.FP16
    profiles: tuple[Profile, ...] = (Profile(),)
    gpus: tuple[str, ...] = ()
    """RTX: the targets, such as `sm89`; none means RTX_GPUS."""
    workspace: int | None = None
    """MiB that a layer's algorithm may use; None leaves it to TensorRT."""
    level: int = 3
    """0..5: how long TensorRT searches."""
    timing_cache: Path | None = None
    """TensorRT: None keeps one per GPU and version beside the model."""
    allow_precision: bool = False
    """Accept convolutions or square roots in another precision than asked for."""
    allow_unfused_attention: bool = False
    """Accept attention that is not one kernel, and so holds its scores in memory."""
    kernels: bool = False
    """TensorRT: SOCA by sanrt's own CUDA kernels, as plugins whose PTX is inside the engine."""
    stages: bool = False
    """One engine per stage of the network, for exact streaming; the only profile is of tiles, without their halo."""

    def __post_init__(self) -> None:
        if not self.stages:
            return
        if len(self.profiles) != 1 or self.profiles[0].max.batch != 1 or self.profiles[0].min != TILES.min:
            raise UsageError(
                f"{option('stages')}: expected tiles as {option('opt')} 1xHxW and {option('max')} 1xHxW, each once; the "
                "smallest is one pixel"
            )
        if self.kernels:
            raise UsageError(
                f"{option('stages')} with {option('kernels', 'fused')}: stages merge SOCA's statistics; leave one of the "
                "two out"
            )

    def arguments(self) -> list[str]:
        """The command line's spelling of these options."""
        words = [f"--{self.precision}", "--flavor", str(self.flavor), *["--stages"] * self.stages]
        if self.profiles != (TILES if self.stages else Profile(),):
            for p in self.profiles:
                words += ["--min", str(p.min), "--opt", str(p.opt), "--max", str(p.max)]
        for name, value in (
            ("--gpu", ",".join(self.gpus)),
            ("--workspace", self.workspace),
            ("--level", self.level if self.level != 3 else None),
            ("--timing-cache", self.timing_cache),
        ):
            words += [name, str(value)] if value else []
        words += ["--kernels", "fused"] * self.kernels
        words += ["--allow-precision"] * self.allow_precision
        return words + ["--allow-unfused-attention"] * self.allow_unfused_attention


@dataclass(frozen=True)
class Identity:
    """Everything that decides what an engine is; two builds with equal identities are interchangeable."""

    onnx: str
    """SHA-256 of the exported ONNX."""
    options: BuildOptions
    version: str
    """Version of that TensorRT."""
    gpu: str
    """Name and compute capability of the GPU it was built for; for RTX its targets."""
    sanrt: str

    @property
    def digest(self) -> str:
        """SHA-256 over every field."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Proof:
    """What the layer list showed after the build."""

    source: str
    """Where the layers were read: the build log or the engine inspector."""
    layers: int
    convolutions: Mapping[str, int]
    """How many convolutions run in which type."""
    wrong_convolutions: Sequence[str]
    """Convolutions in another type than the graph's."""
    soca_layers: int
    """Layers of SOCA's statistics and square root."""
    wrong_soca: Sequence[str]
    """Those that do not compute fp32."""
    attention: int
    """Regions x attention modules in the graph."""
    unfused_attention: Sequence[str]
    kernels: Sequence[str]
    """The fused attention kernels."""
    memory: int | None = None
    """Bytes of activations at the largest profile, as TensorRT states them."""
    unlisted: Sequence[str] = field(default_factory=list)
    """Convolutions and products of the graph that no layer names."""
    remarks: Sequence[str] = field(default_factory=list)

    def table(self) -> dict[str, str]:
        """Names and findings, for people."""
        fused = self.attention - len(self.unfused_attention)
        facts = {
            "convolutions": ", ".join(f"{count} {name}" for name, count in self.convolutions.items()),
            "SOCA's root": f"fp32 in {self.soca_layers - len(self.wrong_soca)} of {self.soca_layers} layers",
            "attention": " ".join([f"{fused} of {self.attention} regions fused", *self.kernels]),
            "read from": f"{self.source}, {self.layers} layers",
        }
        if self.memory is not None:
            facts["GPU memory"] = f"{self.memory / 2**20:.0f} MiB of activations at the largest size"
        if self.remarks:
            facts["remarks"] = "; ".join(self.remarks)
        return facts


@dataclass(frozen=True)
class EngineInfo:
    """An engine and the facts in the JSON beside it."""

    path: Path
    spec: ModelSpec
    model: str
    """The ONNX it was built from, relative to the engine's folder."""
    identity: Identity
    size: int
    """Bytes of the engine file."""
    digest: str
    """SHA-256 of the engine file."""
    proof: Proof

    @property
    def model_path(self) -> Path:
        """Where the ONNX was; a deployed engine may have left it behind."""
        return self.path.parent / self.model

    def activations(self, size: Size) -> int:
        """About the bytes of activations for pictures of a size; no more than TensorRT stated for the largest."""
        estimate = activation_estimate(self.spec, size)
        return min(estimate, self.proof.memory or estimate)

    @property
    def command(self) -> str:
        """The command that builds this engine again."""
        output = ["-o", str(self.path)] if self.path != default_path(self.model_path, self.identity) else []
        return shlex.join(["sanrt", "build", str(self.model_path), *self.identity.options.arguments(), *output])

    def table(self) -> dict[str, str]:
        """Names and facts, for people."""
        options = self.identity.options
        return {
            "stage engines" if options.stages else "engine": f"{self.path}, {self.size / 2**20:.1f} MiB",
            "network": f"{self.spec.architecture.name}, {self.spec.weights_origin}",
            "built by": f"{TITLES[options.flavor]} {self.identity.version} for {self.identity.gpu}",
            "precision": str(options.precision),
            "tiles" if options.stages else "sizes": "; ".join(map(str, options.profiles)),
            **self.proof.table(),
        }


def default_path(model: Path, identity: Identity) -> Path:
    """Beside the model: a prefix for people, and enough of the identity's digest to tell engines apart."""
    options = identity.options
    target = "-".join(options.gpus) or ("rtx-gpus" if options.flavor == Flavor.RTX else identity.gpu.split()[-1])
    suffix = STAGES_SUFFIX if options.stages else SUFFIX
    return model.with_name(f"{model.stem}-{options.precision}-{options.flavor}-{target}-{identity.digest[:8]}{suffix}")


def save_engine(info: EngineInfo, engine_bytes: bytes | memoryview) -> None:
    """Write an engine and its JSON under temporary names, then move both into place; nothing is left on failure."""
    facts = asdict(info) | {"path": info.path.name, "spec": spec_to_json(info.spec), "identity_digest": info.identity.digest}
    remedy = f"it needs {info.size / 2**20:.0f} MiB; choose another place with -o"
    remove_leftovers(info.path.parent)
    with replacing(json_path(info.path), remedy) as beside, replacing(info.path, remedy) as engine:
        engine.write(engine_bytes)
        beside.write(json.dumps(facts, indent=2, default=str).encode())


def kernel_cache(info: EngineInfo) -> tuple[tuple[Path, Path], str]:
    """The folders and the name under which the kernels are kept that TensorRT-RTX compiled on this GPU.

    It checks by itself that they fit.
    """
    return (info.path.parent, cache_folder() / "engines"), f"{info.path.name}.kernels"


def json_path(engine: Path) -> Path:
    """Where an engine's facts are."""
    return engine.with_name(f"{engine.name}.json")


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    return {key.removeprefix(PREFIX): json.loads(value) for key, value in spec.to_metadata().items()}


def read_engine(path: Path) -> EngineInfo:
    """The facts beside an engine, believed only when their own digest agrees; raises ModelError otherwise."""
    beside = json_path(path)
    try:
        facts = json.loads(beside.read_bytes())
        spec = ModelSpec.from_metadata({PREFIX + k: json.dumps(v) for k, v in facts["spec"].items()}, str(beside))
        identity = identity_from_json(facts["identity"])
        info = EngineInfo(path, spec, facts["model"], identity, facts["size"], facts["digest"], Proof(**facts["proof"]))
        intact = facts["identity_digest"] == identity.digest
    except OSError as error:
        raise ModelError(
            f"{path}: its facts {beside.name} cannot be read ({system_reason(error)}); build it with `sanrt build --fp16`"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise ModelError(
            f"{beside}: not the facts of a sanrt engine ({error!r}); build it with `sanrt build --fp16`"
        ) from error
    if not intact:
        raise ModelError(f"{beside}: was altered (its identity does not match its digest); rebuild with `{info.command}`")
    return info


def identity_from_json(facts: Mapping[str, Any]) -> Identity:
    """Undo `asdict`."""
    options = dict(facts["options"])
    options["flavor"] = Flavor(options["flavor"])
    options["precision"] = Precision(options["precision"])
    options["profiles"] = tuple(Profile(**{k: Size(*v) for k, v in profile.items()}) for profile in options["profiles"])
    options["gpus"] = tuple(options["gpus"])
    options["timing_cache"] = Path(options["timing_cache"]) if options["timing_cache"] else None
    return Identity(**{**facts, "options": BuildOptions(**options)})


def read_engine_bytes(info: EngineInfo) -> bytes:
    """The engine's bytes, exactly as built; raises ModelError for a missing, truncated or altered file."""
    try:
        content = info.path.read_bytes()
    except OSError as error:
        raise ModelError(f"{info.path}: cannot be read ({system_reason(error)}); rebuild with `{info.command}`") from error
    if (found := len(content)) != info.size:
        raise ModelError(
            f"{info.path}: damaged ({found} bytes, expected {info.size}); copy it again or rebuild with `{info.command}`"
        )
    digest = hashlib.sha256(content).hexdigest()
    if digest != info.digest:
        raise ModelError(
            f"{info.path}: altered (sha256 {digest[:12]}, expected {info.digest[:12]}); rebuild with `{info.command}`"
        )
    return content


def check_fresh(info: EngineInfo) -> None:
    """Raise ModelError when the ONNX beside the engine is no longer the one it was built from."""
    model = info.model_path
    if model.exists() and (found := model_digest(model)) != info.identity.onnx:
        raise ModelError(
            f"{info.path}: stale, {model.name} has changed since (sha256 {found[:12]}, expected {info.identity.onnx[:12]}); "
            f"rebuild with `{info.command}`"
        )


def check_host(info: EngineInfo, gpu: str, capability: str) -> None:
    """Raise ModelError unless this engine fits the installed TensorRT and the GPU (`NVIDIA L4`, `sm89`)."""
    identity, flavor = info.identity, info.identity.options.flavor
    installed = installed_version(flavor)
    if identity.version != installed:
        found = f"{TITLES[flavor]} {installed} is installed" if installed else f"{TITLES[flavor]} is not installed"
        raise ModelError(
            f"{info.path}: built by {TITLES[flavor]} {identity.version}, but {found}; rebuild with `{info.command}`"
        )
    if flavor == Flavor.RTX:
        fits = capability in identity.gpu.split(",")
        options = replace(identity.options, gpus=(capability,))
    else:
        fits, options = identity.gpu == f"{gpu} {capability}", identity.options
    if not fits:
        command = replace(info, identity=replace(identity, options=options)).command
        raise ModelError(
            f"{info.path}: built for {identity.gpu}, but this GPU is {gpu} {capability}; rebuild with `{command}`"
        )


def engines_of(model: Path, suffix: str = SUFFIX) -> list[EngineInfo]:
    """Engines beside a model that were built from a file of its name, the newest first; unreadable ones are left out."""
    found = []
    for path in sorted(model.parent.glob(f"*{suffix}"), key=changed, reverse=True):
        try:
            info = read_engine(path)
        except ModelError:
            continue
        if info.model_path.resolve() == model.resolve():
            found.append(info)
    return found


def changed(path: Path) -> float:
    """When a file was last written; 0 for one that is gone meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def choose_engine(model: Path, gpu: str, capability: str) -> EngineInfo:
    """The newest engine of an exported ONNX that is fresh and fits this machine; raises ModelError saying why none does."""
    refusal: ModelError | None = None
    for info in engines_of(model):
        try:
            check_fresh(info)
            check_host(info, gpu, capability)
        except ModelError as error:
            refusal = refusal or error
        else:
            return info
    raise refusal or ModelError(
        f"{model}: no engine was built from it; build one with `sanrt build {shlex.quote(str(model))} --fp16`"
    )


def choose_stages(whole: EngineInfo, gpu: str, capability: str) -> EngineInfo:
    """The newest stage engines of the same ONNX, flavour and precision; ModelError with the command that builds them."""
    same = replace(whole.identity.options, profiles=(TILES,), stages=True, kernels=False)
    refusal = ""
    for info in engines_of(whole.model_path, STAGES_SUFFIX):
        options = info.identity.options
        if (info.identity.onnx, options.flavor, options.precision) != (whole.identity.onnx, same.flavor, same.precision):
            continue
        try:
            check_host(info, gpu, capability)
        except ModelError as error:
            refusal = refusal or str(error)
        else:
            return info
    command = shlex.join(["sanrt", "build", str(whole.model_path), *same.arguments()])
    raise ModelError(
        refusal
        or f"{whole.path}: holds the whole network, and exact streaming needs its stages; build them with `{command}`"
    )


def stage_archive(engines: Mapping[str, bytes]) -> bytes:
    """The content of a set's file."""
    content = BytesIO()
    with ZipFile(content, "w") as archive:
        for name, engine_bytes in engines.items():
            archive.writestr(ZipInfo(name), engine_bytes)
    return content.getvalue()
