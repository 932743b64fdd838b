"""A record of a run, one JSON line per output: enough to make the output again and see whether it is the same."""

from __future__ import annotations

import json
import logging
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cache, cached_property
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from sanrt.errors import ModelError, SanrtError, UsageError, system_reason
from sanrt.files import file_digest
from sanrt.model.spec import Precision
from sanrt.runtime.artifacts.variants import model_digest
from sanrt.runtime.backends.protocol import Backend, RunOptions
from sanrt.runtime.backends.registry import ALIASES, load_backend, status
from sanrt.runtime.pictures.codec import Encoding, Pixels, open_picture
from sanrt.runtime.pictures.jobs import job_of
from sanrt.runtime.pictures.storage import fetched, located
from sanrt.runtime.runs.pipeline import Failed, Outcome, PipelineOptions, Written
from sanrt.runtime.runs.results import Recipe
from sanrt.runtime.runs.videos import run
from sanrt.runtime.tiling.options import PROCESS_MEMORY, Tiling, UpscaleOptions
from sanrt.runtime.tiling.upscaling import NetworkRunner
from sanrt.runtime.video.container import ffmpeg, frames, look, picture_of
from sanrt.runtime.video.formats import videos_are_readable
from sanrt.version import __version__
from sanrt.wording import option

log = logging.getLogger(__name__)

RESTORE = "put the file of the run back"
STRIP = 256
"""Rows that are compared at a time."""

TOLERANCE = 1 / 255
"""Largest difference as a share of the full scale: rounding alone makes at most one 8-bit step."""


@dataclass(frozen=True)
class Entry:
    """One output and everything it depends on."""

    source: str
    """Absolute, as are the other paths."""
    source_digest: str
    """SHA-256 of the file."""
    output: str
    output_digest: str
    model: str
    """The ONNX or engine that ran."""
    model_digest: str
    weights_digest: str
    scale: int
    backend: str
    backend_version: str
    device: str
    precision: str
    tiling: str
    """The tiling that really ran, never auto."""
    tile: int
    regions: int
    overlap: int | None
    self_ensemble: bool
    memory: int
    """Bytes that the process was to stay below."""
    threads: int | None
    gpu: int
    """Index."""
    encoding: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: Mapping[str, float]
    """What reading, upscaling and writing took."""
    engine_digest: str | None = None
    """SHA-256 of the TensorRT engine that ran the model, where one did."""
    recipe: Mapping[str, Any] | None = None
    """What the output says of its making, beside its source; None in records of a sanrt that wrote nothing of it."""
    keep_hidden: bool = False
    """Whether colours under full transparency were kept."""

    def upscaling(self) -> UpscaleOptions:
        """What makes the same choices again."""
        tiling = Tiling(self.tiling)
        tile = None if tiling is Tiling.WHOLE else self.tile
        overlap = self.overlap if tiling is Tiling.OVERLAP else None
        return UpscaleOptions(
            tile, overlap, self.self_ensemble, tiling, self.regions, self.memory, keep_hidden=self.keep_hidden
        )

    def output_encoding(self) -> Encoding:
        """How the result was written."""
        lists = {"background": self.encoding["background"], "size": self.encoding.get("size")}
        return Encoding(**{**self.encoding, **{name: tuple(value or ()) or None for name, value in lists.items()}})

    def loading(self) -> RunOptions:
        """How the model was loaded."""
        return RunOptions(threads=self.threads, precision=Precision(self.precision), device=self.gpu)


