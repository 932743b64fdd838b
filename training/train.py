"""Train a SAN from a folder of pictures: `python -m training.train --help`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

from sanrt.model.san import RGB_MEAN, SAN, ResidualBlock, ResidualGroup
from sanrt.model.spec import Architecture
from training.data import Patches, picture_files, read_rgb, to_tensor

INNER_RANGE = 8.0
"""The mean shifts map 0..255 to a range of this width, in which Adam's steps suit every layer alike."""

SOCA_GAIN = 128.0
"""SOCA's first layer starts positive and this much larger: then its hidden units are alive and the gates differ between
pictures from the start (with the usual start they stay all but constant, see training/README.md)."""


def initialise(net: SAN) -> None:
    """Start as a bilinear upscaler: colours pass through head and tail, every residual branch starts small."""
    with torch.no_grad():
        ratio = INNER_RANGE / net.arch.value_range
        net.mean_in.weight.mul_(ratio)
        biases(net.mean_in).copy_(-INNER_RANGE * torch.tensor(RGB_MEAN))
        net.mean_out.weight.div_(ratio)
        for group in cast(Iterable[ResidualGroup], net.groups):
            group.conv.weight.mul_(0.1)
            group.soca.down.weight.abs_().mul_(SOCA_GAIN)
            for block in cast(Iterable[ResidualBlock], group.blocks):
                block.conv2.weight.mul_(0.1)
        nn.init.zeros_(net.attention.out.weight)
        nn.init.zeros_(biases(net.attention.out))
        pass_colours(net.head, identity_kernel())
        for conv in (layer for layer in net.upsampler if isinstance(layer, nn.Conv2d)):
            pass_colours(conv, bilinear_kernels(round((conv.out_channels / conv.in_channels) ** 0.5)))
        nn.init.zeros_(biases(net.tail))
        net.tail.weight.mul_(0.1)
        pass_colours(net.tail, identity_kernel())


def biases(conv: nn.Conv2d) -> Tensor:
    """A convolution's biases, which all of SAN's have."""
    assert conv.bias is not None
    return conv.bias


def identity_kernel() -> Tensor:
    """(1, 3, 3) with its centre set."""
    kernel = torch.zeros(1, 3, 3)
    kernel[0, 1, 1] = 1
    return kernel


def bilinear_kernels(factor: int) -> Tensor:
    """(factor^2, 3, 3): what each sub-pixel of a bilinear upscaling by 2 or 3 takes from its 3 x 3 neighbours."""
    offset = (torch.arange(factor) + 0.5) / factor - 0.5
    taps = (1 - (offset[:, None] - torch.tensor([-1.0, 0.0, 1.0])).abs()).clamp_min(0)
    return torch.einsum("ay,bx->abyx", taps, taps).flatten(0, 1)


def pass_colours(conv: nn.Conv2d, kernels: Tensor) -> None:
    """Let each of the first three input channels come out as `kernels` (n, 3, 3) of itself and of nothing else."""
    n = len(kernels)
    conv.weight[: 3 * n] = 0
    biases(conv)[: 3 * n] = 0
    for colour in range(3):
        conv.weight[colour * n : (colour + 1) * n, colour] = kernels


def start_from(net: SAN, path: Path) -> None:
    """Take the body (head, attention, groups) of another scale's checkpoint; upsampler and tail keep their own start."""
    state = torch.load(path, weights_only=True)["net"]
    net.load_state_dict(net.state_dict() | {n: t for n, t in state.items() if not n.startswith(("upsampler.", "tail."))})


def y_channel(rgb: Tensor) -> Tensor:
    """Luma of ITU-R BT.601 as MATLAB's rgb2ycbcr has it: (B, 3, H, W) 0..255 -> (B, H, W) 16..235."""
    return (torch.tensor([65.481, 128.553, 24.966]) @ rgb.movedim(1, 0).flatten(1) / 255 + 16).view(-1, *rgb.shape[2:])


