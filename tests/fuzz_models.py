"""`python -m tests.fuzz_models --count 120`: damaged models through every CPU backend; fails on a crash or another picture.

Where a backend runs an ONNX, its picture must be the one that plain ONNX Runtime gives for that very file, within the
tolerances of `sanrt validate`. Damaged checkpoints are exported first; the ONNX must give what the checkpoint gives.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from sanrt.errors import SanrtError
from sanrt.export.onnx import ExportOptions, export_onnx
from sanrt.export.parity import TOLERANCES, Tolerance, compare
from sanrt.export.quantise.calibration import RangeMethod, measure_ranges
from sanrt.export.rounding import rounding_tolerance
from sanrt.export.samples import Sample
from sanrt.export.scene import natural_scene
from sanrt.export.tensors import input_type
from sanrt.model.checkpoint import bundled_checkpoint, load_checkpoint
from sanrt.model.exported import read_exported, read_model
from sanrt.model.graph import san_model
from sanrt.model.san import SAN
from sanrt.model.spec import Precision, Quantisation, QuantisedType
from sanrt.runtime.artifacts.models import read_spec
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.tiling.upscaling import infer_padded, network_input

BACKENDS = ("native", "onnxruntime", "openvino", "torch")
PICTURE = natural_scene(24, 28)
SECONDS = 300
"""That one file may take."""
Random = np.random.Generator
Mutation = Callable[[bytes, Random], bytes]


def originals(folder: Path) -> dict[str, bytes]:
    """File name -> content, undamaged: an export, one without digests as of sanrt 0.1, two in fp16, one in int8; weights."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    checkpoint = bundled_checkpoint(2)
    path = export_onnx(load_checkpoint(checkpoint), folder / "original.onnx", ExportOptions(check=False)).path
    spec, weights = read_model(path)
    ranges = measure_ranges(spec, weights, [Sample("scene", natural_scene(48, 48), None)], RangeMethod.MIN_MAX)
    quantisation = Quantisation(QuantisedType.INT8, ranges.inputs, ranges.outputs)
    return {
        "new.onnx": path.read_bytes(),
        "old.onnx": without_digests(onnx.load(path)).SerializeToString(),
        "converted.onnx": convert_float_to_float16(onnx.load(path), keep_io_types=True).SerializeToString(),
        "stored.onnx": stored_in_fp16(without_digests(onnx.load(path))).SerializeToString(),
        "int8.onnx": without_digests(san_model(replace(spec, quantisation=quantisation), weights)).SerializeToString(),
        "weights.safetensors": checkpoint.read_bytes(),
    }


def without_digests(model: onnx.ModelProto) -> onnx.ModelProto:
    """As sanrt 0.1 wrote it: only tensors and graph are held against the description."""
    kept = [entry for entry in model.metadata_props if not entry.key.endswith(("tensors_digest", "description_digest"))]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    return model


def stored_in_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights in fp16, each turned back by a Cast."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and not tensor.name.startswith("const."):
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{name}.fp16"))
            model.graph.node.append(helper.make_node("Cast", [f"{name}.fp16"], [name], to=TensorProto.FLOAT))
    return model


# --- damage to any file ------------------------------------------------------------------------------------------------


def flipped(data: bytes, rng: Random) -> bytes:
    """Bits, anywhere, among the first bytes (nodes, a safetensors header) or among the last (metadata)."""
    start, stop = [(0, len(data)), (0, min(40_000, len(data))), (max(0, len(data) - 4_000), len(data))][rng.integers(3)]
    result = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        result[rng.integers(start, stop)] ^= 1 << int(rng.integers(8))
    return bytes(result)


def cut(data: bytes, rng: Random) -> bytes:
    return data[: rng.integers(len(data))]


def dropped(data: bytes, rng: Random) -> bytes:
    start = int(rng.integers(len(data)))
    return data[:start] + data[start + int(rng.integers(1, 200)) :]


def overwritten(data: bytes, rng: Random) -> bytes:
    start, value = int(rng.integers(len(data) - 8)), int(rng.choice([0, 0x7F, 0x80, 0xFF]))
    return data[:start] + bytes([value] * 4) + data[start + 4 :]


# --- damage to an ONNX's parts -------------------------------------------------------------------------------------------


def on_model(edit: Callable[[onnx.ModelProto, Random], None]) -> Mutation:
    """An edit of the parsed model as one of its bytes."""

    def mutation(data: bytes, rng: Random) -> bytes:
        model = onnx.load_from_string(data)
        edit(model, rng)
        return bytes(model.SerializeToString())

    mutation.__name__ = edit.__name__
    return mutation


def some(things: Any, rng: Random) -> Any:
    return things[rng.integers(len(things))]


