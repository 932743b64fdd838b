"""`sanrt run --ray`: real Ray processes on this machine, on loopback; workers and nodes are really killed."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import closing, suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
import pyvips

from sanrt import request
from sanrt.errors import BackendError, UsageError
from sanrt.runtime.artifacts.engines import json_path, read_engine
from sanrt.runtime.backends.default_variant import prefer
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import model_spec
from sanrt.runtime.pictures.codec import Encoding
from sanrt.runtime.pictures.jobs import Job, Naming, find_pictures
from sanrt.runtime.runs import ray_pool as cluster
from sanrt.runtime.runs.pipeline import Advanced, Failed, Skipped, Written
from sanrt.runtime.runs.ray_pool import Pool, Share, Task, connected, shared_out
from sanrt.runtime.runs.record import Verdict, read_record, verify
from sanrt.runtime.runs.results import Recipe
from sanrt.runtime.tiling.options import UpscaleOptions
from tests.runtime import s3
from tests.runtime.artifacts.test_engines import RTX, TILES, saved

NODE = {"num_cpus": 4}
WAIT = 300
"""Seconds after which something that should end is taken to hang."""


def test_what_one_picture_did_not_tell_of_its_progress_is_not_the_next_ones(monkeypatch):
    told: list[Advanced] = []
    throttled = cluster.Throttled(told.append)
    first, second = (Job(Path(f"{name}.png"), Path("out")) for name in "ab")
    now = iter([1.0, 1.0, 1.2, 3.0, 3.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    for job, share in ((first, 0.5), (first, 0.5), (second, 0.25)):
        throttled.hear(Advanced(job, share))
    assert told == [Advanced(first, 0.5), Advanced(second, 0.25)]


def test_workers_know_the_scratch_folder_wherever_they_run(monkeypatch, tmp_path):
    class Stop(Exception):
        pass

    def task(model, backend, running, upscaling, *_):
        assert upscaling.scratch == tmp_path / "scratch"
        raise Stop

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "Task", task)
    choice = request.ModelChoice(Path("model.onnx"), Path("models"), None, "auto", RunOptions())
    part = request.Part(choice, [], Recipe(2, ""))
    asked = request.Request([], choice, UpscaleOptions(scratch=Path("scratch")), Encoding(), Naming())
    with pytest.raises(Stop):
        list(request.ray_outcomes(part, asked, "local", request.Conduct(), print, print))


def noise(path: Path, height=16, width=16, bands=3, dtype=np.uint8, seed=0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (height, width, bands), dtype, endpoint=True)
    interpretation = "srgb" if dtype is np.uint8 else "rgb16"
    pyvips.Image.new_from_array(values).copy(interpretation=interpretation).write_to_file(str(path))
    return path


def pictures(folder: Path, count: int) -> Path:
    for seed in range(count):
        noise(folder / f"{seed % 3}" / f"{seed:03}.png", 16 + seed % 5, 20, seed=seed)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def told(out: str, *folders: Path) -> list[str]:
    """What a run said, without the times and without what it says of Ray; `folders` are all the same."""
    for folder in folders:
        out = out.replace(str(folder), "FOLDER")
    lines = [line for line in out.splitlines() if not line.startswith("Ray ")]
    return sorted(re.sub(r"(, ready)? in [0-9.]+ s( \(.*)?", "", line) for line in lines)


@pytest.fixture
def both(sanrt, disconnected, tmp_path):
    """Runs a command locally and on the cluster, compares all that comes of it; returns its words and the two folders."""

    def call(source, *options, workers=1):
        local, ray = tmp_path / "local", tmp_path / "ray"
        status, out, err = sanrt(source, local, *options)
        again = sanrt(source, ray, *options, "--workers", workers, "--ray", disconnected.address)
        assert (again[0], told(again[1], ray), told(again[2], ray)) == (status, told(out, local), told(err, local))
        assert tree(ray) == tree(local)
        return status, out, err

    return call


def patiently(start):
    """What `start` gives, at the third try if need be: Ray allows a node 30 s to start, and a busy machine takes longer."""
    for _ in range(2):
        with suppress(Exception):
            return start()
    return start()


@pytest.fixture(scope="module")
def nodes():
    """A node with four CPUs, however many there are; tests add others."""
    pytest.importorskip("ray", reason="needs the extra [ray]")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**cluster.RAY_ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        head = {**NODE, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        started = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        yield started
        import ray

        ray.shutdown()
        started.shutdown()


@pytest.fixture
def ray(nodes):
    """A connection to it, which stays for the next test."""
    import ray

    if not ray.is_initialized():
        ray.init(nodes.address, logging_level=logging.CRITICAL, log_to_driver=False)
    return ray


@pytest.fixture
def disconnected(nodes):
    """No connection to it: the command makes its own."""
    import ray

    ray.shutdown()
    return nodes


def test_a_cluster_gives_the_bytes_and_words_of_the_local_run(both, sanrt, disconnected, tmp_path):
    source = pictures(tmp_path / "in", 12)
    (source / "cut.png").write_bytes((source / "0" / "000.png").read_bytes()[:200])
    (source / "empty.png").touch()
    (source / "words.jpg").write_text("not a picture")
    status, out, err = both(source, workers=2)
    assert (status, len(err.splitlines())) == (1, 3)
    assert "12 written, 3 failed" in out
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "ray").rglob("*.png")}
    status, out, again = sanrt("--ray", disconnected.address, source, tmp_path / "ray", "--workers", 1)
    assert (status, sorted(again.splitlines())) == (1, sorted(err.splitlines()))
    assert "0 written, 12 skipped, 3 failed" in out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "ray").rglob("*.png")} == done


def test_streamed_pictures_in_another_format_are_the_local_ones_and_can_be_verified(both, tmp_path):
    noise(tmp_path / "in" / "deep.png", 40, 20, dtype=np.uint16)
    noise(tmp_path / "in" / "clear.png", 20, 24, bands=4)
    record = tmp_path / "record.jsonl"
    tiled = "--tiling", "exact", "--tile", 32, "--memory", "1G"
    status, out, err = both(tmp_path / "in", *tiled, "--format", "webp", "--lossless", "--suffix", "_x2", "--record", record)
    assert (status, err) == (0, "")
    assert "16-bit samples become 8-bit" in out
    entries = read_record(record)
    assert sorted(Path(entry.output).parent.name for entry in entries) == ["local"] * 2 + ["ray"] * 2
    assert {Path(entry.output).name for entry in entries} == {"deep_x2.webp", "clear_x2.webp"}
    facts = [(e.source_digest, e.output_digest, e.model, e.model_digest, e.tiling, e.tile, e.memory) for e in entries]
    assert sorted(facts[:2]) == sorted(facts[2:])
    assert {replay.verdict for replay in verify(entries[2:])} == {Verdict.IDENTICAL}


def test_a_cluster_takes_the_preferred_variant_and_its_record_says_so(both, tiny_model, tmp_path):
    exported, variant = tmp_path / "models" / "san_x2.onnx", tmp_path / "models" / "san_x2.variant.onnx"
    exported.parent.mkdir()
    for path in exported, variant:
        path.write_bytes(tiny_model(2).read_bytes())
    prefer(exported, variant, "onnxruntime", None)
    record = tmp_path / "record.jsonl"
    chosen = "--models", exported.parent, "--backend", "auto", "--record", record
    status, out, _ = both(noise(tmp_path / "in" / "a.png").parent, *chosen)
    assert status == 0
    assert f"{variant}: " in out
    local, ray = read_record(record)
    assert (ray.model, ray.backend) == (local.model, local.backend) == (str(variant), "onnxruntime")
    assert [replay.verdict for replay in verify([ray])] == [Verdict.IDENTICAL]


def test_without_an_address_a_ray_is_started_writes_to_a_store_and_is_stopped(sanrt, tiny_model, tmp_path):
    pytest.importorskip("ray", reason="needs the extra [ray]")
    source = pictures(tmp_path / "in", 6)
    assert sanrt(source, tmp_path / "local")[0] == 0
    with s3.serving() as store, tempfile.TemporaryDirectory(prefix="ray-") as logs:
        command = [sys.executable, "-m", "sanrt", "run", "--ray", source, f"s3://{s3.BUCKET}/out", "--workers", "2"]
        command += ["--model", tiny_model(2), "--backend", "onnxruntime", "--threads", "1"]
        own = {**os.environ, "HOME": str(tmp_path), "RAY_TMPDIR": logs}

        def run():
            ran = subprocess.run(command, env=own, capture_output=True, text=True, timeout=WAIT)
            assert "could not be started" not in ran.stderr
            return ran

        ran = patiently(run)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert "6 written" in ran.stdout
        assert store.tree("out/") == tree(tmp_path / "local")
        assert processes(logs) == []


def processes(mark: str) -> list[str]:
    """Commands that are still running with a text in them, once they had time to end."""
    deadline = time.monotonic() + WAIT
    while True:
        found = [line for line in map(cmdline, psutil.process_iter()) if mark in line]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def work(model: Path, **more) -> Task:
    return Task(model, "onnxruntime", RunOptions(threads=1), UpscaleOptions(), **{"recipe": Recipe(2, ""), **more})


class Poisoned(cluster.Worker):
    """Dies over one picture, as by a defect in a decoder, and over another the first two times."""

    def run(self, jobs):
        for job in jobs:
            tries = job.destination.with_suffix(".tries")
            if job.source.stem in ("005", "008"):
                tries.parent.mkdir(parents=True, exist_ok=True)
                tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
                if job.source.stem == "005" or len(tries.read_text()) < 3:
                    os.kill(os.getpid(), signal.SIGKILL)
            yield from super().run([job])


@pytest.fixture
def stand_in(ray, monkeypatch):
    """`stand_in(Class)`: what the cluster runs in place of Worker; the cluster gets this file's classes by value."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield lambda kind: monkeypatch.setattr(cluster, "Worker", kind)
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_a_picture_that_kills_three_workers_is_reported_and_the_rest_go_on(stand_in, tiny_model, tmp_path):
    stand_in(Poisoned)
    jobs = find_pictures([pictures(tmp_path / "in", 12)], tmp_path / "out", Naming())
    with Pool(work(tiny_model(2)), Share(2, 1)) as pool:
        outcomes = list(pool.run(jobs))
    assert sorted(outcome.job.source.stem for outcome in outcomes) == sorted(job.source.stem for job in jobs)
    (failed,) = (outcome for outcome in outcomes if not isinstance(outcome, Written))
    assert isinstance(failed, Failed)
    assert failed.job.source.stem == "005"
    assert failed.reason.startswith(f"{failed.job.source}: 3 workers died")
    assert len((tmp_path / "out" / "2" / "005.tries").read_text()) == 3
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert len(list((tmp_path / "out").rglob("*.png"))) == 11


