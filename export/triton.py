"""A model repository for NVIDIA's Triton Inference Server, from an exported ONNX or a TensorRT engine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as schema

from sanrt.errors import FileError, ModelError, UsageError, system_reason
from sanrt.files import file_digest, require_folder_of, write_whole
from sanrt.model.exported import read_exported, read_interface
from sanrt.model.spec import ModelSpec
from sanrt.runtime.artifacts.engines import SUFFIX, EngineInfo, read_engine, read_engine_bytes
from sanrt.runtime.artifacts.flavors import Flavor
from sanrt.runtime.artifacts.models import external_files

CONFIG, CLIENT = "config.pbtxt", "upscale_by_triton.py"
TYPES = {"float32": schema.TYPE_FP32, "float16": schema.TYPE_FP16, "float64": schema.TYPE_FP64}
"""Triton's names for the types that inputs and outputs may have."""
WARM = 64
"""Side of the picture that an ONNX is run on before it counts as ready."""


@dataclass(frozen=True)
class Served:
    """What Triton needs to know of a model, and its files."""

    spec: ModelSpec
    backend: str
    content: bytes | Path
    """Of the model's file."""
    others: Sequence[Path]
    """Files beside it, by their names, that it refers to."""
    types: tuple[int, int]
    """Of `input` and `output`."""
    batch: int
    """Most pictures at once."""
    warm: tuple[int, int]
    """Height and width of the picture that it is run on before it counts as ready."""
    sizes: str
    """The pictures that it takes, for people."""
    profiles: int = 0
    """Optimisation profiles of an engine."""

    @property
    def file_name(self) -> str:
        """The name of the model's file, by which Triton's backend finds it."""
        return "model.plan" if self.backend == "tensorrt" else "model.onnx"


@dataclass(frozen=True)
class TritonOptions:
    """How Triton runs a model."""

    name: str | None = None
    """In the repository; the model file's if left out."""
    instances: int = 1
    kind: str = "auto"
    """auto, cpu or gpu: where instances run."""
    batch: int | None = None
    """Most pictures of one size that go through together; 1 for an ONNX and an engine's largest if left out."""


@dataclass(frozen=True)
class WrittenModel:
    """A model in a repository."""

    config: Path
    model: Path
    client: Path
    new: bool
    """Whether this version is new."""


def write_repository(repository: Path, model: Path, options: TritonOptions = TritonOptions()) -> WrittenModel:
    """Put a model into a repository: its configuration, a new version unless the last one is the same, a client.

    Raises ModelError for a file that is no model of sanrt's or that Triton does not run, UsageError for options that do not
    fit it, FileError where the repository cannot be written.
    """
    served = served_engine(model) if model.suffix == SUFFIX else served_onnx(model)
    name = options.name or model.name.removesuffix(model.suffix)
    if not name.strip() or set(name) & set('/\\:*?"<>|') or name.startswith("."):
        raise UsageError(f"--name {name!r}: expected a name for a folder")
    require_folder_of(repository)
    config = configuration(name, served, options)
    folder = repository / name
    existing = versions(folder)
    last = folder / str(existing[-1]) / served.file_name if existing else None
    new = not (last and last.is_file() and is_same(last, served.content))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIG, text_format.MessageToString(config).encode())
        place = write_version(folder, existing[-1] + 1 if existing else 1, served) if new or last is None else last
    except OSError as error:
        raise FileError(f"{folder}: cannot be written ({system_reason(error)}); choose another place") from error
    client = repository / CLIENT
    write_whole(client, files("sanrt.export").joinpath("triton_client.py").read_bytes())
    return WrittenModel(folder / CONFIG, place, client, new)


