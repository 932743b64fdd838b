"""The library: arrays in, upscaled arrays out."""

from __future__ import annotations

import os
from enum import StrEnum
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

from sanrt.errors import ModelError, UsageError
from sanrt.model.bundled import WeightsKind
from sanrt.model.spec import parse_precision, parse_scale
from sanrt.picture_arrays import picture_array
from sanrt.runtime.artifacts.models import MODELS, default_model, model_title
from sanrt.runtime.backends.default_variant import load_default
from sanrt.runtime.backends.fp32_fallback import FP32Fallback
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.pictures.transparency import fill_hidden
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.runtime.tiling.plan import PAPER_REGIONS
from sanrt.runtime.tiling.upscaling import upscale

if TYPE_CHECKING:
    from sanrt.model.spec import ModelSpec, Precision
    from sanrt.runtime.backends.protocol import Backend
    from sanrt.runtime.runs.pipeline import Skipped, Written

Picture = npt.NDArray[Any]
Choice = TypeVar("Choice", bound=StrEnum)
BackendName = Literal["auto", "native", "onnxruntime", "openvino", "torch", "torch-cuda", "onnxruntime-cuda", "tensorrt"]
WeightsName = Literal["clean", "photo", "fast"]
TilingName = Literal["auto", "whole", "exact", "overlap"]
PrecisionName = Literal["fp32", "fp16", "bf16", "int16"]


