"""What a training changed in one network, added to another."""

import pytest
import torch

from sanrt.errors import CheckpointError
from sanrt.model.checkpoint import save_checkpoint
from sanrt.model.san import SAN
from sanrt.model.spec import Architecture
from training.transfer import transfer
from training.weights import trained_network


def saved(path, seed, scale, channels=16):
    torch.manual_seed(seed)
    save_checkpoint(path, SAN(Architecture(scale=scale, groups=1, blocks=1, channels=channels, reduction=4)), f"seed {seed}")
    return path


def test_the_body_moves_by_a_share_of_the_difference_and_the_tail_stays(tmp_path):
    clean, before, after = (saved(tmp_path / f"{seed}.safetensors", seed, scale) for seed, scale in enumerate((3, 2, 2)))
    transfer(clean, before, after, tmp_path / "out.safetensors", 0.5)
    paths = clean, before, after, tmp_path / "out.safetensors"
    own, old, new, got = (trained_network(path).state_dict() for path in paths)
    for name, tensor in got.items():
        moved = name in old and old[name].shape == tensor.shape and not name.startswith("tail.")
        expected = own[name] + 0.5 * (new[name] - old[name]) if moved else own[name]
        torch.testing.assert_close(tensor, expected, rtol=2e-3, atol=1e-6)  # stored in half precision
    assert not torch.equal(got["head.weight"], own["head.weight"])


def test_networks_of_other_sizes_are_refused(tmp_path):
    paths = [saved(tmp_path / f"{number}.safetensors", number, 2, channels) for number, channels in enumerate((16, 32, 32))]
    with pytest.raises(CheckpointError, match="expected the sizes of"):
        transfer(*paths, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
