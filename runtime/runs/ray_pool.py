"""The pipeline on a Ray cluster: actors that load the model once and run `pipeline.overlapped` over some pictures at a time.

Ray's core does the placing, starting and watching; the few lines of scheduling here are ours, because Ray Data would
either give up when a worker dies or send the same batch out for ever, without telling which picture kills its workers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Self, cast

from sanrt import wording
from sanrt.errors import BackendError, PictureError, SanrtError, UsageError, system_reason
from sanrt.extras import extra
from sanrt.files import locked_file, remove_leftovers
from sanrt.model.spec import ModelSpec
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.engines import STAGES_SUFFIX, SUFFIX, engines_of, json_path, read_engine
from sanrt.runtime.artifacts.models import external_files
from sanrt.runtime.artifacts.variants import model_digest
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.pictures.codec import Encoding
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.pictures.storage import RemotePath
from sanrt.runtime.runs import pipeline
from sanrt.runtime.runs.pipeline import (
    Advanced,
    Event,
    Failed,
    Listener,
    Outcome,
    PipelineOptions,
    Written,
    guarded,
    nobody,
)
from sanrt.runtime.runs.record import Entry, Recorder, open_record, write_entry
from sanrt.runtime.runs.results import Recipe
from sanrt.runtime.runs.video_parts import PartMade, PartMaker, VideoPart
from sanrt.runtime.runs.videos import Video, opened
from sanrt.runtime.tiling.options import PROCESS_MEMORY, UpscaleOptions
from sanrt.runtime.tiling.plan import TilingPlan
from sanrt.runtime.tiling.upscaling import NetworkRunner
from sanrt.runtime.video.segments import Segment, WorkFolder
from sanrt.wording import Wording, option

log = logging.getLogger(__name__)

LOCAL = "local"
"""The address of a Ray that is started for the run and stopped after it."""
MAX_ATTEMPTS = 3
"""Workers that a picture may take with it before it is given up."""
MAX_CHUNK_PICTURES = 64
"""Most pictures in one chunk, which is what a worker is given at once."""
MAX_CHUNK_BYTES = 4 << 20
"""Upper bound on the source bytes in one chunk; a larger file is a chunk of its own."""
FIRST_NOTICE_SECONDS = 15
"""Seconds without a single worker after which the user is told what is waited for; again after twice as long, and so on."""
SHUTDOWN_SECONDS = 5
"""Seconds that idle workers are given to remove their copies of the model."""
CONNECT_SECONDS = 5
"""Seconds after which an address that does not answer is taken for one without a cluster."""
ALIVE = 0
"""State of a node in Ray's GcsNodeInfo, until some time after its death."""
RAY_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}

Files = Mapping[str, bytes]
"""Names and contents of a model's files."""
WorkerResult = tuple[Outcome | PartMade, Entry | None, list[logging.LogRecord]]
"""A picture's or part's outcome, its line in the record, and what was logged on the way."""
PROGRESS_SECONDS = 0.5
"""Seconds between two messages of a worker on how far a picture is, at least."""


@dataclass(frozen=True)
class Task:
    """What every worker does; it travels to them."""

    model: Path
    backend: str
    running: RunOptions
    upscaling: UpscaleOptions
    recipe: Recipe
    encoding: Encoding = field(default_factory=Encoding)
    record: Path | None = None
    """Where the driver writes down what the workers say of each result."""


@dataclass(frozen=True)
class Share:
    """How a cluster is shared out."""

    workers: int
    cpus: int
    """CPUs of each worker."""
    gpus: int = 0
    """GPUs of each worker, 0 or 1."""
    per_node: int = 1
    """Workers on the largest node: they share its memory."""

    def __str__(self) -> str:
        each = "1 GPU" if self.gpus else f"{self.cpus} CPU{'s' * (self.cpus > 1)}"
        return f"{self.workers} worker{'s' * (self.workers > 1)} with {each} each"


@dataclass(frozen=True)
class Ready:
    """What a worker says of itself once the model is loaded."""

    name: str
    """Name of the backend that it loaded."""
    device: str
    spec: ModelSpec
    node: str
    pid: int


