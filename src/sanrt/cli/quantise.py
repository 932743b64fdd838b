"""`sanrt build --int8`, `--fp8` and `--auto`: what is done before an engine is built, told to people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from sanrt.extras import extra

if TYPE_CHECKING:
    from rich.console import Console

    from sanrt.export.quantise.quantised import Quantised, QuantiseOptions
    from sanrt.export.quantise.trials import Trial

Item = TypeVar("Item")


def quantise_options(fp8: bool, calibration: Path | None, calibrator: str, drop: float, keep: list[str]) -> QuantiseOptions:
    """The command line's wishes; a usage error for a calibrator that is none."""
    with extra("export", "quantising"):
        from sanrt.export.quantise.calibration import Method
        from sanrt.export.quantise.quantised import QuantiseOptions
    from sanrt.model.spec import QuantisedType

    if calibrator not in tuple(Method):
        raise typer.BadParameter(f"--calibrator {calibrator}: expected {', '.join(Method)}")
    kind = QuantisedType.FP8 if fp8 else QuantisedType.INT8
    return QuantiseOptions(kind, calibration, Method(calibrator), drop, tuple(keep))


def quantised_model(model: Path, options: QuantiseOptions) -> Path:
    """Quantise a model and see whether that makes it faster here; the faster becomes what `sanrt run` takes by itself."""
    from sanrt.cli.console import plain_console, track
    from sanrt.export.quantise.quantised import quantise

    console = plain_console()
    result = quantise(model, options, track)
    print_quantised(console, result, options)
    compare(console, model, [result], options, str(options.type))
    return result.path


def choose_automatically(model: Path, options: QuantiseOptions) -> None:
    """Try what this machine can run, and prefer the fastest within the budget."""
    from sanrt.cli.console import BuildProgress, plain_console, track
    from sanrt.export.quantise.automatic import engines, quantised_kinds

    console = plain_console()
    prepared = quantised_kinds(model, options, track)
    for result in prepared.quantised:
        print_quantised(console, result, options)
    with BuildProgress() as progress:
        unbuilt = engines(model, [result.path for result in prepared.quantised], progress)
    untried = compare(console, model, prepared.quantised, options, "")
    print_untried(console, {**untried, **prepared.untried, **unbuilt})


def compare(
    console: Console, model: Path, results: Sequence[Quantised], options: QuantiseOptions, kind: str
) -> Mapping[str, str]:
    """Time everything side by side, print it, and make the fastest within the budget the default choice.

    Returns what could not be tried, and why.
    """
    from sanrt.cli.console import track
    from sanrt.export.quantise.calibration import calibration_set
    from sanrt.export.quantise.trials import compared, fastest, reference_quality
    from sanrt.model.spec import Precision
    from sanrt.runtime.artifacts.engines import engines_of
    from sanrt.runtime.artifacts.models import read_spec
    from sanrt.runtime.backends.default_variant import prefer

    scale = read_spec(model).architecture.scale
    pictures = results[0].pictures if results else calibration_set(options.calibration, scale, track)
    graphs = [model, *(result.path for result in results)]
    comparison = compared([*graphs, *(e.path for graph in graphs for e in engines_of(graph))], pictures.held_out, track)
    found = comparison.trials
    if not any(t.computes == Precision.FP32 for t in found):
        console.print("not timed: no backend runs the fp32 model here; pip install 'sanrt[openvino]' or 'sanrt[cpu]'")
        return comparison.untried
    print_trials(console, found, reference_quality(found))
    best = fastest(found, options.max_psnr_drop)
    prefer(model, best.model, best.backend, best.precision)
    if kind:
        console.print(worth(found, kind))
    console.print(f"`sanrt run` takes the fastest within {options.max_psnr_drop:g} dB: {best.computes} on {best.backend}")
    return comparison.untried


def worth(found: Sequence[Trial], kind: str) -> str:
    """Whether 8 bits are faster here, in plain words."""
    from sanrt.export.quantise.trials import MIN_GAIN

    eight, others = ([t for t in found if t.quantised is wanted] for wanted in (True, False))
    if not eight:
        return f"{kind}: no backend runs it here, so whether it is faster is not known"
    ratio = others[0].seconds / eight[0].seconds
    verdict = "worth it" if ratio >= MIN_GAIN else "not worth it"
    return f"{kind} is {verdict} here: {ratio:.2f} times as fast as the best without it (expected {MIN_GAIN:g} or more)"


def print_quantised(console: Console, result: Quantised, options: QuantiseOptions) -> None:
    """The blocks, the loss, and what it was measured on."""
    from sanrt.cli.tables import quantisation_line, quantisation_table

    report = result.spec.report["quantisation"]
    console.print(quantisation_table(report))
    console.print(f"{result.path}: {quantisation_line(report)}")
    if result.pictures.too_small:
        console.print(f"left out: {result.pictures.too_small} pictures smaller than a crop")
    if options.calibration is None:
        console.print("calibrated on generated scenes; pictures of your own are better: --calibration DIR")


def print_trials(console: Console, found: Sequence[Trial], reference: float) -> None:
    """One row per trial, the fastest first."""
    from rich.table import Table

    table = Table("model", "backend", "computes in", "dB", "ms", "MB", title="On this machine: change of Y-PSNR, time, size")
    for trial in found:
        size = trial.model.stat().st_size / 1e6
        change = f"{trial.y_psnr - reference:+.4f}"
        table.add_row(trial.model.name, trial.backend, trial.computes, change, f"{1e3 * trial.seconds:.1f}", f"{size:.1f}")
    console.print(table)


def print_untried(console: Console, untried: Mapping[str, str]) -> None:
    """What is not in the comparison."""
    from rich.table import Table

    table = Table("not tried", "because")
    for what, reason in untried.items():
        table.add_row(what, reason)
    console.print(table)