class Lost(cluster.Worker):
    """Dies two times over the second segment of a video."""

    def run(self, jobs):
        tries = jobs[0].source.parents[1] / "tries"
        if getattr(jobs[0], "number", 0) == 1 and (not tries.exists() or len(tries.read_text()) < 2):
            tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().run(jobs)


def test_segments_of_a_video_are_made_by_all_workers_and_again_where_one_is_lost(stand_in, sanrt, disconnected, tmp_path):
    pytest.importorskip("av", reason="needs the extra [video]")
    from tests.clips import clip

    stand_in(Lost)
    long = clip(tmp_path / "in" / "a.mp4", [0, 0, 1, 2, 3, 4, 5, 6, 7, 8], rate=Fraction(1), sound="aac")  # 3 segments
    noise(tmp_path / "in" / "b.png")
    (tmp_path / "in" / "cut.mp4").write_bytes(long.read_bytes()[:-20])
    local, ray = tmp_path / "local", tmp_path / "ray"
    status, _, told_here = sanrt(tmp_path / "in", local)
    again, out, told_there = sanrt(tmp_path / "in", ray, "--workers", 2, "--ray", disconnected.address)
    assert status == again == 1
    assert "2 written, 1 failed" in out
    assert f"{ray / 'a.mp4'}: 1 of 10 frames (10 %) equal the one before" in out
    assert told_here.splitlines()[-1] in told_there.splitlines()
    assert tree(ray) == tree(local)
    assert (tmp_path / "tries").read_text() == "xx"


