"""`sanrt info`: what a file is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sanrt.errors import UsageError
from sanrt.extras import install_command
from sanrt.model.spec import PixelLayout

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sanrt.model.exported import Interface
    from sanrt.model.spec import ModelSpec


def info(file: Annotated[Path, typer.Argument(help="An ONNX, an engine or a checkpoint.")]) -> None:
    """Say what an ONNX, an engine or a checkpoint is: scale, sizes, precision, identity."""
    from rich.console import Console

    describe = DESCRIBERS.get(file.suffix.lower())
    if describe is None:
        raise UsageError(f"{file}: not a kind of file that sanrt knows; expected {', '.join(DESCRIBERS)}")
    console = Console(highlight=False)
    for part in describe(file):
        console.print(part)


def describe_onnx(path: Path) -> Iterator[RenderableType]:
    """An exported model's facts; raises ModelError after them unless its graph and weights are what they say."""
    from sanrt.cli.tables import facts_table, quantisation_table, square_root_table
    from sanrt.runtime.artifacts.models import read_spec
    from sanrt.runtime.artifacts.variants import model_digest

    spec = read_spec(path)
    facts = {"file": f"{path}, an ONNX model of {path.stat().st_size / 1e6:.1f} MB", **model_facts(spec)}
    yield facts_table({**facts, "digest": model_digest(path)})
    if "square_root" in spec.report:
        yield square_root_table(spec.report["square_root"])
    if "quantisation" in spec.report:
        yield quantisation_table(spec.report["quantisation"])
    try:
        from sanrt.model.exported import read_exported, read_interface
    except ModuleNotFoundError:
        yield f"not read: its graph, and whether it is what it says; {install_command('cpu')}, for the onnx package"
    else:
        read_exported(path)
        yield interface_table(read_interface(path), spec)


def interface_table(interface: Interface, spec: ModelSpec) -> RenderableType:
    """How a program calls the graph: names, shapes, types; what the numbers of pictures mean."""
    from rich.table import Table

    opsets = ", ".join(f"{domain or 'ai.onnx'} {number}" for domain, number in interface.opsets.items())
    table = Table("", "name", "shape", "type", "holds", title=f"Called with (opset {opsets})")
    of_bytes = spec.layout is PixelLayout.UINT8_NHWC
    picture = "RGB, bytes, channels last (NHWC)" if of_bytes else f"RGB, planar (NCHW), 0..{spec.architecture.value_range:g}"
    clipped = "clipped and rounded" if of_bytes else "not clipped"
    holds = {"input": picture, "output": f"the same, {spec.architecture.scale} times height and width, {clipped}"}
    for way, tensors in ("in", interface.inputs), ("out", interface.outputs):
        for tensor in tensors:
            shape = " x ".join(map(str, tensor.shape)) or "a number"
            table.add_row(way, tensor.name, shape, tensor.type, holds.get(tensor.name, ""))
    return table


def model_facts(spec: ModelSpec) -> dict[str, str]:
    """The facts in a model's description, whichever file carried it."""
    from sanrt.cli.tables import gate_line, parity_line, quantisation_line, square_root_line

    arch = spec.architecture
    fixed = f"{'x'.join(map(str, spec.shape))} alone" if spec.shape else "any size"
    multiple = f", multiples of {spec.multiple}" if spec.multiple > 1 else ""
    facts = {
        "network": arch.name,
        "scale": f"{arch.scale}x",
        "precision": spec.computes,
        "input": f"RGB, 0..{arch.value_range:g}, sides of {spec.min_side} px or more{multiple}",
        **({"other programs": f"{spec.layout}, {fixed} (sanrt runs its weights at any size)"} if spec != spec.open else {}),
        "attention": f"{spec.regions} x {spec.regions} regions",
        "SOCA": gate_line(arch),
        "square root": f"{spec.iterations} Newton-Schulz steps",
    }
    if "square_root" in spec.report:
        facts["square root"] = square_root_line(spec.report["square_root"])
    if "parity" in spec.report:
        facts["PyTorch parity"] = parity_line(spec.report["parity"])
    if "quantisation" in spec.report:
        facts["quantisation"] = quantisation_line(spec.report["quantisation"])
    return {
        **facts,
        "weights": spec.weights_origin,
        "weights digest": spec.weights_digest,
        "written by": f"sanrt {spec.version}" if spec.version else "an unnamed version of sanrt",
    }


def describe_checkpoint(path: Path) -> Iterator[RenderableType]:
    """A weights file, loaded and checked as strictly as an export would."""
    from sanrt.cli.tables import facts_table, gate_line
    from sanrt.extras import extra

    with extra("export", "reading a checkpoint"):
        from sanrt.model.checkpoint import load_checkpoint
    checkpoint = load_checkpoint(path)
    arch = checkpoint.architecture
    parameters = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    steps = arch.sqrt_iterations
    facts = {
        "file": f"{path}, a checkpoint of {path.stat().st_size / 1e6:.1f} MB",
        "network": f"{arch.name}, {parameters / 1e6:.2f} M parameters",
        "scale": f"{arch.scale}x",
        "input": f"RGB, 0..{arch.value_range:g}",
        "SOCA": gate_line(arch),
        "square root": "exact" if steps is None else f"{steps} Newton-Schulz steps",
        "weights": checkpoint.origin,
        "digest": checkpoint.digest,
    }
    yield facts_table(facts)


def describe_engine(path: Path) -> Iterator[RenderableType]:
    """An engine's facts; raises ModelError after them when it is damaged or its ONNX has changed since."""
    from sanrt.cli.tables import facts_table
    from sanrt.runtime.artifacts.engines import check_fresh, read_engine, read_engine_bytes

    info = read_engine(path)
    yield facts_table(info.table())
    read_engine_bytes(info)
    check_fresh(info)


DESCRIBERS: dict[str, Callable[[Path], Iterator[RenderableType]]] = {
    ".onnx": describe_onnx,
    ".engine": describe_engine,
    ".stages": describe_engine,
    ".pt": describe_checkpoint,
    ".pth": describe_checkpoint,
    ".ckpt": describe_checkpoint,
    ".safetensors": describe_checkpoint,
}
"""The function that prints a file, by the file's suffix."""
