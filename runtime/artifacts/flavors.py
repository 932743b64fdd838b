"""TensorRT and TensorRT-RTX: which of the two an engine is for, and whether it is installed. Imports neither."""

from __future__ import annotations

from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


class Flavor(StrEnum):
    """Which TensorRT."""

    TENSORRT = "tensorrt"
    RTX = "rtx"


TITLES = {Flavor.TENSORRT: "TensorRT", Flavor.RTX: "TensorRT-RTX"}


EXTRAS = {Flavor.TENSORRT: "trt", Flavor.RTX: "rtx"}


MODULES = {Flavor.TENSORRT: "tensorrt", Flavor.RTX: "tensorrt_rtx_bindings"}


DISTRIBUTIONS = {
    Flavor.TENSORRT: ("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
    Flavor.RTX: ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
}
"""Wheels that carry the module, one of each."""


def installed_version(flavor: Flavor) -> str | None:
    """The installed version, without importing anything; None when it is not installed."""
    for distribution in DISTRIBUTIONS[flavor]:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown" if find_spec(MODULES[flavor]) else None
