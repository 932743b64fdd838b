"""The terminal: the console, progress bars, one line per problem, a summary at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from sanrt.cli.streams import tell
from sanrt.errors import InterruptedRunError
from sanrt.runtime.runs.pipeline import Advanced, Event, Failed, Finished, Opened, Outcome, Planned, Skipped, Written
from sanrt.runtime.runs.results import reasons
from sanrt.wording import NOTICE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from sanrt.runtime.pictures.jobs import Job

Item = TypeVar("Item")


class Reporter(logging.Handler):
    """Follows a run. Problems and warnings go to stderr, all else to stdout; the bar is drawn only on a terminal."""

    def __init__(
        self,
        total: int,
        quiet: bool = False,
        verbose: bool = False,
        passed_over: Sequence[str] = (),
        again: Mapping[Job, str] | None = None,
        hidden: str = "",
        place: str = "",
    ) -> None:
        """passed_over: lines that are told at the end, also to those who want to see nothing but errors.

        again: why some results are made again. hidden: what paths of temporary files begin with, which is not told.
        place: where the results are.
        """
        super().__init__(logging.DEBUG if verbose else logging.WARNING if quiet else NOTICE)
        self.quiet, self.verbose, self.passed_over, self.hidden = quiet, verbose, passed_over, hidden
        self.again, self.place = again or {}, place.replace(hidden, "")
        self.progress = RunProgress(total)

    def __enter__(self) -> Self:
        self.logger = logging.getLogger("sanrt")
        self.logger.addHandler(self)
        self.logger.setLevel(self.level)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.logger.removeHandler(self)
        if kind is KeyboardInterrupt and (self.progress.counts or self.progress.frames):
            raise InterruptedRunError(f"{self.progress.summary()} so far; the same command goes on from here")

    @property
    def status(self) -> int:
        """The command's exit status."""
        return 1 if self.progress.counts[Failed] else 0

    def say(self, text: str) -> None:
        """A line for people, unless they want none."""
        if not self.quiet:
            tell(text)

    def warn(self, text: str) -> None:
        """A line on stderr, wanted or not."""
        tell(f"sanrt: {text}", error=True)

    def emit(self, record: logging.LogRecord) -> None:
        """A log record of sanrt's as a line: a notice on stdout, others on stderr."""
        for line in self.format(record).splitlines():
            if record.levelno == NOTICE:
                self.say(line)
            else:
                self.warn(line)

    def hear(self, event: Event) -> None:
        """A `pipeline.Listener`, for any thread."""
        self.progress.hear(event)

    def follow(self, outcomes: Iterable[Outcome]) -> None:
        """Tell every outcome as it comes, and sum them up at the end."""
        self.progress.started = time.monotonic()
        told: dict[type[Outcome], dict[Job, str]] = {Written: {}, Planned: {}}
        made = False
        with self.bar():
            for outcome in outcomes:
                made |= isinstance(outcome, Written) or (isinstance(outcome, Skipped) and not outcome.reason)
                self.hear(Finished(outcome))
                self.tell(outcome)
                if type(outcome) in told and (why := self.again.get(outcome.job)):
                    told[type(outcome)][outcome.job] = why
        for line in (*reasons(told[Written], "made again"), *reasons(told[Planned], "would be made again")):
            self.say(line)
        self.say(self.progress.summary() + f": {self.place}" * (made and bool(self.place)))
        for line in self.passed_over:
            self.warn(line)

    def tell(self, outcome: Outcome) -> None:
        """A failure, what a result lacks, and on demand everything."""
        match outcome:
            case Failed():
                tell(f"sanrt: {outcome.reason.replace(self.hidden, '')}", error=True)
            case Skipped() if outcome.reason:
                self.say(outcome.reason)
            case Planned():
                self.say(f"{outcome.job.source} -> {outcome.job.destination} ({outcome.width} x {outcome.height})")
            case _ if self.verbose:
                self.say(
                    f"{outcome.job.source} -> {outcome.job.destination}" + ", there already" * isinstance(outcome, Skipped)
                )
        if isinstance(outcome, Written | Planned):
            for note in outcome.notes:
                self.say(f"{outcome.job.destination}: {note}")

    @contextmanager
    def bar(self) -> Iterator[None]:
        """A progress bar on stderr, if that is a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), TextColumn("left")
        console = Console(stderr=True)
        with Progress(
            *columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty(), speed_estimate_period=600
        ) as bar:
            task = bar.add_task(self.progress.line(), total=None)

            def show() -> None:
                done, total = self.progress.pixels_done, self.progress.pixels_in_all
                bar.update(task, completed=done, total=total, description=self.progress.line())

            self.progress.show = show
            try:
                yield
            finally:
                self.progress.show = lambda: None


class RunProgress:
    """How far a run is, by what its pictures told; for any thread.

    Work is counted in pixels of the sources, of videos in those of all frames. What has not been opened counts as the mean
    of what was.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        """Pictures, the skipped ones too."""
        self.counts: Counter[type[Outcome]] = Counter()
        self.pixels = 0
        """Pixels of the sources whose results are on disk, which rates are told by."""
        self.started = time.monotonic()
        self.show: Callable[[], None] = lambda: None
        self.lock = Lock()
        self.finished: set[Job] = set()
        self.opened: dict[Job, int] = {}
        """Pixels of each picture whose header was read and that has not failed."""
        self.shares: dict[Job, float] = {}
        """How much of each picture went through the network."""
        self.frames: dict[Job, int] = {}
        """Frames of each video that are to be made."""

    def hear(self, event: Event) -> None:
        """Take in what happened; an outcome counts once, however often it is told."""
        with self.lock:
            match event:
                case Opened(job, pixels, frames):
                    if not self.opened:  # a model was loaded before
                        self.started = time.monotonic()
                    self.opened[job], self.shares[job] = pixels, 0.0
                    if frames:
                        self.frames[job] = frames
                case Advanced(job, share) if job in self.shares:
                    self.shares[job] += share
                case Finished(outcome) if outcome.job not in self.finished:
                    self.finish(outcome)
        self.show()

    def finish(self, outcome: Outcome) -> None:
        """Count an outcome."""
        job = outcome.job
        self.finished.add(job)
        self.counts[type(outcome)] += 1
        if isinstance(outcome, Written):
            self.pixels += outcome.pixels
            self.shares[job] = 1.0
            if job in self.frames:
                self.frames[job] = outcome.frames
        else:
            for facts in (self.opened, self.shares, self.frames):
                facts.pop(job, None)

    @property
    def pixels_done(self) -> float:
        """Pixels of the sources that went through the network, of failed pictures none."""
        with self.lock:
            return sum(self.opened.get(job, 0) * share for job, share in self.shares.items())

    @property
    def frames_done(self) -> float:
        """Frames of videos that went through the network, likewise."""
        with self.lock:
            return sum(frames * self.shares[job] for job, frames in self.frames.items())

    @property
    def pixels_in_all(self) -> float | None:
        """An estimate of all that has to go through it; None before a picture was opened."""
        with self.lock:
            if not self.opened:
                return None
            without_work = sum(number for kind, number in self.counts.items() if kind is not Written)
            return sum(self.opened.values()) / len(self.opened) * (self.total - without_work)

    def line(self) -> str:
        """Beside the bar: pictures done and in all, and what comes out per second."""
        return f"{len(self.finished)}/{self.total}  {self.rates()}"

    def summary(self) -> str:
        """All in one line."""
        counts = self.counts
        parts = [f"{counts[Planned]} to write, by the headers" if counts[Planned] else f"{counts[Written]} written"]
        parts += [f"{counts[kind]} {name}" for kind, name in ((Skipped, "skipped"), (Failed, "failed")) if counts[kind]]
        seconds = time.monotonic() - self.started
        return ", ".join(parts) + (f" in {seconds:.1f} s ({self.rates()})" if counts[Written] else "")

    def rates(self) -> str:
        """Results and their pixels per second so far; with videos their frames, as they are made."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        number, what, pixels = float(self.counts[Written]), "pictures", float(self.pixels)
        if self.frames:
            number, what, pixels = self.frames_done, "frames", self.pixels_done
        return f"{number / seconds:.2f} {what}/s, {pixels / seconds / 1e6:.2f} Mpx/s of input"


class BuildProgressBar:
    """A bar on the terminal that follows TensorRT's phases; indeterminate while a phase has no steps."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self.bar: Progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
        )
        self.task: TaskID = self.bar.add_task("Building", total=None)
        self.phases: list[tuple[str, int]] = []

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self.phases.append((phase, steps))
        self.show(0)

    def step(self, phase: str, step: int) -> None:
        if self.phases and self.phases[-1][0] == phase:
            self.bar.update(self.task, completed=step + 1)

    def finish(self, phase: str) -> None:
        self.phases = [entry for entry in self.phases if entry[0] != phase]
        self.show(0)

    def show(self, completed: int) -> None:
        """Show the innermost phase; the bar only pulses for one or two steps, which tell nothing."""
        name, steps = self.phases[-1] if self.phases else ("Building", 0)
        self.bar.update(self.task, description=name, total=steps if steps > 2 else None, completed=completed)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def plain_console() -> Console:
    """A console that prints text as it is."""
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False, markup=False)


@contextmanager
def working(on: str) -> Iterator[None]:
    """Say on stderr, if that is a terminal, what goes on while the body runs."""
    from rich.console import Console

    console = Console(stderr=True, markup=False)
    with console.status(on) if sys.stderr.isatty() else nullcontext():
        yield


def track(items: Sequence[Item], description: str) -> Iterable[Item]:
    """A progress bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import track as follow

    if not sys.stderr.isatty() or not items:
        return items
    return follow(items, description, console=Console(stderr=True), transient=True)