@torch.inference_mode()
def y_psnr(net: SAN, folder: Path, scale: int) -> float:
    """Mean PSNR on Y over `folder`/LR against `folder`/HR, `scale` pixels shaved; in dB."""
    values = []
    for path in picture_files(folder / "LR"):
        high = to_tensor(read_rgb(folder / "HR" / path.name)[None])
        output = net(to_tensor(read_rgb(path)[None])).clamp(0, 255).round()
        error = (y_channel(output) - y_channel(high))[:, scale:-scale, scale:-scale]
        values.append(10 * torch.log10(255**2 / error.square().mean()).item())
    return sum(values) / len(values)


def train(
    data: Annotated[list[Path], typer.Argument(help="Folders of training pictures.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the log; a run found there is resumed.")],
    scale: int = 4,
    groups: int = 4,
    blocks: int = 4,
    channels: int = 32,
    reduction: int = 8,
    iterations: int = 10_000,
    batch: int = 8,
    patch: Annotated[int, typer.Option(help="Side of a low-resolution patch, pixels.")] = 32,
    rate: Annotated[float, typer.Option(help="Peak learning rate of the one-cycle schedule.")] = 2e-3,
    warmup: Annotated[float, typer.Option(help="Share of the iterations in which the rate rises.")] = 0.05,
    clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = 0.5,
    start: Annotated[Path | None, typer.Option(help="Checkpoint of another scale to start the body from.")] = None,
    evaluate: Annotated[Path | None, typer.Option(help="Folder with LR/ and HR/, scored for the curve alone.")] = None,
    every: Annotated[int, typer.Option(help="Iterations between checkpoints and scores.")] = 500,
    seed: int = 0,
    threads: int = 0,
    compile_net: Annotated[bool, typer.Option("--compile")] = False,
    bf16: Annotated[bool, typer.Option(help="bf16 autocast (pays on AMX and on GPUs).")] = False,
) -> None:
    """Train with L1, Adam and a one-cycle schedule; write OUT/checkpoint.pt and OUT/log.jsonl as it goes."""
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arch = Architecture(scale, groups, blocks, channels, reduction)
    net = SAN(arch)
    initialise(net)
    if start:
        start_from(net, start)
    for shift in (net.mean_in, net.mean_out):
        shift.requires_grad_(False)
    net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = Adam([p for p in net.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.99), fused=True)
    schedule = OneCycleLR(optimiser, rate, iterations, pct_start=warmup, cycle_momentum=False)
    out.mkdir(parents=True, exist_ok=True)
    done = resume(out / "checkpoint.pt", net, optimiser, schedule)
    patches = Patches(data, scale, patch, seed + done)
    forward: Any = torch.compile(net) if compile_net else net
    losses: list[float] = []
    started = time.monotonic()
    with (
        (out / "log.jsonl").open("a") as log,
        Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress,
    ):
        task = progress.add_task(arch.name, total=iterations, completed=done)
        for step in range(done + 1, iterations + 1):
            low, high = (t.to(device, memory_format=torch.channels_last) for t in patches.batch(batch))
            with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
                loss = (forward(low).float() - high).abs().mean() / arch.value_range
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"{arch.name}  L1 {sum(losses[-100:]) / len(losses[-100:]):.5f}")
            if step % every == 0 or step == iterations:
                row = {
                    "step": step,
                    "seconds": round(time.monotonic() - started, 1),
                    "l1": round(sum(losses) / len(losses), 6),
                    "rate": schedule.get_last_lr()[0],
                    "gradient_norm": round(float(norm), 4),
                }
                if evaluate:
                    row["y_psnr"] = round(y_psnr(net.eval(), evaluate, scale), 3)
                    net.train()
                save(out / "checkpoint.pt", net, optimiser, step)
                log.write(json.dumps(row) + "\n")
                log.flush()
                losses.clear()


def resume(path: Path, net: SAN, optimiser: Adam, schedule: OneCycleLR) -> int:
    """Load an interrupted run, if there is one; return the iterations it has done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    net.load_state_dict(state["net"])
    optimiser.load_state_dict(state["optimiser"])
    schedule.last_epoch = state["step"]
    return int(state["step"])


def save(path: Path, net: SAN, optimiser: Adam, step: int) -> None:
    """Replace the checkpoint in one move, so that a kill leaves the old or the new one."""
    partial = path.with_suffix(".partial")
    torch.save({"net": net.state_dict(), "optimiser": optimiser.state_dict(), "step": step}, partial)
    partial.replace(path)


if __name__ == "__main__":
    typer.run(train)
