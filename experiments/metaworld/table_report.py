"""Tables 23 and 24 of the paper with lines of our own, as Markdown, CSV and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from eva_lightning import plots
from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.files import only_process, writable_folder, write_text
from eva_lightning.methods import METHODS, MethodKey
from eva_lightning.ours import claim
from eva_lightning.rl.tasks import CW10
from experiments.metaworld.finetune import EXPERIMENT
from experiments.metaworld.success import EXPERTS_NOTE, PAPER_EPISODES, PAPER_NOTE, PAPERS, Definition, definitions
from experiments.metaworld.table import Settings
from experiments.runner.run_folder import metrics_below
from experiments.runner.statistics import BRACKETS, PLUS_MINUS, Interval, Range, iqm, over_seeds, t_quantile
from experiments.runner.tables import as_markdown

#: Columns of both tables, in the paper's order.
COLUMNS = tuple(sorted(CW10))

_PAPER = Path(__file__).with_name("paper_tables.csv")
_PAPER_SEEDS = 3
_GROUP = ["method", "rank", "rho"]


@dataclass(frozen=True, eq=False)
class Row:
    """One line of a table.

    Attributes:
        source: ``"paper"`` or ``"ours"``.
        method: Name, as ``finetune --method`` takes it.
        rank: LoRA rank; None without adapters, or where the best one was taken (Table 23).
        rho: EVA's ρ; None for other methods, and where the paper does not say.
        cells: Task -> share of solved episodes, in [0, 1], over seeds.
        average: Mean over all ten tasks, as printed or computed; None where tasks are missing.
        runs: Our runs; without any for the paper.
        success: The definition of success; the paper does not say.
    """

    source: str
    method: str
    rank: int | None
    rho: float | None
    cells: Mapping[str, Interval]
    average: float | None = None
    runs: pd.DataFrame = field(default_factory=pd.DataFrame)
    success: Definition = PAPERS

    @property
    def tasks(self) -> set[str]:
        """The tasks that it is of, with or without a figure."""
        return set(self.cells) if self.runs.empty else set(self.runs["task"])

    @property
    def label(self) -> str:
        """The method, with ρ where it is not 2."""
        return METHODS[self.method].label if self.rho is None else MethodKey(self.method, self.rho).label

    def mean_over(self, tasks: Sequence[str]) -> float | None:
        """Mean success over `tasks`; None where one is missing."""
        values = [self.cells[task].mean for task in tasks if task in self.cells]
        return sum(values) / len(values) if values and len(values) == len(tasks) else None

    def iqm_over(self, tasks: Sequence[str]) -> Range | None:
        """Interquartile mean over our runs on `tasks`; None for the paper, which prints means alone."""
        if self.mean_over(tasks) is None or self.runs.empty:
            return None
        chosen = self.runs[self.runs["task"].isin(tasks)].dropna(subset=[self.success.rate])
        return iqm(chosen, self.success.rate).get(self.method)

    @property
    def val_loss(self) -> float:
        """Mean over tasks of the validation loss after the last step."""
        return float(self.runs.groupby("task")["val_loss"].mean().mean())


def paper_rows(table: int) -> list[Row]:
    """The lines of Table 23 or 24; standard errors over three seeds, as printed, become intervals."""
    printed = pd.read_csv(_PAPER, comment="#").query("table == @table")
    rows = []
    for (method, rank), lines in printed.groupby(["method", "rank"], sort=False, dropna=False):
        values = lines.set_index("task")
        halves = t_quantile(_PAPER_SEEDS - 1) * values["stderr"]
        average = values["success"].pop("average")
        tasks = values.index.drop("average")
        cells = {task: Interval(float(values["success"][task]), float(halves[task]), _PAPER_SEEDS) for task in tasks}
        rows.append(Row("paper", method, None if pd.isna(rank) else int(rank), None, cells, float(average)))
    return rows


def read_runs(folder: str | Path) -> pd.DataFrame:
    """The metrics of every finished ``finetune`` run below `folder` that was rolled out, in order of their paths.

    ``val_loss`` is the validation loss after the last step. A definition of success that a run was made without is NaN.

    Raises:
        MissingInputError: There is none.
        InputError: A ``metrics.json`` is damaged, or two runs are of the same task, method, rank, ρ and seed.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for place, metrics in metrics_below(folder):
        success = {each.rate: metrics.get(each.rate) for each in definitions()}
        # without a success rate: finetune --eval-episodes 0
        if metrics.get("experiment") != EXPERIMENT or all(rate is None for rate in success.values()):
            continue
        if metrics.get("rho_tuned"):
            # one line of the method, whatever tuning chose for each task and rank, as in the paper (section G)
            metrics = {**metrics, "rho": None}
        key = tuple(metrics[name] for name in (*_GROUP, "task", "seed"))
        if key in found:
            raise InputError(
                f"{found[key]['path']} and {place} are both {metrics['method']} on {metrics['task']} with seed "
                f"{metrics['seed']}: keep runs of different settings in different folders"
            )
        found[key] = {**metrics, **success, "val_loss": metrics["val_loss"][-1]["val_loss"], "path": place}
    if not found:
        raise MissingInputError(
            f"no finished runs below {folder}: make some with "
            f"python -m experiments.metaworld finetune --output {folder}"
        )
    return pd.DataFrame(found.values()).astype({each.rate: float for each in definitions()})


