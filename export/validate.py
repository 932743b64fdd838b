"""An ONNX or engine on any backend, held against the PyTorch network of the checkpoint it was made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sanrt.arrays import Array
from sanrt.errors import ParityError, UsageError
from sanrt.export.metrics import ssim, y_channel, y_psnr
from sanrt.export.parity import TOLERANCES, Difference, Tolerance, compare, require, worst
from sanrt.export.rounding import rounding_tolerance
from sanrt.export.samples import Picture, Sample
from sanrt.export.squareroot import with_root
from sanrt.geometry import pad
from sanrt.model.checkpoint import Checkpoint, bundled_checkpoint, load_checkpoint
from sanrt.model.san import SAN
from sanrt.model.spec import ModelSpec, Precision
from sanrt.runtime.backends.onnxruntime import open_session
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.pictures.codec import Output, write_picture
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.tiling.upscaling import infer_padded, network_input, network_output

Infer = Callable[[Array], Array]
"""float32 (1, 3, H, W) -> (1, 3, sH, sW)."""

FILE_SIDE = 96
"""Of the picture that goes through an ONNX's own graph, whose plain attention holds its scores in memory."""


@dataclass(frozen=True)
class ValidateOptions:
    """What an artifact is held against, and how."""

    backend: str = "auto"
    precision: Precision | None = None
    """None is the backend's own choice."""
    checkpoint: Path | None = None
    """None is the bundled one; its digest must be the artifact's either way."""
    tolerance: float | None = None
    """Instead of the table's largest difference, of 255."""
    heatmaps: Path | None = None
    """Folder for a picture of where each pair of outputs differs."""


@dataclass(frozen=True)
class PictureResult:
    """Artifact and reference on one picture."""

    picture: str
    difference: Difference
    ssim: float
    """Of the two outputs as 8-bit luma; NaN where a side is too short for SSIM's window."""
    y_psnr: float | None
    """The reference's, against the high-resolution picture, where there is one."""
    y_psnr_drop: float | None
    """How much lower the artifact's is."""