@dataclass
class Recorder:
    """Appends an entry for every output of a run; a context manager."""

    path: Path
    backend: Backend
    model: Path
    loading: RunOptions
    upscaling: UpscaleOptions
    encoding: Encoding
    recipe: Recipe
    file: IO[str] = field(init=False)

    @cached_property
    def model_digest(self) -> str:
        """SHA-256 of the model's file."""
        return model_digest(self.model)

    def __enter__(self) -> Self:
        self.model_digest  # noqa: B018 - of the file as it is before the run
        self.file = open_record(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def follow(self, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
        """The same outcomes, each result written down before it is passed on."""
        for outcome in outcomes:
            if isinstance(outcome, Written):
                write_entry(self.file, self.entry(outcome))
            yield outcome

    def entry(self, outcome: Written) -> Entry:
        """One line of the record."""
        job, plan, spec, backend = outcome.job, outcome.plan, self.backend.spec, self.backend
        assert plan
        assert outcome.source
        assert outcome.digest
        return Entry(
            source=str(job.source.resolve()),
            source_digest=outcome.source.sha256,
            output=str(job.destination.resolve()),
            output_digest=outcome.digest,
            model=str(self.model.resolve()),
            model_digest=self.model_digest,
            weights_digest=spec.weights_digest,
            scale=spec.architecture.scale,
            backend=backend.name,
            backend_version=status(backend.name).version or "",
            device=backend.device,
            precision=str(spec.precision),
            tiling=str(plan.tiling),
            tile=plan.tile,
            regions=plan.regions,
            overlap=plan.overlap if plan.tiling is Tiling.OVERLAP else None,
            self_ensemble=self.upscaling.self_ensemble,
            memory=self.upscaling.budget + PROCESS_MEMORY,
            threads=self.loading.threads,
            gpu=self.loading.device,
            encoding=asdict(self.encoding),
            versions=versions(job.needs_ffmpeg),
            seconds=outcome.seconds,
            engine_digest=backend.engine_digest,
            recipe=asdict(self.recipe),
            keep_hidden=self.upscaling.keep_hidden,
        )


def versions(by_ffmpeg: bool) -> dict[str, str]:
    """Of what made a result."""
    found = {"sanrt": __version__, "python": platform.python_version(), "numpy": np.__version__}
    return found | ({"ffmpeg": ffmpeg().ffmpeg_version_info} if by_ffmpeg and videos_are_readable() else {})


def open_record(path: Path) -> IO[str]:
    """The record, to be added to; raises UsageError when it cannot be written."""
    try:
        require_record(path)
        record = path.open("a", encoding="utf-8")
        if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):  # a killed run left half a line
            record.write("\n")
        return record
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written ({system_reason(error)}); choose another file for {option('record')}"
        ) from None


def require_record(path: Path) -> None:
    """Raise UsageError for a file that is there, not empty, and no record: lines would be written behind its content."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    try:
        if first.strip():
            read_entry(first.decode())
    except (ValueError, TypeError, KeyError):
        raise UsageError(f"{path}: is there and no record of sanrt's; choose another file for {option('record')}") from None


def write_entry(record: IO[str], entry: Entry) -> None:
    """Add a line, at once; raises UsageError when it cannot be written."""
    try:
        print(json.dumps(asdict(entry)), file=record, flush=True)
    except OSError as error:
        with suppress(OSError):  # what could not be written is tried again on closing
            record.close()
        raise UsageError(
            f"{record.name}: cannot be written ({system_reason(error)}); choose another file for {option('record')}"
        ) from None


def read_record(path: Path) -> list[Entry]:
    """All entries, without lines that killed runs left unfinished, which is logged.

    Raises UsageError when the file cannot be read, is empty or is no record.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        whole = [line for line in lines if line.rstrip().endswith("}")]
        entries = [read_entry(line) for line in whole]
        if whole != lines:
            log.warning("%s: %d lines were cut short by killed runs and are left out", path, len(lines) - len(whole))
        if not entries:
            raise UsageError(f"{path}: has no entries; expected what `sanrt run --record` wrote")
        return entries
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({system_reason(error)}); expected what `sanrt run --record` wrote"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path}: not a record of this sanrt ({error}); expected what `sanrt run --record` wrote") from None


def read_entry(line: str) -> Entry:
    """An entry whose settings sanrt has; raises ValueError, TypeError or KeyError for any other line."""
    entry = Entry(**json.loads(line))
    entry = replace(entry, backend=ALIASES.get(entry.backend, entry.backend))
    entry.loading(), entry.upscaling(), entry.output_encoding(), entry.recipe and Recipe(**entry.recipe)
    return entry