def our_rows(runs: pd.DataFrame, success: Definition = PAPERS) -> list[Row]:
    """One line per method, rank and ρ among `runs`, in the order of the method registry."""
    rows = []
    for (method, rank, rho), group in runs.groupby(_GROUP, dropna=False):
        by_task = over_seeds(group.dropna(subset=[success.rate]), success.rate, by="task")
        cells = {task: by_task[task] for task in COLUMNS if task in by_task}
        row = Row(
            "ours", method, None if pd.isna(rank) else int(rank), None if pd.isna(rho) else rho, cells,
            runs=group, success=success,
        )  # fmt: skip
        rows.append(replace(row, average=row.mean_over(COLUMNS)))
    order = list(METHODS)
    return sorted(rows, key=lambda row: (order.index(row.method), row.rank or 0, row.rho or 0.0))


def best_ranks(rows: Sequence[Row]) -> list[Row]:
    """Of each method and ρ the rank of the lowest validation loss over its tasks: not chosen by success."""
    best: dict[tuple[str, float | None], Row] = {}
    for row in sorted(rows, key=lambda row: (-len(row.tasks), row.val_loss)):
        best.setdefault((row.method, row.rho), row)
    return [row for row in rows if row in best.values()]


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """The tasks that every one of `rows` has, in the paper's order; if they share none, those that any has."""
    shared = [task for task in COLUMNS if all(task in row.tasks for row in rows)]
    return shared or [task for task in COLUMNS if any(task in row.tasks for row in rows)]


def as_report(runs: pd.DataFrame, first: str = PAPERS.name) -> str:
    """Both tables in Markdown, the paper's lines and ours below each other, marked in the first column.

    Args:
        runs: From :func:`read_runs`.
        first: Definition of success that stands directly below the paper's line; the other one follows.
    """
    ours = [our_rows(runs, success) for success in definitions(first)]
    tasks = tasks_of(ours[0])
    parts = [
        "# Fine-tuning on CW10: the paper's numbers beside ours",
        _notes(runs, tasks),
        "## Layout of Table 23: one line per method",
        "Ours: the rank of the lowest validation loss after the last step.",
        as_markdown(_frame(_interleaved(paper_rows(23), *map(best_ranks, ours)), tasks)),
        "## Layout of Table 24: by rank",
        as_markdown(_frame(_interleaved(paper_rows(24), *ours), tasks)),
    ]
    return "\n\n".join(parts) + "\n"


def _notes(runs: pd.DataFrame, tasks: Sequence[str]) -> str:
    count = f"{len(tasks)} task{'s' * (len(tasks) > 1)}"
    measure = (
        "Share of solved episodes after fine-tuning on one CW10 task, mean over seeds; ours once still solved at the "
        "last step of the episode, and once solved at any of its steps. "
        f"{PLUS_MINUS} The paper prints standard errors over three seeds, which are multiplied by "
        f"{t_quantile(_PAPER_SEEDS - 1):.2f} here. {BRACKETS}"
    )
    sources = (
        "Lines marked *paper* are printed in the paper: 12M or 16M parameters, 2M transitions and 100,000 steps per "
        f"task, three seeds. Lines marked **ours** are measured here: {_conditions(runs)}. They are not comparable as "
        "absolute numbers; what can be compared is the order of methods."
    )
    same = (
        f"*Same tasks* is the mean, and *IQM* the interquartile mean, over the {count} run here by every method: "
        f"{', '.join(map(_short, tasks))}."
    )
    return "\n\n".join([measure, f"{PAPER_NOTE} {PAPER_EPISODES} {EXPERTS_NOTE}", sources, same])


