"""Gates that follow the picture less, about the same means."""

import numpy as np
import torch

from sanrt.model.san import SAN
from sanrt.model.spec import Architecture
from training.damp import draw_together
from training.gates import logits_on
from training.network import initialise


def test_gates_keep_their_means_and_lose_their_spread():
    torch.manual_seed(0)
    net = SAN(Architecture(scale=2, groups=1, blocks=1, channels=16, reduction=4))
    initialise(net)
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 64 * (i + 1), (16, 16, 3), np.uint8) for i in range(4)]
    before = logits_on(net, pictures)
    draw_together(net, pictures, 0.25)
    after = logits_on(net, pictures)
    means = before.mean(1, keepdim=True)
    assert (before - means).abs().max() > 0.01
    torch.testing.assert_close(after, 0.25 * before + 0.75 * means, rtol=0, atol=1e-3)