@dataclass(frozen=True)
class Validation:
    """The verdict on an artifact."""

    artifact: Path
    spec: ModelSpec
    backend: str
    checkpoint: Path
    tolerance: Tolerance
    pictures: tuple[PictureResult, ...]

    @property
    def difference(self) -> Difference:
        """The worst over the pictures."""
        return worst(p.difference for p in self.pictures)

    @property
    def y_psnr_drop(self) -> float | None:
        """The mean over the pictures that have a high-resolution original."""
        drops = [p.y_psnr_drop for p in self.pictures if p.y_psnr_drop is not None]
        return float(np.mean(drops)) if drops else None

    def require(self) -> None:
        """Raise ParityError, naming what was measured, unless the artifact is within its tolerance."""
        subject = f"{self.artifact} ({self.spec.coarsest}) on {self.backend}"
        require(self.difference, self.tolerance, subject, "`--locate` names the stage where it begins")
        drop = self.y_psnr_drop
        if drop is not None and not drop <= self.tolerance.y_psnr_drop:
            raise ParityError(
                f"{subject}: Y-PSNR is {drop:.3f} dB below the PyTorch reference's, expected"
                f" {self.tolerance.y_psnr_drop:g} or less; `--locate` names the stage where it begins"
            )

    def to_json(self) -> dict[str, Any]:
        """Every figure, for a file; infinite and undefined ones are null."""
        rows = [
            {
                "picture": p.picture,
                **p.difference.to_json(),
                "ssim": None if math.isnan(p.ssim) else p.ssim,
                "y_psnr": p.y_psnr,
                "y_psnr_drop": p.y_psnr_drop,
            }
            for p in self.pictures
        ]
        return {
            "artifact": str(self.artifact),
            "backend": self.backend,
            "precision": self.spec.coarsest,
            "weights_digest": self.spec.weights_digest,
            "tolerance": self.tolerance.max_abs,
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
    with load_backend(options.backend, artifact, RunOptions(precision=options.precision)) as backend:
        spec = backend.spec
        checkpoint = source_checkpoint(spec, artifact, options.checkpoint)
        net = reference_network(checkpoint, spec)
        reference, infer = partial(reference_output, net, spec), partial(infer_padded, backend)
        remaining = iter(pictures(spec.architecture.scale))
        first = next(remaining)
        tolerance = tolerance_for(net, spec, middle(first), options.tolerance)
        results = []
        if artifact.suffix == ".onnx":
            results.append(picture_result(middle(first), reference, own_graph(artifact, spec), spec, None))
        results += [picture_result(s, reference, infer, spec, options.heatmaps) for s in chain([first], remaining)]
        return Validation(artifact, spec, backend.name, checkpoint.path, tolerance, tuple(results))


def tolerance_for(net: SAN, spec: ModelSpec, sample: Sample, wished: float | None) -> Tolerance:
    """The table's for the coarsest type, fp32's by its rounding on a sample as in `export`; or the wished difference."""
    usual = TOLERANCES[spec.coarsest]
    if wished is not None:
        return replace(usual, max_abs=wished)
    if spec.coarsest != Precision.FP32:
        return usual
    x = network_input(sample.low, spec.architecture.value_range)
    return rounding_tolerance(net, [pad(x, spec.min_side, spec.multiple)])


def middle(sample: Sample) -> Sample:
    """The middle of a picture, to be run by the file's own graph."""
    top, left = (max(0, side - FILE_SIDE) // 2 for side in sample.low.shape[:2])
    part = sample.low[top : top + FILE_SIDE, left : left + FILE_SIDE]
    return Sample(f"{sample.name}, middle, the file's own graph", np.ascontiguousarray(part), None)


def own_graph(path: Path, spec: ModelSpec) -> Infer:
    """An ONNX's nodes as they are in the file."""
    session = open_session(path, RunOptions())

    def infer(x: Array) -> Array:
        height, width = (spec.architecture.scale * side for side in x.shape[2:])
        y: Array = session.run(None, {"input": pad(x, spec.min_side, spec.multiple)})[0]
        return y[..., :height, :width]

    return infer


def source_checkpoint(spec: ModelSpec, artifact: Path, named: Path | None) -> Checkpoint:
    """The weights that an artifact was made of; raises UsageError for others."""
    checkpoint = load_checkpoint(named or bundled_checkpoint(spec.architecture.scale))
    if checkpoint.digest != spec.weights_digest:
        which = "is" if named else "(bundled) is"
        raise UsageError(
            f"{artifact}: made of weights with the digest {spec.weights_digest[:12]}, {checkpoint.path} {which}"
            f" {checkpoint.digest[:12]}; name the file that it was exported from with --checkpoint"
        )
    return checkpoint


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
    sample: Sample, reference: Infer, candidate: Infer, spec: ModelSpec, heatmaps: Path | None
) -> PictureResult:
    """One picture through both, and every measure of the two outputs."""
    arch = spec.architecture
    x = network_input(sample.low, arch.value_range)
    expected, found = reference(x), candidate(x)
    if heatmaps:
        write_heatmap(heatmaps / f"{Path(sample.name).stem}.png", expected, found)
    pictures = [network_output(y, sample.low, arch.value_range) for y in (expected, found)]
    likeness = ssim(y_channel(pictures[0]), y_channel(pictures[1])) if min(pictures[0].shape[:2]) > 10 else math.nan
    scores: list[float] = []
    if sample.high is not None and min(sample.high.shape[:2]) > 2 * arch.scale:
        scores = [y_psnr(picture, sample.high, arch.scale) for picture in pictures]
    drop = scores[0] - scores[1] if scores else None
    return PictureResult(
        sample.name, compare(expected, found, arch.value_range), likeness, scores[0] if scores else None, drop
    )


def write_heatmap(path: Path, expected: Array, candidate: Array) -> None:
    """Where (1, 3, H, W) outputs differ, as a PNG: black, red, yellow, and white for the largest."""
    error = np.abs(candidate - expected).max((0, 1))
    heat = 3 * error / max(float(error.max()), 1e-12)
    colours: Picture = (np.stack([heat, heat - 1, heat - 2], 2).clip(0, 1) * 255).round().astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(Output(path, Format.PNG, colours.shape[1], colours.shape[0]), colours)
