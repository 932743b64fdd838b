"""The rounding of PyTorch's own fp32: other implementations of fp32 may differ from it by as much, and more."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace

import torch

from sanrt.arrays import Array
from sanrt.export.parity import TOLERANCES, Tolerance, compare, worst
from sanrt.model.san import SAN
from sanrt.model.spec import Precision

ROUNDING_MARGIN = 4.0
"""Two fp32 implementations may differ by this many times the rounding of one."""


@torch.inference_mode()
def rounding_tolerance(net: SAN, inputs: Iterable[Array]) -> Tolerance:
    """fp32's usual tolerance, or more where PyTorch's fp32 outputs lie far from its float64 ones.

    Weights that make large attention scores amplify the rounding of any implementation.
    """
    wide = deepcopy(net).double()
    rounding = worst(
        compare(wide(x.double()).numpy(), net(x).numpy(), net.arch.value_range) for x in map(torch.from_numpy, inputs)
    )
    usual = TOLERANCES[Precision.FP32]
    return replace(
        usual,
        max_abs=max(usual.max_abs, ROUNDING_MARGIN * rounding.max_abs),
        min_psnr=min(usual.min_psnr, rounding.psnr - 20 * math.log10(ROUNDING_MARGIN)),
    )
