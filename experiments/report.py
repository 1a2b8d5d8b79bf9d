"""One self-contained HTML page about a demo: what was done, on what, the tables, the figures, how to repeat it.

The page holds its pictures (SVG) and style sheet itself, so the file can be moved or mailed.
"""

from __future__ import annotations

import base64
import io
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eva_lightning import plots
from eva_lightning.errors import InputError
from eva_lightning.vision.digits import PIXEL_MEAN, PIXEL_STD, load_digits_split
from experiments.demo_runs import METHODS, Pretrained, Pretraining, RunResult
from experiments.demo_summary import (
    MethodSummary,
    PairedDifference,
    by_method,
    curves,
    paired_differences,
    same_rate_sentences,
    summarise,
    verdict_sentence,
)

_STYLE = """
:root { --ink: #20262b; --soft: #5b6770; --line: #dfe3e6; --paper: #ffffff; --tint: #f5f7f8; --accent: #2f7fc1; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--tint); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto 1.6rem; padding: 2.2rem 2.4rem 3rem; background: var(--paper); }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .8rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 75ch; }
.note { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .45rem .55rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
td small { color: var(--soft); }
td.best { background: #eaf3fb; }
td b { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0; font-size: .94rem; }
dt { color: var(--soft); } dd { margin: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); gap: 1.2rem 1.6rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .3rem; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem;
      overflow-x: auto; }
ul { margin: .5rem 0; padding-left: 1.2rem; }
"""

_RESULTS_NOTE = """<p class="note">Upper line: held-out cross-entropy; lower line: accuracy. Shaded: lowest mean loss of
the column, which says nothing about significance. Rate: learning rate. Trained: parameters,
with head and biases. Set-up: median seconds
from the pre-trained model to the first training step, with Lightning's own start, which is all that full fine-tuning
needs.</p>"""
_PAIRED_NOTE = """<p class="note">EVA minus LoRA on the same labels and batches: negative loss means that EVA is better.
A difference counts as clear above two standard errors.</p>"""
_DATA_NOTE = """<p class="note">scikit-learn's digits, which are the test part of "Optical Recognition of Handwritten
Digits" (UCI). The class of an image stands above it.</p>"""


@dataclass(frozen=True)
class Facts:
    """Everything about a demo that is not a result: where, with what, how long, and how to repeat it."""

    command: str
    machine: str
    versions: dict[str, str]
    seeds: Sequence[int]
    pretraining: Pretraining
    pretrained: Pretrained
    pretrained_was_cached: bool
    n_cached: int
    seconds: float
    tuning: dict[str, Any]

    @classmethod
    def collect(cls, **known: Any) -> Facts:
        """``known`` and the machine this runs on."""
        machine = (
            f"{processor()}, {os.cpu_count()} logical cores, {platform.system()}, Python {platform.python_version()}"
        )
        return cls(machine=machine, **known)


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def embed(figure: Figure, alt: str, caption: str = "") -> str:
    """HTML of ``figure`` as an SVG inside the page."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "eva_lightning"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    legend = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">{legend}</figure>'


def html_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Cells are HTML; a cell that starts with ``*`` is marked as the best of its column."""
    rows = [
        "".join(f'<td class="best">{c[1:]}</td>' if c.startswith("*") else f"<td>{c}</td>" for c in row) for row in body
    ]
    heads = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


def _results_table(rows: Sequence[MethodSummary]) -> str:
    epochs = list(rows[0].loss)
    best = {epoch: min(row.loss[epoch].mean for row in rows) for epoch in epochs}
    head = ["Method", "Rate", "Trained", "Set-up", *(f"Epoch {epoch}" for epoch in epochs)]
    body = []
    for row in rows:
        cells = [
            f"{'*' if row.loss[epoch].mean == best[epoch] else ''}"
            f"<b>{row.loss[epoch].text(3)}</b><br><small>{row.accuracy[epoch].text(1, 100)} %</small>"
            for epoch in epochs
        ]
        parameters = f"{row.trainable_parameters.mean:,.0f}"
        body.append([escape(row.name), f"{row.learning_rate:g}", parameters, f"{row.setup_seconds:.2f} s", *cells])
    return html_table(head, body)


def _paired_table(rows: Sequence[PairedDifference]) -> str:
    epochs = list(rows[0].loss)
    body = [
        [
            escape(row.name),
            *(
                f"<b>{row.loss[epoch].text(3, sign=True)}</b><br>"
                f"<small>{row.accuracy[epoch].text(1, 100, sign=True)} points<br>"
                f"lower loss on {row.wins[epoch]} of {row.n_pairs} seeds</small>"
                for epoch in epochs
            ),
        ]
        for row in rows
    ]
    return html_table(["Difference", *(f"Epoch {epoch}" for epoch in epochs)], body)