def served_onnx(path: Path) -> Served:
    """An exported ONNX; raises ModelError unless it is what it says."""
    spec, interface = read_exported(path).spec, read_interface(path)
    names = [tensor.name for tensor in (*interface.inputs, *interface.outputs)]
    if names != ["input", "output"]:
        raise ModelError(f"{path}: has {', '.join(names)}; expected a whole network, with input and output")
    kinds = TYPES[interface.inputs[0].type], TYPES[interface.outputs[0].type]
    multiple = f", multiples of {spec.multiple}" if spec.multiple > 1 else ""
    side = -(-max(WARM, spec.min_side) // spec.multiple) * spec.multiple
    sizes = f"sides of {spec.min_side} pixels or more{multiple}"
    others = [path.parent / name for name in external_files(path)]
    return Served(spec, "onnxruntime", path, others, kinds, 1, (side, side), sizes)


def served_engine(path: Path) -> Served:
    """A TensorRT engine; raises ModelError for TensorRT-RTX's, which Triton's backend does not load."""
    info: EngineInfo = read_engine(path)
    options = info.identity.options
    if options.flavor is Flavor.RTX:
        raise ModelError(
            f"{path}: built by TensorRT-RTX, whose engines Triton does not load; build one with --flavor tensorrt"
        )
    largest = min(profile.max.batch for profile in options.profiles)
    floats = schema.TYPE_FP32, schema.TYPE_FP32
    best = options.profiles[0].opt
    sizes = "; ".join(map(str, options.profiles))
    return Served(
        info.spec,
        "tensorrt",
        read_engine_bytes(info),
        (),
        floats,
        largest,
        (best.height, best.width),
        sizes,
        len(options.profiles),
    )


def configuration(name: str, served: Served, options: TritonOptions) -> schema.ModelConfig:
    """The model's config.pbtxt; raises UsageError for options that do not fit it."""
    batch = options.batch or served.batch
    if served.backend == "tensorrt" and batch > served.batch:
        raise UsageError(f"--batch {batch}: the engine takes at most {served.batch} pictures at once")
    kinds = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}
    kind = "KIND_GPU" if served.backend == "tensorrt" else kinds[options.kind]
    if served.backend == "tensorrt" and options.kind == "cpu":
        raise UsageError("--kind cpu: an engine runs on a GPU; name an ONNX, or leave --kind out")
    arch = served.spec.architecture
    read, written = served.types
    profiles = [str(number) for number in range(served.profiles)] if served.profiles > 1 else []
    warm = schema.ModelWarmup(name="one picture", batch_size=1)
    warm.inputs["input"].CopyFrom(schema.ModelWarmup.Input(data_type=read, dims=[3, *served.warm], zero_data=True))
    config = schema.ModelConfig(
        name=name,
        backend=served.backend,
        max_batch_size=batch,
        input=[schema.ModelInput(name="input", data_type=read, dims=[3, -1, -1])],
        output=[schema.ModelOutput(name="output", data_type=written, dims=[3, -1, -1])],
        instance_group=[schema.ModelInstanceGroup(count=options.instances, kind=kind, profile=profiles)],
        default_model_filename=served.file_name,
        model_warmup=[warm],
    )
    if batch > 1:
        config.dynamic_batching.SetInParent()
    facts = {
        "scale": arch.scale,
        "value_range": f"{arch.value_range:g}",
        "min_side": served.spec.min_side,
        "multiple": served.spec.multiple,
        "sizes": served.sizes,
        "network": arch.name,
    }
    for key, value in facts.items():
        config.parameters[f"sanrt.{key}"].string_value = str(value)
    return config


def versions(folder: Path) -> list[int]:
    """The numbers of the versions that a model has, in order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal()) if folder.is_dir() else []


def is_same(path: Path, content: bytes | Path) -> bool:
    """Whether a file has this content."""
    return file_digest(path) == file_digest(content) if isinstance(content, Path) else path.read_bytes() == content


def write_version(folder: Path, number: int, served: Served) -> Path:
    """The folder of a version, under its number only when it is whole: Triton may be watching."""
    unfinished = Path(tempfile.mkdtemp(prefix=".sanrt-", dir=folder))
    try:
        if isinstance(served.content, Path):
            shutil.copyfile(served.content, unfinished / served.file_name)
        else:
            (unfinished / served.file_name).write_bytes(served.content)
        for other in served.others:
            (unfinished / other.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(other, unfinished / other.name)
        unfinished.chmod(0o755)
        unfinished.rename(folder / str(number))
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder / str(number) / served.file_name
