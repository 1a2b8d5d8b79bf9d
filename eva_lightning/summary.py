"""What an initialisation shows: a progress bar while it streams and one short table at the end."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import lightning.pytorch as pl
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import nn

from eva_lightning.adapters import Injection
from eva_lightning.adapters.frozen_layers import by_training
from eva_lightning.adapters.targets import linear_layers, summarised
from eva_lightning.output import can_animate, show
from eva_lightning.rank_plan import Plan
from eva_lightning.state import EVAState
from eva_lightning.streaming_options import StreamingOptions


def say_summary(
    plan: Plan,
    module: nn.Module,
    before: int,
    after: int,
    injection: Injection | None,
    skipped: Mapping[str, str] | None = None,
    max_batches: int = 0,
) -> None:
    """Say what was done: layers, ranks, trainable parameters, minibatches, seconds; and what was left as it is."""
    state = plan.state
    adapted = [rank for rank in state.ranks.values() if rank > 0]
    median = statistics.median(adapted) if adapted else 0
    spread = f"{min(adapted, default=0)} / {median:g} / {max(adapted, default=0)}"
    rows = [
        ("layers", f"{len(state.ranks)}, of which {len(state.ranks) - len(adapted)} removed (rank 0)"),
        ("ranks min/median/max", f"{spread}, sum {sum(adapted)}"),
        ("trainable parameters", f"{after:,} (with uniform ranks {before:,})"),
    ]
    if injection is None:
        rows.append(("adapters", f"those of the module, r = {statistics.mean(plan.uniform.values()):g}"))
    else:
        rows += _of_injection(injection, module)
    rows += [
        ("minibatches", f"{state.n_batches}, {_why_stopped(state, max_batches)}"),
        ("seconds", f"{state.seconds:.2f}"),
    ]
    if plan.capped:
        rows.append(("capped", f"{len(plan.capped)} layers are narrower than r * rho, e.g. {plan.capped[0]}"))
    if plan.untouched:
        fate = "keep their random A" if state.ranks[plan.untouched[0]] else "have lost their adapters"
        rows.append(("not run", f"{len(plan.untouched)} layers {fate}, e.g. {plan.untouched[0]}"))
    if skipped:
        name, reason = next(iter(skipped.items()))
        rows.append(("left as is", f"{len(skipped)} LoRA layers, e.g. {name}: {reason}"))
    show("EVA initialisation", rows)


def _of_injection(injection: Injection, module: nn.Module) -> list[tuple[str, str]]:
    """What the module is now: flags may have changed since the injection, and layers may have gone."""
    full, part, frozen = by_training(module, [*injection.head, *injection.frozen_head])
    trains = f"head {', '.join(full)} trains in full" if full else "no head is trained whole"
    rows = [("adapters", f"injected; {trains}")]
    if part:
        rows.append(("head in part", f"{', '.join(part)}: some of its parameters are frozen"))
    if frozen:
        rows.append(("frozen head", f"{', '.join(frozen)}: trains if named with head="))
    if injection.left_frozen:
        where = summarised(injection.left_frozen, [*linear_layers(module), *injection.targets])
        many = len(injection.left_frozen)
        rows.append(("left frozen", f"{where} ({many} layers, frozen before fit); adapt_frozen=True adapts them"))
    return rows


def _why_stopped(state: EVAState, max_batches: int) -> str:
    share, what = sum(state.converged.values()) / max(1, len(state.converged)), "layers"
    if state.meta.get("selected"):  # the paper's algorithm
        share, what = int(state.meta["selected_converged"]) / int(state.meta["selected"]), "components"
    if share == 1:
        return f"all {what} converged"
    reason = "the most allowed" if state.n_batches >= max_batches else "all there are"
    return f"{share:.0%} of the {what} converged" if share >= float(state.meta.get("delta", 1)) else reason


def shows_progress(trainer: pl.Trainer) -> bool:
    """Whether this process of a Trainer is the one that draws progress bars, if any does."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


@contextmanager
def streaming_progress(shown: bool, options: StreamingOptions) -> Iterator[ReportBatch]:
    """A bar over EVA's minibatches; yields what to tell it."""
    with progress_bar(shown, "EVA: streaming minibatches", options.limit) as (progress, task):
        yield ReportBatch(progress, task, "components" if options.algorithm == "paper" else "layers")


@contextmanager
def counting_progress(shown: bool, description: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar over `total` things; yields what to call after each."""
    with progress_bar(shown, description, total) as (progress, task):
        yield lambda: progress.advance(task)


@contextmanager
def progress_bar(shown: bool, description: str, total: int) -> Iterator[tuple[Progress, TaskID]]:
    """A rich progress bar, if it is to be shown and there is something to draw it on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not (shown and can_animate()), transient=True) as progress:
        yield progress, progress.add_task(description, total=total)


class ReportBatch:
    """Moves the bar by one minibatch."""

    def __init__(self, progress: Progress, task: TaskID, what: str) -> None:
        self._progress, self._task, self._what = progress, task, what

    def __call__(self, n_batches: int, share_converged: float) -> None:
        self._progress.update(
            self._task,
            completed=n_batches,
            description=f"EVA: streaming minibatches, {share_converged:.0%} of the {self._what} converged",
        )
