"""The page on any finished runs: a section for each task, and what was left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eva_lightning import ours, plots
from eva_lightning.errors import InputError
from experiments.report import page
from experiments.report.epochs import in_order
from experiments.report.found_runs import FoundRun, find_runs
from experiments.report.of_runs import Settings
from experiments.report.ranks import rank_figure
from experiments.report.run_groups import Group, OfTask, by_task, results_table, verdicts

#: Most lines of a figure: as many as there are colours.
_LINES = len(plots.PALETTE)
#: Most sentences on folders that are left out.
_SENTENCES = 20


def report(settings: Settings) -> Path:
    """Write the page, and say on the terminal what is left out.

    Raises:
        InputError: None of the folders has a finished run, or something of somebody else's is in the way.
    """
    out = Path(settings.out)
    ours.refuse_others(out.parent, (out.name,), "choose another --out")
    found = find_runs(settings.runs)
    if not found.runs:
        others = len(found.left_out) - 1
        more = f" (and {page.counted(others, 'other folder')})" if others else ""
        raise InputError(f"there is no finished run to report on: {found.left_out[0]}{more}", setting="runs")
    left_out = list(found.left_out)
    tasks = by_task(found.runs)
    left_out += [sentence for each in tasks for sentence in each.repeated]
    sections = [_section(each, settings.maps) for each in tasks]
    if left_out:
        sections.append(_left_out(left_out))
    ours.claim(out.parent, (out.name,), "choose another --out")
    page.write_page(out, settings.title, sections)
    for sentence in left_out[:_SENTENCES]:
        print(f"left out: {sentence}")
    if len(left_out) > _SENTENCES:
        print(f"left out: {len(left_out) - _SENTENCES} more")
    print(f"{page.counted(sum(len(each.runs) for each in tasks), 'run')} on {page.counted(len(tasks), 'task')}: {out}")
    return out


def _section(of_task: OfTask, most_maps: int) -> page.Section:
    maps, unshown = _rank_maps(of_task, most_maps)
    weights = of_task.weights
    body = page.render(
        "runs.html",
        facts=_facts(of_task),
        table=results_table(of_task),
        weights=weights,
        notes=_notes(of_task.runs),
        curves=list(_curve_figures(of_task)),
        maps=maps,
        unshown=unshown,
    )
    said = (*verdicts(of_task), *([f"Weights: {weights}."] if weights else []))
    return page.Section(of_task.task, body, said, _data(of_task))


def _facts(of_task: OfTask) -> dict[str, str]:
    folders = [run.folder for run in of_task.runs]
    places = dict.fromkeys(str(folder.parent) for folder in folders)
    common = ", ".join(f"{name} {value}" for name, value in of_task.common.items() if name != "weights")
    devices = sorted({str(run.metrics["device"]) for run in of_task.runs if "device" in run.metrics})
    return {
        "Runs": f"{len(folders)}, in {', '.join(list(places)[:3])}" + (" and others" if len(places) > 3 else ""),
        **({"Device": page.enumerated(devices)} if devices else {}),
        **({"Judged on": of_task.judged_on} if of_task.judged_on else {}),
        **({"Settings of all": common} if common else {}),
    }


def _notes(runs: Sequence[FoundRun]) -> list[str]:
    """What is to be known of runs, with how many it concerns."""
    counts: dict[str, int] = {}
    for run in runs:
        for note in run.notes:
            counts[note] = counts.get(note, 0) + 1
    return [f"{number} of {len(runs)} runs: {note}." for note, number in counts.items()]


def _curve_figures(of_task: OfTask) -> Iterator[page.Figure]:
    """Figures of few lines each, of groups that were measured at the same epochs or steps."""
    for what in dict.fromkeys(name for run in of_task.runs for name in run.curves):
        alike: dict[tuple[float, ...], dict[str, np.ndarray]] = {}
        for group in of_task.groups:
            times, values = _shared(group, what)
            if len(times) > 1:
                alike.setdefault(times, {})[group.name] = values
        for times, lines in alike.items():
            names = list(lines)
            for start in range(0, len(names), _LINES):
                yield _curve_figure(of_task, what, times, {name: lines[name] for name in names[start : start + _LINES]})


def _shared(group: Group, what: str) -> tuple[tuple[float, ...], np.ndarray]:
    """When all runs of a group were measured, and the values ``(runs, times)``."""
    curves = [dict(run.curves[what]) for run in group.whole if what in run.curves]
    times = tuple(sorted(set.intersection(*map(set, curves)))) if curves else ()
    return times, np.array([[curve[time] for time in times] for curve in curves])


def _curve_figure(of_task: OfTask, what: str, times: tuple[float, ...], lines: Mapping[str, np.ndarray]) -> page.Figure:
    is_image = of_task.runs[0].is_of_images
    unit, when = ("cross-entropy (nats)", "epoch") if is_image else ("squared error of the actions", "step")
    title = f"{of_task.task}: {what}"
    figure = plots.learning_curves(lines, unit, xlabel=when, title=title, x=times)
    last = in_order({name: float(values[:, -1].mean()) for name, values in lines.items()}, ".4g")
    alt = f"{title} by {when}; after the last one, the lowest first: {last}"
    return page.drawn(figure, alt, "Line: mean over seeds; band: 95% interval.")


def _rank_maps(of_task: OfTask, most: int) -> tuple[list[page.Figure], int]:
    """Maps of the groups whose ranks differ between layers, one for all that have the same, and how many are not
    drawn: ranks depend on model and data, and runs at other learning rates have them too."""
    uneven = [group for group in of_task.groups if any(len(set(run.ranks.values())) > 1 for run in group.runs)]
    alike: dict[tuple[tuple[str, float], ...], list[Group]] = {}
    for group in uneven:
        alike.setdefault(tuple(_mean_ranks(group).items()), []).append(group)
    figures = []
    for means, groups in list(alike.items())[:most]:
        ranks = dict(means)
        others = f" and {page.counted(len(groups) - 1, 'other row')}" if len(groups) > 1 else ""
        title = f"{of_task.task}: ranks of {groups[0].name}{others}"
        figures.append(rank_figure([ranks], round(sum(ranks.values()) / len(ranks), 2), title))
    return figures, len(alike) - len(figures)


def _mean_ranks(group: Group) -> dict[str, float]:
    """Layer -> mean over runs, as far as a map shows it."""
    runs = [run.ranks for run in group.runs if run.ranks]
    names = dict.fromkeys(name for ranks in runs for name in ranks)
    return {name: round(float(np.mean([ranks.get(name, 0) for ranks in runs])), 2) for name in names}


def _data(of_task: OfTask) -> tuple[page.Data, ...]:
    rows: list[dict[str, Any]] = [
        {"folder": str(run.folder), "task": run.task, "method": run.method, "seed": run.seed, **run.settings,
         **run.values, "curves": {name: list(map(list, points)) for name, points in run.curves.items()},
         "metrics": dict(run.metrics)}
        for run in of_task.runs
    ]  # fmt: skip
    name = re.sub(r"\W+", "-", of_task.task)
    return page.runs_as_data(f"runs-{name}", f"{page.counted(len(rows), 'run')} on {of_task.task}", rows)


def _left_out(sentences: Sequence[str]) -> page.Section:
    more = len(sentences) - _SENTENCES
    shown = [f"{sentence}." for sentence in sentences[:_SENTENCES]] + ([f"{more} more."] if more > 0 else [])
    number = page.counted(len(sentences), "folder")
    return page.Section("Left out", page.render("left_out.html", sentences=shown), (f"{number}: see below.",))
