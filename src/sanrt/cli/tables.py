"""An exported model's measurements (`ModelSpec.report`) as lines and tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from sanrt.model.spec import Architecture


def parity_line(parity: Mapping[str, Any] | None) -> str:
    """The distance of the ONNX from PyTorch, as a line."""
    if parity is None:
        return "not checked (--no-check)"
    return f"at most {parity['max_abs']:.2g} of 255 apart, tolerance {parity['tolerance']:g}"


def gate_line(arch: Architecture) -> str:
    """How SOCA's gate reduces its channels: r is not in a checkpoint, and what is trained as r=5 may be read as r=6."""
    return f"{arch.channels} channels reduced to {arch.gate_channels}; r={arch.reduction} is read off these"


def square_root_line(report: Mapping[str, Any]) -> str:
    """The convergence of the square root's steps, and what it costs, as a line."""
    steps, trained = report["iterations"], report["trained"]
    psnr, largest = report["difference"]["psnr"], report["difference"]["max_abs"]
    apart = "nothing" if psnr is None else f"{largest:.2g} of 255 at most ({psnr:.1f} dB PSNR)"
    exact = f"by {apart} on {report['picture']}"
    if steps == trained:
        return (
            f"{steps} Newton-Schulz steps, as the weights were trained with and need it;"
            f" the exact root, which is not theirs, would change the picture {exact}"
        )
    residual = max(row["residual"] for row in report["groups"])
    how = "the exact root" if trained is None else f"{trained} steps"
    return (
        f"{steps} Newton-Schulz steps, where the weights were trained with {how}; residual up to {residual:.2g}"
        f" (0 is converged); the picture differs from the exact root's {exact}"
    )


def square_root_table(report: Mapping[str, Any]) -> Table:
    """One row per group's SOCA."""
    table = Table("group", "condition", "residual", "error of root", "error of gate", title="Matrix square roots")
    for column in table.columns:
        column.justify = "right"
    for row in report["groups"]:
        table.add_row(str(row["group"]), *(f"{row[name]:.2g}" for name in ("condition", "residual", "error", "gate")))
    return table


def facts_table(facts: Mapping[str, str]) -> Table:
    """Names on the left, what is so on the right."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table


def quantisation_line(report: Mapping[str, Any]) -> str:
    """The share of the parts in 8 bits, and what it costs, as a line."""
    parts = report["parts"]
    count = sum(part["quantised"] for part in parts)
    return (
        f"{count} of {len(parts)} parts in {report['type']}; Y-PSNR changes by"
        f" {-report['y_psnr_drop']:+.4f} dB on {report['held_out']} held-out crops (budget -{report['max_psnr_drop']:g});"
        f" calibrated on {report['calibration']}"
    )


def quantisation_table(report: Mapping[str, Any]) -> Table:
    """One row per part: residual blocks, and the other convolutions that may be in 8 bits."""
    table = Table("part", "alone, dB", "PSNR to fp32", "computes in", title="Parts of the network")
    for row in report["parts"]:
        kind = report["type"] if row["quantised"] else "as the rest"
        if row["y_psnr_drop"] is None:
            table.add_row(row["part"], "", "", f"{kind} (kept)")
        else:
            psnr = "equal" if row["psnr"] is None else f"{row['psnr']:.1f}"
            table.add_row(row["part"], f"{-row['y_psnr_drop']:+.4f}", psnr, kind)
    return table