def _interleaved(paper: Sequence[Row], ours: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """The paper's lines in their order, ours behind those of their method, and ours that it does not have last.

    `others` are ours by the other definition of success, in the same order: each stands below its like.
    """
    methods = dict.fromkeys([*(row.method for row in paper), *(row.method for row in ours)])
    both = [row for pair in zip(ours, others, strict=True) for row in pair]
    return [row for method in methods for row in (*paper, *both) if row.method == method]


def _frame(rows: Sequence[Row], tasks: Sequence[str]) -> pd.DataFrame:
    lines = {}
    for row in rows:
        rank = "" if row.rank is None else f" (r={row.rank})"
        ours = f"**ours** {row.label}{rank}, {row.success.title}"
        name = ours if row.source == "ours" else f"*paper* {row.label}{rank}"
        lines[name] = {
            **{_short(task): row.cells.get(task) for task in COLUMNS},
            "Average": row.average,
            "Same tasks": row.mean_over(tasks),
            "IQM": row.iqm_over(tasks),
        }
    return pd.DataFrame.from_dict(lines, orient="index").astype(object)


def as_cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Both tables with one cell per line; ``source`` is paper or ours, ``half`` half the width of the interval.

    ``solved_at`` is the definition of success of our lines: any step or last step.
    """
    ours = [our_rows(runs, success) for success in definitions(PAPERS.name)]
    best = [row for rows in ours for row in best_ranks(rows)]
    means = runs.groupby([*_GROUP, "task"], dropna=False)[["mean_return", "val_loss"]].mean()
    lines = []
    for table, rows in ((23, [*paper_rows(23), *best]), (24, [*paper_rows(24), *ours[0], *ours[1]])):
        for row in rows:
            line = {"table": table, "source": row.source, "method": row.method, "rank": row.rank, "rho": row.rho}
            line["solved_at"] = row.success.title if row.source == "ours" else None
            for task, value in row.cells.items():
                cell = {"task": task, "success": value.mean, "half": value.half, "seeds": value.n}
                if row.source == "ours":
                    of_task = row.runs[row.runs["task"] == task]
                    cell |= {name: of_task[name].mean() for name in means.columns}
                lines.append({**line, **cell})
            if row.average is not None:
                lines.append({**line, "task": "average", "success": row.average})
    return pd.DataFrame(lines).astype({"rank": "Int64", "seeds": "Int64"}).round(6)


def as_figure(runs: pd.DataFrame, first: str = PAPERS.name) -> Figure:
    """Success of each method over the tasks run here: the paper hollow, ours solid by the definition `first` and light
    by the other, a dot per task."""
    chosen, other = definitions(first)
    ours, others = best_ranks(our_rows(runs, chosen)), best_ranks(our_rows(runs, other))
    tasks = tasks_of(ours)
    paper = {row.method: row for row in paper_rows(23)}
    figure = Figure(figsize=(2.5 + 0.95 * len(ours), 3.8), layout="constrained")
    axes = figure.add_subplot()
    hollow: dict[str, Any] = {"fill": False, "hatch": "////", "edgecolor": "#5b6770"}
    solid: dict[str, Any] = {"color": "#2f7fc1", "edgecolor": "#2f7fc1"}
    light: dict[str, Any] = {"color": "#b5d3ec", "edgecolor": "#2f7fc1"}
    dots: dict[str, Any] = {"color": "#1c1c1c", "markersize": 3, "alpha": 0.5}
    for place, (row, again) in enumerate(zip(ours, others, strict=True)):
        lines = ((-0.27, paper.get(row.method), hollow), (0.0, row, solid), (0.27, again, light))
        for shift, line, style in lines:
            mean = None if line is None else line.mean_over(tasks)
            if line is None or mean is None:
                continue
            axes.bar(place + shift, mean, width=0.25, zorder=2, **style)
            values = [line.cells[task].mean for task in tasks]
            axes.plot([place + shift] * len(values), values, "o", zorder=3, **dots)
    axes.bar(0, 0, label="paper (Table 23)", **hollow)
    axes.bar(0, 0, label=f"ours, {chosen.title}", **solid)
    axes.bar(0, 0, label=f"ours, {other.title}", **light)
    axes.plot([], [], "o", label="one task", **dots)
    axes.set_xticks(range(len(ours)), [row.label for row in ours], rotation=20, ha="right")
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("success (share of episodes)")
    axes.set_title(f"CW10, mean over {len(tasks)} task{'s' * (len(tasks) > 1)}", fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
    return figure


def write_report(settings: Settings) -> str:
    """Write the three files; returns the Markdown, which is printed too."""
    runs = read_runs(settings.runs)
    folder = writable_folder(settings.runs if settings.out is None else settings.out)
    claim(folder, ("table.md", "table.csv", "table.png"), "choose another --out")
    with only_process(folder / ".table.lock", f"another process is writing tables to {folder}"):
        return _write_tables(runs, folder, settings.success)


def _write_tables(runs: pd.DataFrame, folder: Path, first: str) -> str:
    text = as_report(runs, first)
    write_text(folder / "table.md", text)
    write_text(folder / "table.csv", as_cells(runs).to_csv(index=False))
    plots.save(as_figure(runs, first), folder / "table.png", dpi=120)
    print(text)
    print(f"{len(runs)} runs -> {folder / 'table.md'}, {folder / 'table.csv'}, {folder / 'table.png'}")
    return text


def _conditions(runs: pd.DataFrame) -> str:
    def span(values: Iterable[Any]) -> str:
        numbers = sorted(set(values))
        return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"

    seeds = runs.groupby([*_GROUP, "task"], dropna=False).size()
    return (
        f"{span(runs['total_parameters'])} parameters, {span(runs['train_episodes'])} demonstrations of "
        f"{span(runs['horizon'])} steps and {span(runs['max_steps'])} steps per task, {span(seeds)} seeds, "
        f"{span(runs['episodes'])} evaluation episodes each"
    )


def _short(task: str) -> str:
    return task.removesuffix("-v3")
