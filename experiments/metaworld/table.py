"""Runs beside the paper's Tables 23 and 24: ``python -m experiments.metaworld table --runs runs/metaworld``.

Reads the ``metrics.json`` of every finished ``finetune`` run below a folder and writes ``table.md``, ``table.csv`` and
``table.png``. The paper's numbers, and where they are from, are in ``paper_tables.csv``.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_lightning.errors import InputError, MissingInputError
from experiments.runner.cli import in_terminal
from experiments.runner.settings import option, parse_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What marks a ``metrics.json`` as one of ours to read.
EXPERIMENT = "metaworld-finetune"

#: Columns of both tables, as printed.
COLUMNS = (
    "faucet-close-v3",
    "hammer-v3",
    "handle-press-side-v3",
    "peg-unplug-side-v3",
    "push-back-v3",
    "push-v3",
    "push-wall-v3",
    "shelf-place-v3",
    "stick-pull-v3",
    "window-close-v3",
)

LABELS = {
    "scratch": "scratch",
    "fft": "FFT",
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "lora+": "LoRA+",
    "adalora": "AdaLoRA",
    "pissa": "PiSSA",
    "milora": "MiLoRA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora-ga": "LoRA-GA",
    "dora": "DoRA",
    "eva": "EVA",
    "eva-dora": "EVA+DoRA",
}

_PAPER = Path(__file__).with_name("paper_tables.csv")


@dataclass(frozen=True)
class Settings:
    """Which runs, and where to write."""

    runs: str = option("runs/metaworld", "folder with runs of finetune, at any depth")
    out: str | None = option(None, "folder for table.md, table.csv and table.png; RUNS if not given")


@dataclass(frozen=True)
class Cell:
    """Success of one method on one task.

    Attributes:
        success: Mean over seeds of the share of solved episodes, in [0, 1].
        stderr: Standard error of that mean over seeds; None for a single seed, or where none is printed.
        seeds: Number of seeds.
        mean_return: Mean return over seeds; None in the paper.
        val_loss: Mean validation loss after the last update; None in the paper.
    """

    success: float
    stderr: float | None
    seeds: int
    mean_return: float | None = None
    val_loss: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        source: ``"paper"`` or ``"ours"``.
        method: Name, as ``finetune --method`` takes it.
        rank: LoRA rank; None without adapters, or where the best one was taken (Table 23).
        rho: EVA's ρ; None for other methods, and where the paper does not say.
        cells: Task -> result.
        average: Mean over all ten tasks, as printed or computed; None where tasks are missing.
    """

    source: str
    method: str
    rank: int | None
    rho: float | None
    cells: Mapping[str, Cell]
    average: float | None = None

    @property
    def label(self) -> str:
        """The method as the paper writes it."""
        return LABELS[self.method] + (f" ρ={self.rho:g}" if self.rho is not None else "")

    def mean_over(self, tasks: Iterable[str]) -> float | None:
        """Mean success over `tasks`; None where one is missing."""
        values = [self.cells[task].success if task in self.cells else None for task in tasks]
        return None if None in values or not values else statistics.fmean(v for v in values if v is not None)


def paper_rows(table: int) -> list[Row]:
    """The lines of Table 23 or 24, as printed."""
    rows: dict[tuple[str, str], Row] = {}
    lines = [line for line in _PAPER.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    for entry in csv.DictReader(lines):
        if int(entry["table"]) != table:
            continue
        key = entry["method"], entry["rank"]
        row = rows.get(key) or Row("paper", key[0], int(key[1]) if key[1] else None, None, {})
        value, stderr = float(entry["success"]), float(entry["stderr"]) if entry["stderr"] else None
        if entry["task"] == "average":
            row = replace(row, average=value)
        else:
            row = replace(row, cells={**row.cells, entry["task"]: Cell(value, stderr, 3)})
        rows[key] = row
    return list(rows.values())


def read_runs(folder: str | Path) -> list[dict[str, Any]]:
    """The metrics of every finished ``finetune`` run below `folder` that was rolled out, in order of their paths.

    Raises:
        MissingInputError: There is none.
        InputError: A ``metrics.json`` is damaged, or two runs are of the same task, method, rank, ρ and seed.
    """
    found: list[dict[str, Any]] = []
    paths: dict[tuple[Any, ...], Path] = {}
    for file in sorted(Path(folder).rglob("metrics.json")):
        try:
            metrics = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file} is damaged: {error}") from error
        if not isinstance(metrics, dict) or metrics.get("experiment") != EXPERIMENT:
            continue
        if metrics.get("success_rate") is None:  # finetune --eval-episodes 0
            continue
        key = (*_group(metrics), metrics["task"], metrics["seed"])
        if key in paths:
            raise InputError(
                f"{paths[key]} and {file.parent} are both {metrics['method']} on {metrics['task']} with seed "
                f"{metrics['seed']}: keep runs of different settings in different folders"
            )
        paths[key] = file.parent
        found.append(metrics)
    if not found:
        raise MissingInputError(
            f"no finished runs below {folder}: make some with "
            f"python -m experiments.metaworld finetune --output {folder}"
        )
    return found


