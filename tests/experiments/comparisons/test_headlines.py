"""What a page says first is what its learning rates were chosen by, and it names the command that chose them."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from eva_lightning import plots
from experiments.comparisons import robots_tables
from experiments.comparisons.digits import Digits
from experiments.comparisons.photographs import Photographs
from experiments.comparisons.robots import Robots
from experiments.comparisons.robots_settings import Settings as RobotSettings
from experiments.comparisons.tuned import TunedComparison
from experiments.demo import Settings
from experiments.report import epochs, page
from tests.paths import CONFIGS

PARTS: dict[str, tuple[type[TunedComparison], str, Callable[[dict[str, Any]], tuple[float, ...]]]] = {
    "demo.yaml": (Photographs, epochs.CRITERION, lambda row: (row["loss"], -row["accuracy"])),
    "digits.yaml": (Digits, epochs.CRITERION, lambda row: (row["loss"], -row["accuracy"])),
    "demo_rl.yaml": (Robots, robots_tables.CRITERION, lambda row: (row["loss_left"],)),
}


@pytest.mark.parametrize("name", sorted(PARTS))
def test_committed_rates_are_the_best_by_what_the_page_says_first(name: str) -> None:
    kind, criterion, score = PARTS[name]
    content = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    assert criterion in kind.rule
    assert content["tuning"]["rule"] == kind.rule
    for method, rate in content["learning_rates"].items():
        rows = [row for row in content["tuning"]["scores"] if row["method"] == method]
        assert rate == min(rows, key=score)["lr"]


def test_the_headline_of_epochs_has_the_criterion_of_every_method_the_best_first() -> None:
    rows = [
        {"method": method, "seed": seed, "lr": 1e-3, "trainable_parameters": 1, "setup_seconds": 1.0,
         "loss": [2.0, loss + seed / 10], "accuracy": [0.1, 0.5]}
        for method, loss in (("lora", 0.8), ("eva", 0.6)) for seed in (0, 1)
    ]  # fmt: skip
    found = epochs.compare(pd.DataFrame(rows)).headline
    assert epochs.CRITERION in found
    assert found.index("EVA 0.650 ± ") < found.index("LoRA 0.850 ± ")


def test_the_headline_of_robots_has_the_criterion_the_difference_and_the_episodes() -> None:
    left = {"fft": (0.4, 0.6), "lora": (0.5, 0.7), "eva": (0.3, 0.52)}
    after = pd.DataFrame(
        {"task": "push-v3", "method": method, "seed": seed, "successes": [True, False],
         "val_loss": [{"updates": 0, "val_loss": 0.1}, {"updates": 50, "val_loss": 0.1 * share}]}
        for method, shares in left.items() for seed, share in enumerate(shares)
    )  # fmt: skip
    before = pd.DataFrame([{"task": "push-v3", "method": "none", "seed": 0, "successes": [False, False]}])
    against, losses, solved = robots_tables.headlines(RobotSettings(), "push-v3", before, after)
    assert robots_tables.CRITERION in against
    assert robots_tables.CRITERION in losses
    difference = np.subtract(left["eva"], left["lora"])
    assert f"{difference.mean():+.3f} ± " in against
    assert losses.index("EVA 0.410") < losses.index("FFT 0.500") < losses.index("LoRA 0.600")
    assert solved == "push, episodes solved at any step: pre-trained 0 of 2, FFT 2 of 4, LoRA 2 of 4, EVA 2 of 4."


def _strokes(figure: page.Figure) -> set[str]:
    svg = base64.b64decode(figure.source.partition(",")[2]).decode()
    return set(re.findall(r"stroke: (#[0-9a-f]{6})", svg)) & set(plots.PALETTE)


def test_a_method_has_the_same_colour_in_all_parts_of_a_page() -> None:
    steps = RobotSettings().noted_updates
    robots = pd.DataFrame(
        {"task": "push-v3", "method": method, "seed": 0, "val_loss": [{"updates": n, "val_loss": 0.1} for n in steps]}
        for method in ("lora", "eva")
    )
    photographs = pd.DataFrame(
        {"method": method, "seed": 0, "lr": 1e-3, "trainable_parameters": 1, "setup_seconds": 1.0,
         "loss": [2.0, 1.0], "accuracy": [0.1, 0.5]}
        for method in ("lora", "eva")
    )  # fmt: skip
    expected = {plots.PALETTE[epochs.COLOURED.index(label)] for label in ("LoRA", "EVA")}
    assert _strokes(robots_tables.curve_figure(RobotSettings(), "push-v3", robots)) == expected
    assert _strokes(epochs.compare(photographs).figures[0]) == expected


@pytest.mark.parametrize(
    ("name", "seeds", "usual", "command"),
    [
        ("vision", [1000], 2, "--parts vision --seeds 1 --tune"),
        ("vision", [1000, 1001], 2, "--parts vision --tune"),
        ("rl", [1000], None, "--parts rl --tune"),
        ("digits", [], 5, "--parts digits --tune"),
    ],
    ids=["one-seed", "usual-seeds", "no-seeds", "unknown"],
)
def test_the_command_that_chose_rates_has_the_seeds_they_were_chosen_with(
    name: str, seeds: list[int], usual: int | None, command: str
) -> None:
    # what this call is asked for besides has no part in it
    found = Settings(seeds=7, epochs=9).tuned_by(name, {"seeds": seeds}, usual)
    assert found == f"python -m experiments.demo {command}"


def test_the_committed_configuration_names_its_command() -> None:
    text = (CONFIGS / "demo.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    command = Settings().tuned_by("vision", content["tuning"], 2)
    assert text.splitlines()[0].endswith(f"Learning rates written by: {command}")
    assert command.endswith("--seeds 1 --tune")


def test_tuning_names_the_seeds_that_it_is_asked_for() -> None:
    assert Settings(seeds=3, tune=True).tuned_by("vision", None, 2).endswith("--parts vision --seeds 3 --tune")
    assert Settings(seeds=2, tune=True).tuned_by("vision", None, 2).endswith("--parts vision --tune")
