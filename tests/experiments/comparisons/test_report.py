"""Intervals and sentences of reports, beside SciPy's tests on the same numbers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from eva_lightning.methods import MethodKey
from experiments.comparisons import metaworld, metaworld_report
from experiments.comparisons.evidence import Evidence, Quantity
from experiments.comparisons.report import difference_sentences, remains, significance_sentence
from experiments.runner.results import Results
from experiments.runner.statistics import Interval
from tests.paths import CONFIGS, ROOT

LABELS = {"lora": "LoRA", "dora": "DoRA", "eva": "EVA"}


def evidence(values: dict[tuple[str, str, int], float]) -> Evidence:
    """Runs of (task, method, seed)."""
    rows = [{"task": t, "method": m, "seed": s, "x": x} for (t, m, s), x in values.items()]
    return Evidence(pd.DataFrame(rows), LABELS)


def test_differences_are_taken_within_seed_and_task() -> None:
    # seeds and tasks differ a lot, the methods always by a factor of two
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 0.2, ("b", 1): 0.1}
    found = evidence({(t, m, s): x * f for (t, s), x in values.items() for m, f in (("eva", 0.5), ("lora", 1.0))})
    ratio = found.difference("eva", "lora", Quantity("x", "loss", relative=True))
    assert ratio is not None
    assert ratio.mean == pytest.approx(100 * np.log(0.5))
    assert ratio.half == pytest.approx(0.0, abs=1e-9)
    difference = found.on("a").difference("eva", "lora", Quantity("x", "loss", scale=100))
    assert difference is not None
    assert difference.mean == pytest.approx(-100.0)
    mean = found.means(Quantity("x", "loss"))["lora"]
    assert mean.mean == pytest.approx((0.6 + 1.55) / 2)
    # a seed without one of the runs is left out
    fewer = Evidence(found.runs.iloc[:-1], LABELS).difference("eva", "lora", Quantity("x", "loss"))
    assert fewer == Interval.of([(-0.5 - 0.1) / 2])
    assert found.difference("eva", "dora", Quantity("x", "loss")) is None


def test_what_is_called_significant_is_so_by_the_paired_t_test() -> None:
    draw = np.random.default_rng(1)
    seeds = draw.normal(0, 1, 6)
    samples = {"lora": seeds, "dora": seeds + draw.normal(-0.3, 0.2, 6), "eva": seeds + draw.normal(0, 0.3, 6)}
    found = evidence({("a", m, s): x for m, sample in samples.items() for s, x in enumerate(sample)})
    p = {method: ttest_rel(samples[method], samples["lora"]).pvalue for method in ("dora", "eva")}
    assert p["dora"] < 0.05 / 2 < 0.05 < p["eva"]
    (sentence,) = significance_sentence(found, Quantity("x", "test loss", digits=2), ["dora", "eva"])
    gain = (samples["dora"] - samples["lora"]).mean()
    assert sentence == (
        f"- Test loss: better than LoRA: DoRA ({gain:+.2f}*); worse than LoRA: none; no significant difference: 1 of 2."
    )
    (better,) = significance_sentence(found, Quantity("x", "accuracy", digits=2, higher_is_better=True), ["dora"])
    assert f"better than LoRA: none; worse than LoRA: DoRA ({gain:+.2f}*)" in better
    (line,) = difference_sentences(found, [Quantity("x", "test loss", digits=2)])
    assert line.startswith("- EVA minus LoRA: test loss ")
    assert line.endswith(" (not significant).")


def test_the_star_is_bonferronis_correction() -> None:
    values = [0.9, 1.1, 1.4, 0.6, 1.2, 0.3]
    comparisons = int(0.05 / ttest_1samp(values, 0.0).pvalue)
    assert comparisons > 10
    assert remains(Interval.of(values), comparisons)
    assert not remains(Interval.of(values), comparisons + 1)
    assert not remains(Interval.of([1.0]), 1)


def test_the_report_of_the_published_runs_has_the_published_figures(tmp_path: Path) -> None:
    # docs/metaworld.md was written from docs/metaworld/results.csv by the statistics of an earlier version
    settings = metaworld.parse([f"--config={CONFIGS / 'metaworld' / 'compare.yaml'}", f"--output={tmp_path}"])
    runs = pd.read_csv(ROOT / "docs" / "metaworld" / "results.csv")
    runs["method"] = [MethodKey.parse(text).key for text in runs.pop("variant")]
    losses = {step: runs.pop(f"val_loss_{step}") for step in (0, *settings.val_steps)}
    runs["val_loss"] = [
        [{"updates": step, "val_loss": column[row]} for step, column in losses.items()] for row in runs.index
    ]
    metaworld_report.write(settings, Results(runs, runs.iloc[:0], choices={}))
    rows = {
        tuple(word.strip() for word in line.strip("|").split("|"))[1:]
        for line in (tmp_path / "report.md").read_text().splitlines()
    }
    published = (ROOT / "docs" / "metaworld.md").read_text().splitlines()
    # not the lines beside the paper's, which are of other runs
    tables = [line for line in published if " ± " in line and re.match(r"\| \w", line)]
    assert len(tables) == 4 * 7 + 2 * 7 + 3 * 5  # losses by task, success by definition, differences
    for line in tables:
        cells = tuple(word.strip() for word in line.strip("|").split("|"))[1:]
        assert any(row[: len(cells)] == cells for row in rows), line
