"""The queue goes on where it was left, on this machine or from what the repository keeps; a GPU visit is rehearsed."""

import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from sanrt.errors import SanrtError, UsageError
from sanrt.model.checkpoint import load_checkpoint
from sanrt.model.spec import Architecture
from training.recipe import QUEUE, best_weights, cpu_options, go_on, keep, named, next_item, seen, training_command
from training.train import Worker, train_on
from training.visit import Outcome, parsed, report, visit

ROOT = Path(__file__).resolve().parents[2]
TINY = "--groups 1 --blocks 1 --channels 16 --graph --save-every 1"


def trained(plan, tiles, out, **changes):
    """A tiny run in `out`, of ten steps."""
    clock = iter(range(1000))
    made = plan(seconds=10, out=out, **changes)
    train_on(made, tiles, tiles, Worker(clock=lambda: float(next(clock))))
    return made


def test_everything_that_a_network_begins_with_comes_before_it():
    names = [item.name for item in QUEUE]
    assert len(set(names)) == len(names)
    assert names[:4] == ["x4-clean", "x4-photo", "x2-clean", "x3-clean"]
    for index, item in enumerate(QUEUE):
        assert {item.start, item.teacher} - {""} <= set(names[:index])
        assert item.name.startswith(f"x{item.scale}-")
        assert item.photo == item.name.endswith("photo")
        if item.start:
            assert named(item.start).channels == item.channels


def test_the_first_network_short_of_its_goal_is_next(plan, tiles, tmp_path, monkeypatch):
    states, runs = tmp_path / "states", tmp_path / "runs"
    assert next_item(states, runs).name == "x4-clean"
    monkeypatch.setattr("training.recipe.QUEUE", (replace(QUEUE[0], goal=800), QUEUE[1]))
    made = trained(plan, tiles, runs / "x4-clean")
    assert next_item(states, runs).name == "x4-photo"  # 7 steps of 2 patches of 8 x 8 px: 896
    keep(made.out, states / "x4-clean")
    assert next_item(states, tmp_path / "none").name == "x4-photo"
    monkeypatch.setattr("training.recipe.QUEUE", (replace(QUEUE[0], goal=800),))
    with pytest.raises(UsageError, match="every network of the queue has reached its goal; name one of x4-clean"):
        next_item(states, runs)


def test_a_network_starts_from_the_best_there_is(plan, tiles, tmp_path):
    states, runs = tmp_path / "states", tmp_path / "runs"
    with pytest.raises(UsageError, match=r"x4-clean: no weights in .*; train it first"):
        training_command(named("x4-photo"), tmp_path, runs, states, 10, [])
    made = trained(plan, tiles, tmp_path / "x4-clean")
    (made.out / "decayed.safetensors").rename(tmp_path / "decayed")
    keep(made.out, states / "x4-clean")
    assert best_weights("x4-clean", states, runs) == states / "x4-clean" / "stable.safetensors"
    (tmp_path / "decayed").rename(states / "x4-clean" / "decayed.safetensors")
    assert best_weights("x4-clean", states, runs) == states / "x4-clean" / "decayed.safetensors"
    command = training_command(named("x4-clean"), tmp_path, runs, states, 10, ["--more"])
    assert command[command.index("--resume") + 1] == str(states / "x4-clean" / "stable.safetensors")
    assert "--start" not in command
    photo = training_command(named("x4-photo"), tmp_path, runs, states, 10, [])
    assert "--photo" in photo
    assert photo[photo.index("--start") + 1] == str(states / "x4-clean" / "decayed.safetensors")
    (states / "x4-photo").mkdir()
    own = shutil.copy(states / "x4-clean" / "decayed.safetensors", states / "x4-photo")
    assert training_command(named("x4-photo"), tmp_path, runs, states, 10, [])[-1] == str(own)
    trained(plan, tiles, runs / "x4-photo")
    assert "--start" not in training_command(named("x4-photo"), tmp_path, runs, states, 10, [])
    fast = training_command(named("x4-fast"), tmp_path, runs, states, 10, [])
    assert fast[fast.index("--teacher") + 1] == str(states / "x4-clean" / "decayed.safetensors")
    assert fast[fast.index("--channels") + 1] == "32"


