"""`sanrt run --ray`: real Ray processes on this machine, on loopback; workers and nodes are really killed."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import pyvips

from sanrt.cli import main
from sanrt.errors import BackendError, UsageError
from sanrt.runtime import cluster
from sanrt.runtime.backends import RunOptions
from sanrt.runtime.cluster import Pool, Share, Task, connected, shared_out
from sanrt.runtime.jobs import Naming, find_pictures
from sanrt.runtime.pipeline import Failed, Skipped, Written
from sanrt.runtime.record import Verdict, read_record, verify
from sanrt.runtime.upscale import UpscaleOptions
from tests.runtime import s3

NODE = {"num_cpus": 4}


def noise(path: Path, height=16, width=16, seed=0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    pyvips.Image.new_from_array(values).write_to_file(str(path))
    return path


def pictures(folder: Path, count: int) -> Path:
    for seed in range(count):
        noise(folder / f"{seed % 3}" / f"{seed:03}.png", 16 + seed % 5, 20, seed)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def sanrt(tiny_model, monkeypatch, capfd):
    """Calls `sanrt run ARGUMENTS` with the tiny model; returns exit status, stdout, stderr."""

    def call(*arguments):
        rest = ["--models", tiny_model(2).parent, "--scale", 2, "--backend", "onnxruntime", "--threads", 1]
        monkeypatch.setattr(sys, "argv", ["sanrt", "run", *map(str, [*arguments, *rest])])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return call


@pytest.fixture(scope="module")
def nodes():
    """A node with four CPUs, however many there are; tests add others."""
    pytest.importorskip("ray", reason="needs the extra [ray]")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.QUIET.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        started = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        yield started
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


def test_a_cluster_gives_the_bytes_and_words_of_the_local_run(sanrt, disconnected, tmp_path):
    source = pictures(tmp_path / "in", 12)
    (source / "bad.png").write_bytes((source / "0" / "000.png").read_bytes()[:200])
    status, _, expected = sanrt(source, tmp_path / "local")
    assert status == 1
    record = tmp_path / "record.jsonl"
    options = "--workers", 2, "--record", record
    status, out, err = sanrt(source, tmp_path / "ray", *options, "--ray", disconnected.address)
    assert (status, err) == (1, expected)
    assert "2 workers with 1 CPU each" in out
    assert "12 written, 1 failed" in out
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")
    entries = read_record(record)
    assert sorted(entry.output for entry in entries) == sorted(str(path) for path in (tmp_path / "ray").rglob("*.png"))
    assert [replay.verdict for replay in verify(entries[:1])] == [Verdict.IDENTICAL]
    status, out, err = sanrt("--ray", disconnected.address, source, tmp_path / "ray", "--workers", 1)
    assert (status, err) == (1, expected)
    assert "0 written, 12 skipped, 1 failed" in out


@pytest.mark.slow
def test_without_an_address_a_ray_is_started_writes_to_a_store_and_is_stopped(sanrt, tmp_path):
    pytest.importorskip("ray", reason="needs the extra [ray]")
    source = pictures(tmp_path / "in", 6)
    assert sanrt(source, tmp_path / "local")[0] == 0
    with s3.serving() as store:
        status, out, err = sanrt("--ray", source, f"s3://{s3.BUCKET}/out", "--workers", 2)
        assert (status, err) == (0, "")
        assert "6 written" in out
        assert store.tree("out/") == tree(tmp_path / "local")
    import ray

    assert not ray.is_initialized()


def work(model: Path, **more) -> Task:
    return Task(model, "onnxruntime", RunOptions(threads=1), UpscaleOptions(), **more)


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


def test_a_picture_that_kills_three_workers_is_reported_and_the_rest_go_on(ray, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "Worker", Poisoned)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    jobs = find_pictures([pictures(tmp_path / "in", 12)], tmp_path / "out", Naming())
    try:
        with Pool(work(tiny_model(2)), Share(2, 1)) as pool:
            outcomes = list(pool.run(jobs))
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert sorted(outcome.job.source.stem for outcome in outcomes) == sorted(job.source.stem for job in jobs)
    (failed,) = (outcome for outcome in outcomes if not isinstance(outcome, Written))
    assert isinstance(failed, Failed)
    assert failed.job.source.stem == "005"
    assert failed.reason.startswith(f"{failed.job.source}: 3 workers died")
    assert len((tmp_path / "out" / "2" / "005.tries").read_text()) == 3
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert len(list((tmp_path / "out").rglob("*.png"))) == 11


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


def survived(nodes, model: Path, folder: Path, count: int) -> list:
    """The outcomes of a run in which a worker is killed half way and a node stopped after three quarters."""
    jobs = find_pictures([pictures(folder / "in", count)], folder / "out", Naming())
    outcomes, other = [], nodes.add_node(**NODE)
    nodes.wait_for_nodes()
    with connected(nodes.address, 8, 1) as share, Pool(work(model), share) as pool, closing(pool.run(jobs)) as coming:
        for outcome in coming:
            outcomes.append(outcome)
            if len(outcomes) == count // 2:
                hand = next(hand for hand in pool.hands if hand.left)
                os.kill(hand.ready.pid, signal.SIGKILL)
            if len(outcomes) == 3 * count // 4:
                nodes.remove_node(other, allow_graceful=False)
    return outcomes


@pytest.mark.slow
def test_a_killed_worker_and_a_stopped_node_lose_nothing(sanrt, disconnected, tiny_model, tmp_path):
    outcomes = survived(disconnected, tiny_model(2), tmp_path, 40)
    assert len({outcome.job for outcome in outcomes}) == len(outcomes) == 40
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
        ([{"CPU": 2.0}, {"CPU": 2.0}], 1, None, Share(1, 2, 0, 1)),
        ([{}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}], None, None, Share(6, 1, 1, 4)),
        ([{"CPU": 16.0, "GPU": 4.0}], 8, None, Share(8, 2, 0, 8)),
    ],
)
def test_a_cluster_is_shared_out_by_gpus_or_cpus(nodes, workers, threads, expected):
    assert shared_out(nodes, workers, threads) == expected


def test_more_threads_than_any_node_has_are_refused():
    with pytest.raises(UsageError, match="largest node has 4 CPUs"):
        shared_out([{"CPU": 4.0}], None, 8)


def test_an_address_without_a_cluster_is_told_in_one_line(disconnected):
    with pytest.raises(BackendError, match="no Ray cluster to be reached") as caught, connected("127.0.0.1:9"):
        pass
    assert "\n" not in str(caught.value)