def test_workers_that_cannot_load_the_model_end_the_run_with_their_own_words(ray, tiny_model, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(tiny_model(2).read_bytes()[:5000])
    with pytest.raises(cluster.SanrtError, match=r"broken\.onnx"), Pool(work(broken), Share(1, 1)):
        pass


def test_a_node_without_the_folder_ends_the_run(ray, tiny_model, tmp_path):
    with (
        pytest.raises(UsageError, match="not shared with the node"),
        Pool(work(tiny_model(2)), Share(1, 1), tmp_path / "no"),
    ):
        pass


class Stillborn(cluster.Worker):
    """Dies while it loads the model."""

    def load(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_all_die_while_loading_end_the_run(stand_in, tiny_model):
    stand_in(Stillborn)
    with pytest.raises(BackendError, match="3 workers in a row died while loading"), Pool(work(tiny_model(2)), Share(1, 1)):
        pass


class Away(cluster.Worker):
    """On a node with a temporary folder of its own."""

    def load(self):
        tempfile.tempdir = str(self.task.record)
        return super().load()


def test_a_node_without_the_model_gets_a_copy_and_keeps_none(stand_in, monkeypatch, tiny_model, tmp_path):
    stand_in(Away)
    monkeypatch.setattr(cluster, "open_record", lambda path: None)
    model, node = tmp_path / "san_x2.onnx", tmp_path / "node"
    node.mkdir()
    model.write_bytes(tiny_model(2).read_bytes())
    files = cluster.model_files(model)
    model.unlink()
    monkeypatch.setattr(cluster, "model_files", lambda path: files)
    with Pool(work(model, record=node), Share(1, 1)) as pool:
        (copy,) = node.glob("*/san_x2.onnx")
        assert copy.read_bytes() == tiny_model(2).read_bytes()
        jobs = find_pictures([pictures(tmp_path / "in", 2)], tmp_path / "out", Naming())
        assert [type(outcome) for outcome in pool.run(jobs)] == [Written] * 2
    assert not copy.parent.exists()


def test_an_engine_travels_with_its_onnx_and_all_that_was_built_from_it(tmp_path):
    onnx, other = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.write_bytes(b"a model"), other.write_bytes(b"another one")
    engine, stages = saved(onnx).path, saved(onnx, replace(RTX, stages=True, profiles=(TILES,))).path
    saved(other)
    built = [engine, stages]
    expected = {path.name: path.read_bytes() for path in [onnx, *built, *map(json_path, built)]}
    assert cluster.model_files(engine) == cluster.model_files(onnx) == expected
    onnx.unlink()
    assert set(cluster.model_files(engine)) == set(expected) - {"a.onnx"}


def test_an_engine_that_was_built_elsewhere_travels_too_and_finds_its_onnx(tmp_path):
    onnx = tmp_path / "models" / "a.onnx"
    onnx.parent.mkdir()
    onnx.write_bytes(b"a model")
    (tmp_path / "engines").mkdir()
    engine = saved(onnx, path=tmp_path / "engines" / "b.engine").path
    files = cluster.model_files(engine)
    assert files == {"../models/a.onnx": b"a model", **{p.name: p.read_bytes() for p in (engine, json_path(engine))}}
    assert cluster.place_model(engine, files) == (None, engine)
    content = engine.read_bytes()
    shutil.rmtree(engine.parent)
    folder, copy = cluster.place_model(engine, files)
    with folder:
        assert copy.read_bytes() == content
        assert read_engine(copy).model_path.read_bytes() == b"a model"


def test_no_files_are_not_taken_for_a_model_that_is_there(tmp_path):
    folder, path = cluster.place_model(tmp_path / "a.onnx", {})
    with folder:
        assert path != tmp_path / "a.onnx"


def test_a_cluster_without_room_is_waited_for_and_that_is_told(ray, monkeypatch, tiny_model):
    @ray.remote(num_cpus=NODE["num_cpus"])
    class Other:
        """Takes all CPUs."""

        def ready(self):
            return True

    other, told = Other.remote(), []
    assert ray.get(other.ready.remote(), timeout=WAIT)
    monkeypatch.setattr(cluster, "FIRST_NOTICE_SECONDS", 0.3)

    def warned(text, *arguments):
        told.append(text % arguments)
        ray.kill(other)

    monkeypatch.setattr(cluster.log, "warning", warned)
    with Pool(work(tiny_model(2)), Share(1, 2)) as pool:
        assert len(pool.loaded) == 1
    assert told[0] == "no worker yet: waiting for a node with room for one of 1 worker with 2 CPUs each"


def survived(nodes, model: Path, folder: Path, count: int) -> list:
    """The outcomes of a run in which a worker is killed half way and a node stopped after three quarters."""
    jobs = find_pictures([pictures(folder / "in", count)], folder / "out", Naming())
    outcomes, killed, other = [], None, patiently(lambda: nodes.add_node(**NODE))
    nodes.wait_for_nodes(WAIT)
    task = work(model, recipe=Recipe.of(model_spec(model), None, UpscaleOptions(), Encoding()))
    with connected(nodes.address, 4, 2) as share, Pool(task, share) as pool, closing(pool.run(jobs)) as coming:
        for outcome in coming:
            outcomes.append(outcome)
            busy = [worker for worker in pool.handles if worker.pending]
            if len(outcomes) >= count // 2 and busy and not killed:
                killed = busy[0]
                os.kill(killed.ready.pid, signal.SIGKILL)
            if len(outcomes) == 3 * count // 4:
                nodes.remove_node(other, allow_graceful=False)
        assert killed not in [None, *pool.handles]
    return outcomes


@pytest.mark.slow
def test_a_killed_worker_and_a_stopped_node_lose_nothing(sanrt, disconnected, tiny_model, tmp_path):
    outcomes = survived(disconnected, tiny_model(2), tmp_path, 200)
    assert len({outcome.job for outcome in outcomes}) == len(outcomes) == 200
    # A worker may die between the renaming of a result and the telling of it: the result is then found done.
    assert all(isinstance(outcome, Written | Skipped) for outcome in outcomes)
    assert sanrt(tmp_path / "in", tmp_path / "local")[0] == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


@pytest.mark.parametrize(
    ("nodes", "workers", "threads", "expected"),
    [
        ([{"CPU": 8.0}, {"CPU": 4.0}], None, None, Share(3, 4, 0, 2)),
        ([{"CPU": 8.0}, {"CPU": 4.0}], 6, None, Share(6, 2, 0, 4)),
        ([{"CPU": 8.0}, {"CPU": 4.0}], None, 3, Share(3, 3, 0, 2)),
        ([{"CPU": 8.0}, {"CPU": 4.0}], 2, 1, Share(2, 1, 0, 2)),
        ([{"CPU": 2.0}, {"CPU": 2.0}], 1, None, Share(1, 2, 0, 1)),
        ([{}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}], None, None, Share(6, 1, 1, 4)),
        ([{"CPU": 16.0, "GPU": 4.0}], 8, None, Share(8, 2, 0, 8)),
    ],
)
def test_a_cluster_is_shared_out_by_gpus_or_cpus(nodes, workers, threads, expected):
    assert shared_out(nodes, workers, threads) == expected


@pytest.mark.parametrize("gpus", [0.0, 2.0])
def test_more_threads_than_any_node_has_are_refused(gpus):
    with pytest.raises(UsageError, match="largest node has 4 CPUs"):
        shared_out([{"CPU": 4.0, "GPU": gpus}], None, 8)


def test_the_cluster_file_of_the_documentation_is_one_that_ray_takes_once_filled_in():
    util = pytest.importorskip("ray.autoscaler._private.util", reason="needs the extra [ray]")
    import yaml

    page = Path(__file__).parents[3].joinpath("docs", "ray.md").read_text()
    text = textwrap.dedent(re.search(r"^    cluster_name:.*?(?=\n\n)", page, re.DOTALL | re.MULTILINE)[0])
    filled = {
        "NODES": "2",
        "REGION": "us-west-2",
        "MODEL": __file__,
        "IMAGE": "ami-0",
        "EXTRA": "cpu",
        "SOURCE": "sanrt.whl",
    }
    filled |= dict.fromkeys(("HEAD_TYPE", "WORKER_TYPE"), "m5.large")
    for name, value in filled.items():
        text, count = re.subn(rf"\b{name}\b(?!:)", value, text)
        assert count
    assert not re.findall(r"\b[A-Z]{4,}\b", re.sub("#.*", "", text))
    util.validate_config(util.prepare_config(yaml.safe_load(text)))


def test_an_address_without_a_cluster_is_told_in_one_line(sanrt, tmp_path):
    pytest.importorskip("ray", reason="needs the extra [ray]")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = "{}:{}".format(*free.getsockname())
    status, out, err = sanrt(noise(tmp_path / "a.png"), tmp_path / "out", "--ray", address)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith(f"sanrt: --ray {address}: no Ray cluster to be reached there ([Errno 111] Connection refused)")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_cluster_whose_node_here_died_is_told_instead_of_waited_for(disconnected, monkeypatch):
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    started = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
    try:
        for process in psutil.process_iter():
            if cmdline(process).split(" ")[0].endswith("raylet/raylet") and started.address in cmdline(process):
                process.kill()
        with pytest.raises(BackendError, match="its node on this machine does not answer"), connected(started.address):
            pass
    finally:
        started.shutdown()


def test_a_ray_that_does_not_start_is_told_in_one_line(monkeypatch):
    ray = pytest.importorskip("ray", reason="needs the extra [ray]")

    def init(*_, **__):
        raise Exception("The current node timed out during startup.\nSee the logs.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(BackendError, match=r"could not be started here \(The current node timed out") as caught:
        connected(cluster.LOCAL).__enter__()
    assert "\n" not in str(caught.value)
