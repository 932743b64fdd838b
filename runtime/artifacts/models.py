"""Where exported models lie, and what an ONNX file says of itself; needs neither onnx nor a session."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO

from sanrt.errors import ModelError, UsageError, system_reason
from sanrt.model.bundled import FOLDER as BUNDLED_FOLDER
from sanrt.model.bundled import SUFFIX as WEIGHTS_SUFFIX
from sanrt.model.bundled import WeightsKind, bundled_checkpoint, bundled_name, has_bundled, read_weights
from sanrt.model.spec import SCALES, ModelSpec, QuantisedType
from sanrt.wording import option

MODELS = Path("models")
"""The folder, in the working folder, that export, build and run share by default."""
DEFAULT_SCALE = 4
BUNDLED_NAME = re.compile(r"san_x\d+(_.*)?", re.IGNORECASE)
"""File names, without their suffix, that are for the weights that ship with sanrt alone."""
METADATA_PROPS, GRAPH, INITIALIZER, EXTERNAL_DATA = 14, 7, 5, 13
"""Field numbers in ONNX's ModelProto (the first two), GraphProto and TensorProto."""
LOCATION = b"location"
"""Key of the entry that names the file with a tensor's values."""
REMEDY = "make a model with `sanrt export --scale 4`"


def exported_path(models: Path, scale: int | None = None, kind: WeightsKind = WeightsKind.CLEAN) -> Path:
    """Where `sanrt export` writes the bundled weights of a scale and kind."""
    return models / f"{bundled_name(scale or DEFAULT_SCALE, kind)}.onnx"


def checkpoint_path(models: Path, checkpoint: Path, digest: str) -> Path:
    """Where `sanrt export` writes the model of a checkpoint: under the checkpoint's name.

    A name that belongs to bundled weights is told apart by the beginning of the checkpoint's digest.
    """
    bundled = BUNDLED_NAME.fullmatch(checkpoint.stem)
    return models / f"{checkpoint.stem}{f'-{digest[:8]}' if bundled else ''}.onnx"


def other_models(models: Path) -> str:
    """The models in a folder that no command takes by itself, for messages about one that is not there."""
    defaults = [exported_path(models, scale, kind) for scale in SCALES for kind in WeightsKind]
    exported = (path for path in models.glob("*.onnx") if path.stem.rpartition(".")[2] not in tuple(QuantisedType))
    names = ", ".join(map(str, sorted(path for path in exported if path not in defaults)))
    return f" (there are others, which must be named: {names})" if names else ""


def default_model(models: Path, scale: int | None = None, kind: WeightsKind = WeightsKind.CLEAN) -> Path:
    """The model where none is named: what `sanrt export` wrote for the scale and kind, else the bundled weights as they are.

    Raises CheckpointError where there are neither.
    """
    path = exported_path(models, scale, kind)
    return path if path.is_file() else bundled_checkpoint(scale or DEFAULT_SCALE, kind)


def has_photo_model(models: Path, scale: int | None = None) -> bool:
    """Whether a model for JPEG photographs goes with the default one: both exported, or both bundled."""
    scale = scale or DEFAULT_SCALE
    exported = exported_path(models, scale, WeightsKind.PHOTO).is_file()
    return exported or (has_bundled(scale, WeightsKind.PHOTO) and not exported_path(models, scale).is_file())


def model_title(path: Path) -> str:
    """A model's path, or what it is for people where it ships with sanrt."""
    return f"bundled weights {path.stem}" if path.parent == BUNDLED_FOLDER else str(path)


def require_own_weights(model: Path | None, kind: WeightsKind | None) -> None:
    """Raise UsageError for a named model or checkpoint with a kind of bundled weights besides."""
    if model and kind:
        raise UsageError(f"{option('weights', kind)}: {model} is named, and has its own; leave one of the two out")


def require_scale(path: Path, found: int, asked: int | None) -> None:
    """Raise UsageError when a model or checkpoint is of another scale than was asked for."""
    if asked not in (None, found):
        raise UsageError(
            f"{path}: is for x{found}, but {option('scale', asked)} was asked for; leave {option('scale')} out, or pass "
            f"{found}"
        )


def read_spec(path: Path) -> ModelSpec:
    """The description of an exported ONNX or of weights in sanrt's format; ModelError or CheckpointError without one."""
    if path.suffix == WEIGHTS_SUFFIX:
        return read_weights(path).spec
    try:
        with path.open("rb") as file:
            return spec_in(file, str(path))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({system_reason(error)}); {REMEDY}") from error


def spec_in(file: BinaryIO, subject: str) -> ModelSpec:
    """The same of an open ONNX; `subject` names it in errors."""
    return ModelSpec.from_metadata(onnx_metadata(file, subject), subject)


def onnx_metadata(file: BinaryIO, subject: str) -> dict[str, str]:
    """The metadata_props of an ONNX, the graph skipped; raises ModelError for anything else."""
    try:
        entries = [dict(protobuf_fields(BytesIO(entry))) for number, entry in protobuf_fields(file, METADATA_PROPS)]
        return {entry[1].decode(): entry.get(2, b"").decode() for entry in entries}
    except (ValueError, KeyError) as error:
        raise ModelError(f"{subject}: not an ONNX file, or a damaged one; {REMEDY}") from error


def external_files(path: Path) -> list[str]:
    """Files in an ONNX's folder that hold its weights (ONNX's external data), by relative path; none for other files.

    Paths that lead out of the folder are left out; onnx refuses to load them.
    """
    names = set()
    with (
        suppress(OSError, ValueError, KeyError),
        path.open("rb") as file,
        mmap(file.fileno(), 0, access=ACCESS_READ) as content,
    ):
        if content.find(LOCATION) >= 0:
            for _, graph in protobuf_fields(file, GRAPH):
                for _, tensor in protobuf_fields(BytesIO(graph), INITIALIZER):
                    for _, entry in protobuf_fields(BytesIO(tensor), EXTERNAL_DATA):
                        pair = dict(protobuf_fields(BytesIO(entry)))
                        names |= {pair[2].decode()} if pair.get(1) == LOCATION else set()
    return sorted(name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts)


def protobuf_fields(stream: BinaryIO, only: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of the length-delimited fields of a protobuf message, or of those with one number.

    Raises ValueError where the stream ends early or is no protobuf.
    """
    end = stream.seek(0, 2)
    stream.seek(0)
    while stream.tell() < end:
        number, kind = divmod(varint(stream), 8)
        if kind == 0:
            varint(stream)
            continue
        size = {1: 8, 5: 4}.get(kind) or (varint(stream) if kind == 2 else end + 1)
        if stream.tell() + size > end or not number:
            raise ValueError(f"no protobuf field at byte {stream.tell()}")
        if kind == 2 and only in (None, number):
            yield number, stream.read(size)
        else:
            stream.seek(size, 1)


def varint(stream: BinaryIO) -> int:
    """A base-128 integer, least significant group first; raises ValueError at the stream's end."""
    value = shift = 0
    while shift < 64:
        byte = stream.read(1)
        if not byte:
            raise ValueError("the file ends within a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
        shift += 7
    raise ValueError("a number of more than 64 bits")
