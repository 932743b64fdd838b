"""A checkpoint as an ONNX file, checked against the PyTorch reference before it gets its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from sanrt.arrays import Array
from sanrt.errors import CheckpointError, ModelError, UsageError
from sanrt.export.layout import as_given, call_graph, layout_tolerance, opened
from sanrt.export.parity import Difference, Tolerance, compare, require, worst
from sanrt.export.rounding import rounding_tolerance
from sanrt.export.scene import natural_scene
from sanrt.export.squareroot import SquareRootReport, iterations_for, square_root_report, with_root
from sanrt.files import require_writable, write_whole
from sanrt.model.checkpoint import Checkpoint
from sanrt.model.graph import Weights, san_model
from sanrt.model.san import SAN
from sanrt.model.spec import MIN_SIDE, ModelSpec, PixelLayout, Precision
from sanrt.runtime.artifacts.models import read_spec
from sanrt.runtime.artifacts.sizes import Size
from sanrt.runtime.artifacts.variants import derived_model, forget, variant_bytes
from sanrt.runtime.backends.onnxruntime import CPU_FORM, open_session
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.tiling.upscaling import network_input
from sanrt.version import __version__
from sanrt.wording import option

REPORT = "nothing was written; check the checkpoint's values, or report it"
CHECKED_SIZES = ((1, 4, 4), (2, 5, 7), (1, 17, 23), (2, 32, 24))
"""Batch, height and width of the pictures on which an export is checked; a black one and the whole scene come on top."""


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported."""

    iterations: int | None = None
    """Newton-Schulz steps; None is as trained, or as many as an exact-root checkpoint needs."""
    picture: npt.NDArray[np.uint8] = field(default_factory=natural_scene)
    """(H, W, 3) uint8 on which the square root is measured."""
    picture_name: str = "a generated scene"
    check: bool = True
    """Compare the ONNX with PyTorch, and write nothing when they differ."""
    layout: PixelLayout = PixelLayout.FLOAT_NCHW
    """How the graph takes and gives pictures."""
    shape: Size | None = None
    """The one input that the graph takes; None leaves batch, height and width open."""
    overwrite: bool = False
    """Replace whatever file is there, not only an earlier export of the same weights."""


@dataclass(frozen=True)
class ExportReport:
    """The written file, and the measurements made on it."""

    path: Path
    spec: ModelSpec
    square_root: SquareRootReport
    parity: Difference | None
    """The worst over every checked input; None when not checked."""
    replaced: str
    """A description of the file that was there before; empty where none was."""


@torch.inference_mode()
def export_onnx(checkpoint: Checkpoint, out: Path, options: ExportOptions | None = None) -> ExportReport:
    """Write a checkpoint as fp32 ONNX with dynamic batch, height and width, standard operators only.

    Raises ModelError before any work where `out` is something else than an earlier export of the same weights and steps, and
    ParityError when ONNX Runtime's output differs from PyTorch's; then what was there is left as it was.
    """
    options = options or ExportOptions()
    replaced = describe_replaced(out, checkpoint, options)
    remedy = f"choose another folder with {option('models')}"
    require_writable(out, remedy)
    if options.shape and min(options.shape[1:]) < MIN_SIDE:
        raise UsageError(f"{option('shape', options.shape)}: expected a height and width of {MIN_SIDE} or more")
    arch = checkpoint.architecture
    pixels = torch.from_numpy(network_input(options.picture, arch.value_range))
    try:
        iterations = options.iterations or iterations_for(checkpoint, pixels)
        root = square_root_report(checkpoint, iterations, pixels, options.picture_name)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise CheckpointError(
            f"{checkpoint.path}: its features overflow float32 on {options.picture_name}; expected a trained SAN's weights"
        ) from error
    plain = ModelSpec(arch, checkpoint.digest, checkpoint.origin, iterations, version=__version__)
    spec = replace(plain, layout=options.layout, shape=options.shape)
    weights = {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}
    reference = with_root(checkpoint.network(), iterations)
    parity, tolerance = check_parity(out, spec, weights, reference, pixels) if options.check else (None, None)
    measured = parity and tolerance and {**parity.to_json(), "tolerance": tolerance.max_abs}
    spec = replace(spec, report={"square_root": root.to_json(), "parity": measured})
    if replaced:
        forget(out)
    # The same nodes as those just checked: only the metadata gained the measurements.
    write_whole(out, san_model(spec, weights).SerializeToString(), remedy)
    derived_model(out, CPU_FORM)
    return ExportReport(out, spec, root, parity, replaced)


def describe_replaced(out: Path, checkpoint: Checkpoint, options: ExportOptions) -> str:
    """A description of the file that an export to `out` replaces; empty where none is there.

    Raises ModelError for what is not an export of the same weights, with as many steps if these are given, unless that may
    be overwritten.
    """
    if not out.exists():
        return ""
    try:
        spec = read_spec(out)
    except ModelError:
        found, same = "a file that `sanrt export` did not write", False
    else:
        found = f"{spec.architecture.name}, {spec.iterations} Newton-Schulz steps, {spec.weights_origin}"
        same = spec.weights_digest == checkpoint.digest and spec.coarsest == Precision.FP32
        found += f" ({'the same weights' if same else f'other weights: sha256 {spec.weights_digest[:12]}'})"
        same = same and options.iterations in (None, spec.iterations)
    if same or options.overwrite:
        return found
    raise ModelError(
        f"{out}: is there already and would be lost: {found}; choose another place with {option('output')}, or add "
        f"{option('overwrite', True)}"
    )


def check_parity(
    out: Path, spec: ModelSpec, weights: Weights, reference: SAN, pixels: torch.Tensor
) -> tuple[Difference, Tolerance]:
    """The worst difference of the exported graph's outputs from PyTorch's, and what it may be; ParityError beyond that.

    So is the form of it that sanrt's own backend runs, which is not reported: its values may be of another unit.
    """
    inputs = list(check_inputs(pixels))
    expected = [reference(torch.from_numpy(x)).numpy() for x in inputs]
    usual = rounding_tolerance(reference, inputs)

    def held(graph: bytes, form: str, its_spec: ModelSpec) -> tuple[Difference, Tolerance]:
        session, tolerance = open_session(graph, out, RunOptions()), layout_tolerance(usual, its_spec)
        differences = []
        for x, y in zip(inputs, expected, strict=True):
            difference = compare(as_given(y, its_spec), call_graph(session, its_spec, x), spec.architecture.value_range)
            require(difference, tolerance, f"{spec.architecture.name} {form}, input {list(x.shape)}", REPORT)
            differences.append(difference)
        return worst(differences), tolerance

    held(variant_bytes(CPU_FORM, spec.open, weights), "as sanrt's onnxruntime backend runs it", spec.open)
    return held(opened(san_model(spec, weights)), "as exported", spec)


def check_inputs(pixels: torch.Tensor) -> Iterator[Array]:
    """(B, 3, H, W) inputs to compare on: crops of the picture in several sizes, pairs of them, a black one, the whole."""
    for batch, height, width in CHECKED_SIZES:
        crop = pixels[:, :, :height, :width]
        yield torch.cat([crop, crop.flip(3)])[:batch].numpy()
    yield np.zeros((1, 3, 16, 16), np.float32)
    yield pixels.numpy()