class Upscaler:
    """A loaded SAN (Dai et al., CVPR 2019), ready to upscale; a context manager.

    >>> with Upscaler.load(4) as upscaler:
    ...     large = upscaler(picture)

    Threads may share one: it takes their pictures one at a time, each on all its threads. So do several with the native
    backend, in one process; those of other backends compute side by side.

    In a process that is forked after `load` (as multiprocessing does by default on Linux up to Python 3.13) it goes on with
    the native backend, and raises BackendError with any other: load the model in the child, or start processes with spawn.
    """

    def __init__(self, backend: Backend, options: UpscaleOptions, precision: Precision | None, model: Path) -> None:
        """`precision` is what was asked for, None where the backend chose; `model` is the file that was loaded."""
        self.backend, self.options, self.precision, self.model = backend, options, precision, model
        self.locks: dict[int, Lock] = {}

    @property
    def lock(self) -> Lock:
        """Held while a picture is computed; a forked process has another, since nobody there would release this one."""
        return self.locks.setdefault(os.getpid(), Lock())

    @classmethod
    def load(
        cls,
        model: int | str | os.PathLike[str],
        *,
        weights: WeightsName = "clean",
        models: str | Path = MODELS,
        backend: BackendName | str = "auto",
        precision: PrecisionName | None = None,
        threads: int | None = None,
        device: int = 0,
        tile: int | None = None,
        overlap: int | None = None,
        self_ensemble: bool = False,
        tiling: TilingName = "auto",
        regions: int | Literal["auto"] = "auto",
        memory: int | None = None,
        scratch: str | Path | None = None,
        keep_hidden: bool = False,
    ) -> Self:
        """A scale (2, 3, 4 or 8), meaning what `sanrt export` wrote into `models`, else the bundled weights; or a path.

        `models` is looked for in the working folder, so the same scale may be another model elsewhere: `upscaler.model` and
        `repr` tell which file it is.

        `weights` are those for the scale: `clean`, `photo` for JPEG photographs, or `fast`, a smaller network; where sanrt
        has none of a kind, CheckpointError says what it has.

        Pictures larger than `tile` (by default those that do not fit the memory) are cut as `tiling` says: `auto`, `whole`,
        `exact` or `overlap`; `overlap` is in pixels. `regions` is the k of the k x k attention regions, by default chosen by
        a picture's size; `precision` is that of convolutions and attention, by default the backend's own choice. `memory` is
        how many bytes of the host's memory to stay below, by default a share of what is free; `scratch` is the folder for
        what exceeds them, by default the system's. `self_ensemble` averages over the 8 flips and rotations (SAN+, section 4
        of the paper). Colours under full transparency are those of the nearest visible pixels, unless `keep_hidden` (for
        textures).

        Raises ModelError when the model is missing or damaged, BackendError when the backend cannot run here, UsageError
        for options that make no sense.
        """
        named = Path(model) if isinstance(model, str | os.PathLike) else None
        if named and not named.exists():
            raise ModelError(f"{named}: no such model; expected its path, or a scale as a number for the bundled weights")
        k = None if regions == "auto" else regions
        way, folder = choice(Tiling, tiling), Path(scratch) if scratch else None
        options = UpscaleOptions(tile, overlap, self_ensemble, way, k, memory, folder, keep_hidden)
        computed = None if precision is None else parse_precision(precision)
        run_options = RunOptions(threads, computed, k or PAPER_REGIONS, device)
        kind = choice(WeightsKind, weights)
        if named and kind is not WeightsKind.CLEAN:
            raise UsageError(f"weights {weights!r}: {named} has its own; name a scale instead, or leave one of the two out")
        path = named or default_model(Path(models), parse_scale(model), kind)
        automatic = named is None and backend == "auto"
        network = load_default(path, run_options) if automatic else load_backend(backend, path, run_options)
        return cls(network, options, computed, path)

    def __repr__(self) -> str:
        spec, network = self.spec, self.backend
        what = f"{spec.architecture.name}, {spec.computes}, {network.name} on {network.device}"
        return f"<Upscaler {model_title(self.model)}: {what}>"

    @property
    def spec(self) -> ModelSpec:
        """The description of the loaded model."""
        return self.backend.spec

    @property
    def scale(self) -> int:
        """Upscaling factor."""
        return self.spec.architecture.scale

    @overload
    def __call__(self, pictures: list[Any] | tuple[Any, ...]) -> list[Picture]: ...

    @overload
    def __call__(self, pictures: Any) -> Picture: ...

    def __call__(self, pictures: Any) -> Picture | list[Picture]:
        """One picture or a list of them, each (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA, of any size from 1 x 1.

        Arrays, Pillow pictures, PyTorch tensors on the CPU, or anything with `__array__`: uint8, uint16 (0..65535) or
        float32 (0..1). The results are arrays of the same type, range and channels, `scale` times the height and width.
        Grey goes through the network as three equal channels and comes back as their mean; opacity is upscaled by bicubic
        interpolation. Raises UsageError for anything else, OutOfMemoryError when not even small tiles fit the memory.
        """
        if isinstance(pictures, list | tuple):
            return [self.one(picture) for picture in pictures]
        return self.one(pictures)

    def upscale_file(
        self,
        source: str | os.PathLike[str],
        destination: str | os.PathLike[str],
        *,
        quality: int | None = None,
        lossless: bool = False,
        background: tuple[int, int, int] | None = None,
        outscale: float | None = None,
        size: tuple[int, int] | None = None,
        overwrite: bool = False,
    ) -> Written | Skipped:
        """One picture, animation or video to another file, as `sanrt run` does with options of these names.

        Format and depth are by the destination's ending and the source; profile, EXIF and transparency are kept, and what is
        not is in the result's `notes`, one line each. `background` is 8-bit RGB to lay transparency onto, `size` the (width,
        height) that the result fits inside. A destination that holds this very result already is Skipped.

        Raises PictureError for a picture that cannot be read or written so, UsageError where another file is in the
        destination's place (unless `overwrite`), and as a call does.
        """
        from sanrt.runtime.pictures.codec import Encoding
        from sanrt.runtime.pictures.jobs import Naming, find_pictures
        from sanrt.runtime.pictures.storage import located
        from sanrt.runtime.runs import pipeline, videos
        from sanrt.runtime.runs.results import Recipe, sort_out
        from sanrt.runtime.tiling.upscaling import NetworkRunner

        picture, result = (located(os.fspath(path)) for path in (source, destination))
        if picture.is_dir():
            raise UsageError(f"{picture}: a folder; expected a picture's path, or use sanrt.upscale_files")
        encoding = Encoding(quality, lossless, background, outscale, size)
        recipe = Recipe.of(self.spec, self.precision, self.options, encoding)
        found = sort_out(dict.fromkeys(find_pictures([picture], result, Naming()), recipe), overwrite)
        if found.done:
            return pipeline.Skipped(found.done[0])
        (job,), options = found.to_do, pipeline.PipelineOptions(recipe, encoding)
        runner = NetworkRunner(self.backend, self.options)
        if job.is_video:
            with self.lock:
                return videos.enlarge(job, partial(videos.make_segments, runner), options)
        loaded = pipeline.read(job, runner, options)
        with self.lock:
            enlarged = pipeline.enlarge(loaded, runner)
        return pipeline.write(enlarged, options)

    def on_device(self, pictures: Any) -> Any:
        """GPU arrays in and out, never copied to the host; with `backend="tensorrt"` only.

        pictures: anything with `__cuda_array_interface__` (pycuda, CuPy, torch), contiguous float32 (B, 3, H, W), RGB of
        0..`spec.architecture.value_range`. The result is such an array, complete, (B, 3, scale * H, scale * W), not clipped
        and not looked at: what overflowed half precision is not computed again.
        """
        network = self.backend.backend if isinstance(self.backend, FP32Fallback) else self.backend
        infer = getattr(network, "infer_on_device", None)
        if infer is None:
            raise UsageError(f"backend {self.backend.name} takes no GPU arrays; load the model with backend='tensorrt'")
        with self.lock:
            return infer(pictures)

    def one(self, picture: Any) -> Picture:
        """One picture of any supported kind."""
        if getattr(picture, "ndim", 0) == 3 and picture.shape[2] == 1:
            return self.one(picture[..., 0])[..., None]
        picture = picture_array(picture)
        if picture.ndim == 2:
            colours = self.rgb(np.repeat(picture[..., None], 3, axis=2))
            return rounded(colours.mean(axis=2, dtype=np.float64), picture.dtype)
        if picture.shape[2] == 3:
            return self.rgb(picture)
        colours, alpha = picture[..., :3], picture[..., 3]
        if not self.options.keep_hidden:
            colours = fill_hidden(colours, alpha)
        return np.dstack([self.rgb(colours), self.opacity(alpha)])

    def rgb(self, picture: Picture) -> Picture:
        """(H, W, 3) through the network."""
        with self.lock:
            result: Picture = upscale(self.backend, picture, self.options)
        return result

    def opacity(self, alpha: Picture) -> Picture:
        """(H, W) by bicubic interpolation."""
        from sanrt.runtime.pictures.codec import upscale_alpha

        return upscale_alpha(alpha, self.scale).clip(0, 1 if alpha.dtype == np.float32 else None)

    def close(self) -> None:
        """Free the model, once no thread computes any more; the upscaler is of no use afterwards."""
        with self.lock:
            self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def choice(kind: type[Choice], name: str) -> Choice:
    """The member of that name; UsageError names those that there are."""
    try:
        return kind(name)
    except ValueError:
        raise UsageError(f"{kind.__name__.lower()} {name!r}: expected {', '.join(kind)}") from None


def rounded(values: npt.NDArray[np.float64], dtype: np.dtype[Any]) -> Picture:
    """The values in another type, rounded to the nearest integer where it is an integer type."""
    return (np.rint(values) if dtype.kind == "u" else values).astype(dtype)
