"""EVA against LoRA and full fine-tuning on digits and robot tasks, in minutes and without a download.

    python -m experiments.demo

has two parts. The first pre-trains a small Vision Transformer on the digits 0-4 and fine-tunes it on 200 labelled
images of the digits 5-9 with every method and ten seeds, at tuned and at lower learning rates. The second
(:mod:`experiments.demo_rl`) fine-tunes a Decision Transformer on robot tasks and rolls it out in MuJoCo. Both print
tables and write ``runs/demo/report.html``. Finished work is kept under ``runs/demo``: after Ctrl-C the same command
goes on where it stopped. ``--fresh`` computes everything anew, ``--parts vision`` or ``--parts rl`` does one part.

The learning rates come from ``configs/demo.yaml`` and ``configs/demo_rl.yaml``. They were chosen, one per method and by
the same rule, with

    python -m experiments.demo --tune

on data and seeds that the tables do not use.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from eva_lightning.errors import InputError, MissingInputError, unknown
from experiments.demo_runs import (
    ADAPTERS,
    METHODS,
    Pretrained,
    Pretraining,
    Run,
    RunResult,
    finetune_to_file,
    load_pretrained,
    load_result,
    pretrain,
    result_path,
    versions,
)
from experiments.demo_summary import (
    EARLY,
    MethodSummary,
    PairedDifference,
    by_method,
    paired_differences,
    same_rate_sentences,
    summarise,
    verdict_sentence,
)
from experiments.runner.processes import worker_pool

PARTS = ("vision", "rl")
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
RL_CONFIG = CONFIG.with_name("demo_rl.yaml")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_TUNING_SEED = 1000
CAREFUL = 10  # the second comparison divides LoRA's tuned rate by this


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Command-line options; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m experiments.demo", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="vision, rl or both (default %(default)s)")
    parser.add_argument("--seeds", type=int, help="vision: runs per method (default 10; 5 with --tune)")
    parser.add_argument("--epochs", type=int, default=10, help="vision: fine-tuning epochs (default 10)")
    parser.add_argument("--labels", type=int, default=200, help="vision: labelled images of 5-9 (default 200)")
    parser.add_argument("--pretrain-epochs", type=int, default=Pretraining.epochs, help="vision: default %(default)s")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes; 0: none (default 2)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default %(default)s")
    parser.add_argument("--config", type=Path, default=CONFIG, help="vision: rates (default configs/demo.yaml)")
    parser.add_argument(
        "--rl-config", type=Path, default=RL_CONFIG, help="rl: settings and rates (default configs/demo_rl.yaml)"
    )
    parser.add_argument("--fresh", action="store_true", help="ignore finished runs and the cached model")
    parser.add_argument("--tune", action="store_true", help="choose the learning rates and write them to the config")
    parser.add_argument("--rates", type=float, nargs="+", help="the grid of --tune")
    options = parser.parse_args(args)
    options.parts = [part.strip() for part in options.parts.split(",") if part.strip()]
    for part in options.parts:
        if part not in PARTS:
            parser.error(unknown("part", part, PARTS))
    if not options.parts:
        parser.error(f"--parts must name at least one of {', '.join(PARTS)}")
    if options.seeds is None:
        options.seeds = 5 if options.tune else 10
    for name, least in (("seeds", 1), ("epochs", 1), ("pretrain_epochs", 1), ("workers", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    return options


def read_learning_rates(path: Path) -> dict[str, float]:
    """Learning rate per method out of the configuration file.

    Raises:
        MissingInputError: there is no such file.
        InputError: the file lacks a method or gives a rate that is not a positive number.
    """
    if not path.exists():
        raise MissingInputError(
            f"no configuration at {_shown(path)}: choose learning rates with --tune, or pass --config"
        )
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = content.get("learning_rates") if isinstance(content, dict) else None
    rates: dict[str, Any] = found if isinstance(found, dict) else {}
    for method in METHODS:
        rate = rates.get(method)
        if not isinstance(rate, int | float) or not rate > 0:
            raise InputError(f"{path}: learning_rates.{method} must be a positive number, got {rate!r}")
    return {method: float(rates[method]) for method in METHODS}


def read_tuning(path: Path) -> dict[str, Any]:
    """How the learning rates of a valid configuration were chosen; empty where it does not say."""
    tuning: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")).get("tuning") or {}
    return tuning


def execute(
    runs: Sequence[tuple[Run, Path]],
    weights: Path,
    pool: ProcessPoolExecutor | None,
    on_done: Callable[[RunResult], None],
) -> None:
    """Fine-tune every run into its file, in ``pool`` or here, and report each as it is done.

    Raises:
        RuntimeError: a run failed; names the run, with the error as its cause.
    """
    if pool is None:
        for run, path in runs:
            on_done(finetune_to_file(run, weights, path))
        return
    futures = {pool.submit(finetune_to_file, run, weights, path): run for run, path in runs}
    for future in as_completed(futures):
        try:
            result = future.result()
        except Exception as error:
            run = futures[future]
            raise RuntimeError(f"the run of {METHODS[run.method]} with seed {run.seed} failed: {error}") from error
        on_done(result)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All results, and what was computed now or found."""

    results: list[RunResult]
    pretrained: Pretrained
    pretrained_was_cached: bool
    n_cached: int
    seconds: float


