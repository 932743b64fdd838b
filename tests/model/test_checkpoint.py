"""Strict loading: official names, refusals that name the tensor, and files that are not what they seem."""

from __future__ import annotations

import argparse
import pickle
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sanrt.errors import CheckpointError
from sanrt.model.checkpoint import load_checkpoint, save_checkpoint


def official_state(net):
    """The network's weights under the official code's names, with the tensors that it never uses."""
    state, own = {}, net.state_dict()
    pairs = [("sub_mean", "mean_in"), ("add_mean", "mean_out"), ("head.0", "head"), ("tail.1", "tail")]
    pairs += [(f"tail.0.{i}", f"upsampler.{i}") for i in range(0, len(net.upsampler), 2)]
    parts = {"theta": "query", "phi.0": "key", "g.0": "value", "W": "out"}
    pairs += [(f"non_local.non_local.{theirs}", f"attention.{ours}") for theirs, ours in parts.items()]
    for g in range(net.arch.groups):
        pairs += [(f"RG.{g}.soca.conv_du.0", f"groups.{g}.soca.down"), (f"RG.{g}.soca.conv_du.2", f"groups.{g}.soca.up")]
        pairs += [(f"RG.{g}.conv_last", f"groups.{g}.conv")]
        for b in range(net.arch.blocks):
            for theirs, ours in ((0, 1), (2, 2)):
                pairs.append((f"RG.{g}.rcab.{b}.conv_first.{theirs}", f"groups.{g}.blocks.{b}.conv{ours}"))
        state[f"RG.{g}.gamma"] = torch.zeros(1)
    for theirs, ours in pairs:
        for kind in ("weight", "bias"):
            state[f"{theirs}.{kind}"] = own[f"{ours}.{kind}"].clone()
    unused = {"conv_last.weight": torch.ones(8, 8, 3, 3), "non_local.soca.conv_du.0.weight": torch.ones(2, 8, 1, 1)}
    return {**state, **unused, "gamma": own["gamma"].clone()}


@pytest.fixture
def official(live_network, tmp_path):
    """`official(change)`: an official file, its tensors changed in place by `change` first."""

    def write(change=lambda state: None, **architecture):
        state = official_state(live_network(**architecture))
        change(state)
        path = tmp_path / "SAN_BI.pt"
        torch.save(state, path)
        return path

    return write


ARCHITECTURES = [
    {"scale": 2, "groups": 1, "blocks": 1, "channels": 8, "reduction": 2},
    {"scale": 3, "groups": 2, "blocks": 1, "channels": 16, "reduction": 16},
    {"scale": 4, "groups": 1, "blocks": 3, "channels": 24, "reduction": 8},
    {"scale": 8, "groups": 12, "blocks": 1, "channels": 16, "reduction": 4},
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_architecture_is_read_off_an_official_file(official, live_network, architecture):
    checkpoint = load_checkpoint(official(**architecture))
    assert checkpoint.architecture == live_network(**architecture).arch
    picture = torch.rand(1, 3, 6, 5) * 255
    assert torch.equal(checkpoint.network()(picture), live_network(**architecture)(picture))


WRAPPED = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 5, "best": np.float64(31.2)},
    "params": lambda state: {"params": state},
    "module.": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "model.": lambda state: {f"model.{name}": tensor for name, tensor in state.items()},
    "model.module.": lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
    "optimizer": lambda state: {
        "net": state,
        "optimizer": {
            "state": {0: {"exp_avg": torch.ones(3), "step": 7}},
            "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99)}],
        },
        "args": argparse.Namespace(lr=1e-4, out=Path("runs")),
        "started": datetime(2026, 11, 26),
        "rng": torch.get_rng_state(),
    },
    "another network": lambda state: {
        "state_dict": {f"g.{n}": t for n, t in state.items()} | {"vgg.head.0.weight": torch.ones(2)}
    },
    "parameters": lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
    "half": lambda state: {name: tensor.half() for name, tensor in state.items()},
}
"""State dicts as people keep them."""


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("names", ["official", "ours"])
def test_weights_are_found_in_whatever_people_keep_them_in(live_network, tmp_path, wrapped, names):
    net = live_network()
    state = official_state(net) if names == "official" else dict(net.state_dict())
    torch.save(WRAPPED[wrapped](state), tmp_path / "kept.ckpt")
    checkpoint = load_checkpoint(tmp_path / "kept.ckpt")
    assert checkpoint.architecture == net.arch
    rtol = 1e-3 if wrapped == "half" else 0
    assert all(torch.allclose(checkpoint.tensors[name], t, rtol, 1e-5) for name, t in net.state_dict().items())
    assert not any(t.requires_grad for t in checkpoint.tensors.values())


