"""Scores are the papers' Y-PSNR."""

import numpy as np
import torch

from sanrt.export.metrics import y_psnr
from sanrt.model.san import SAN
from sanrt.model.spec import Architecture
from training.network import initialise
from training.score import scores


def test_scores_are_the_mean_y_psnr_of_every_version(tiles):
    torch.manual_seed(0)
    net = SAN(Architecture(scale=2, groups=1, blocks=1, channels=16, reduction=4))
    initialise(net)
    expected = []
    for version in tiles.low:
        with torch.no_grad():
            outputs = net(version.permute(0, 3, 1, 2).float()).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        pairs = zip(outputs.numpy(), tiles.high.numpy(), strict=True)
        expected.append(np.mean([y_psnr(output, high, 2) for output, high in pairs]))
    found = scores(net, tiles, half=False)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert found[0] > found[1]
