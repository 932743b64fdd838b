"""`sanrt build`: TensorRT engines from an exported ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sanrt.cli.models import KindOption, build_words, known_scale, one_of, run_words
from sanrt.cli.panels import panel
from sanrt.extras import extra
from sanrt.model.spec import Precision, QuantisedType
from sanrt.runtime.artifacts.models import MODELS

if TYPE_CHECKING:
    from sanrt.runtime.artifacts.engines import EngineInfo


eight_bit_option, size_option, tensorrt_option = map(panel, ("8-bit options", "Sizes", "TensorRT options"))


def build(
    model: Annotated[
        Path | None, typer.Argument(help="An exported ONNX, instead of the one that `sanrt run` takes by itself.")
    ] = None,
    scale: Annotated[
        int | None, typer.Option(help="2, 3, 4 or 8; 4 unless MODEL says otherwise.", callback=known_scale)
    ] = None,
    weights: KindOption = None,
    models: Annotated[Path, typer.Option(help="The folder that `sanrt export` wrote to.")] = MODELS,
    fp32: Annotated[bool, typer.Option("--fp32", help="Everything in fp32, TF32 off.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Convolutions and attention in half, SOCA's root in fp32.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="The same in bfloat16.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="int8 wherever --max-psnr-drop allows.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="The same in fp8 (e4m3).")] = False,
    auto: Annotated[bool, typer.Option("--auto", help="Try what this machine runs; prefer the fastest.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The engine; beside the model if left out.")] = None,
    stages: Annotated[
        bool, typer.Option("--stages", help="One engine per stage, for exact streaming; sizes are of tiles.")
    ] = False,
    max_psnr_drop: Annotated[float, eight_bit_option(min=0, help="What quantisation may cost, dB of Y-PSNR.")] = 0.1,
    calibration: Annotated[
        Path | None, eight_bit_option(help="Pictures to quantise by; generated scenes if left out.")
    ] = None,
    calibrator: Annotated[
        str,
        eight_bit_option(
            help="min-max, or percentile: the largest one in ten thousand values saturate.",
            callback=one_of("min-max", "percentile"),
        ),
    ] = "min-max",
    keep_fp16: Annotated[list[str] | None, eight_bit_option(help="Parts not to quantise, such as 'groups.0.*'.")] = None,
    smallest: Annotated[list[str] | None, size_option("--min", help="Smallest input, BxHxW; repeat for profiles.")] = None,
    best: Annotated[list[str] | None, size_option("--opt", help="The input to tune for.")] = None,
    largest: Annotated[
        list[str] | None,
        size_option("--max", help="Largest input; 1x1080x1920 if that takes under 3 GiB."),
    ] = None,
    flavor: Annotated[
        str, tensorrt_option(help="auto, tensorrt or rtx.", callback=one_of("auto", "tensorrt", "rtx"))
    ] = "auto",
    gpu: Annotated[str, tensorrt_option(help="RTX: targets, such as sm89,sm120; Ampere and newer if left out.")] = "",
    device: Annotated[int, tensorrt_option(min=0, help="TensorRT: the GPU to build on and for, numbered from 0.")] = 0,
    workspace: Annotated[int | None, tensorrt_option(min=1, help="MiB one layer may use; leave it out on RTX.")] = None,
    level: Annotated[int, tensorrt_option(min=0, max=5, help="How long TensorRT searches.")] = 3,
    timing_cache: Annotated[Path | None, tensorrt_option(help="TensorRT: where to keep timings.")] = None,
    kernels: Annotated[
        str,
        tensorrt_option(
            help="TensorRT: none, or fused for SOCA by sanrt's own CUDA kernels.", callback=one_of("none", "fused")
        ),
    ] = "none",
    allow_precision: Annotated[
        bool, tensorrt_option("--allow-precision", help="Accept layers in another precision.")
    ] = False,
    allow_unfused_attention: Annotated[
        bool, tensorrt_option("--allow-unfused-attention", help="Accept attention that is not one kernel.")
    ] = False,
) -> None:
    """Build an exported ONNX into a TensorRT engine, and prove that it is what was asked for."""
    with extra("rtx", "sanrt build"):
        from sanrt.export.engine import choose_flavor
    from sanrt.cli.console import BuildProgressBar
    from sanrt.library import build_engine, check_engine_path, model_to_build
    from sanrt.runtime.artifacts.flavors import Flavor, installed_version

    precision = only_one(fp32=fp32, fp16=fp16, bf16=bf16)
    eight_bit = only_one(int8=int8, fp8=fp8, auto=auto)
    if flavor == "auto" and not eight_bit:
        flavor = choose_flavor(device)  # told before anything is exported
    model = model_to_build(model, models, scale, weights, print)
    check_engine_path(output, model, stages)
    if eight_bit:
        with extra("export", "quantising"):
            from sanrt.export.quantise.calibration import RangeMethod
            from sanrt.export.quantise.model import QuantiseOptions
        from sanrt.cli.quantise import choose_automatically, make_quantised_model

        kind = QuantisedType.FP8 if fp8 else QuantisedType.INT8
        method, kept = RangeMethod(calibrator), tuple(keep_fp16 or ())
        quantise_options = QuantiseOptions(kind, calibration, method, max_psnr_drop, kept)
        if auto:
            return choose_automatically(model, quantise_options)
        model = make_quantised_model(model, quantise_options)
        if flavor == "auto" and not any(map(installed_version, Flavor)):
            return print("no engine: TensorRT is not installed")
    with BuildProgressBar() as progress:
        info, built = build_engine(
            model,
            output,
            precision=Precision(precision or Precision.FP16),
            stages=stages,
            smallest=smallest or [],
            best=best or [],
            largest=largest or [],
            flavor=flavor,
            gpus=tuple(filter(None, gpu.split(","))),
            device=device,
            workspace=workspace,
            level=level,
            timing_cache=timing_cache,
            kernels=kernels == "fused",
            allow_precision=allow_precision,
            allow_unfused_attention=allow_unfused_attention,
            progress=progress,
            say=print,
        )
    return report(info, built)


def only_one(**wanted: bool) -> str | None:
    """The one flag that is set, or None; wrong usage for more than one."""
    names = [name for name, is_set in wanted.items() if is_set]
    if len(names) > 1:
        raise typer.BadParameter(f"choose one of --{' and --'.join(names)}")
    return names[0] if names else None


def report(info: EngineInfo, built: bool) -> None:
    """Print what the engine is, the proof, and the next command."""
    from sanrt.cli.console import plain_console
    from sanrt.cli.tables import facts_table

    console = plain_console()
    console.print("built" if built else "unchanged: the engine that is there is what would be built")
    console.print(facts_table(info.table()))
    console.print(f"next: {next_words(info)}, on a machine with {info.identity.gpu}")


def next_words(info: EngineInfo) -> str:
    """The command that runs an engine; for stage engines, on the newest whole one that they go with."""
    from sanrt.runtime.artifacts.engines import engines_of

    options, onnx = info.identity.options, info.identity.onnx
    if not options.stages:
        return f"`{run_words(info.path)}`"
    wholes = (
        whole
        for whole in engines_of(info.model_path)
        if (whole.identity.onnx, whole.identity.options.flavor, whole.identity.options.precision)
        == (onnx, options.flavor, options.precision)
    )
    if whole := next(wholes, None):
        return f"`{run_words(whole.path)} --tiling exact`"
    return f"an engine of the whole network beside it, `{build_words(info.model_path)} --{options.precision}`"
