"""What a result depends on, and what it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sanrt.model.checkpoint import bundled_checkpoint
from sanrt.model.spec import Architecture, ModelSpec, Precision, Quantisation, QuantisedType
from sanrt.runtime.backends.registry import model_spec
from sanrt.runtime.pictures.codec import Encoding
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.provenance import SourceIdentity
from sanrt.runtime.runs.results import Recipe
from sanrt.runtime.tiling.options import Tiling
from sanrt.runtime.tiling.upscaling import UpscaleOptions

SPEC = ModelSpec(Architecture(2, 1, 1, 16, 4), "0" * 64, "nowhere", 5)
SOURCE = SourceIdentity("a" * 64, 1, "b" * 32)


def digest(form=Format.WEBP, precision=None, encoding=None, **options) -> str:
    return Recipe.of(SPEC, precision, UpscaleOptions(**options), encoding or Encoding()).provenance(SOURCE, form).options


@pytest.mark.parametrize(
    "asked",
    [
        {"self_ensemble": True},
        {"regions": 3},
        {"precision": Precision.FP32},
        {"tiling": Tiling.OVERLAP},
        {"tiling": Tiling.OVERLAP, "tile": 64},
        {"overlap": 16, "tile": 64},
        {"tile": 64},
        {"encoding": Encoding(quality=80)},
        {"encoding": Encoding(lossless=True)},
        {"encoding": Encoding(background=(255, 255, 255))},
    ],
    ids=str,
)
def test_options_that_can_change_the_picture_count(asked):
    assert digest(**asked) != digest()
    assert digest(**asked) == digest(**asked)


@pytest.mark.parametrize(
    ("form", "asked"),
    [
        (Format.WEBP, {"memory": 2**30}),
        (Format.WEBP, {"tiling": Tiling.EXACT, "tile": 64}),
        (Format.WEBP, {"tiling": Tiling.WHOLE}),
        (Format.WEBP, {"encoding": Encoding(quality=95)}),
        (Format.PNG, {"encoding": Encoding(quality=80, lossless=True)}),
        (Format.JPEG, {"encoding": Encoding(lossless=True)}),
    ],
    ids=str,
)
def test_options_that_cannot_change_the_picture_do_not_count(form, asked):
    assert digest(form, **asked) == digest(form)


def test_the_model_is_its_network_weights_and_quantisation_wherever_they_lie():
    def model(spec: ModelSpec) -> str:
        return Recipe.of(spec, None, UpscaleOptions(), Encoding()).model

    assert model(replace(SPEC, weights_origin="elsewhere", version="9", report={"a": 1}, precision=Precision.FP16)) == model(
        SPEC
    )
    others = [
        replace(SPEC, weights_digest="1" * 64),
        replace(SPEC, iterations=6),
        replace(SPEC, architecture=replace(SPEC.architecture, value_range=1.0)),
        replace(SPEC, quantisation=Quantisation(QuantisedType.INT8, {"head": 1.0}, {})),
    ]
    assert len({model(spec) for spec in [SPEC, *others]}) == 5


@pytest.mark.parametrize("scale", [8])
def test_a_model_that_is_still_to_be_exported_is_the_one_that_will_run(scale, tmp_path):
    from sanrt.export.onnx import ExportOptions, export_onnx
    from sanrt.model.checkpoint import load_checkpoint

    weights = bundled_checkpoint(scale)
    export_onnx(load_checkpoint(weights), tmp_path / "a.onnx", ExportOptions(check=False))
    recipes = [Recipe.of(model_spec(path), None, UpscaleOptions(), Encoding()) for path in (weights, tmp_path / "a.onnx")]
    assert recipes[0] == recipes[1]