class Worker:
    """A process of the cluster with the model in it; Ray makes an actor of it."""

    def __init__(self, task: Task, files: Files, share: Share, level: int, probe: Path | None, words: Wording) -> None:
        self.task, self.files, self.share, self.probe = task, files, share, probe
        wording.wording = words
        self.records: SimpleQueue[logging.LogRecord] = SimpleQueue()
        logger = logging.getLogger("sanrt")
        logger.setLevel(level)
        logger.propagate = False
        logger.addHandler(QueueHandler(self.records))  # type: ignore[arg-type]

    def load(self) -> Ready:
        """Load the model; SanrtError if this node cannot, or does not see the results' folder."""
        import ray

        node = ray.util.get_node_ip_address()
        if self.probe and not self.probe.exists():
            folder = self.probe.parent
            raise UsageError(f"{folder}: not shared with the node {node}; choose a folder that every node has, or a URL")
        task = self.task
        self.folder, model = place_model(task.model, self.files)
        running = task.running if self.share.gpus else replace(task.running, threads=self.share.cpus)
        network = load_backend(task.backend, model, running)
        memory = task.upscaling.memory or (task.upscaling.budget + PROCESS_MEMORY) // self.share.per_node
        upscaling = replace(task.upscaling, memory=memory)
        self.options = PipelineOptions(task.recipe, task.encoding, digests=bool(task.record))
        self.runner = NetworkRunner(network, upscaling)
        self.parts = PartMaker(self.runner, self.options)
        self.recorder = Recorder(Path(), network, task.model, running, upscaling, task.encoding, task.recipe)
        self.recorder.model_digest = model_digest(model)
        return Ready(network.name, network.device, network.spec, node, os.getpid())

    def run(self, jobs: Sequence[Job]) -> Iterator[WorkerResult | Event]:
        """Every job's outcome, in order, and between them what happens to the pictures, as it happens."""
        messages: SimpleQueue[WorkerResult | Event | BaseException | None] = SimpleQueue()
        listener = Throttled(messages.put)

        def work() -> None:
            try:
                for outcome in self.outcomes(jobs, listener.hear):
                    entry = self.recorder.entry(outcome) if self.task.record and isinstance(outcome, Written) else None
                    messages.put((outcome, entry, [self.records.get() for _ in range(self.records.qsize())]))
                messages.put(None)
            except BaseException as error:
                messages.put(error)

        Thread(target=work, name="sanrt-pictures", daemon=True).start()
        while (message := messages.get()) is not None:
            if isinstance(message, BaseException):
                raise message
            yield message

    def outcomes(self, jobs: Sequence[Job], listener: Listener) -> Iterator[Outcome | PartMade]:
        """Of pictures, or of parts of videos."""
        parts = [job for job in jobs if isinstance(job, VideoPart)]
        if not parts:
            yield from pipeline.overlapped(jobs, self.runner, self.options, listener)
        for part in parts:
            yield guarded(part, partial(self.parts.made, part, listener))

    def leave(self) -> None:
        """Remove the copy of the model: Ray kills processes, which removes nothing."""
        if self.folder:
            self.folder.cleanup()


@dataclass
class Throttled:
    """A `pipeline.Listener` that passes on how far a picture is no oftener than every PROGRESS_SECONDS."""

    listener: Listener
    job: Job | None = None
    """The picture that goes through the network: one after the other does."""
    share: float = 0.0
    """Of it, not passed on yet."""
    told: float = 0.0

    def hear(self, event: Event) -> None:
        """Pass it on at once, or later in a sum; what is left of a picture is told by its outcome."""
        if not isinstance(event, Advanced):
            return self.listener(event)
        if event.job != self.job:
            self.job, self.share = event.job, 0.0
        self.share += event.share
        if time.monotonic() - self.told >= PROGRESS_SECONDS:
            self.listener(Advanced(event.job, self.share))
            self.share, self.told = 0.0, time.monotonic()
        return None


@dataclass(eq=False)
class WorkerHandle:
    """A worker, as seen from the driver."""

    actor: Any
    awaited: Any
    """Reference to its Ready while it loads, then the generator of its chunk's outcomes; None when it is idle."""
    pending: deque[Job] = field(default_factory=deque)
    """Jobs of its chunk whose outcome has not come."""
    ready: Ready | None = None


