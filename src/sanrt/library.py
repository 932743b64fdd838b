"""The commands as functions: what `sanrt export`, `build`, `validate` and `run` do, for programs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sanrt.errors import ModelError, UsageError
from sanrt.extras import extra
from sanrt.files import require_folder_of
from sanrt.model.bundled import WeightsKind
from sanrt.model.spec import PixelLayout, Precision, parse_precision, parse_scale
from sanrt.runtime.artifacts.models import (
    MODELS,
    checkpoint_path,
    default_model,
    exported_path,
    other_models,
    read_spec,
    require_own_weights,
    require_scale,
)
from sanrt.runtime.artifacts.sizes import Size
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.upscaler import BackendName, PrecisionName, TilingName, WeightsName, choice
from sanrt.wording import option

if TYPE_CHECKING:
    from sanrt.export.engine import BuildProgress
    from sanrt.export.onnx import ExportReport
    from sanrt.export.validate import Validation
    from sanrt.model.spec import ModelSpec
    from sanrt.runtime.artifacts.engines import EngineInfo
    from sanrt.runtime.artifacts.sizes import Profile
    from sanrt.runtime.runs.pipeline import Listener, Outcome

Place = str | os.PathLike[str]
EnginePrecisionName = Literal["fp32", "fp16", "bf16"]
FlavorName = Literal["auto", "tensorrt", "rtx"]
LayoutName = Literal["float32-nchw", "uint8-nhwc"]
FormatName = Literal["png", "jpeg", "webp", "tiff", "avif"]


def quiet(line: str) -> None:
    """Say nothing."""


def export_model(
    checkpoint: Place | None = None,
    output: Place | None = None,
    *,
    scale: int | None = None,
    weights: WeightsName | WeightsKind | None = None,
    models: Place = MODELS,
    check: bool = True,
    sqrt_iterations: int | None = None,
    picture: Place | None = None,
    io: LayoutName | PixelLayout = "float32-nchw",
    shape: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a checkpoint (official `.pt`, or sanrt's `.safetensors`), or the bundled weights of a scale, as an ONNX file.

    `weights` are those for the scale: `clean` if left out, `photo` for JPEG photographs, `fast`, a smaller network.

    It goes to `output`, by default `san_xN.onnx` or `CHECKPOINT.onnx` in the folder `models`. With `check` it is compared
    with PyTorch before it gets its name. `sqrt_iterations` is the number of Newton-Schulz steps, by default as trained;
    the square root is measured on `picture`, by default a generated scene. With `io="uint8-nhwc"` the graph takes and gives
    bytes (B, H, W, 3), with `shape="1x180x320"` inputs of that size alone, for programs that call it themselves (sanrt's
    own backends run its weights at any size); such a file has that in its name. The report's `path` is the file. Needs the
    `export` extra.

    Raises UsageError without a checkpoint or scale, CheckpointError for a file that holds no SAN, ModelError where
    `output` is something else than an earlier export of the same weights (unless `overwrite`), ParityError where ONNX and
    PyTorch differ.
    """
    if checkpoint is None and scale is None:
        raise UsageError("no weights named; expected a scale (2, 3, 4 or 8) for the bundled ones, or a checkpoint's path")
    with extra("export", "sanrt export"):
        from sanrt.export.onnx import ExportOptions, export_onnx
        from sanrt.model.checkpoint import bundled_checkpoint, load_checkpoint
    from sanrt.export.samples import read_scene
    from sanrt.export.scene import natural_scene

    scale = known_scale(scale)
    folder, source = Path(models), None if checkpoint is None else Path(checkpoint)
    kind = kind_of_weights(source, weights)
    if output and Path(output).suffix.lower() != ".onnx":
        raise UsageError(
            f"{option('output', output)}: expected a name that ends in .onnx, by which `sanrt run` and `build` know it"
        )
    layout, fixed = choice(PixelLayout, io), Size.parse(shape) if shape else None
    if source is None:
        assert scale is not None
        loaded, default = load_checkpoint(bundled_checkpoint(scale, kind)), exported_path(folder, scale, kind)
    else:
        loaded = load_checkpoint(source)
        require_scale(source, loaded.architecture.scale, scale)
        default = checkpoint_path(folder, source, loaded.digest)
    require_folder_of(Path(output) if output else folder)
    options = ExportOptions(
        iterations=sqrt_iterations,
        picture=read_scene(Path(picture)) if picture else natural_scene(),
        picture_name=Path(picture).name if picture else "a generated scene",
        layout=layout,
        shape=fixed,
        check=check,
        overwrite=overwrite,
    )
    marks = [f"-{layout}"] * (layout is not PixelLayout.FLOAT_NCHW) + [f"-{fixed}"] * (fixed is not None)
    default = default.with_stem(default.stem + "".join(marks))
    return export_onnx(loaded, Path(output) if output else default, options)