def _tuning_section(tuning: dict[str, Any], rows: Sequence[MethodSummary]) -> str:
    text = "<p>Learning rates: " + ", ".join(f"{escape(row.name)} {row.learning_rate:g}" for row in rows) + ". "
    scores = tuning.get("scores")
    if not scores:
        return text + "The configuration does not say how they were chosen.</p>"
    seeds = tuning["seeds"]
    text += (
        f"One per method, chosen from the grid below by the same rule for all ({escape(tuning['rule'])}), with "
        f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]}) and on images that the results above do not use. Each cell: "
        "accuracy and loss there. Command: <code>python -m experiments.demo --tune</code>.</p>"
    )
    rates = sorted({rate for row in scores.values() for rate in row})
    chosen = {row.method: row.learning_rate for row in rows}
    body = [
        [
            escape(METHODS[method]),
            *(
                f"{'*' if chosen.get(method) == rate else ''}{row[rate]['accuracy']:.1%}"
                f"<br><small>{row[rate]['loss']:.3f}</small>"
                if rate in row
                else "–"
                for rate in rates
            ),
        ]
        for method, row in scores.items()
    ]
    figures = [
        embed(
            plots.rate_sensitivity(
                {METHODS[method]: {rate: row[rate][key] for rate in row} for method, row in scores.items()},
                "cross-entropy (nats)",
                title=f"Loss on the tuning part after epoch {epoch}",
            ),
            f"Loss against learning rate after epoch {epoch}",
            "Mean over the tuning seeds; a ring marks the lowest.",
        )
        for key, epoch in (("early_loss", tuning["early_epoch"]), ("loss", tuning["epochs"]))
    ]
    table = html_table(["Method", *(f"{rate:g}" for rate in rates)], body)
    text += "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in same_rate_sentences(tuning)) + "</ul>"
    return f'{text}{table}<div class="figures" style="margin-top:1.2rem">{"".join(figures)}</div>'


def _curve_figures(results: Sequence[RunResult]) -> str:
    groups = by_method(results)
    figures = []
    for quantity, label, percent in (("loss", "cross-entropy (nats)", False), ("accuracy", "accuracy", True)):
        lines = {METHODS[method]: curves(group, quantity) for method, group in groups.items()}
        title = f"Held-out {quantity}"
        figure = plots.learning_curves(lines, label, title=title, percent=percent, order=list(METHODS.values()))
        figures.append(embed(figure, f"Learning curves: held-out {quantity} per epoch"))
    return "".join(figures)


def _decomposition_figures(runs: Sequence[RunResult]) -> str:
    names = list(runs[0].eva["explained_variance_ratio"])
    ranks = {name: float(np.mean([run.eva["ranks"].get(name, 0) for run in runs])) for name in names}
    short = {name: name.removeprefix("model.blocks.") for name in names}
    first = runs[0]
    curve = {name: [(int(t), float(q)) for t, q in points] for name, points in first.eva["convergence"].items()}
    figures = [
        embed(
            plots.rank_heatmap(ranks, first.run.rank, "Ranks of EVA ρ=2, mean over seeds"),
            "Heat map of the ranks per block and layer",
            f"Without redistribution every layer has rank {first.run.rank}. Red: more, blue: fewer.",
        ),
        embed(
            plots.rank_bars(
                {short[n]: r for n, r in first.eva["ranks"].items()}, first.run.rank, "Ranks of EVA ρ=2, first seed"
            ),
            "Bar chart of the rank of every layer",
            "Names: block, then layer. The sum is the same budget that LoRA has.",
        ),
        embed(
            plots.spectra(first.eva["explained_variance_ratio"], "Spectra of the layer inputs, first seed"),
            "Explained-variance ratio of every component and layer",
            "One line per layer. The ranks keep the largest shares over all layers.",
        ),
    ]
    if any(curve.values()):
        figures.append(
            embed(
                plots.convergence(curve, 0.99, "Convergence of the streaming SVD, first seed"),
                "Captured variance per layer as minibatches come in",
                f"The decomposition used {first.eva['n_batches']} minibatches and took {first.eva['seconds']:.2f} s.",
            )
        )
    return "".join(figures)


def _sample_figures() -> str:
    figures = []
    for classes, title in (
        ((0, 1, 2, 3, 4), "Pre-training: digits 0 to 4"),
        ((5, 6, 7, 8, 9), "Fine-tuning: digits 5 to 9"),
    ):
        images, labels = load_digits_split(classes).train.tensors
        per_class = [(labels == i).nonzero().squeeze(1)[:4] for i in range(len(classes))]
        chosen = [int(per_class[i][row]) for row in range(4) for i in range(len(classes))]
        pixels = (images[chosen, 0] * PIXEL_STD + PIXEL_MEAN).numpy()
        captions = [str(classes[int(labels[i])]) for i in chosen]
        figures.append(embed(plots.image_grid(pixels, captions, columns=5, title=title), f"Sample scans. {title}"))
    return "".join(figures)


