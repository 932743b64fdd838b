"""From training to the weights that ship, their gates and their curve."""

import json
import math

import numpy as np
import pytest
import torch

from sanrt.errors import CheckpointError, PictureError, UsageError
from sanrt.model.checkpoint import load_checkpoint
from sanrt.model.san import SAN
from sanrt.model.spec import Architecture
from training.curve import curve, read_log
from training.degrade import degrade
from training.gates import logits_on, read_pairs, report_on
from training.learner import Learner
from training.network import initialise
from training.ship import likeness_on, pattern, ship
from training.state import Progress, save_compact
from training.weights import trained_network


def network(seed=0):
    torch.manual_seed(seed)
    net = SAN(Architecture(scale=2, groups=2, blocks=1, channels=16, reduction=4))
    torch.nn.init.constant_(net.gamma, 0.5)
    initialise(net)
    torch.nn.init.normal_(net.attention.out.weight, std=0.1)
    return net.eval().requires_grad_(False)


@pytest.fixture
def trained(tmp_path):
    path = tmp_path / "decayed.safetensors"
    save_compact(path, Learner(network().requires_grad_(True), torch.device("cpu"), half=False), Progress(step=9))
    return path


def test_a_training_checkpoint_becomes_half_precision_weights(trained, tmp_path, capsys):
    out = tmp_path / "san_x2.safetensors"
    ship(trained, 2, "made in a test", out)
    shipped = load_checkpoint(out)
    assert shipped.origin == "made in a test"
    assert (shipped.architecture.scale, shipped.architecture.groups) == (2, 2)
    assert out.stat().st_size < 2.5 * sum(t.numel() for t in shipped.tensors.values())
    assert 60 < likeness_on(pattern(), network(), shipped.network()) < math.inf
    assert likeness_on(pattern(), trained_network(trained), shipped.network()) == math.inf
    assert "author" in (tmp_path / "sources.csv").read_text(), "CC-BY asks for the names"
    assert "SAN x2 (G=2 m=1 C=16 r=4)" in capsys.readouterr().out


def test_nothing_is_shipped_under_another_scale_s_name(trained, tmp_path):
    with pytest.raises(CheckpointError, match=r"SAN x2.*expected scale 4"):
        ship(trained, 4, "made in a test", tmp_path / "san_x4.safetensors")
    assert not list(tmp_path.glob("san_x4*"))


def test_official_checkpoints_are_read_as_well(shared):
    assert trained_network(shared / "golden" / "san_x3_g2m2c32r8.pt").arch.scale == 3


def test_a_file_that_is_no_checkpoint_is_told(tmp_path):
    (tmp_path / "odd.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"odd.pt"):
        trained_network(tmp_path / "odd.pt")


@pytest.fixture
def pairs():
    highs = [pattern(48), pattern(48)[::-1] // 3, np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)]
    return [(degrade(high, 2), high) for high in highs]


def test_gates_are_those_that_the_network_applies(pairs):
    net = network()
    seen = logits_on(net, [low for low, _ in pairs]).sigmoid()
    assert seen.shape == (2, 3, 16)
    inputs = []
    net.groups[1].soca.register_forward_hook(lambda _, given, result: inputs.append(result / given[0]))
    logits_on(net, [pairs[2][0]])
    ratio = inputs[0].nanmedian(3).values.nanmedian(2).values[0]
    torch.testing.assert_close(seen[1, 2], ratio, atol=1e-4, rtol=0)


def test_gates_that_depend_on_the_picture_spread_and_are_missed_when_frozen(pairs):
    net = network()
    for group in net.groups:
        group.soca.down.weight.abs_().mul_(20)
    report = report_on(net, pairs)
    assert all(0 <= g.lowest < g.highest <= 1 and g.spread > 0.001 for g in report.groups)
    assert report.frozen_y_psnr != report.y_psnr
    assert report.exact_root_psnr < 120


def test_gates_that_ignore_the_picture_show_no_spread_and_are_not_missed(pairs):
    net = network()
    for group in net.groups:
        group.soca.up.weight.zero_()
    report = report_on(net, pairs)
    assert [g.spread for g in report.groups] == [0, 0]
    assert report.frozen_y_psnr == pytest.approx(report.y_psnr, abs=1e-3)
    assert report.exact_root_psnr == math.inf


def test_parts_on_their_own_are_those_of_the_whole_unless_gates_see_the_picture(pairs, monkeypatch):
    """A picture of which half is flat: its statistics are not those of its parts."""
    monkeypatch.setattr("training.gates.PART", 16)
    monkeypatch.setattr("training.gates.MARGIN", 6)
    high = np.concatenate([pattern(64)[:, :32], np.zeros((64, 64, 3), np.uint8)], 1)
    lost = []
    for blind in True, False:
        net = network()
        torch.nn.init.zeros_(net.attention.out.weight)
        for group in net.groups:
            if blind:
                torch.nn.init.zeros_(group.soca.up.weight)
            else:
                group.soca.down.weight.data.abs_().mul_(20)
        found = report_on(net, [(degrade(high, 2), high)] * 2)
        lost.append(abs(found.parts_psnr - found.whole_psnr))
    assert lost[0] < lost[1] / 3


def test_gates_need_pictures_to_differ_over(tmp_path):
    with pytest.raises(PictureError, match="0 pictures; expected at least 2"):
        read_pairs(tmp_path, 2)


def test_a_curve_is_drawn_for_every_run(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'sanrt[training]'")
    logs = []
    for name in ("x2", "x4"):
        (tmp_path / name).mkdir()
        logs.append(tmp_path / name / "log.jsonl")
        logs[-1].write_text("".join(json.dumps({"step": s, "l1": 1 / s, "y_psnr": [20 + s, 19]}) + "\n" for s in (1, 2, 3)))
    curve(logs, tmp_path / "curves" / "both.png")
    assert (tmp_path / "curves" / "both.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="2 logs in folders of 1 names"):
        curve([logs[0], logs[0]])


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_file_that_is_no_log_is_told(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UsageError, match=r"log.jsonl"):
        read_log(tmp_path / "log.jsonl")
