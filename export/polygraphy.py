"""What sanrt makes, in NVIDIA's Polygraphy: a runner for any backend, `polygraphy run --sanrt`, replays of a validation."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import RunResults
from polygraphy.json import save_json

from sanrt.arrays import Array
from sanrt.export.parity import Tolerance
from sanrt.runtime.artifacts.engines import SUFFIX, read_engine
from sanrt.runtime.artifacts.flavors import Flavor
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_unguarded
from sanrt.runtime.tiling.upscaling import infer_padded

INPUTS, OUTPUTS, COMMANDS = "inputs.json", "outputs.json", "replay.sh"
REFERENCE = "PyTorch reference"


class SanrtRunner(BaseRunner):  # type: ignore[misc]
    """A Polygraphy runner of a model or engine on any backend of sanrt, for Comparator and the `polygraphy` tools."""

    def __init__(self, model: str | os.PathLike[str], backend: str = "auto", options: RunOptions | None = None) -> None:
        super().__init__(name=f"sanrt {backend}")
        self.model, self.backend_name, self.options = Path(model), backend, options or RunOptions()

    def activate_impl(self) -> None:
        self.backend = load_unguarded(self.backend_name, self.model, self.options)

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("input", np.float32, (None, 3, None, None))

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, Array]:
        pictures = np.ascontiguousarray(feed_dict["input"], np.float32)
        started = time.perf_counter()
        output = np.ascontiguousarray(infer_padded(self.backend, pictures))
        self.inference_time = time.perf_counter() - started
        return OrderedDict(output=output)

    def deactivate_impl(self) -> None:
        self.backend.close()
        del self.backend


def argument_groups() -> list[Any]:
    """What `polygraphy run` loads at its start: the options `--sanrt` and `--sanrt-backend`."""
    from polygraphy.tools.args import ModelArgs
    from polygraphy.tools.args.base import BaseRunnerArgs
    from polygraphy.tools.script import make_invocable

    class SanrtRunnerArgs(BaseRunnerArgs):  # type: ignore[misc]
        """sanrt: running inference with a backend of sanrt.

        Depends on:

            - ModelArgs
        """

        def get_name_opt_impl(self) -> tuple[str, str]:
            return "sanrt", "sanrt"

        def add_parser_args_impl(self) -> None:
            self.group.add_argument("--sanrt-backend", help="The backend, as sanrt run has it.", default="auto")

        def parse_impl(self, args: Any) -> None:
            self.backend = args.sanrt_backend

        def add_to_script_impl(self, script: Any) -> None:
            script.add_import(imports=["SanrtRunner"], frm=__name__)
            script.add_runner(make_invocable("SanrtRunner", self.arg_groups[ModelArgs].path, backend=self.backend))

    return [SanrtRunnerArgs()]


@dataclass(frozen=True)
class Replay:
    """Inputs of a network and the reference's outputs, to be held against an artifact by Polygraphy."""

    artifact: Path
    backend: str
    """The backend that ran it in sanrt."""
    value_range: float
    inputs: Sequence[Array]
    """(1, 3, H, W) each."""
    outputs: Sequence[Array]
    """(1, 3, sH, sW) each, from PyTorch."""
    tolerance: Tolerance
    """Of what the backend computes."""
    own_tolerance: Tolerance | None
    """Of the file's own graph; None for an engine."""

    def write(self, folder: Path) -> None:
        """Write inputs.json, outputs.json and replay.sh, whose commands hold the artifact against them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_json([OrderedDict(input=x) for x in self.inputs], str(folder / INPUTS), "inputs")
        results = RunResults()
        results.add([OrderedDict(output=y) for y in self.outputs], runner_name=REFERENCE)
        results.save(str(folder / OUTPUTS))
        lines = ["#!/bin/sh -e", 'cd "$(dirname "$0")"', *self.commands(folder)]
        (folder / COMMANDS).write_text("\n".join(lines) + "\n")
        (folder / COMMANDS).chmod(0o755)

    def commands(self, folder: Path) -> list[str]:
        """The file by itself, and by the backend of sanrt that ran it; paths are relative to the folder."""
        path = os.path.relpath(self.artifact.resolve(), folder.resolve())
        backend = self.command(path, ["--sanrt", "--sanrt-backend", self.backend], self.tolerance)
        if self.artifact.suffix != SUFFIX:
            return [self.command(path, ["--onnxrt"], self.own_tolerance or self.tolerance), backend]
        rtx = read_engine(self.artifact).identity.options.flavor == Flavor.RTX
        engine = self.command(path, ["--trt", "--model-type", "engine"], self.tolerance)
        return ["POLYGRAPHY_USE_TENSORRT_RTX=1 " * rtx + engine, backend]

    def command(self, path: str, runner: Sequence[str], tolerance: Tolerance) -> str:
        """One run: every value is held to the largest difference, and each picture to the lowest PSNR."""
        peak = min(float(y.max()) for y in self.outputs) / self.value_range  # Polygraphy's PSNR is of the output's own peak
        decibels = tolerance.min_psnr + 20 * math.log10(max(peak, 1e-3))
        limits = ["--atol", f"{tolerance.max_abs * self.value_range / 255:g}", "--rtol", "0"]
        limits += ["--psnr-threshold", f"{math.floor(10 * decibels) / 10:g}"]
        data = ["--load-inputs", INPUTS, "--load-outputs", OUTPUTS, "--compare", "simple", "psnr"]
        return shlex.join(["polygraphy", "run", path, *runner, *data, *limits])
