"""An ONNX or engine on any backend, held against the PyTorch network of the checkpoint it was made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sanrt.arrays import Array
from sanrt.errors import ParityError, UsageError
from sanrt.export.layout import as_given, call_graph, layout_tolerance, opened
from sanrt.export.metrics import ssim, y_channel, y_psnr
from sanrt.export.parity import TOLERANCES, Difference, Tolerance, compare, require, worst
from sanrt.export.rounding import rounding_tolerance
from sanrt.export.samples import Picture, Sample
from sanrt.export.squareroot import with_root
from sanrt.extras import extra
from sanrt.geometry import Box, pad
from sanrt.model.bundled import WeightsKind, bundled_checkpoint, has_bundled, read_weights
from sanrt.model.checkpoint import Checkpoint, load_checkpoint
from sanrt.model.exported import ExportedModel, load_onnx, read_exported
from sanrt.model.san import SAN
from sanrt.model.spec import ModelSpec, Precision, QuantisedType
from sanrt.runtime.artifacts.engines import read_engine
from sanrt.runtime.backends.onnxruntime import open_session, run_error
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_unguarded
from sanrt.runtime.pictures.codec import Output, write_picture
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.tiling.upscaling import infer_padded, network_input, network_output
from sanrt.wording import option

Infer = Callable[[Array], Array]
"""float32 (1, 3, H, W) -> (1, 3, sH, sW)."""

REPLAYED = 3
"""Pictures of which the middle is written for Polygraphy."""
FILE_SIDE = 96
"""Longest side of the picture that goes through an ONNX's own graph, whose plain attention holds its scores in memory."""


@dataclass(frozen=True)
class ValidateOptions:
    """The reference that an artifact is held against, and the limits."""

    backend: str = "auto"
    precision: Precision | None = None
    """None is the backend's own choice."""
    checkpoint: Path | None = None
    """None is the bundled one; its digest must be the artifact's either way."""
    tolerance: float | None = None
    """Instead of the table's largest difference, of 255."""
    min_psnr: float | None = None
    """Instead of the table's lowest PSNR to the reference, dB."""
    heatmaps: Path | None = None
    """Folder for a picture of where each pair of outputs differs."""
    polygraphy: Path | None = None
    """Folder for inputs and reference outputs, and the commands that hold the artifact against them by Polygraphy."""


@dataclass(frozen=True)
class PictureResult:
    """Artifact and reference on one picture."""

    picture: str
    type: Precision | QuantisedType
    """The coarsest type in which the artifact's output was computed."""
    difference: Difference
    tolerance: Tolerance
    """The limits of that type."""
    ssim: float
    """SSIM of the two outputs as 8-bit luma; NaN where a side is too short for SSIM's window."""
    y_psnr: float | None
    """dB of the reference against the high-resolution picture; None where there is none."""
    y_psnr_drop: float | None
    """dB by which the artifact's Y-PSNR is lower."""


@dataclass(frozen=True)
class Validation:
    """The verdict on an artifact."""

    artifact: Path
    spec: ModelSpec
    backend: str
    checkpoint: Path
    tolerance: Tolerance
    """The limits for what the backend computed."""
    pictures: tuple[PictureResult, ...]
    own_graph: PictureResult | None
    """The middle of the first picture, by an ONNX's own graph."""
    wrong: str | None
    """A weight of the ONNX that is not the checkpoint's; None where all are, or where an engine's ONNX is not there."""

    @property
    def rows(self) -> tuple[PictureResult, ...]:
        """Everything that was run."""
        return (self.own_graph, *self.pictures) if self.own_graph else self.pictures

    @property
    def difference(self) -> Difference:
        """The worst over the pictures, as the backend computed them."""
        return worst(p.difference for p in self.pictures)

    @property
    def passed(self) -> bool:
        """Whether `require` has nothing to raise."""
        try:
            self.require()
        except ParityError:
            return False
        return True

    @property
    def y_psnr_drop(self) -> float | None:
        """The mean over the pictures that have a high-resolution original."""
        drops = [p.y_psnr_drop for p in self.pictures if p.y_psnr_drop is not None]
        return float(np.mean(drops)) if drops else None

    def require(self) -> None:
        """Raise ParityError, naming what was measured, unless weights are the checkpoint's and outputs within tolerances."""
        if self.wrong:
            raise ParityError(
                f"{self.artifact}: its {self.wrong} is not what {self.checkpoint} has; make it again with `sanrt export`"
            )
        remedy = "`sanrt validate --locate` names the stage where it begins"
        if self.own_graph:
            subject = f"{self.artifact} ({self.own_graph.type}), its own graph"
            require(self.own_graph.difference, self.own_graph.tolerance, subject, remedy)
        subject = f"{self.artifact} ({self.spec.coarsest}) on {self.backend}"
        require(self.difference, self.tolerance, subject, remedy)
        drop = self.y_psnr_drop
        if drop is not None and not drop <= self.tolerance.y_psnr_drop:
            raise ParityError(
                f"{subject}: Y-PSNR is {drop:.3f} dB below the PyTorch reference's, expected"
                f" {self.tolerance.y_psnr_drop:g} or less; {remedy}"
            )

    def to_json(self) -> dict[str, Any]:
        """Every figure, for a file; infinite and undefined ones are null."""
        rows = [
            {
                "picture": p.picture,
                "type": p.type,
                "tolerance": p.tolerance.max_abs,
                "min_psnr": p.tolerance.min_psnr,
                **p.difference.to_json(),
                "ssim": None if math.isnan(p.ssim) else p.ssim,
                "y_psnr": p.y_psnr,
                "y_psnr_drop": p.y_psnr_drop,
            }
            for p in self.rows
        ]
        return {
            "artifact": str(self.artifact),
            "passed": self.passed,
            "not_the_checkpoint's": self.wrong,
            "backend": self.backend,
            "precision": self.spec.coarsest,
            "weights_digest": self.spec.weights_digest,
            "tolerance": self.tolerance.max_abs,
            "min_psnr": self.tolerance.min_psnr,
            "y_psnr_drop_tolerance": self.tolerance.y_psnr_drop,
            **self.difference.to_json(),
            "y_psnr_drop": self.y_psnr_drop,
            "pictures": rows,
        }