def our_rows(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One line per method, rank and ρ among `runs`, in the order of `LABELS`."""
    groups: dict[tuple[Any, ...], dict[str, list[Mapping[str, Any]]]] = {}
    for run in runs:
        groups.setdefault(_group(run), {}).setdefault(run["task"], []).append(run)
    rows = []
    for (method, rank, rho), tasks in groups.items():
        cells = {task: _cell(tasks[task]) for task in COLUMNS if task in tasks}
        row = Row("ours", method, rank, rho, cells)
        rows.append(replace(row, average=row.mean_over(COLUMNS)))
    order = list(LABELS)
    return sorted(rows, key=lambda row: (order.index(row.method), row.rank or 0, row.rho or 0.0))


def best_ranks(rows: Sequence[Row]) -> list[Row]:
    """Of each method and ρ the rank of the lowest validation loss over its tasks: not chosen by success."""
    best: dict[tuple[str, float | None], Row] = {}
    for row in rows:
        key = row.method, row.rho
        if key not in best or (len(row.cells), -_loss(row)) > (len(best[key].cells), -_loss(best[key])):
            best[key] = row
    return list(best.values())


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """The tasks that every one of `rows` has, in the paper's order; if they share none, those that any has."""
    shared = [task for task in COLUMNS if all(task in row.cells for row in rows)]
    return shared or [task for task in COLUMNS if any(task in row.cells for row in rows)]


def as_markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """Both tables, the paper's lines and ours below each other, marked in the first column."""
    ours = our_rows(runs)
    tasks = tasks_of(ours)
    measure = (
        "Share of solved episodes (at any step of the episode) after fine-tuning on one CW10 task, mean ± standard "
        "error over seeds."
    )
    sources = (
        "Lines marked *paper* are printed in the paper: 12M or 16M parameters, 2M transitions and 100,000 updates per "
        f"task, three seeds. Lines marked **ours** are measured here: {_conditions(runs)}. They are not comparable as "
        "absolute numbers; what can be compared is the order of methods."
    )
    notes = [measure, sources]
    if len(tasks) < len(COLUMNS):
        names = ", ".join(_short(task) for task in tasks)
        count = f"{len(tasks)} task{'s' * (len(tasks) > 1)}"
        notes.append(f"*Same tasks* is the mean over the {count} run here by every method: {names}.")
    parts = ["# Fine-tuning on CW10: the paper's numbers beside ours", *notes]
    parts.append("## Layout of Table 23: one line per method")
    parts.append("Ours: the rank of the lowest validation loss after the last update.")
    parts.append(_table(_interleaved(paper_rows(23), best_ranks(ours)), tasks, with_rank=False))
    parts.append("## Layout of Table 24: by rank")
    parts.append(_table(_interleaved(paper_rows(24), ours), tasks, with_rank=True))
    return "\n\n".join(parts) + "\n"


def as_csv(runs: Sequence[Mapping[str, Any]]) -> str:
    """Both tables as one cell per line; ``source`` is paper or ours."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["table", "source", "method", "rank", "rho", "task", "success", "stderr", "seeds", "mean_return", "val_loss"]
    )
    ours = our_rows(runs)
    for table, rows in ((23, [*paper_rows(23), *best_ranks(ours)]), (24, [*paper_rows(24), *ours])):
        for row in rows:
            for task, cell in row.cells.items():
                values = (row.rank, row.rho, task, cell.success, cell.stderr, cell.seeds, cell.mean_return)
                writer.writerow([table, row.source, row.method, *map(_plain, values), _plain(cell.val_loss)])
            if row.average is not None:
                writer.writerow([table, row.source, row.method, _plain(row.rank), _plain(row.rho), "average",
                                 _plain(row.average), "", "", "", ""])  # fmt: skip
    return file.getvalue()


def as_figure(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Success of each method over the tasks run here: the paper hollow, ours solid, a dot per task."""
    from matplotlib.figure import Figure

    ours = best_ranks(our_rows(runs))
    tasks = tasks_of(ours)
    paper = {row.method: row for row in paper_rows(23)}
    figure = Figure(figsize=(2.5 + 0.95 * len(ours), 3.8), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(ours):
        printed = paper.get(row.method)
        for shift, line in ((-0.2, printed), (0.2, row)):
            mean = line.mean_over(tasks) if line is not None else None
            if line is None or mean is None:
                continue
            solid = line.source == "ours"
            style: dict[str, Any] = {"color": "#2f7fc1"} if solid else {"fill": False, "hatch": "////"}
            axes.bar(place + shift, mean, width=0.36, edgecolor="#2f7fc1" if solid else "#5b6770", zorder=2, **style)
            values = [line.cells[task].success for task in tasks]
            axes.plot([place + shift] * len(values), values, "o", color="#1c1c1c", markersize=3, alpha=0.5, zorder=3)
    axes.bar(0, 0, fill=False, hatch="////", edgecolor="#5b6770", label="paper (Table 23)")
    axes.bar(0, 0, color="#2f7fc1", label="ours")
    axes.plot([], [], "o", color="#1c1c1c", markersize=3, alpha=0.5, label="one task")
    axes.set_xticks(range(len(ours)), [row.label for row in ours], rotation=20, ha="right")
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("success (share of episodes)")
    axes.set_title(f"CW10, mean over {len(tasks)} task{'s' * (len(tasks) > 1)}", fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
    return figure


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
    description = (__doc__ or "").splitlines()[0].rstrip(".")
    return parse_settings(Settings, "python -m experiments.metaworld table", description, args)


def main(args: Sequence[str] | None = None) -> str:
    """Write the three files and return the Markdown, which is printed too.

    Raises:
        MissingInputError: There are no finished runs.
        InputError: Runs are damaged, or two are of the same settings.
    """
    settings = parse(args)
    runs = read_runs(settings.runs)
    folder = Path(settings.runs if settings.out is None else settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    text = as_markdown(runs)
    (folder / "table.md").write_text(text, encoding="utf-8")
    (folder / "table.csv").write_text(as_csv(runs), encoding="utf-8")
    as_figure(runs).savefig(folder / "table.png", dpi=120)
    print(text)
    print(f"{len(runs)} runs -> {folder / 'table.md'}, {folder / 'table.csv'}, {folder / 'table.png'}")
    return text


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal: one sentence on standard error, and exit status 2, where the input is wrong."""
    return in_terminal(main, args)


def _group(metrics: Mapping[str, Any]) -> tuple[str, int | None, float | None]:
    return metrics["method"], metrics.get("rank"), metrics.get("rho")


def _cell(runs: Sequence[Mapping[str, Any]]) -> Cell:
    successes = [float(run["success_rate"]) for run in runs]
    stderr = statistics.stdev(successes) / len(successes) ** 0.5 if len(successes) > 1 else None
    losses = [run["val_loss"][-1]["val_loss"] for run in runs if run.get("val_loss")]
    returns = statistics.fmean(float(run["mean_return"]) for run in runs)
    return Cell(statistics.fmean(successes), stderr, len(runs), returns, statistics.fmean(losses) if losses else None)


def _loss(row: Row) -> float:
    losses = [cell.val_loss for cell in row.cells.values() if cell.val_loss is not None]
    return statistics.fmean(losses) if losses else float("inf")


def _interleaved(paper: Sequence[Row], ours: Sequence[Row]) -> list[Row]:
    """The paper's lines in their order, ours behind the last line of their method, and ours it does not have last."""
    rows: list[Row] = []
    for index, row in enumerate(paper):
        rows.append(row)
        if index + 1 == len(paper) or paper[index + 1].method != row.method:
            rows += [own for own in ours if own.method == row.method]
    printed = {row.method for row in paper}
    return rows + [row for row in ours if row.method not in printed]


def _table(rows: Sequence[Row], tasks: Sequence[str], with_rank: bool) -> str:
    partial = len(tasks) < len(COLUMNS)
    head = ["", "method", *(["rank"] if with_rank else []), *map(_short, COLUMNS), "Average"]
    head += ["Same tasks"] if partial else []
    lines = [head, ["---"] * len(head)]
    for row in rows:
        ours = row.source == "ours"
        rank = "-" if row.rank is None else str(row.rank)
        label = row.label if with_rank or row.rank is None or not ours else f"{row.label} (r={rank})"
        cells = [_text(row.cells.get(task)) for task in COLUMNS]
        means = [row.average, *([row.mean_over(tasks)] if partial else [])]
        numbers = [*cells, *("" if mean is None else f"{mean:.2f}" for mean in means)]
        if ours:
            label, numbers = f"**{label}**", [f"**{text}**" if text else "" for text in numbers]
        lines.append(["**ours**" if ours else "*paper*", label, *([rank] if with_rank else []), *numbers])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{cell.success:.2f}" + (f" ± {cell.stderr:.2f}" if cell.stderr is not None else "")


def _conditions(runs: Sequence[Mapping[str, Any]]) -> str:
    def span(values: Iterable[Any]) -> str:
        numbers = sorted(set(values))
        return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"

    seeds = [cell.seeds for row in our_rows(runs) for cell in row.cells.values()]
    return (
        f"{span(run['total_parameters'] for run in runs)} parameters, "
        f"{span(run['train_episodes'] for run in runs)} demonstrations of {span(run['horizon'] for run in runs)} steps "
        f"and {span(run['max_steps'] for run in runs)} updates per task, {span(seeds)} seeds, "
        f"{span(run['episodes'] for run in runs)} evaluation episodes each"
    )


def _short(task: str) -> str:
    return task.removesuffix("-v3")


def _plain(value: Any) -> Any:
    return "" if value is None else round(value, 6) if isinstance(value, float) else value
