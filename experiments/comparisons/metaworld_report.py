"""The report of the Meta-World comparison: ``results.csv``, ``report.md`` and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from pandas import DataFrame

from eva_lightning.files import file_digest
from experiments.comparisons.evidence import Evidence, Quantity
from experiments.comparisons.figures import colours_of, curves_figure, differences_figure
from experiments.comparisons.metaworld import Settings
from experiments.comparisons.report import (
    against_reference,
    cell,
    difference_sentences,
    differences_table,
    means_table,
    significance_sentence,
    sizes_table,
    table,
    tuning,
    write_report,
)
from experiments.comparisons.search_report import at_best_rank, by_rank, chosen, write_candidates
from experiments.metaworld.success import DEFINITIONS, EXPERTS_NOTE, PAPER_EPISODES, PAPER_NOTE, definitions
from experiments.runner.comparison import Results
from experiments.runner.statistics import Interval, iqm
from experiments.runner.tables import NOTHING

#: Definition of success -> the quantity.
SUCCESS = {
    each.name: Quantity(each.rate, f"success {each.phrase}", digits=2, higher_is_better=True)
    for each in DEFINITIONS.values()
}

SIZES = {
    "trained parameters": ("trainable_parameters", 0),
    "ranks in all": ("total_rank", 0),
    "initialisation, s": ("init_seconds", 2),
    "training, s": ("train_seconds", 1),
    "rollouts, s": ("rollout_seconds", 1),
}


def write(settings: Settings, results: Results) -> Path:
    """Write all files; returns the report."""
    evidence = Evidence.of(settings, with_both(at_best_rank(settings, results)), "val_loss", "updates")
    success = [SUCCESS[each.name] for each in definitions(settings.success)] if settings.eval_episodes else []
    by_task = {task: evidence.on(task) for task in settings.task_names}
    losses = {step: Quantity(f"val_loss_{step}", str(step), digits=4) for step in settings.val_steps}
    changes = [
        Quantity(each.column, f"loss after {step} steps", "%", 1, relative=True) for step, each in losses.items()
    ]
    quantities = [*changes, *success]
    others = evidence.against_reference
    figures = {"losses": curves_figure(by_task, losses, "step", "squared error of the actions", log_y=True)}
    if success:
        figures["success"] = success_figure(evidence, by_task, success[0])
    if evidence.adapters:
        figures["differences"] = differences_figure(evidence, quantities, evidence.adapters)
    lines = difference_sentences(evidence, quantities)
    for quantity in quantities:
        lines += significance_sentence(evidence, quantity, others)
    context = {
        "wanted": sum(len(by_task) if part.task is None else 1 for part in settings.parts) * settings.seeds,
        "digest": file_digest(settings.init)[:12],
        "in_short": "\n".join(lines),
        "tuning": tuning(settings, results, lambda score: f"{math.exp(score):.4f}"),
        "chosen": chosen(settings, results) if settings.searches or settings.select != "loss" else "",
        "by_rank": _by_rank(settings, results),
        "adapter_ranks": " and ".join(map(str, sorted(settings.ranks or (settings.rank,)))),
        "losses": {task: _losses(found, list(losses.values())) for task, found in by_task.items()},
        "success": {each.title: _success(evidence, by_task, each) for each in success},
        "paper_note": f"{PAPER_NOTE} {PAPER_EPISODES} {EXPERTS_NOTE}",
        "pairs": dict(_pair(evidence, by_task, quantities, *pair) for pair in evidence.pairs),
        "differences": against_reference(evidence, quantities, others),
        "sizes": sizes_table(evidence, SIZES),
    }
    write_candidates(settings, results, Path(settings.output) / "choices.csv")
    return write_report("metaworld", settings, results, evidence, figures, context)


def with_both(runs: DataFrame) -> DataFrame:
    """`runs` with a column of each definition of success; runs made earlier may lack one."""
    return runs.assign(**{each.rate: math.nan for each in DEFINITIONS.values() if each.rate not in runs})


def success_figure(evidence: Evidence, by_task: Mapping[str, Evidence], success: Quantity) -> Figure:
    """Bars of mean success by method with 95% intervals, one group per task and one for their mean."""
    groups = {**by_task, "mean": evidence} if len(by_task) > 1 else by_task
    missing = Interval(math.nan, None, 0)
    means = {group: part.means(success) for group, part in groups.items()}
    found = DataFrame(
        {
            label: {group: part.get(key, missing) for group, part in means.items()}
            for key, label in evidence.labels.items()
        }
    )
    heights, halves = found.map(lambda each: each.mean), found.map(lambda each: each.half or 0.0)
    figure = Figure(figsize=(1.6 + 2.1 * len(groups), 3.6), layout="constrained")
    axes = figure.add_subplot()
    colours = list(colours_of(list(evidence.labels)).values())
    heights.plot.bar(ax=axes, yerr=halves, color=colours, width=0.84, rot=0, capsize=2, ylim=(0, 1.03))
    axes.set_ylabel(f"{success.title} (share of episodes)")
    axes.grid(axis="y", alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
    return figure


def _by_rank(settings: Settings, results: Results) -> dict[str, str]:
    """Of both definitions of success, where ranks are tuned apart."""
    if "rank" not in settings.tune_per or not settings.eval_episodes:
        return {}
    columns = {"at any step of an episode": "success_rate", "at its last step": "final_success_rate"}
    return {title: by_rank(settings, with_both(results.runs), column) for title, column in columns.items()}


def _losses(found: Evidence, losses: Sequence[Quantity]) -> dict[str, str]:
    start = found.runs.loc[found.runs["method"] != "scratch", "val_loss_0"]
    return {"before": f"{start.iloc[0]:.4f}" if len(start) else "unknown", "table": means_table(found, losses, "steps")}


def _success(evidence: Evidence, by_task: Mapping[str, Evidence], success: Quantity) -> str:
    columns = [found.means(success) for found in (*by_task.values(), evidence)]
    middle = iqm(success.of(evidence.runs), "value")
    rows = {
        label: [
            *(cell(means.get(key), success.digits) or NOTHING for means in columns),
            middle[key].text(success.digits) if key in middle else NOTHING,
        ]
        for key, label in evidence.labels.items()
    }
    return table("", [*by_task, "mean", "IQM"], rows)


def _pair(
    evidence: Evidence, by_task: Mapping[str, Evidence], quantities: Sequence[Quantity], first: str, second: str
) -> tuple[str, str]:
    rows = {name: (found, first, second) for name, found in {**by_task, "all tasks": evidence}.items()}
    return f"{evidence.labels[first]} minus {evidence.labels[second]}", differences_table(quantities, rows)