def test_official_names_in_safetensors_are_taken(live_network, tmp_path):
    save_file(official_state(live_network()), tmp_path / "SAN.safetensors")
    checkpoint = load_checkpoint(tmp_path / "SAN.safetensors")
    assert torch.equal(checkpoint.tensors["head.weight"], live_network().head.weight)
    assert "official SAN format" in checkpoint.origin


@pytest.mark.parametrize(("average", "other"), [("params_ema", "params"), ("average", "raw"), ("ema_model", "model")])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_of_a_network_and_its_moving_average_the_average_is_taken_and_told(live_network, tmp_path, average, other, kind):
    state = official_state(live_network())
    changed = {name: tensor + 1 for name, tensor in state.items()}
    path = tmp_path / "kept.pt"
    if kind == "torch":
        torch.save({other: changed, average: state}, path)
    else:
        save_file({f"{other}.{n}": t for n, t in changed.items()} | {f"{average}.{n}": t for n, t in state.items()}, path)
    checkpoint = load_checkpoint(path)
    assert torch.equal(checkpoint.tensors["head.weight"], state["head.0.weight"])
    assert checkpoint.origin.endswith(f", its {average}")


def test_of_several_networks_none_is_guessed(live_network, tmp_path):
    state = official_state(live_network())
    torch.save({"first": state, "second": dict(state)}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"holds several networks \(first, second\)"):
        load_checkpoint(tmp_path / "two.pt")


def test_a_dictionary_that_holds_itself_is_no_endless_loop(live_network, tmp_path):
    content = {"state_dict": official_state(live_network())}
    content["itself"] = content
    torch.save(content, tmp_path / "round.pt")
    assert load_checkpoint(tmp_path / "round.pt").architecture.scale == 2


def test_what_would_be_code_to_run_is_named(tmp_path):
    torch.save({"state_dict": {}, "loss": torch.nn.L1Loss()}, tmp_path / "whole.pt")
    with pytest.raises(
        CheckpointError, match=r"holds torch\.nn\.modules\.loss\.L1Loss, which would be code to run; .*state_dict"
    ):
        load_checkpoint(tmp_path / "whole.pt")


def broken(name, change):
    return lambda state: state.update({name: change(state[name])})