def validate(artifact: Path, pictures: Callable[[int], Iterable[Sample]], options: ValidateOptions) -> Validation:
    """Run an artifact and its reference on pictures, which are made for the artifact's scale, one at a time.

    Backends run variants of an ONNX, not its own graph; that goes through ONNX Runtime once, with a part of the first
    picture. Raises UsageError when the checkpoint is not the one that the artifact was made of. The verdict is
    `.require()`'s.
    """
    with load_unguarded(options.backend, artifact, RunOptions(precision=options.precision)) as backend:
        spec = backend.spec
        checkpoint = source_checkpoint(spec, artifact, options.checkpoint)
        net = reference_network(checkpoint, spec)
        reference, infer = partial(reference_output, net, spec), partial(infer_padded, backend)
        remaining = iter(pictures(spec.architecture.scale))
        first = next(remaining)
        limits = partial(tolerance_for, net, spec, middle(first), options)
        exported = exported_model(artifact)
        if options.polygraphy and exported and exported.spec != exported.spec.open:
            raise UsageError(
                f"{artifact}: {option('polygraphy')} needs float32 pictures of any size; export without {option('io')} "
                f"and {option('shape')}"
            )
        own = None
        if exported and artifact.suffix == ".onnx":
            kind = exported.spec.coarsest if exported.spec.quantisation else exported.precision
            given = partial(as_given, spec=exported.spec)
            own = picture_result(
                middle(first),
                lambda x: given(reference(x)),
                own_graph(artifact, exported.spec),
                spec,
                kind,
                layout_tolerance(limits(kind), exported.spec),
            )
        # Weights that were rounded to fp16 make an fp32 run as coarse.
        coarsest = Precision.FP16 if exported and exported.halved and spec.coarsest == Precision.FP32 else spec.coarsest
        tolerance = limits(coarsest)
        results = tuple(
            picture_result(sample, reference, infer, spec, coarsest, tolerance, options.heatmaps)
            for sample in chain([first], remaining)
        )
        if options.polygraphy:
            parts = map(middle, islice(pictures(spec.architecture.scale), REPLAYED))
            limit = own.tolerance if own else None
            write_replay(artifact, backend.name, spec, parts, reference, tolerance, limit, options.polygraphy)
        wrong = wrong_weight(exported, checkpoint) if exported else None
        return Validation(artifact, spec, backend.name, checkpoint.path, tolerance, results, own, wrong)


def write_replay(
    artifact: Path,
    backend: str,
    spec: ModelSpec,
    pictures: Iterable[Sample],
    reference: Infer,
    tolerance: Tolerance,
    own: Tolerance | None,
    folder: Path,
) -> None:
    """Write pictures and what PyTorch makes of them as Polygraphy has it, with the commands that replay them."""
    with extra("rtx", option("polygraphy")):
        from sanrt.export.polygraphy import Replay

    value_range = spec.architecture.value_range
    inputs = [pad(network_input(p.low, value_range), spec.min_side, spec.multiple) for p in pictures]
    Replay(artifact, backend, value_range, inputs, [reference(x) for x in inputs], tolerance, own).write(folder)


def exported_model(artifact: Path) -> ExportedModel | None:
    """The content of an ONNX, or of the one that an engine was built from while it is there; ModelError if it is spoilt."""
    model = artifact if artifact.suffix == ".onnx" else read_engine(artifact).model_path
    return read_exported(model) if model.exists() else None


def wrong_weight(exported: ExportedModel, checkpoint: Checkpoint) -> str | None:
    """The first tensor of an ONNX that is not the checkpoint's, or its description of another network; None if all is."""
    if exported.spec.architecture != checkpoint.architecture:
        return f"description as {exported.spec.architecture.name}"
    name = exported.differing({name: tensor.numpy() for name, tensor in checkpoint.tensors.items()})
    return name and f"tensor {name}"