@pytest.mark.slow
def test_the_queue_trains_packs_what_is_missing_and_keeps_the_states(plan, tiles, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("training.recipe.cores", lambda: 1)
    tiny = replace(QUEUE[1], scale=2, cpu_patch=8, channels=16)
    monkeypatch.setattr("training.recipe.QUEUE", (replace(QUEUE[0], goal=0), tiny))
    states, runs = tmp_path / "states", tmp_path / "runs"
    like = Architecture(scale=2, groups=4, blocks=4, channels=16, reduction=4)
    trained(plan, tiles, states / "x4-clean", arch=like)
    data = tmp_path / "data"
    shutil.copytree(packed, data)
    for path in data.glob("photo-*"):
        path.unlink()
    go_on(data, 3, states=states, runs=runs)
    assert {path.name for path in (states / "x4-photo").iterdir()} == {"stable.safetensors", "decayed.safetensors"}
    assert len(list(data.glob("photo-x2-*.npz"))) == len(list(data.glob("high-*.npz")))
    assert seen(tiny, states, tmp_path / "none").pixels == seen(tiny, states, runs).pixels > 0
    assert load_checkpoint(states / "x4-photo" / "decayed.safetensors").architecture == like


def test_a_run_that_fails_is_told(tmp_path, capfd):
    with pytest.raises(SanrtError, match="x4-clean: training ended with exit status 1; see above"):
        go_on(tmp_path, 1, ["x4-clean"], states=tmp_path, runs=tmp_path / "runs")
    assert "no high*.npz" in capfd.readouterr().err


@pytest.mark.parametrize(("count", "batch"), [(1, "8"), (2, "8"), (3, "9"), (16, "16")])
def test_every_core_has_its_share_of_a_batch(monkeypatch, count, batch):
    monkeypatch.setattr("training.recipe.cores", lambda: count)
    options = cpu_options(QUEUE[0])
    assert options[options.index("--batch") + 1] == batch


@pytest.mark.parametrize(("features", "option"), [(("AVX-512",), "--fp32"), (("AVX-512", "AMX-BF16"), "--bf16")])
def test_bf16_is_for_processors_that_multiply_in_it(monkeypatch, features, option):
    monkeypatch.setattr("training.recipe.cpu_features", lambda: features)
    assert option in cpu_options(QUEUE[0])


def test_names_that_are_not_in_the_queue_and_odd_budgets_are_told():
    with pytest.raises(UsageError, match="x5-clean: not in the queue; expected one of x4-clean, x4-photo"):
        named("x5-clean")
    with pytest.raises(UsageError, match="x4-clean=soon: expected NAME=SECONDS"):
        parsed("x4-clean=soon")
    assert parsed("x2-photo=12.5") == (named("x2-photo"), 12.5)


@pytest.mark.slow
def test_a_visit_trains_one_network_from_the_other_and_brings_both_home(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("training.recipe.QUEUE", [replace(item, scale=2) for item in QUEUE[:2]])
    out = tmp_path / "out"
    budgets = ["x4-clean=3", "x4-photo=2"]
    folders = {"states": tmp_path / "states", "work": tmp_path / "work"}
    visit(out, packed, budgets, batch=2, patch=8, probe_seconds=0.1, more=TINY, **folders)
    shown = capsys.readouterr().out
    log = (out / "visit.log").read_text()
    assert "probe: done" in shown, log
    assert "low resolution as on the CPU, to the bit: yes" in log
    assert "patch 8: largest difference of losses, recorded against plain: 0.00e+00" in log
    assert log.count("megapixels/s") == 2
    assert "no GPU: a rehearsal" in shown
    assert shown.count("done") == 3, shown + log
    assert {path.name for path in out.iterdir()} == {"x4-clean.tar", "x4-photo.tar", "visit.log"}
    for kind in ("clean", "photo"):
        with tarfile.open(out / f"x4-{kind}.tar") as tar:
            files = ("decayed.safetensors", "stable.safetensors", "log.jsonl")
            assert tar.getnames() == [f"x4-{kind}/{name}" for name in files]
    assert max(path.stat().st_size for path in out.iterdir()) < 16 * 2**20
    lines = [json.loads(line) for line in log.splitlines() if line.startswith('{"name"')]
    assert {line["name"] for line in lines} == {"x4-clean", "x4-photo"}


def test_a_report_counts_the_steps_of_this_visit_alone():
    lines = ({"step": 5200, "seconds": 4.0, "l1": 0.03}, {"step": 5400, "seconds": 8.0, "l1": 0.02, "y_psnr": [27.5]})
    shown = report([Outcome("x4-clean", "done", 30.2, lines), Outcome("x2-clean", "stopped after 245 s", 245, ())])
    (row,) = [line for line in shown.splitlines() if "x4-clean" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "x4-clean",
        "done",
        "30",
        "5400",
        "50.0",
        "0.02",
        "[27.5]",
    ]
    assert "stopped after 245 s" in shown


def test_a_visit_goes_on_when_a_network_cannot_be_trained(packed, tmp_path, capsys):
    visit(tmp_path / "out", packed, ["x4-photo=1"], probe_seconds=0, states=tmp_path / "s", work=tmp_path / "w")
    assert "train it first" in capsys.readouterr().out.replace("\n", " ")


def test_training_needs_no_pyvips():
    """A GPU machine has numpy, torch, Pillow, typer, rich and safetensors."""
    blocked = "import sys; sys.modules['pyvips'] = sys.modules['onnx'] = None; import training.visit, training.probe"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
