"""The fp16 and bf16 graphs against the fp32 one, in ONNX Runtime on the CPU.

That runtime has no bf16 convolutions or products, so the bf16 graph is run as hardware runs it: every operator computes
in fp32 on bf16 values, and what it puts out is rounded to bf16. fp16 graphs run as they are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from sanrt.export.tensors import Probe
from sanrt.model.checkpoint import bundled_checkpoint, load_checkpoint
from sanrt.model.graph import Weights, san_model
from sanrt.model.spec import GraphOptions, ModelSpec, Precision

TYPED = (Precision.FP16, Precision.BF16)
FLOATS = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


@pytest.fixture(scope="module")
def network() -> tuple[ModelSpec, Weights]:
    checkpoint = load_checkpoint(bundled_checkpoint(4))
    arch = checkpoint.architecture
    weights = {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}
    return ModelSpec(arch, checkpoint.digest, checkpoint.origin, arch.sqrt_iterations or 12), weights


def session(network: tuple[ModelSpec, Weights], precision: Precision) -> Probe:
    width = 0 if precision == Precision.FP32 else 16
    return Probe(san_model(*network, GraphOptions(precision=precision, attention_width=width)), ["output"])


def run(running: Probe, pictures: np.ndarray) -> np.ndarray:
    return running(pictures)["output"]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255.0**2 / np.mean((a - b) ** 2)))


@pytest.mark.parametrize(("precision", "least"), [(Precision.FP16, 60.0), (Precision.BF16, 55.0)])
def test_typed_graphs_agree_with_fp32_on_set5(
    shared: Path, network: tuple[ModelSpec, Weights], precision: Precision, least: float
):
    pyvips = pytest.importorskip("pyvips")
    reference, typed = session(network, Precision.FP32), session(network, precision)
    pictures = sorted((shared / "data" / "eval" / "Set5" / "x4" / "LR").glob("*.png"))
    assert len(pictures) == 5
    for path in pictures:
        picture = np.asarray(pyvips.Image.new_from_file(str(path)).colourspace("srgb").numpy(), np.float32)
        x = picture.transpose(2, 0, 1)[None]
        assert psnr(run(typed, x), run(reference, x)) >= least, path.name


@pytest.mark.parametrize("precision", TYPED)
def test_extreme_pictures_give_finite_results_near_fp32(network: tuple[ModelSpec, Weights], precision: Precision):
    reference, typed = session(network, Precision.FP32), session(network, precision)
    checkerboard = 255.0 * (np.indices((24, 20)).sum(0) % 2)
    noise = np.random.default_rng(0).integers(0, 256, (24, 20))
    for flat in (np.zeros((24, 20)), np.full((24, 20), 255.0), checkerboard, noise):
        x = np.broadcast_to(flat.astype(np.float32), (1, 3, 24, 20)).copy()
        result = run(typed, x)
        assert np.isfinite(result).all()
        assert psnr(result.clip(0, 255), run(reference, x).clip(0, 255)) > 40


def test_scores_beyond_fp16_stay_finite(network: tuple[ModelSpec, Weights]):
    spec, weights = network
    loud = {
        name: weight * (150 if name.startswith(("attention.query", "attention.key")) else 1)
        for name, weight in weights.items()
    }
    x = np.random.default_rng(0).integers(0, 256, (1, 3, 24, 20)).astype(np.float32)
    reference = run(session((replace(spec), loud), Precision.FP32), x)
    result = run(session((spec, loud), Precision.FP16), x)
    assert np.isfinite(result).all()
    assert psnr(result, reference) > 50


def test_the_statistics_and_the_square_root_stay_fp32(network: tuple[ModelSpec, Weights]):
    for precision in TYPED:
        model = san_model(*network, GraphOptions(precision=precision, attention_width=16))
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
        products = [n.output[0] for n in model.graph.node if n.op_type == "MatMul" and ".soca." in n.name]
        convolutions = [n.output[0] for n in model.graph.node if n.op_type == "Conv" and ".blocks." in n.name]
        assert products
        assert convolutions
        assert {types[name] for name in products} == {TensorProto.FLOAT}
        assert {types[name] for name in convolutions} <= set(FLOATS)


def test_bf16_graphs_have_their_first_and_last_convolution_in_fp32(network: tuple[ModelSpec, Weights]):
    for precision, expected in ((Precision.FP16, TensorProto.FLOAT16), (Precision.BF16, TensorProto.FLOAT)):
        stored = {t.name: t.data_type for t in san_model(*network, GraphOptions(precision=precision)).graph.initializer}
        assert {stored[f"{name}.{part}"] for name in ("head", "tail") for part in ("weight", "bias")} == {expected}
        assert stored["upsampler.0.weight"] in FLOATS
