"""A small checkpoint with live gates and skips, and its export."""

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Exported:
    checkpoint: Path
    onnx: Path


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    import torch

    from sanrt.export.onnx import ExportOptions, export_onnx
    from sanrt.model.checkpoint import load_checkpoint, save_checkpoint
    from sanrt.model.san import SAN
    from sanrt.model.spec import Architecture

    folder = tmp_path_factory.mktemp("exported")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SAN(Architecture(scale=2, groups=2, blocks=2, channels=16, reduction=4))
    torch.nn.init.constant_(net.gamma, 0.3)
    save_checkpoint(folder / "tiny.safetensors", net, "seeded random weights", torch.float32)
    checkpoint = load_checkpoint(folder / "tiny.safetensors")
    report = export_onnx(checkpoint, folder / "san_x2.onnx", ExportOptions(check=False))
    return Exported(checkpoint.path, report.path)