def _facts_list(facts: Facts, results: Sequence[RunResult]) -> str:
    n = len(results)
    fresh = "all computed now" if not facts.n_cached else f"{facts.n_cached} of {n} finished by an earlier call"
    origin = "from the cache; training took" if facts.pretrained_was_cached else "trained now in"
    seeds = f"{len(facts.seeds)} ({facts.seeds[0]} to {facts.seeds[-1]})"
    entries = {
        "Machine": facts.machine,
        "Versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        "Seeds": f"{seeds}: each draws the labels, the head, the batch order and LoRA's random matrices",
        "Starting model": f"{facts.pretrained.accuracy:.1%} held out on digits 0 to 4 after "
        f"{facts.pretraining.epochs} epochs; {origin} {facts.pretrained.seconds:.0f} s",
        "Fine-tuning runs": f"{n}, {fresh}",
        "Time of this call": f"{facts.seconds:.0f} s",
    }
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items()) + "</dl>"


def _comparison(results: Sequence[RunResult]) -> list[str]:
    """Table, paired differences and learning curves of one set of runs."""
    differences = paired_differences(results)
    verdicts = "".join(f"<li>{escape(verdict_sentence(difference))}</li>" for difference in differences)
    parts = [_results_table(summarise(results)), _RESULTS_NOTE]
    if differences:
        parts += [
            "<h3>EVA against LoRA, seed by seed</h3>",
            _paired_table(differences),
            f"<ul>{verdicts}</ul>",
            _PAIRED_NOTE,
        ]
    parts += ["<h3>Learning curves</h3>", f'<div class="figures">{_curve_figures(results)}</div>']
    return [*parts, '<p class="note">Line: mean over seeds; band: one standard error.</p>']


def vision_section(results: Sequence[RunResult], facts: Facts, careful: Sequence[RunResult] = ()) -> str:
    """What the page says about the digits.

    Args:
        results: the runs at tuned learning rates.
        facts: everything else.
        careful: the adapters' runs at a lower rate, the same for all.

    Raises:
        InputError: there are no results.
    """
    if not results:
        raise InputError("results must hold at least one run, got none")
    rows = summarise(results)
    run, n_seeds = results[0].run, len(facts.seeds)
    redistributed = by_method(results).get("eva_rho2", [])
    summary = (
        "A small Vision Transformer was pre-trained on real 8×8 scans of the digits 0 to 4. It was then fine-tuned on "
        f"{run.n_labels} labelled scans of the digits 5 to 9 by full fine-tuning, by LoRA and by EVA, without (ρ=1) "
        f"and with (ρ=2) rank redistribution; the adapters share one budget, {run.rank} ranks per layer. Every method "
        f"saw the same {n_seeds} draws of labels and the same batches; the figures are held-out means over these "
        "seeds with standard errors."
    )
    parts = [
        "<h1>EVA on handwritten digits</h1>",
        f"<p>{summary}</p>",
        _facts_list(facts, [*results, *careful]),
        "<h2>Results at tuned learning rates</h2>",
        *_comparison(results),
    ]
    if careful:
        parts += [
            f"<h2>Results at a lower rate, {careful[0].run.learning_rate:g} for every adapter</h2>",
            (
                "<p>A rate that is too low for these ten epochs, as when the budget is short or nobody tuned: how far "
                "does each initialisation get? Part of a lead here is scale: the rows of EVA's A have length 1, those "
                "of LoRA's random A about 0.58, so that the same learning rate moves the function further.</p>"
            ),
            *_comparison(careful),
        ]
    if redistributed:
        parts += ["<h2>What EVA found</h2>", f'<div class="figures">{_decomposition_figures(redistributed)}</div>']
    parts += [
        "<h2>Data</h2>",
        f'<div class="figures">{_sample_figures()}</div>',
        _DATA_NOTE,
        "<h2>Learning rates</h2>",
        _tuning_section(facts.tuning, rows),
        "<h2>Repeat it</h2>",
        f"<pre>{escape(facts.command)}</pre>",
        '<p class="note">With <code>--fresh</code> nothing is taken from an earlier call.</p>',
    ]
    return "".join(parts)


def page(sections: Sequence[str]) -> str:
    """The whole page as a string."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>EVA demo</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(f'<main>{section}</main>' for section in sections)}</body></html>\n"
    )


def write_page(path: Path, sections: Sequence[str]) -> Path:
    """Write the page to ``path``, in one go, and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(page(sections), encoding="utf-8")
    temporary.replace(path)
    return path