def sample(entries: list[Entry], count: int | None) -> list[Entry]:
    """`count` entries spread evenly over the record; all if None."""
    if count is None or count >= len(entries):
        return entries
    return [entries[i * len(entries) // count] for i in range(count)]


class Verdict(StrEnum):
    """What a replay showed."""

    IDENTICAL = "same, bit for bit"
    CLOSE = "same, within rounding"
    DIFFERENT = "differs"
    IMPOSSIBLE = "cannot be replayed"


@dataclass(frozen=True)
class Replay:
    """One output made again."""

    entry: Entry
    verdict: Verdict
    detail: str = ""

    @property
    def reproduced(self) -> bool:
        """Whether the output is what it should be."""
        return self.verdict in (Verdict.IDENTICAL, Verdict.CLOSE)


def verify(entries: Iterable[Entry]) -> Iterator[Replay]:
    """Make each entry's output again in a temporary folder and compare."""
    with ExitStack() as opened:

        @cache
        def loaded(backend: str, model: Path, loading: RunOptions) -> Backend:
            return opened.enter_context(load_backend(backend, model, loading))

        for entry in entries:
            try:
                check_unchanged(entry)
                backend = loaded(entry.backend, Path(entry.model), entry.loading())
                check_engine(entry, backend)
                with tempfile.TemporaryDirectory(prefix="sanrt-") as folder:
                    yield compared(entry, again(entry, backend, Path(folder)))
            except SanrtError as error:
                yield Replay(entry, Verdict.IMPOSSIBLE, str(error))


def check_unchanged(entry: Entry) -> None:
    """Raise SanrtError unless picture, model and result are the files of the record."""
    source, model = file_digest(located(entry.source), RESTORE), model_digest(Path(entry.model), RESTORE)
    for path, found, digest in (
        (entry.source, source, entry.source_digest),
        (entry.model, model, entry.model_digest),
    ):
        if found != digest:
            raise ModelError(f"{path}: changed since the run (SHA-256 {digest[:12]}... was recorded); {RESTORE}")
    file_digest(located(entry.output), RESTORE)


def check_engine(entry: Entry, backend: Backend) -> None:
    """Raise ModelError unless the engine that runs the model now is the one that ran it then."""
    if entry.engine_digest not in (None, backend.engine_digest):
        raise ModelError(f"{entry.model}: another engine than SHA-256 {entry.engine_digest[:12]}... runs it now; {RESTORE}")


def again(entry: Entry, backend: Backend, folder: Path) -> Path:
    """The output, made again in `folder`."""
    output = folder / Path(entry.output).name
    encoding, upscaling = entry.output_encoding(), entry.upscaling()
    recipe = Recipe(**entry.recipe) if entry.recipe else Recipe.of(backend.spec, None, upscaling, encoding)
    job = job_of(located(entry.source), output)
    (outcome,) = run([job], NetworkRunner(backend, upscaling), PipelineOptions(recipe, encoding))
    if isinstance(outcome, Failed):
        raise SanrtError(outcome.reason)
    return output


def compared(entry: Entry, output: Path) -> Replay:
    """The recorded output against its replay: bytes first, then pixels."""
    recorded = located(entry.output)
    if file_digest(output) == entry.output_digest == file_digest(recorded):
        return Replay(entry, Verdict.IDENTICAL)
    job = job_of(located(entry.source), output)
    with fetched(recorded) as local:
        difference = (largest_difference_of_frames if job.is_video else largest_difference)(local, output)
    detail = f"largest difference {difference * 255:.2f} of 255"
    then, now = entry.versions.get("ffmpeg"), versions(job.needs_ffmpeg).get("ffmpeg")
    if difference > TOLERANCE and now and then != now:
        detail += f", by FFmpeg {now}, then {then}, whose encoders need not agree"
    if file_digest(recorded) != entry.output_digest:
        detail += ", and the file changed since the run"
    return Replay(entry, Verdict.CLOSE if difference <= TOLERANCE else Verdict.DIFFERENT, detail)


def largest_difference(first: Path, second: Path) -> float:
    """Largest difference over all pixels, as a share of the full scale; PictureError for files that are no pictures."""
    with open_picture(first) as one, open_picture(second) as other:
        if (one.info.height, one.info.width, one.info.dtype) != (other.info.height, other.info.width, other.info.dtype):
            return 1.0
        parts = ((one.rgb, other.rgb), (one.alpha, other.alpha))
        full, height = np.iinfo(one.info.dtype).max, one.info.height
        strips = [(top, min(STRIP, height - top)) for top in range(0, height, STRIP)]
        steps = (step(part(*strip), same(*strip)) for strip in strips for part, same in parts)
        return max(steps) / full


def largest_difference_of_frames(first: Path, second: Path) -> float:
    """The same over all frames of two videos or animations; 1 where they have not as many, or of another size."""
    one, other = look(first), look(second)
    largest = 0.0
    for left, right in zip_longest(frames(one), frames(other)):
        if left is None or right is None:
            return 1.0
        mine, same = picture_of(left.frame, one), picture_of(right.frame, other)
        if (mine.shape, mine.dtype) != (same.shape, same.dtype):
            return 1.0
        largest = max(largest, step(mine, same) / np.iinfo(mine.dtype).max)
    return largest


def step(first: Pixels, second: Pixels) -> float:
    """The largest difference of two arrays, in steps of their type."""
    return float(np.abs(first.astype(np.int64) - second).max())