class Pool:
    """Workers on the connected cluster; a context manager, entered when the first worker has the model."""

    def __init__(self, task: Task, share: Share, probe: Path | None = None, listener: Listener = nobody) -> None:
        """`probe` is a file that every node must see."""
        self.task, self.share, self.probe, self.listener = task, share, probe, listener
        self.waiting: deque[Job] = deque()
        self.isolated: deque[Job] = deque()
        """Jobs that may have killed a worker: each is sent out in a chunk of its own."""
        self.deaths: Counter[Job] = Counter()
        self.failed_starts = 0
        """Workers that died while loading, one after the other."""
        self.handles: list[WorkerHandle] = []
        self.notice_seconds = FIRST_NOTICE_SECONDS

    def __enter__(self) -> Self:
        import ray

        self.files = ray.put(model_files(self.task.model))
        self.record = open_record(self.task.record) if self.task.record else None
        share = self.share
        self.kind = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=0, max_task_retries=0)(Worker)
        self.handles = [self.start_worker() for _ in range(share.workers)]
        try:
            while not self.loaded:
                list(self.step())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Dismiss the workers."""
        import ray

        if leaving := [worker.actor.leave.remote() for worker in self.handles if worker.ready and not worker.pending]:
            ray.wait(leaving, num_returns=len(leaving), timeout=SHUTDOWN_SECONDS)
        for worker in self.handles:
            ray.kill(worker.actor)
        if self.record:
            self.record.close()

    @property
    def loaded(self) -> list[Ready]:
        """What the workers that have the model say."""
        return [worker.ready for worker in self.handles if worker.ready]

    def run(self, jobs: Sequence[Job]) -> Generator[Outcome, None, None]:
        """Every job's outcome, as they come."""
        self.waiting.extend(pipeline.without_leftovers(jobs))
        while self.waiting or self.isolated or any(worker.pending for worker in self.handles):
            for worker in self.handles:
                if worker.ready and worker.awaited is None and (chunk := self.chunk()):
                    worker.pending, worker.awaited = deque(chunk), worker.actor.run.remote(chunk)
            yield from cast("Iterator[Outcome]", self.step())
        for folder in {job.destination.parent for job in self.deaths if not isinstance(job.destination, RemotePath)}:
            remove_leftovers(folder)

    def chunk(self) -> list[Job]:
        """The next jobs for one worker: fewer towards the end, so that all finish together; none if there are no more."""
        if self.isolated:
            return [self.isolated.popleft()]
        most = min(MAX_CHUNK_PICTURES, -(-len(self.waiting) // (3 * self.share.workers)))
        chunk: list[Job] = []
        total = 0
        while len(chunk) < most:
            total += source_bytes(self.waiting[0])
            if chunk and total > MAX_CHUNK_BYTES:
                break
            chunk.append(self.waiting.popleft())
        return chunk

    def make_segments(self, video: Video, work: WorkFolder, there: list[Segment], listener: Listener) -> TilingPlan:
        """A `videos.Maker`: every worker makes one segment after the other, a dead one's is made by another.

        Raises PictureError for the first that cannot be made, once those that are begun are done.
        """
        job = video.job
        share = opened(video, sum(len(segment.times) for segment in there), listener)
        parts = (
            VideoPart(**vars(job), folder=work.folder, number=number, share=share)
            for number in count(len(there))
            if not work.found(number)
        )
        plans, ended, failed = [], False, ""
        while any(worker.pending for worker in self.handles) or not (ended or failed) or (self.isolated and not failed):
            for worker in self.handles:
                if worker.ready and worker.awaited is None and not failed and (self.isolated or not ended):
                    part = self.isolated.popleft() if self.isolated else next(parts)
                    worker.pending, worker.awaited = deque([part]), worker.actor.run.remote([part])
            for outcome in self.step():
                if isinstance(outcome, PartMade):
                    plans.append(outcome.plan)
                    ended |= not outcome.there
                elif isinstance(outcome, Failed):
                    failed = failed or outcome.reason
        self.isolated.clear()
        if failed:
            raise PictureError(failed)
        return plans[-1]

    def step(self) -> Iterator[Outcome | PartMade]:
        """Wait for a worker to say something, and take it in."""
        import ray

        awaited = [worker for worker in self.handles if worker.awaited is not None]
        said, _ = ray.wait([worker.awaited for worker in awaited], timeout=self.notice_seconds)
        if not said and not self.loaded:
            log.warning("no worker yet: waiting for a node with room for one of %s", self.share)
            self.notice_seconds *= 2
        for worker in awaited:
            if any(worker.awaited is ref for ref in said):
                yield from self.receive(worker)

    def receive(self, worker: WorkerHandle) -> Iterator[Outcome | PartMade]:
        """What a worker said: that it is ready, how far it is, an outcome, the end of its chunk; or that it died."""
        import ray

        try:
            if worker.ready is None:
                worker.ready, worker.awaited = ray.get(worker.awaited), None
                self.failed_starts = 0
                log.debug("worker %d on %s: %s on %s", *worker_facts(worker.ready))
                return
            message = ray.get(next(worker.awaited))
        except StopIteration:
            worker.awaited = None
            if worker.pending:
                yield from self.replace_dead(worker, "it ended early")
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, SanrtError) else worker_error(error) from None
        except ray.exceptions.RayError as error:
            yield from self.replace_dead(worker, type(error).__name__)
        else:
            if isinstance(message, Event):
                self.listener(message)
                return
            outcome, entry, records = message
            job = worker.pending.popleft()
            for record in records:
                logging.getLogger(record.name).handle(record)
            if entry and self.record:
                write_entry(self.record, entry)
            yield replace(outcome, job=job)

    def replace_dead(self, worker: WorkerHandle, why: str) -> Iterator[Failed]:
        """Start a worker in a dead one's place and do its pictures again; yields those that are given up.

        Each of the pending pictures may be what killed it, so each is sent out again in a chunk of its own.
        """
        import ray

        log.debug("worker %s died (%s)", worker.ready and worker.ready.pid, why)
        ray.kill(worker.actor)
        self.failed_starts += worker.ready is None
        if self.failed_starts == MAX_ATTEMPTS:
            raise BackendError(
                f"{self.task.model}: {MAX_ATTEMPTS} workers in a row died while loading it ({why}); see Ray's logs"
            )
        self.handles[self.handles.index(worker)] = self.start_worker()
        for job in worker.pending:
            self.deaths[job] += 1
            if self.deaths[job] < MAX_ATTEMPTS:
                self.isolated.append(job)
            else:
                yield Failed(
                    job, f"{job.source}: {MAX_ATTEMPTS} workers died over it; look at it, or give workers more memory"
                )

    def start_worker(self) -> WorkerHandle:
        """A new worker, loading the model as soon as a node has room for it."""
        level = logging.getLogger("sanrt").getEffectiveLevel()
        actor = self.kind.remote(self.task, self.files, self.share, level, self.probe, wording.wording)
        return WorkerHandle(actor, actor.load.remote())


def worker_facts(ready: Ready) -> tuple[int, str, str, str]:
    return ready.pid, ready.node, ready.name, ready.device


def worker_error(error: Exception) -> BackendError:
    """What only a defect, or a node without sanrt, makes a worker raise."""
    text = str(error).strip().splitlines()[-1]
    return BackendError(f"a worker failed ({text}); every node needs the same sanrt and Ray as this one")


def source_bytes(job: Job) -> int:
    """Bytes of the source; 0 if they cannot be told, which opening it will."""
    try:
        return job.source.stat().st_size
    except OSError:
        return 0


def model_files(model: Path) -> Files:
    """What loading the model takes: the ONNX, which may be named by an engine of it, and the engines built from it.

    By paths relative to the model's folder, which an engine may not share with its ONNX.
    """
    onnx = read_engine(model).model_path if model.suffix == SUFFIX else model
    engines = [info.path for suffix in (SUFFIX, STAGES_SUFFIX) for info in engines_of(onnx, suffix)]
    engines += [model] if model.suffix == SUFFIX else []
    paths = [onnx, *engines, *map(json_path, engines)]
    paths += [onnx.parent / name for name in external_files(onnx)]
    return {os.path.relpath(path, model.parent): path.read_bytes() for path in paths if path.exists()}


def place_model(model: Path, files: Files) -> tuple[tempfile.TemporaryDirectory[str] | None, Path]:
    """The model on this node: where the driver has it if it is the same there, else a copy, gone with the folder."""
    with contextlib.suppress(OSError):
        if files and all((model.parent / name).read_bytes() == content for name, content in files.items()):
            return None, model
    folder = tempfile.TemporaryDirectory(prefix="sanrt-model-")
    upwards = max((Path(name).parts.count("..") for name in files), default=0)
    home = Path(folder.name, *["model"] * upwards)
    for name, content in files.items():
        path = Path(os.path.normpath(home / name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder, home / model.name


@contextmanager
def shared_folder_probe(folder: Path) -> Iterator[Path | None]:
    """A file by which a node sees whether it shares `folder`, locked: `remove_leftovers` spares it. None for a URL."""
    if isinstance(folder, RemotePath):
        yield None
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path, file = locked_file(folder / "shared-folder-probe")
    except OSError as error:
        raise PictureError(f"{folder}: cannot be written ({system_reason(error)})") from None
    try:
        with file:
            yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def connected(address: str, workers: int | None = None, threads: int | None = None) -> Iterator[Share]:
    """A connection to a cluster, and how it is shared out: one worker per GPU, or `workers` with their part of the CPUs.

    LOCAL starts a Ray on this machine and stops it in the end.
    """
    if address.startswith("ray://"):
        raise UsageError(
            f"{option('ray', address)}: Ray's client is not supported; run on a node: ray job submit -- sanrt run ..."
        )
    os.environ.update(RAY_ENVIRONMENT)
    with extra("ray", option("ray")):
        import ray
    local = {"num_cpus": max(machine.cores(), (workers or 0) * (threads or 1)), "include_dashboard": False}
    quiet = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address != LOCAL:
            check_reachable(address)
        ray.init(address, **quiet, **(local | {"_node_ip_address": "127.0.0.1"} if address == LOCAL else {}))
    except Exception as error:  # no narrower one: Ray 2.60 raises just that where a node takes too long to start
        raise BackendError(no_cluster(address, str(error).strip().partition("\n")[0])) from None
    finally:
        # ValueError: another thread than the main one, where Ray set no handler either; TypeError: one that C code had set.
        with contextlib.suppress(ValueError, TypeError):
            signal.signal(signal.SIGTERM, before)
    try:
        yield shared_out([node["Resources"] for node in ray.nodes() if node["Alive"]], workers, threads)
    finally:
        ray.shutdown()


def no_cluster(address: str, why: str) -> str:
    """Without a cluster: what was tried, why it failed, what to do."""
    if address == LOCAL:
        return f"{option('ray')}: a Ray could not be started here ({why}); free some CPU and memory, and try again"
    remedy = "start one with ray start, or set RAY_AUTH_MODE and the token as they are there"
    return f"{option('ray', address)}: no Ray cluster to be reached there ({why}); {remedy}"


def check_reachable(address: str) -> None:
    """OSError where nothing listens, or no node of this machine: Ray itself would try for minutes, or for ever.

    ValueError if it is no address.
    """
    from ray._private.services import GcsClient, canonicalize_bootstrap_address
    from ray.util import get_node_ip_address

    place = canonicalize_bootstrap_address(address) or address
    host, _, port = place.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    known = GcsClient(address=place).get_all_node_info(timeout=CONNECT_SECONDS).values()
    alive = [node for node in known if node.state == ALIVE]
    here = [node for node in alive if node.node_manager_address in (get_node_ip_address(), "127.0.0.1")]
    if here and not any(answers(node.node_manager_address, node.node_manager_port) for node in here):
        raise OSError("its node on this machine does not answer")


def answers(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    with contextlib.suppress(OSError):
        socket.create_connection((host, port), CONNECT_SECONDS).close()
        return True
    return False


def shared_out(nodes: Sequence[Mapping[str, float]], workers: int | None, threads: int | None) -> Share:
    """One worker per GPU; with `workers`, or without GPUs, equal parts of the CPUs (one per node if nothing is said)."""
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU")]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if not cpus:
        raise BackendError("the Ray cluster has no CPUs to give; start a node with ray start")
    if threads and threads > max(cpus):
        raise UsageError(f"{option('threads', threads)}: the cluster's largest node has {max(cpus)} CPUs; ask for no more")
    if sum(gpus) and workers is None:
        return Share(sum(gpus), threads or 1, 1, max(gpus))
    each = threads or (max(1, min(sum(cpus) // workers, max(cpus))) if workers else min(cpus))
    count = workers or sum(cpu // each for cpu in cpus)
    return Share(count, each, per_node=min(count, max(cpus) // each))