def swapped_tensors(model: onnx.ModelProto, rng: Random) -> None:
    """The values of two tensors of one shape."""
    tensors = [t for t in model.graph.initializer if len(t.raw_data) > 100]
    first = some(tensors, rng)
    second = some([t for t in tensors if (t.dims, t.data_type) == (first.dims, first.data_type)], rng)
    first.raw_data, second.raw_data = second.raw_data, first.raw_data


def swapped_names(model: onnx.ModelProto, rng: Random) -> None:
    first, second = some(model.graph.initializer, rng), some(model.graph.initializer, rng)
    first.name, second.name = second.name, first.name


def edited_metadata(model: onnx.ModelProto, rng: Random) -> None:
    """A number becomes another, or an entry another's value, or it goes."""
    entry = some(model.metadata_props, rng)
    match rng.integers(3):
        case 0:
            digits = [i for i, c in enumerate(entry.value) if c.isdigit()] or [0]
            at = some(digits, rng)
            entry.value = entry.value[:at] + str(rng.integers(10)) + entry.value[at + 1 :]
        case 1:
            entry.value = some(model.metadata_props, rng).value
        case _:
            model.metadata_props.remove(entry)


def edited_architecture(model: onnx.ModelProto, rng: Random) -> None:
    entry = next(entry for entry in model.metadata_props if entry.key == "sanrt.architecture")
    facts = json.loads(entry.value)
    facts[some(list(facts), rng)] = some([0, 1, 2, 3, 4, 5, 8, 32, 64, 10**6, -1, 1.0, None, "4"], rng)
    entry.value = json.dumps(facts)


def edited_tensor(model: onnx.ModelProto, rng: Random) -> None:
    """Another shape, type or length, or scaled, or gone."""
    tensor = some(model.graph.initializer, rng)
    array = numpy_helper.to_array(tensor)
    match rng.integers(6):
        case 0:
            tensor.data_type = int(rng.integers(1, 17))
        case 1:
            tensor.dims[:] = list(tensor.dims)[::-1]
        case 2:
            tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]
        case 3:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), tensor.name))
        case 4:
            tensor.CopyFrom(numpy_helper.from_array((array * array.dtype.type(1.2)).astype(array.dtype), tensor.name))
        case _:
            model.graph.initializer.remove(tensor)


def edited_node(model: onnx.ModelProto, rng: Random) -> None:
    """Another operator, input or attribute, or gone."""
    node = some(model.graph.node, rng)
    match rng.integers(4):
        case 0:
            node.op_type = some(["Relu", "Sigmoid", "Add", "Mul", "Identity", "Sub"], rng)
        case 1:
            node.input[0] = some(some(model.graph.node, rng).output, rng)
        case 2:
            for attribute in node.attribute:
                attribute.i += 1
                attribute.ints[:] = [each + 1 for each in attribute.ints]
        case _:
            model.graph.node.remove(node)


# --- damage to a checkpoint's parts --------------------------------------------------------------------------------------


