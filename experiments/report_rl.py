"""The robot part of the demo's page."""

from __future__ import annotations

import base64
import os
import platform
from collections.abc import Sequence
from html import escape

import numpy as np

from eva_lightning import plots
from experiments.demo_rl import FILMED, Outcome, caution, counted, film_sentence
from experiments.demo_rl_runs import METHODS, versions
from experiments.demo_rl_summary import Row, before_success, losses_of, rows, short
from experiments.report import embed, html_table, processor


def rl_section(outcome: Outcome, command: str) -> str:
    """What the page says about the robot tasks.

    Args:
        outcome: What the demo found.
        command: The command that repeats it.
    """
    setup, config = outcome.config.setup, outcome.config
    table = rows(outcome.results)
    names = " and ".join(short(task) for task in setup.tasks)
    summary = (
        "A small Decision Transformer (it reads returns-to-go, states, actions and rewards, and predicts actions) was "
        "pre-trained on demonstrations of 40 Meta-World tasks and comes with the project. It is fine-tuned on "
        f"{names}, which it has never seen, from {setup.demonstrations} demonstrations each by a scripted expert, by "
        f"full fine-tuning, by LoRA and by EVA with rank redistribution (ρ={setup.rho:g}); the adapters share a "
        f"budget of {setup.rank} ranks per layer. Then it acts in the simulator."
    )
    note = (
        f"Validation loss: squared error of the actions on {setup.held_out} held-out demonstrations per task, mean ± "
        f"standard error over {counted(setup.seeds, 'seed')}. Trained: parameters, with the action head. Train: median "
        f"seconds of {setup.updates} updates, with EVA's initialisation and the validation losses. {caution(outcome)}"
    )
    parts = [
        "<h1>EVA on robot tasks</h1>",
        f"<p>{summary}</p>",
        _facts(outcome),
        "<h2>Results</h2>",
        _table(table, outcome),
        f'<p class="note">{escape(note)}</p>',
        "<h2>Validation loss</h2>",
        f'<div class="figures">{_curves(outcome)}</div>',
        '<p class="note">Line: mean over seeds; band: one standard error.</p>',
        "<h2>Before and after</h2>",
        _film(outcome),
        *_ranks(outcome),
        "<h2>Learning rates</h2>",
        _tuning(config.tuning, config.learning_rates),
        "<h2>Repeat it</h2>",
        f"<pre>{escape(command)}</pre>",
    ]
    return "".join(parts)


def _facts(outcome: Outcome) -> str:
    setup, n = outcome.config.setup, len(outcome.results)
    fresh = "all computed now" if not outcome.n_cached else f"{outcome.n_cached} of {n} finished by an earlier call"
    entries = {
        "Machine": f"{processor()}, {os.cpu_count()} logical cores, {platform.system()}, "
        f"Python {platform.python_version()}",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "Seeds": f"{setup.seeds}, from 0: each draws the batches, LoRA's random matrices and {setup.episodes} goals",
        "Starting network": f"{setup.checkpoint}; a card beside it says how it was made",
        "Demonstrations": f"scripted experts, {setup.horizon} steps, noise {setup.noise:g} on the actions, seed 0",
        "Fine-tuning runs": f"{n}, {fresh}",
        "Time of this call": f"{outcome.seconds:.0f} s",
    }
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items()) + "</dl>"


def _table(table: Sequence[Row], outcome: Outcome) -> str:
    shown = outcome.config.setup.shown_updates
    body = []
    for task in dict.fromkeys(row.task for row in table):
        here = [row for row in table if row.task == task]
        start = before_success(outcome.before, task)
        before = [f"{here[0].losses[0].mean:.4f}", *("" for _ in shown[1:])]
        body.append(
            [f"<b>{escape(short(task))}</b>, pre-trained", "", "", "", *before,
             f"<b>{start.text()}</b><br><small>{start.count()}</small>"]
        )  # fmt: skip
        body += [
            [escape(row.name), f"{row.learning_rate:g}", f"{row.trained:,.0f}", f"{row.train_seconds:.1f} s", "",
             *(row.losses[updates].text(4).replace(" ", "<br>") for updates in shown[1:]),
             f"<b>{row.success.text()}</b><br><small>{row.success.count()}</small>"]
            for row in here
        ]  # fmt: skip
    return html_table(["Method", "Rate", "Trained", "Train", *(f"Update {n}" for n in shown), "Success"], body)


def _curves(outcome: Outcome) -> str:
    figures = []
    for task in outcome.config.setup.tasks:
        figure = plots.learning_curves(
            losses_of(outcome.results, task),
            "squared error of actions",
            xlabel="updates",
            title=short(task),
            order=list(METHODS.values()),
            x=outcome.config.setup.noted_updates,
        )
        figures.append(embed(figure, f"Validation loss of every method on {short(task)}"))
    return "".join(figures)


def _film(outcome: Outcome) -> str:
    if outcome.film is None:
        return f"<p>{escape(outcome.no_film)}.</p>"
    data = base64.b64encode(outcome.film.path.read_bytes()).decode()
    text = escape(film_sentence(outcome.film, outcome.config.setup.updates))
    return (
        f'<figure style="max-width:640px"><img alt="The same episode before and after fine-tuning" '
        f'src="data:image/gif;base64,{data}"><figcaption>{text}</figcaption></figure>'
    )


def _ranks(outcome: Outcome) -> list[str]:
    figures = []
    for task in outcome.config.setup.tasks:
        runs = [r for r in outcome.results if r.run.task == task and r.run.method == FILMED and r.ranks]
        if not runs:
            return []
        names = dict.fromkeys(name for run in runs for name in run.ranks)
        ranks = {name: float(np.mean([run.ranks.get(name, 0) for run in runs])) for name in names}
        figure = plots.rank_heatmap(ranks, outcome.config.setup.rank, f"Ranks on {short(task)}, mean over seeds")
        figures.append(embed(figure, f"Heat map of EVA's ranks per block and layer on {short(task)}"))
    return ["<h2>What EVA found</h2>", f'<div class="figures">{"".join(figures)}</div>']


def _tuning(tuning: dict[str, object], rates: dict[str, float]) -> str:
    text = "<p>Learning rates: " + ", ".join(f"{METHODS[m]} {rates[m]:g}" for m in METHODS) + ". "
    scores, seeds = tuning.get("scores"), tuning.get("seeds")
    if not isinstance(scores, dict) or not isinstance(seeds, list):
        return text + "The configuration does not say how they were chosen.</p>"
    tried = sorted({rate for row in scores.values() for rate in row})
    body = [
        [
            escape(METHODS[method]),
            *((f"{'*' if rates[method] == rate else ''}{row[rate]:.3f}" if rate in row else "–") for rate in tried),
        ]
        for method, row in scores.items()
    ]
    text += (
        f"One per method by the same rule ({escape(str(tuning['rule']))}), with seeds {seeds[0]} to {seeds[-1]} and "
        "demonstrations that the results above do not use. Command: "
        "<code>python -m experiments.demo --parts rl --tune</code>.</p>"
    )
    return text + html_table(["Method", *(f"{rate:g}" for rate in tried)], body)