def known_scale(scale: int | None) -> int | None:
    """A scale that was asked for, if one was; UsageError for one that SAN does not have."""
    return None if scale is None else parse_scale(scale)


def kind_of_weights(source: Path | None, weights: WeightsName | WeightsKind | None) -> WeightsKind:
    """The kind of bundled weights; UsageError for an unknown one, or beside a named model or checkpoint."""
    kind = None if weights is None else choice(WeightsKind, weights)
    require_own_weights(source, kind)
    return kind or WeightsKind.CLEAN


def build_engine(
    model: Place | None = None,
    output: Place | None = None,
    *,
    scale: int | None = None,
    weights: WeightsName | WeightsKind | None = None,
    models: Place = MODELS,
    precision: EnginePrecisionName | Precision = "fp16",
    stages: bool = False,
    smallest: Sequence[str] = (),
    best: Sequence[str] = (),
    largest: Sequence[str] = (),
    flavor: FlavorName | str = "auto",
    gpus: Sequence[str] = (),
    device: int = 0,
    workspace: int | None = None,
    level: int = 3,
    timing_cache: Place | None = None,
    kernels: bool = False,
    allow_precision: bool = False,
    allow_unfused_attention: bool = False,
    progress: BuildProgress | None = None,
    say: Callable[[str], None] = quiet,
) -> tuple[EngineInfo, bool]:
    """Build an exported ONNX into a TensorRT engine and prove that it is what was asked for; False if it was there already.

    `model` is by default what `sanrt export` wrote for `scale` into `models`, else the bundled weights, which are exported
    first. `smallest`, `best` and `largest` are inputs as `1x360x640` (batch, height, width), one of each for every
    profile, of tiles with `stages`; where none is named, the largest is
    1x1080x1920, or less where that would take more than 3 GiB.
    `flavor` is `tensorrt` or `rtx`, by default what is installed; `gpus` are RTX's targets, such as `sm89`; `device` is the
    GPU that TensorRT builds on and for; `workspace` is in MiB; `level` (0 to 5) is how long TensorRT searches; `kernels`
    puts SOCA on sanrt's own CUDA kernels (TensorRT alone). `progress` follows TensorRT's phases; `say` is told beforehand
    what the largest size takes of a GPU's memory. Needs the `trt` or `rtx` extra.

    Raises BuildError where the engine cannot be built or is not what was asked for, ModelError for an unsuitable model,
    BackendError where TensorRT or the GPU cannot be used, UsageError for options that contradict each other.
    """
    with extra("rtx", "sanrt build"):
        from sanrt.export import engine
    from sanrt.runtime.artifacts.engines import BuildOptions
    from sanrt.runtime.artifacts.flavors import Flavor
    from sanrt.runtime.artifacts.sizes import default_profile

    chosen = engine.choose_flavor(device) if flavor == "auto" else choice(Flavor, flavor)
    kind, sizes = choice(Precision, precision), named_profiles(stages, smallest, best, largest)
    path = model_to_build(model, models, scale, weights)
    target, timings = (Path(place) if place else None for place in (output, timing_cache))
    require_folder_of(target, timings)
    check_engine_path(target, path, stages)
    spec = replace(read_spec(path), precision=kind)
    options = BuildOptions(
        flavor=chosen,
        precision=spec.precision,
        profiles=sizes or (default_profile(spec),),
        gpus=tuple(gpus),
        workspace=workspace,
        level=level,
        timing_cache=timings,
        allow_precision=allow_precision,
        allow_unfused_attention=allow_unfused_attention,
        kernels=kernels,
        stages=stages,
    )
    if not stages:
        say(memory_words(spec, options.profiles))
    return engine.build_engine(path, options, target, progress, device)


def memory_words(spec: ModelSpec, sizes: Sequence[Profile]) -> str:
    """What the largest size of an engine takes, for people."""
    from sanrt.runtime.artifacts.sizes import activation_estimate

    largest = max((profile.max for profile in sizes), key=prod)
    memory = activation_estimate(spec, largest) / 2**30
    scores = ", attention's scores not counted, which TensorRT does not fuse in fp32" * (spec.precision == Precision.FP32)
    return (
        f"up to {largest} ({option('max')}): about {memory:.1f} GiB of a GPU's memory for a picture of that "
        f"size{scores}; two are"
        " under way at once, smaller ones take less, larger ones go by stages or tiles"
    )