def edited_header(data: bytes, rng: Random) -> bytes:
    """Entries of a safetensors header: exchanged, or another shape, type, offset or setting."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    first, second = (header[some(names, rng)] for _ in range(2))
    match rng.integers(6):
        case 0:
            first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
        case 1:
            first["shape"], second["shape"] = second["shape"], first["shape"]
        case 2:
            first["dtype"] = some(["F64", "F32", "F16", "BF16", "I8", "BOOL"], rng)
        case 3:
            first["data_offsets"] = [int(each + rng.integers(-4, 5)) for each in first["data_offsets"]]
        case 4:
            del header[some(names, rng)]
        case _:
            settings = json.loads(header["__metadata__"]["sanrt"])
            settings[some(list(settings), rng)] = some([0, -1, 1, 7, 10**9, "x", None, [1], 1e400], rng)
            header["__metadata__"]["sanrt"] = json.dumps(settings)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


ANY: tuple[Mutation, ...] = (flipped, flipped, cut, dropped, overwritten)
OF_ONNX = (swapped_tensors, swapped_names, edited_metadata, edited_architecture, edited_tensor, edited_tensor, edited_node)
MUTATIONS = {".onnx": ANY + tuple(map(on_model, OF_ONNX)), ".safetensors": (*ANY, edited_header, edited_header)}


def mutated(count: int, seed: int, folder: Path) -> Iterator[tuple[str, bytes]]:
    """The undamaged files, then `count` damaged ones: a name that says what was done, and the content."""
    rng = np.random.default_rng(seed)
    sources = originals(folder)
    yield from ((f"intact_{name}", data) for name, data in sources.items())
    for number in range(count):
        name = some(list(sources), rng)
        mutation = some(MUTATIONS[Path(name).suffix], rng)
        yield f"{number:04}_{mutation.__name__}_{name}", mutation(sources[name], rng)


# --- what becomes of it --------------------------------------------------------------------------------------------------


def examined(path: Path) -> dict[str, str]:
    """Backend -> "ran", "refused" or what is wrong."""
    warnings.simplefilter("ignore")
    if path.suffix == ".onnx":
        return {name: outcome(name, path, path) for name in BACKENDS}
    model = path.with_name(f"{path.stem}_exported.onnx")
    try:
        export_onnx(load_checkpoint(path), model, ExportOptions(check=False, picture=PICTURE))
    except Exception as error:
        return dict.fromkeys(BACKENDS, refusal(error, path))
    return {**{name: outcome(name, model, model) for name in BACKENDS}, "checkpoint": outcome("torch", path, model)}


def refusal(error: Exception, path: Path) -> str:
    """Refused in one line, or a traceback that a user would see."""
    fine = isinstance(error, SanrtError) and "\n" not in str(error)
    return "refused" if fine else f"{type(error).__name__}: {error}"


def outcome(name: str, path: Path, reference: Path) -> str:
    """One backend in fp32, and by its own choice of type."""
    try:
        results = [ran(name, path, options) for options in (RunOptions(1, Precision.FP32), RunOptions(1))]
    except Exception as error:
        return refusal(error, path)
    expected = plain_onnxruntime(reference)
    if expected is None:
        return "runs, though ONNX Runtime refuses it"
    for picture, kind in results:
        limit, difference = tolerance(reference, kind), compare(expected, picture)
        if limit and not difference.within(limit):
            return f"{kind}: {difference}, expected {limit}"
    return "ran"


def ran(name: str, path: Path, options: RunOptions) -> tuple[Any, Precision | QuantisedType]:
    """A backend's picture on the 0..255 scale, and the coarsest type that made it."""
    with load_backend(name, path, options) as backend:
        value_range = backend.spec.architecture.value_range
        return infer_padded(backend, network_input(PICTURE, value_range)) * (255 / value_range), backend.spec.coarsest


@cache
def plain_onnxruntime(path: Path) -> Any:
    """The picture of the file's own graph, pixels of the range that it says; None where ONNX Runtime refuses it."""
    value_range = read_spec(path).architecture.value_range
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        output = session.run(None, {"input": network_input(PICTURE, value_range).astype(input_type(session))})[0]
    except Exception:
        return None
    return output.astype(np.float32) * (255 / value_range)


@cache
def tolerance(path: Path, kind: Precision | QuantisedType) -> Tolerance | None:
    """The coarser of the backend's and the file's own, wider where these weights make any fp32 round more than usual.

    None for coarser types than fp32 with such weights: how coarse those are was measured with trained ones.
    """
    exported = read_exported(path)
    limit = max((TOLERANCES[kind], TOLERANCES[exported.precision]), key=lambda each: each.max_abs)
    if exported.spec.quantisation:
        return limit
    net = SAN(replace(exported.spec.architecture, sqrt_iterations=exported.spec.iterations)).eval()
    net.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in exported.weights().items()})
    rounding = rounding_tolerance(net, [network_input(PICTURE, exported.spec.architecture.value_range)])
    wider = rounding.max_abs / TOLERANCES[Precision.FP32].max_abs
    lower = TOLERANCES[Precision.FP32].min_psnr - rounding.min_psnr
    if wider > 1 and kind != Precision.FP32:
        return None
    return replace(limit, max_abs=limit.max_abs * wider, min_psnr=limit.min_psnr - lower)


def main() -> None:
    """Mutate, run, compare, sum up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    problems = []
    with TemporaryDirectory() as name:
        pool = new_pool()
        for file, data in mutated(options.count, options.seed, Path(name)):
            path = Path(name, file)
            path.write_bytes(data)
            try:
                found = pool.submit(examined, path).result(SECONDS)
            except (BrokenProcessPool, TimeoutError) as error:
                found = dict.fromkeys(BACKENDS, f"{type(error).__name__}: a crash, or more than {SECONDS} s")
                pool = new_pool()
            for backend, told in found.items():
                counts[told if told in ("ran", "refused") else "wrong"] += 1
                wrong = told not in ("ran", "refused") or ("intact_" in file and told == "refused" and "int8" not in file)
                problems += [f"{file}, {backend}: {told}"] if wrong else []
            path.unlink()
    figures = ", ".join(f"{count} {told}" for told, count in sorted(counts.items()))
    print(f"{options.count} models, seed {options.seed}, {len(BACKENDS)} backends: {figures}; {len(problems)} problems")
    sys.exit("\n".join(problems) or 0)


def new_pool() -> ProcessPoolExecutor:
    """One worker, so that a crash is seen and told."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


if __name__ == "__main__":
    main()
