"""Runs keep their budget, survive kills, go on from each other, and are the same by every path."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sanrt.errors import CheckpointError, UsageError
from sanrt.model.checkpoint import load_checkpoint
from sanrt.model.spec import Architecture
from training.network import bilinear_kernels
from training.recording import plain, tape
from training.state import newest, read_compact, save
from training.train import Schedule, Worker, locked, prepare, train, train_on
from training.weights import trained_network

CPU = torch.device("cpu")


def ticking(start=100.0, until=None):
    """A clock that is a second later at each look; it interrupts the run at `until` seconds."""
    now = [start]

    def clock():
        now[0] += 1
        if until is not None and now[0] - start > until:
            raise KeyboardInterrupt
        return now[0]

    return clock


def run(plan, tiles, **worker):
    return train_on(plan, tiles, tiles, Worker(**({"clock": ticking()} | worker)))


def lines(plan):
    return [json.loads(line) for line in (plan.out / "log.jsonl").read_text().splitlines()]


def state(folder):
    found = newest(folder)
    return {path.name: torch.load(path, weights_only=True) for path in sorted(found.glob("*.pt"))}


def equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[part][name], second[part][name]) for part in first for name in first[part])


def test_the_rate_rises_stays_and_falls_to_zero():
    schedule = Schedule(rate=2.0, seconds=100, warmup=10, decay=0.3)
    assert [schedule.at(s) for s in (0, 5, 10, 69)] == [0, 1, 2, 2]
    assert schedule.at(77.5) == pytest.approx(1)
    assert schedule.at(100) == schedule.at(120) == 0


def test_a_run_keeps_its_budget_and_leaves_both_states(plan, tiles):
    made = plan(seconds=10)
    progress = run(made, tiles)
    assert (progress.step, progress.spent, progress.finished) == (10, 10, True)
    assert newest(made.out / "stable").name == "00000007"
    assert newest(made.out / "current").name == "00000010"
    assert not equal(state(made.out / "stable"), state(made.out / "current"))
    (line,) = lines(made)
    assert line["step"] == 10
    assert line["rate"] == 0
    assert 0 < line["l1"] < 1
    assert line["norm"] <= line["largest_norm"]
    assert [10 < score < 60 for score in line["y_psnr"]] == [True, True]


def test_states_are_written_in_time_and_before_the_end(plan, tiles, monkeypatch):
    written = []
    monkeypatch.setattr("training.train.save", lambda folder, _, progress: written.append((folder.name, progress.spent)))
    run(plan(seconds=100, save_every=25), tiles)
    assert written == [
        *(("current", s) for s in (25, 50)),
        ("stable", 0.0),
        *(("current", s) for s in (70, 95, 100)),
    ]


@pytest.mark.parametrize("killed_at", [4, 8])
def test_a_killed_run_goes_on_as_if_it_had_not_been(plan, tiles, killed_at):
    whole = plan(seconds=10, save_every=1)
    run(whole, tiles)
    broken = replace(whole, out=whole.out.with_name("broken"))
    with pytest.raises(KeyboardInterrupt):
        run(broken, tiles, clock=ticking(until=killed_at))
    assert newest(broken.out / "current").name == f"{killed_at - 1:08d}"
    assert run(broken, tiles, clock=ticking(5000)).finished
    assert equal(state(broken.out / "current"), state(whole.out / "current"))
    assert equal(state(broken.out / "stable"), state(whole.out / "stable"))


def test_the_next_run_goes_on_from_before_the_decay(plan, tiles):
    first = plan(seconds=10)
    run(first, tiles)
    stable = state(first.out / "stable")
    learner, progress = prepare(first, CPU)
    assert (progress.step, progress.spent, progress.finished) == (7, 0, False)
    assert torch.equal(learner.named(learner.moment2)["head.weight"], stable["moment2.pt"]["head.weight"])
    assert run(first, tiles).step == 17
    assert newest(first.out / "stable").name == "00000014"


def test_a_run_elsewhere_goes_on_from_the_compact_state(plan, tiles):
    first = plan(seconds=10)
    run(first, tiles)
    stable = state(first.out / "stable")["weights.pt"]["head.weight"]
    elsewhere = replace(first, out=first.out.with_name("elsewhere"), resume=first.out / "stable.safetensors")
    learner, progress = prepare(elsewhere, CPU)
    assert (progress.step, progress.spent, progress.finished, progress.pixels) == (7, 0, False, 7 * 2 * 8**2)
    torch.testing.assert_close(learner.named(learner.flat.detach())["head.weight"], stable, atol=1e-3, rtol=1e-3)
    assert not torch.equal(learner.flat, learner.average)
    assert learner.moment2.count_nonzero() == learner.updates == 0


def test_the_decayed_average_is_a_weights_file_and_the_stable_one_can_be_read_too(plan, tiles):
    made = plan(seconds=10)
    run(made, tiles)
    net = load_checkpoint(made.out / "decayed.safetensors").network()
    assert net.arch == made.arch == trained_network(made.out / "stable.safetensors").arch
    expected = state(made.out / "current")["average.pt"]["tail.weight"]
    torch.testing.assert_close(net.tail.weight, expected, atol=1e-3, rtol=1e-3)


def test_other_scales_begin_with_the_body_and_one_that_doubles_once_more_with_everything(plan, tiles):
    made = plan(seconds=10)
    run(made, tiles)
    given = trained_network(made.out / "decayed.safetensors").state_dict()
    for scale, further in ((2, True), (4, True), (3, False)):
        arch = replace(made.arch, scale=scale)
        fresh = plan(out=made.out.with_name(f"x{scale}"), arch=arch)
        started = prepare(replace(fresh, start=made.out / "decayed.safetensors"), CPU)[0].weights(averaged=False)
        begun = prepare(fresh, CPU)[0].weights(averaged=False)
        for name, tensor in started.items():
            taken = name in given and (further or not name.startswith(("upsampler.", "tail.")))
            if taken:
                torch.testing.assert_close(tensor, given[name], msg=name)
            elif not further:
                torch.testing.assert_close(tensor, begun[name], msg=name)
        if scale == 4:
            kernels = started["upsampler.2.weight"].unflatten(0, (-1, 4))
            for channel in range(made.arch.channels):
                torch.testing.assert_close(kernels[channel, :, channel], bilinear_kernels(2))


def test_recorded_steps_give_the_run_that_plain_ones_give(plan, tiles):
    made = plan(seconds=10, half=True)
    recorded = replace(made, out=made.out.with_name("recorded"))
    run(made, tiles, record=plain)
    run(recorded, tiles, record=tape)
    assert equal(state(made.out / "current"), state(recorded.out / "current"))
    assert lines(made) == lines(recorded)


def test_files_of_a_state_are_below_16_mib_for_the_networks_that_ship(plan, tmp_path):
    for scale in (2, 3, 4, 8):
        made = plan(arch=Architecture(scale, 4, 4, 64, 4), out=tmp_path / f"x{scale}")
        learner, progress = prepare(made, CPU)
        save(made.out / "current", learner, progress)
        sizes = {path.name: path.stat().st_size for path in newest(made.out / "current").iterdir()}
        assert sizes.keys() == {"weights.pt", "average.pt", "moment1.pt", "moment2.pt", "progress.json"}
        assert max(sizes.values()) < 16 * 2**20


def test_a_kill_while_a_state_is_written_leaves_the_old_one(plan, tiles, monkeypatch):
    made = plan(seconds=10)
    learner, progress = prepare(made, CPU)
    save(made.out / "current", learner, progress)
    write, calls = torch.save, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save(made.out / "current", learner, replace(progress, step=5))
    assert prepare(made, CPU)[1].step == 0
    save(made.out / "current", learner, replace(progress, step=6))
    assert [path.name for path in (made.out / "current").iterdir()] == ["00000006"]


def test_a_state_of_another_network_is_told(plan, tiles):
    made = plan(seconds=10)
    run(made, tiles)
    with pytest.raises(CheckpointError, match=r"weights.pt: tensor .*, expected .* for SAN x2 \(G=1 m=1 C=8 r=4\)"):
        prepare(replace(made, arch=replace(made.arch, channels=8)), CPU)
    (made.out / "stable.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"stable.safetensors: cannot be read as safetensors"):
        read_compact(made.out / "stable.safetensors")


def test_two_runs_cannot_share_a_folder(tmp_path):
    with locked(tmp_path), pytest.raises(UsageError, match="another process trains there"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def command(packed, out, *more):
    tiny = {"scale": 2, "groups": 1, "blocks": 1, "channels": 16, "batch": 2, "patch": 8, "seconds": 1.5, "warmup": 0.2}
    options = [part for name, value in tiny.items() for part in (f"--{name}", str(value))]
    arguments = [sys.executable, "-m", "training.train", str(out), "--data", str(packed), *options, *more]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_two_workers_learn_what_one_learns(packed, tmp_path):
    done = command(packed, tmp_path / "two", "--workers", "2", "--photo")
    assert done.returncode == 0, done.stderr
    assert "SAN x2 (G=1 m=1 C=16 r=4): 11 tiles, 3 versions, on cpu" in done.stdout
    line = json.loads((tmp_path / "two" / "log.jsonl").read_text().splitlines()[-1])
    assert len(line["y_psnr"]) == 5


def test_the_command_trains_as_a_gpu_would(packed, tmp_path):
    done = command(packed, tmp_path / "run", "--graph")
    assert done.returncode == 0, done.stderr
    assert newest(tmp_path / "run" / "current")
    assert (tmp_path / "run" / "decayed.safetensors").exists()


def test_workers_that_do_not_share_the_batch_evenly_are_refused(packed, tmp_path):
    with pytest.raises(UsageError, match=r"--workers 3: expected .* a divisor of the batch of 8"):
        train(tmp_path, packed, 1, workers=3)