def model_to_build(
    model: Place | None,
    models: Place,
    scale: int | None,
    weights: WeightsName | WeightsKind | None,
    say: Callable[[str], None] = quiet,
) -> Path:
    """The ONNX that an engine is made of: the named one, or the default one, exported first where it is not there yet.

    Raises UsageError where a named one is of another scale than was asked for, or weights are asked for besides.
    """
    named, scale = None if model is None else Path(model), known_scale(scale)
    kind = kind_of_weights(named, weights)
    if named is None:
        return exported_default(Path(models), scale, kind, say)
    if scale:
        require_scale(named, read_spec(named).architecture.scale, scale)
    return named


def exported_default(models: Path, scale: int | None, kind: WeightsKind, say: Callable[[str], None] = quiet) -> Path:
    """The default model as an ONNX: where that is the bundled weights they are exported first, which `say` is told."""
    path, default = exported_path(models, scale, kind), default_model(models, scale, kind)
    if default != path:
        say(f"{path}: not there yet{other_models(models)}; exporting the bundled weights {path.stem} first")
        with extra("export", "making a model"):
            from sanrt.export.onnx import export_onnx
            from sanrt.model.checkpoint import load_checkpoint
        export_onnx(load_checkpoint(default), path)
    return path


def check_engine_path(output: Path | None, model: Path, stages: bool) -> None:
    """Raise UsageError for a place where an engine would not be found, or would replace something else."""
    from sanrt.runtime.artifacts.engines import STAGES_SUFFIX, SUFFIX, read_engine

    if output is None:
        return
    suffix = STAGES_SUFFIX if stages else SUFFIX
    if output.suffix != suffix:
        raise UsageError(f"{option('output', output)}: expected a name that ends in {suffix}, by which `sanrt run` knows it")
    if stages and output.parent.resolve() != model.parent.resolve():
        raise UsageError(
            f"{option('output', output)}: stage engines are looked for beside their model; expected a file in {model.parent}"
        )
    if not output.exists():
        return
    try:
        same = read_engine(output).model_path.resolve() == model.resolve()
    except ModelError:
        same = False
    if not same:
        raise UsageError(
            f"{option('output', output)}: is there already, and no engine of {model}; choose another place, or remove it"
        )


def named_profiles(
    stages: bool, smallest: Sequence[str], best: Sequence[str], largest: Sequence[str]
) -> tuple[Profile, ...]:
    """One profile from each smallest, best and largest size of the same place; the default's where some are not named.

    Of a whole network without any named size there is none here: its default depends on the model. UsageError where sizes
    of one kind are several, and not as many as the others.
    """
    from sanrt.runtime.artifacts.sizes import TILES, Profile, Size

    if not (stages or smallest or best or largest):
        return ()
    default = TILES if stages else Profile()
    count = max(1, len(smallest), len(best), len(largest))
    if any(len(sizes) not in (0, count) for sizes in (smallest, best, largest)):
        raise UsageError(
            f"{len(smallest)} {option('min')}, {len(best)} {option('opt')} and {len(largest)} {option('max')}: expected "
            "one of each for every profile"
        )
    columns = (
        [Size.parse(text) for text in sizes] or [standard] * count
        for sizes, standard in ((smallest, default.min), (best, default.opt), (largest, default.max))
    )
    return tuple(Profile(*sizes) for sizes in zip(*columns, strict=True))


def validate_model(
    artifact: Place,
    images: Place | None = None,
    hr: Place | None = None,
    *,
    checkpoint: Place | None = None,
    backend: BackendName | str = "auto",
    precision: PrecisionName | Precision | None = None,
    tolerance: float | None = None,
    min_psnr: float | None = None,
    heatmaps: Place | None = None,
    polygraphy: Place | None = None,
) -> Validation:
    """Hold an ONNX or engine against the PyTorch network of the checkpoint that it came from, by default the bundled one.

    `images` is a folder of pictures, `hr` one of their originals of the same relative paths; `hr` alone is downscaled,
    without either scenes are generated. `precision` is that of an ONNX, where the backend has a choice. `tolerance` (of
    255) and `min_psnr` (dB) replace the limits of the type that is computed in; `heatmaps` is a folder for pictures of
    where outputs differ, `polygraphy` one for inputs, PyTorch's outputs and the commands by which Polygraphy holds the
    artifact against them. Needs the `export` extra.

    The verdict is the result's `passed`; its `require()` raises ParityError outside the limits. Raises ModelError for an
    artifact that is not what it says, UsageError for another checkpoint than its own, PictureError for unreadable pictures.
    """
    with extra("export", "sanrt validate"):
        from sanrt.export.samples import samples
        from sanrt.export.validate import ValidateOptions, validate
    low, high, heat, replay = (Path(folder) if folder else None for folder in (images, hr, heatmaps, polygraphy))
    require_folder_of(heat, replay)
    options = ValidateOptions(
        backend,
        None if precision is None else parse_precision(precision),
        Path(checkpoint) if checkpoint else None,
        tolerance,
        min_psnr,
        heat,
        replay,
    )
    return validate(Path(artifact), partial(samples, low, high), options)