HEAD, SQUEEZE = "head.0.weight", "RG.0.soca.conv_du.0.weight"
BROKEN = {
    "is torch.sparse_coo": broken(HEAD, lambda t: t.to_sparse()),
    "is without data": broken(HEAD, lambda t: t.to("meta")),
    "is quantised": broken(HEAD, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
    "is torch.int64": broken(HEAD, lambda t: t.long()),
    "is torch.complex64": broken(HEAD, lambda t: t.to(torch.complex64)),
    "is str": broken(HEAD, lambda t: "a name"),
    "tensor head.weight is [], expected": broken(HEAD, lambda t: t.sum()),
    "tensor upsampler.0.weight is [], expected": broken("tail.0.0.weight", lambda t: t.sum()),
    "tensor groups.0.soca.down.weight is [], expected": broken(SQUEEZE, lambda t: t.sum()),
    "16 channels, in SOCA reduced by 0": broken(SQUEEZE, lambda t: torch.ones(17, *t.shape[1:])),
    "16 channels, in SOCA reduced by 0; expected": broken(SQUEEZE, lambda t: t[:0]),
    "0 channels": broken(HEAD, lambda t: t[:0]),
    "tensor gamma is [], expected [1]": broken("gamma", lambda t: t.sum()),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own of its quantised tensors
@pytest.mark.parametrize("told", BROKEN)
def test_a_tensor_of_another_kind_is_one_clear_line(official, told):
    path = official(BROKEN[told])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def drop(name):
    return lambda state: state.pop(name)


def put(name, *shape):
    return lambda state: state.update({name: torch.zeros(*shape)})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put("RG.0.rcab.0.surprise", 3, 5), "unknown tensor RG.0.rcab.0.surprise [3, 5]"),
        (put("gammas", 1), "unknown tensor gammas [1]"),
        (drop("RG.1.soca.conv_du.2.bias"), "tensor groups.1.soca.up.bias is none, expected [16]"),
        (drop("gamma"), "tensor gamma is none, expected [1]"),
        (drop("head.0.weight"), "no tensor head.weight"),
        (put("tail.1.weight", 3, 16, 5, 5), "tensor tail.weight is [3, 16, 5, 5], expected [3, 16, 3, 3]"),
        (put("head.0.weight", 13, 3, 3, 3), "13 channels"),
        (lambda state: state["RG.0.conv_last.bias"].fill_(float("nan")), "tensor groups.0.conv.bias holds NaN"),
    ],
)
def test_a_tensor_that_does_not_belong_is_named(official, change, told):
    path = official(change)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


class Malicious:
    """Creates a file when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, save):
    trace, path = tmp_path / "executed", tmp_path / "weights.pt"
    save({"head.0.weight": Malicious(trace)}, path)
    with pytest.raises(CheckpointError, match=r"weights\.pt"):
        load_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("iterations", [None, 7])
def test_a_safetensors_file_comes_back_as_it_was(live_network, tmp_path, iterations):
    net = live_network(3, value_range=1.0, sqrt_iterations=iterations)
    save_checkpoint(tmp_path / "own.safetensors", net, "seeded", torch.float32)
    checkpoint = load_checkpoint(tmp_path / "own.safetensors")
    assert checkpoint.architecture == net.arch
    assert checkpoint.origin == "seeded"
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in checkpoint.tensors.items())


def test_weights_that_half_precision_cannot_hold_are_not_saved(live_network, tmp_path):
    net = live_network()
    net.head.bias[0] = 1e6
    with pytest.raises(CheckpointError, match=r"head\.bias"):
        save_checkpoint(tmp_path / "own.safetensors", net, "too large")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [0, 1, 7, 9, 100, -1])
@pytest.mark.parametrize("kind", ["official", "own"])
def test_a_cut_file_is_one_clear_line(official, live_network, tmp_path, kind, kept):
    path = official()
    if kind == "own":
        path = tmp_path / "own.safetensors"
        save_checkpoint(path, live_network(), "seeded")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"just text\n" * 50, pickle.dumps([1, 2]), b"\x80\x02." + bytes(40)])
def test_other_files_are_one_clear_line(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        *("[]", "{", '{"value_range": "wide"}', '{"sqrt_iterations": "many"}', '{"sqrt_iterations": 0}'),
        *('{"sqrt_iterations": 1000000000}', "[" * 100_000),
    ],
)
def test_settings_that_make_no_sense_are_one_clear_line(live_network, tmp_path, settings):
    path = tmp_path / "own.safetensors"
    save_file(live_network().state_dict(), path, {"sanrt": settings})
    with pytest.raises(CheckpointError, match=r"own\.safetensors"):
        load_checkpoint(path)


def test_a_missing_file_and_a_folder_are_one_clear_line(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(path)


def test_a_gap_in_the_groups_is_refused(official):
    def rename(state):
        for name in [name for name in state if name.startswith("RG.1.")]:
            state[name.replace("RG.1.", "RG.7.")] = state.pop(name)

    with pytest.raises(CheckpointError, match=r"groups\.[1-6]\."):
        load_checkpoint(official(rename))


def test_an_absurd_group_number_does_not_exhaust_memory(official):
    with pytest.raises(CheckpointError):
        load_checkpoint(official(put("RG.999999999.conv_last.bias", 16)))