def compute(runs: Sequence[Run], recipe: Pretraining, options: argparse.Namespace, console: Console) -> Outcome:
    """Pre-train and fine-tune whatever is not there yet, with progress bars."""
    cache, folder = options.out / "cache", options.out / "runs"
    found = {} if options.fresh else {run: load_result(result_path(run, recipe, folder)) for run in runs}
    done = {run: result for run, result in found.items() if result is not None}
    missing = [(run, result_path(run, recipe, folder)) for run in runs if run not in done]
    pretrained = None if options.fresh else load_pretrained(recipe, cache)
    was_cached = pretrained is not None

    columns = (
        TextColumn("{task.description:<46}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    n_cached, start = len(done), time.perf_counter()
    with worker_pool(min(options.workers, len(missing))) as pool, Progress(*columns, console=console) as progress:
        if pretrained is None:
            task = progress.add_task("Pre-training on digits 0-4", total=recipe.epochs)

            def on_epoch(epoch: int, accuracy: float) -> None:
                text = f"Pre-training on digits 0-4: {accuracy:.1%} held out"
                progress.update(task, completed=epoch, description=text)

            pretrained = pretrain(recipe, cache, on_epoch)
        bar = progress.add_task(
            f"Fine-tuning on digits {_listed(runs[0].classes)}", total=len(runs), completed=len(done)
        )

        def on_done(result: RunResult) -> None:
            done[result.run] = result
            text = f"{METHODS[result.run.method]}, seed {result.run.seed}: {result.accuracy[-1]:.1%} held out"
            progress.update(bar, advance=1, description=text)

        execute(missing, pretrained.path, pool, on_done)
        progress.update(bar, description=f"Fine-tuning on digits {_listed(runs[0].classes)}")
    return Outcome([done[run] for run in runs], pretrained, was_cached, n_cached, time.perf_counter() - start)


def _shown(path: Path) -> Path:
    """``path`` relative to the working folder where it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _listed(classes: Sequence[int]) -> str:
    return f"{classes[0]}-{classes[-1]}"


def main_table(rows: Sequence[MethodSummary]) -> Table:
    """Held-out loss (upper line) and accuracy in percent (lower line) of every method."""
    table = Table()
    for column in ("Method", "Learning rate", "Trained", "Set-up"):
        table.add_column(column, justify="left" if column == "Method" else "right", no_wrap=column != "Learning rate")
    for epoch in rows[0].loss:
        table.add_column(f"Epoch {epoch}", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.learning_rate:g}",
            f"{row.trainable_parameters.mean:,.0f}",
            f"{row.setup_seconds:.2f} s",
            *(f"{row.loss[epoch].text(3)}\n{row.accuracy[epoch].text(1, 100)}" for epoch in row.loss),
            end_section=True,
        )
    return table


def paired_table(rows: Sequence[PairedDifference]) -> Table:
    """Paired differences to LoRA: loss, accuracy in points, seeds on which the loss is lower."""
    table = Table()
    table.add_column("Difference", no_wrap=True)
    for epoch in rows[0].loss:
        table.add_column(f"Epoch {epoch}", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            *(
                f"{row.loss[epoch].text(3, sign=True)}\n{row.accuracy[epoch].text(1, 100, sign=True)}"
                f"\n{row.wins[epoch]} of {row.n_pairs}"
                for epoch in row.loss
            ),
            end_section=True,
        )
    return table


def run_demo(options: argparse.Namespace, console: Console) -> str:
    """The vision part: all methods on paired seeds, tables. Returns its section of the report."""
    rates = read_learning_rates(options.config)
    recipe = Pretraining(epochs=options.pretrain_epochs)
    careful = rates["lora"] / CAREFUL
    tuned_runs, careful_runs = (
        [
            Run(method, rate[method], seed, n_labels=options.labels, epochs=options.epochs)
            for seed in range(options.seeds)
            for method in rate
        ]
        for rate in (rates, dict.fromkeys(ADAPTERS, careful))
    )
    runs = tuned_runs + careful_runs
    console.print(
        f"[bold]EVA demo.[/bold] A small ViT learns the digits 0-4, then {options.labels} labels of the digits "
        f"{_listed(runs[0].classes)}: {len(METHODS)} methods x {options.seeds} seeds at tuned learning rates, then the "
        f"{len(ADAPTERS)} adapters again at a tenth of LoRA's."
    )
    outcome = compute(runs, recipe, options, console)

    pretrained = outcome.pretrained
    origin = "taken from the cache, where it took" if outcome.pretrained_was_cached else "trained in"
    console.print(f"Pre-trained model: {pretrained.accuracy:.1%} held out, {origin} {pretrained.seconds:.0f} s.")
    if outcome.n_cached:
        console.print(
            f"Of {len(runs)} fine-tuning runs, {outcome.n_cached} were finished before; --fresh repeats them."
        )
    tuned, gentle = outcome.results[: len(tuned_runs)], outcome.results[len(tuned_runs) :]
    for results, what in (
        (tuned, "at the learning rate tuned for each method"),
        (gentle, f"at a tenth of LoRA's tuned rate ({careful:g}), where training has not converged"),
    ):
        console.print(f"\n[bold]Held-out loss, and below it accuracy in %[/bold], {what}: mean ± standard error")
        console.print(main_table(summarise(results)))
        differences = paired_differences(results)
        console.print("[bold]EVA minus LoRA on the same seeds[/bold]: loss, accuracy in points, seeds with lower loss")
        console.print(paired_table(differences))
        for difference in differences:
            console.print(verdict_sentence(difference), highlight=False)
    console.print()
    for sentence in same_rate_sentences(read_tuning(options.config)):
        console.print(sentence, highlight=False)
    console.print(
        'A difference counts as clear above two standard errors. "Set-up": seconds to the first step (median).'
    )

    from experiments.report import Facts, vision_section

    facts = Facts.collect(
        command=_command(options),
        versions=versions(),
        seeds=list(range(options.seeds)),
        pretraining=recipe,
        pretrained=pretrained,
        pretrained_was_cached=outcome.pretrained_was_cached,
        n_cached=outcome.n_cached,
        seconds=outcome.seconds,
        tuning=read_tuning(options.config),
    )
    everything = [dataclasses.asdict(result) for result in outcome.results]
    (options.out / "results.json").write_text(json.dumps(everything, indent=1), encoding="utf-8")
    return vision_section(tuned, facts, gentle)


def _command(options: argparse.Namespace) -> str:
    """The command that repeats this run, with the options that differ from their defaults."""
    default = parse_args([])
    parts = ["python -m experiments.demo"]
    if options.parts != default.parts:
        parts.append(f"--parts {','.join(options.parts)}")
    for name in ("seeds", "epochs", "labels", "pretrain_epochs"):
        if getattr(options, name) != getattr(default, name):
            parts.append(f"--{name.replace('_', '-')} {getattr(options, name)}")
    return " ".join(parts)


def choose_rates(results: Sequence[RunResult]) -> tuple[dict[str, float], dict[str, dict[float, dict[str, float]]]]:
    """Per method, the rate with the highest mean accuracy after the last epoch; ties go to the lower mean loss."""
    chosen, table = {}, {}
    for method, group in by_method(results).items():
        scores = {}
        for rate in sorted({result.run.learning_rate for result in group}):
            at_rate = [result for result in group if result.run.learning_rate == rate]
            accuracy = sum(result.accuracy[-1] for result in at_rate) / len(at_rate)
            loss = sum(result.loss[-1] for result in at_rate) / len(at_rate)
            early = sum(result.loss[min(EARLY[-1], len(result.loss)) - 1] for result in at_rate) / len(at_rate)
            scores[rate] = {"accuracy": round(accuracy, 4), "loss": round(loss, 4), "early_loss": round(early, 4)}
        chosen[method] = max(scores, key=lambda rate, s=scores: (s[rate]["accuracy"], -s[rate]["loss"]))  # type: ignore[misc]
        table[method] = scores
    return chosen, table


def run_tuning(options: argparse.Namespace, console: Console) -> None:
    """Choose one learning rate per method and write the configuration file."""
    recipe = Pretraining(epochs=options.pretrain_epochs)
    rates_tried = options.rates or RATES
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.seeds)
    runs = [
        Run(method, rate, seed, n_labels=options.labels, epochs=options.epochs, evaluate_on="tune")
        for seed in seeds
        for rate in rates_tried
        for method in METHODS
    ]
    console.print(f"Tuning: {len(METHODS)} methods x {len(rates_tried)} rates x {options.seeds} seeds.")
    outcome = compute(runs, recipe, options, console)
    chosen, scores = choose_rates(outcome.results)

    console.print("\n[bold]Tuning part, last epoch[/bold]: mean accuracy and loss; * marks the chosen rate")
    table = Table()
    table.add_column("Method")
    for rate in sorted(rates_tried):
        table.add_column(f"{rate:g}", justify="right")
    for method, row in scores.items():
        cells = (
            (f"{score['accuracy']:.1%}\n{score['loss']:.3f}" + (" *" if rate == chosen[method] else ""))
            for rate, score in row.items()
        )
        table.add_row(METHODS[method], *cells, end_section=True)
    console.print(table)

    content: dict[str, Any] = {
        "learning_rates": chosen,
        "tuning": {
            "rule": "highest mean accuracy after the last epoch on the tuning part, ties to the lower mean loss",
            "seeds": list(seeds),
            "labels": options.labels,
            "epochs": options.epochs,
            "early_epoch": min(EARLY[-1], options.epochs),
            "scores": scores,
        },
    }
    header = "# Learning rates of the demo. Written by: python -m experiments.demo --tune\n"
    options.config.parent.mkdir(parents=True, exist_ok=True)
    options.config.write_text(header + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    console.print(f"Learning rates written to {_shown(options.config)}.", soft_wrap=True)


def _tune(options: argparse.Namespace, console: Console) -> None:
    if "vision" in options.parts:
        run_tuning(options, console)
    if "rl" in options.parts:
        from experiments import demo_rl

        rates = options.rates or demo_rl.RATES
        demo_rl.run_tuning(options.out, options.rl_config, options.workers, options.fresh, rates, console)


def _run(options: argparse.Namespace, console: Console) -> None:
    """The parts asked for, and the report, which is written after each so that an interruption leaves one."""
    from experiments.report import write_page

    sections, numbers = [], []
    if "vision" in options.parts:
        sections.append(run_demo(options, console))
        numbers.append(options.out / "results.json")
        write_page(options.out / "report.html", sections)
    if "rl" in options.parts:
        from experiments import demo_rl
        from experiments.report_rl import rl_section

        if sections:
            console.print()
        outcome = demo_rl.run_demo(options.out, options.rl_config, options.workers, options.fresh, console)
        sections.append(rl_section(outcome, _command(options)))
        numbers.append(options.out / "results_rl.json")
        write_page(options.out / "report.html", sections)
    report = options.out / "report.html"
    listed = ", ".join(str(path) for path in numbers)
    console.print(f"[bold]Report:[/bold] {report}   (all numbers: {listed})", soft_wrap=True)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line in ``args`` and return its exit code."""
    options = parse_args(args)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 112))
    try:
        if options.tune:
            _tune(options, console)
        else:
            _run(options, console)
    except KeyboardInterrupt:
        console.print("Interrupted. Finished runs are kept; the same command goes on from there.")
        return 130
    except (FileNotFoundError, ValueError) as error:
        console.print(f"[bold red]Error:[/bold red] {error}", soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