def upscale_files(
    sources: Place | Iterable[Place],
    output: Place | None = None,
    *,
    scale: int | None = None,
    outscale: float | None = None,
    size: tuple[int, int] | None = None,
    weights: WeightsName | Literal["auto"] = "auto",
    model: Place | None = None,
    format: FormatName | None = None,
    suffix: str = "",
    quality: int | None = None,
    lossless: bool = False,
    background: tuple[int, int, int] | None = None,
    keep_hidden: bool = False,
    self_ensemble: bool = False,
    overwrite: bool = False,
    include_results: bool = False,
    models: Place = MODELS,
    backend: BackendName | str = "auto",
    precision: PrecisionName | Precision | None = None,
    threads: int | None = None,
    device: int = 0,
    tiling: TilingName = "auto",
    tile: int | None = None,
    overlap: int | None = None,
    memory: int | None = None,
    scratch: Place | None = None,
    regions: int | Literal["auto"] = "auto",
    record: Place | None = None,
    ray: str | None = None,
    workers: int | None = None,
    listener: Listener | None = None,
) -> list[Outcome]:
    """Upscale picture files and folders of them, as `sanrt run` with the options of the same names does.

    `weights` are of the bundled ones: with `auto` those for JPEG photographs where they are better, else `clean`.

    `output` is the folder of the results (the tree of folders is kept), or the file of one; by default `a_x4.png` beside
    `a.png`, `photos_x4` beside `photos`. What is done already is skipped; files that sanrt did not make are not replaced
    unless `overwrite`. Results of sanrt in folders are passed over unless `include_results`. `size` is (width, height) to
    fit inside, `background` 8-bit RGB to lay transparency onto, `memory` in bytes; `listener` is called with events as
    pictures are opened, advance and finish, from several threads.

    One outcome per picture: `Written`, `Skipped`, or `Failed` with the `reason` in one line; each has its `job.source` and
    `job.destination`. They come in the order of `sources`, those of a folder by name; a file that is named twice, or lies in
    a folder that is named too, is one picture, at its first place. A bad picture stops no other and raises nothing. Raises,
    before any picture is upscaled, UsageError for options or places that cannot be, PictureError where there is no picture,
    ModelError or BackendError for the model.
    """
    from sanrt.request import Conduct, ModelChoice, Request, outcomes
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.runtime.pictures.codec import Encoding
    from sanrt.runtime.pictures.jobs import Naming

    loading = RunOptions(threads, None if precision is None else parse_precision(precision), device=device)
    kind = None if weights == "auto" else choice(WeightsKind, weights)
    k, folder = None if regions == "auto" else regions, Path(scratch) if scratch else None
    request = Request(
        arguments(sources, output),
        ModelChoice(Path(model) if model else None, Path(models), known_scale(scale), backend, loading, kind),
        UpscaleOptions(tile, overlap, self_ensemble, choice(Tiling, tiling), k, memory, folder, keep_hidden),
        Encoding(quality, lossless, background, outscale, size),
        Naming(suffix, written_format(format)),
    )
    conduct = Conduct(record=Path(record) if record else None, ray=ray, workers=workers)
    work = request.resolve(overwrite, bool(ray), include_results)
    place = {job.source: at for at, job in enumerate(work.jobs)}
    return sorted(outcomes(work, request, conduct, listener), key=lambda outcome: place[outcome.job.source])


def arguments(sources: Place | Iterable[Place], output: Place | None) -> list[str]:
    """Sources and output as the arguments of `sanrt run`; UsageError where there is no source, or no place for several."""
    places = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not places:
        raise UsageError("no pictures named; expected paths of pictures or folders")
    if output is None and len(places) > 1:
        raise UsageError(f"{len(places)} sources without output; name the folder of the results")
    return [str(place) for place in (*places, *([] if output is None else [output]))]


def written_format(name: str | None) -> Format | None:
    """The format of that name; UsageError where sanrt writes none such."""
    form = None if name is None else Format.named(name)
    if name is not None and (form is None or form.written_as is not form):
        raise UsageError(f"format {name!r}: expected png, jpeg, webp, tiff or avif")
    return form