def tolerance_for(
    net: SAN, spec: ModelSpec, sample: Sample, options: ValidateOptions, kind: Precision | QuantisedType
) -> Tolerance:
    """The table's for a type, fp32's by its rounding on a sample as in `export`; or what the options say."""
    usual = TOLERANCES[kind]
    if kind == Precision.FP32:
        x = network_input(sample.low, spec.architecture.value_range)
        usual = rounding_tolerance(net, [pad(x, spec.min_side, spec.multiple)])
    max_abs = usual.max_abs if options.tolerance is None else options.tolerance
    return replace(usual, max_abs=max_abs, min_psnr=usual.min_psnr if options.min_psnr is None else options.min_psnr)


def middle(sample: Sample) -> Sample:
    """The middle of a picture, to be run by the file's own graph."""
    box = Box(0, 0, *sample.low.shape[:2]).middle(FILE_SIDE)
    part = sample.low[box.top : box.bottom, box.left : box.right]
    return Sample(f"{sample.name}, middle, the file's own graph", np.ascontiguousarray(part), None)


def own_graph(path: Path, spec: ModelSpec) -> Infer:
    """An ONNX's nodes as they are in the file, at any size."""
    session = open_session(opened(load_onnx(path)) if spec.shape else path, path, RunOptions())

    def infer(x: Array) -> Array:
        height, width = (spec.architecture.scale * side for side in x.shape[2:])
        try:
            y = call_graph(session, spec, pad(x, spec.min_side, spec.multiple))
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise run_error(error) from error
        return y[..., :height, :width]

    return infer


def source_checkpoint(spec: ModelSpec, artifact: Path, named: Path | None) -> Checkpoint:
    """The weights that an artifact was made of; raises UsageError for others."""
    scale = spec.architecture.scale
    bundled = [bundled_checkpoint(scale, kind) for kind in WeightsKind if has_bundled(scale, kind)]
    checkpoint = load_checkpoint(named or next((path for path in bundled if is_made_of(spec, path)), bundled[0]))
    if checkpoint.digest != spec.weights_digest:
        which = "is" if named else "(bundled) is"
        raise UsageError(
            f"{artifact}: made of weights with the digest {spec.weights_digest[:12]}, {checkpoint.path} {which}"
            f" {checkpoint.digest[:12]}; name the file that it was exported from with {option('checkpoint')}"
        )
    return checkpoint


def is_made_of(spec: ModelSpec, weights: Path) -> bool:
    """Whether a model has the weights of a file."""
    return read_weights(weights).spec.weights_digest == spec.weights_digest


def reference_network(checkpoint: Checkpoint, spec: ModelSpec) -> SAN:
    """The PyTorch network that a graph of this spec stands for: its steps of the square root, its regions."""
    net = with_root(checkpoint.network(), spec.iterations)
    net.attention.regions = spec.regions
    return net


@torch.inference_mode()
def reference_output(net: SAN, spec: ModelSpec, x: Array) -> Array:
    """(1, 3, H, W) -> (1, 3, sH, sW), padded as the backend's input is."""
    height, width = (spec.architecture.scale * side for side in x.shape[2:])
    y: Array = net(torch.from_numpy(pad(x, spec.min_side, spec.multiple)))[..., :height, :width].numpy()
    return y


def picture_result(
    sample: Sample,
    reference: Infer,
    candidate: Infer,
    spec: ModelSpec,
    kind: Precision | QuantisedType,
    tolerance: Tolerance,
    heatmaps: Path | None = None,
) -> PictureResult:
    """One picture through both, and every measure of the two outputs; the candidate computes in the type `kind`."""
    arch = spec.architecture
    x = network_input(sample.low, arch.value_range)
    expected, found = reference(x), candidate(x)
    if heatmaps:
        name = sample.name if sample.name.endswith(".png") else f"{sample.name}.png"
        write_heatmap(heatmaps / name, expected, found)
    pictures = [network_output(y, sample.low, arch.value_range) for y in (expected, found)]
    likeness = ssim(y_channel(pictures[0]), y_channel(pictures[1])) if min(pictures[0].shape[:2]) > 10 else math.nan
    scores: list[float] = []
    if sample.high is not None and min(sample.high.shape[:2]) > 2 * arch.scale:
        scores = [y_psnr(picture, sample.high, arch.scale) for picture in pictures]
    drop = scores[0] - scores[1] if scores else None
    difference = compare(expected, found, arch.value_range)
    return PictureResult(sample.name, kind, difference, tolerance, likeness, scores[0] if scores else None, drop)


def write_heatmap(path: Path, expected: Array, candidate: Array) -> None:
    """Where (1, 3, H, W) outputs differ, as a PNG: black, red, yellow, and white for the largest."""
    error = np.abs(candidate - expected).max((0, 1))
    heat = 3 * error / max(float(error.max()), 1e-12)
    colours: Picture = (np.stack([heat, heat - 1, heat - 2], 2).clip(0, 1) * 255).round().astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(Output(path, Format.PNG, colours.shape[1], colours.shape[0]), colours)
