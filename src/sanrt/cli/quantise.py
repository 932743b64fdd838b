"""`sanrt build --int8`, `--fp8` and `--auto`: quantise, compare with the fp32 model, and print both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sanrt.cli.models import default_kind, run_words
from sanrt.extras import install_command

if TYPE_CHECKING:
    from rich.console import Console

    from sanrt.export.quantise.model import QuantisedModel, QuantiseOptions
    from sanrt.export.quantise.trials import BackendTrial


def make_quantised_model(model: Path, options: QuantiseOptions) -> Path:
    """Quantise a model and compare the two here; `sanrt run` takes the faster by itself from then on."""
    from sanrt.cli.console import plain_console, track
    from sanrt.export.quantise.model import quantise

    console = plain_console()
    result = quantise(model, options, track)
    print_quantised(console, result, options)
    compare_and_prefer(console, model, [result], options, str(options.type))
    return result.path


def choose_automatically(model: Path, options: QuantiseOptions) -> None:
    """Try everything that this machine can run, and prefer the fastest within the budget."""
    from sanrt.cli.console import BuildProgressBar, plain_console, track
    from sanrt.export.quantise.automatic import build_every_engine, quantise_every_type

    console = plain_console()
    quantised = quantise_every_type(model, options, track)
    for result in quantised.models:
        print_quantised(console, result, options)
    with BuildProgressBar() as progress:
        unbuilt = build_every_engine(model, [result.path for result in quantised.models], progress)
    untried = compare_and_prefer(console, model, quantised.models, options, "")
    print_untried(console, {**untried, **quantised.untried, **unbuilt})


def compare_and_prefer(
    console: Console, model: Path, results: Sequence[QuantisedModel], options: QuantiseOptions, kind: str
) -> Mapping[str, str]:
    """Time everything side by side, print it, and make the fastest within the budget the default choice.

    Returns the reasons for what could not be tried.
    """
    from sanrt.cli.console import track
    from sanrt.export.quantise.calibration import calibration_set
    from sanrt.export.quantise.trials import compare_backends, fastest, fp32_y_psnr
    from sanrt.model.spec import Precision
    from sanrt.runtime.artifacts.engines import engines_of
    from sanrt.runtime.artifacts.models import read_spec
    from sanrt.runtime.backends.default_variant import prefer

    scale = read_spec(model).architecture.scale
    pictures = results[0].pictures if results else calibration_set(options.calibration, scale, track)
    graphs = [model, *(result.path for result in results)]
    artifacts = [*graphs, *(engine.path for graph in graphs for engine in engines_of(graph))]
    comparison = compare_backends(artifacts, pictures.held_out, track)
    trials = comparison.trials
    if not any(t.computes == Precision.FP32 for t in trials):
        console.print(f"not timed: no backend runs the fp32 model here; {install_command('cpu')}")
        for result in results:
            console.print(f"next: `{run_words(result.path)}`")
        return comparison.untried
    print_trials(console, trials, fp32_y_psnr(trials))
    best = fastest(trials, options.max_psnr_drop)
    prefer(model, best.model, best.backend, best.precision)
    if kind:
        console.print(verdict(trials, kind))
    console.print(f"the fastest within {options.max_psnr_drop:g} dB is {best.computes} on {best.backend}")
    console.print(f"next: {next_words(model, best)}")
    return comparison.untried


def next_words(model: Path, best: BackendTrial) -> str:
    """The command that runs the best variant of a model: a default model's is taken by itself, another's is named."""
    if default_kind(model):
        return f"`{run_words(model)}` takes it by itself"
    precision = f" --precision {best.precision}" if best.precision else ""
    return f"`{run_words(best.model)} --backend {best.backend}{precision}`"


def verdict(trials: Sequence[BackendTrial], kind: str) -> str:
    """Whether the 8-bit type is faster here than the best without it, in one sentence."""
    from sanrt.export.quantise.trials import MIN_GAIN

    eight_bit, others = ([t for t in trials if t.quantised is wanted] for wanted in (True, False))
    if not eight_bit:
        return f"{kind}: no backend runs it here, so whether it is faster is not known"
    ratio = others[0].seconds / eight_bit[0].seconds
    worth = "worth it" if ratio >= MIN_GAIN else "not worth it"
    return f"{kind} is {worth} here: {ratio:.2f} times as fast as the best without it (expected {MIN_GAIN:g} or more)"


def print_quantised(console: Console, result: QuantisedModel, options: QuantiseOptions) -> None:
    """Print the parts, the loss, and what it was measured on."""
    from sanrt.cli.tables import quantisation_line, quantisation_table

    report = result.spec.report["quantisation"]
    console.print(quantisation_table(report))
    console.print(f"{result.path}: {quantisation_line(report)}")
    if result.pictures.too_small:
        console.print(f"left out: {result.pictures.too_small} pictures smaller than a crop")
    if options.calibration is None:
        console.print("calibrated on generated scenes; pictures of your own are better: --calibration DIR")


def print_trials(console: Console, trials: Sequence[BackendTrial], reference: float) -> None:
    """Print one row per trial, the fastest first; `reference` is the Y-PSNR that changes are counted from."""
    from rich.table import Table

    table = Table("model", "backend", "computes in", "dB", "ms", "MB", title="On this machine: change of Y-PSNR, time, size")
    for trial in trials:
        size = trial.model.stat().st_size / 1e6
        change = f"{trial.y_psnr - reference:+.4f}"
        table.add_row(trial.model.name, trial.backend, trial.computes, change, f"{1e3 * trial.seconds:.1f}", f"{size:.1f}")
    console.print(table)


def print_untried(console: Console, untried: Mapping[str, str]) -> None:
    """Print what is not in the comparison, and why."""
    from rich.table import Table

    table = Table("not tried", "because")
    for what, reason in untried.items():
        table.add_row(what, reason)
    console.print(table)
