"""What engines take of a GPU's memory, and the default profile that follows from it."""

from __future__ import annotations

import pytest

from sanrt.model.spec import Architecture, ModelSpec, Precision, Quantisation, QuantisedType
from sanrt.runtime.artifacts.sizes import DEFAULT_BYTES, Profile, Size, activation_estimate, default_profile

PAPER = Architecture(4, 20, 10, 64, 16)
EIGHT_BIT = Quantisation(QuantisedType.FP8, {}, {})


def network(
    scale: int, channels: int, precision: Precision = Precision.FP16, eight_bit: Quantisation | None = None
) -> ModelSpec:
    arch = Architecture(scale, 2, 1, channels, 8)
    return ModelSpec(arch, "0" * 64, "nothing", 5, precision, quantisation=eight_bit)


@pytest.mark.parametrize(
    ("scale", "channels", "size", "stated"),
    [
        (2, 32, (1, 1080, 1920), 2354905088),
        (3, 32, (1, 1080, 1920), 3682009088),
        (4, 32, (1, 1080, 1920), 5539954688),
        (4, 32, (1, 720, 1280), 2494799360),
        (2, 64, (1, 1080, 1920), 3997884416),
        (3, 64, (1, 1080, 1920), 6652092416),
        (4, 64, (1, 270, 480), 648501760),
    ],
)
def test_the_estimate_is_what_tensorrt_rtx_stated_or_somewhat_more(scale, channels, size, stated):
    """`Total Activation Memory` of fp16 builds by TensorRT-RTX 1.7 for sm89, with a profile up to that size."""
    assert 1 <= activation_estimate(network(scale, channels), Size(*size)) / stated < 1.3


@pytest.mark.parametrize(
    ("spec", "stated"),
    [(network(4, 32, Precision.BF16), 3099), (network(4, 32, eight_bit=EIGHT_BIT), 3343)],
    ids=["bf16", "fp8"],
)
def test_what_puts_out_fp32_takes_more(spec, stated):
    """As TensorRT-RTX 1.7 stated in MiB for the bundled x4, whose channels these are, up to 1x720x1280."""
    assert 1 <= activation_estimate(spec, Size(1, 720, 1280)) / (stated * 2**20) < 1.3


@pytest.mark.parametrize(
    ("spec", "largest"),
    [
        (network(2, 32), (1, 1080, 1920)),
        (network(4, 32), (1, 720, 1280)),
        (ModelSpec(PAPER, "0" * 64, "nothing", 5, Precision.FP16), (1, 540, 960)),
        (network(8, 64), (1, 360, 640)),
    ],
)
def test_the_default_profile_is_of_single_pictures_that_fit_twice_in_eight_gib(spec, largest):
    profile = default_profile(spec)
    assert profile == Profile(max=Size(*largest))
    assert activation_estimate(spec, profile.max) <= max(DEFAULT_BYTES, 4 * 2**30)
