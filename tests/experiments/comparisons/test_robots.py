"""The robots comparison: its tables, its film, and what is committed for it."""

from __future__ import annotations

import io
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console
from scipy import stats

from eva_lightning.rl.module import read_checkpoint
from eva_lightning.rl.tasks import MT40
from experiments.comparisons import robots, robots_film
from experiments.comparisons.robots_film import Film, Made, goal_to_film, learnt_goals, make_film
from experiments.comparisons.robots_tables import results_table
from experiments.runner import tables
from tests.paths import CONFIGS

TASK = "handle-press-side-v3"


def _film(size: int = 32) -> Film:
    return Film("a.ckpt", "b.ckpt", "EVA", TASK, seed=0, goal=0, target_return=1.0, horizon=12, size=size)


def test_tables_agree_with_scipy() -> None:
    def run(method: str, seed: int, loss: float, *solved: bool) -> dict[str, object]:
        losses = [{"updates": 0, "val_loss": 1.0}, {"updates": 1, "val_loss": loss}]
        return {
            "task": TASK, "method": method, "lr": 1e-3, "seed": seed, "val_loss": losses, "successes": list(solved),
            "final_successes": [solved[0], False],            "trainable_parameters": 1234, "train_seconds": 2.0,
        }  # fmt: skip

    after = pd.DataFrame([run("lora", 0, 0.4, True, False), run("lora", 1, 0.6, True, True)])
    before = pd.DataFrame([run("none", 0, 1.0, False, False), run("none", 1, 1.0, False, True)])
    options = robots.Settings(tasks=(TASK,), updates=1)
    cells = results_table(options, TASK, before, after).cells
    t = stats.t.ppf(0.975, 1)
    assert cells.loc["LoRA", "Step 1"] == f"0.5000\n± {t * stats.sem([0.4, 0.6]):.4f}"
    wilson = stats.binomtest(3, 4).proportion_ci(method="wilson")
    last = stats.binomtest(2, 4).proportion_ci(method="wilson")
    assert cells.loc["LoRA", "Success"] == (
        f"any 3 of 4\n[{wilson.low:.2f}, {wilson.high:.2f}]\nlast 2 of 4\n[{last.low:.2f}, {last.high:.2f}]"
    )
    assert cells.loc["LoRA", "Trained"] == "1,234\n2.0 s"
    assert "any 1 of 4" in cells.loc["pre-trained", "Success"]
    older = after.drop(columns="final_successes")
    assert results_table(options, TASK, before, older).cells.loc["LoRA", "Success"].endswith("]\nlast –")


def test_score_is_the_share_of_the_loss_that_is_left() -> None:
    comparison = robots.Robots(robots.Settings(tune="unused.yaml"))
    assert comparison.score({"val_loss": [{"val_loss": 0.5}, {"val_loss": 0.1}]}) == pytest.approx((0.2,))


def test_steps_that_are_shown_are_measured() -> None:
    for updates in (1, 2, 7, 50):
        settings = robots.Settings(updates=updates)
        assert set(settings.shown_updates) <= set(settings.noted_updates)
        assert {0, updates} <= set(settings.shown_updates)


def test_filmed_goal_is_the_first_that_was_learnt() -> None:
    assert goal_to_film([True, False, False, False], [True, False, True, True]) == 2
    assert learnt_goals([True, False, False, False], [True, False, True, True]) == [2, 3]
    assert goal_to_film([True, False, False], [False, False, False]) == 0


def _pictures(grey: int) -> np.ndarray:
    """Three that differ, above all in the upper half: GIFs keep no two alike."""
    pictures = np.full((3, 32, 32, 3), grey, np.uint8)
    pictures[:, :16] += np.array([0, 60, 120], np.uint8)[:, None, None, None]
    return pictures


def test_a_film_that_fails_costs_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise OSError("the driver went away")

    monkeypatch.setattr(robots_film, "rendering_backend", lambda: "egl")
    monkeypatch.setattr(robots_film, "roll_one", broken)
    assert make_film(_film(), tmp_path / "film.gif", 0) == Made(None, reason="no video: the driver went away")
    assert make_film(_film(size=0), tmp_path / "film.gif", 0) == Made(None, reason="no video: film_size is 0")
    assert not list(tmp_path.iterdir())


def test_a_film_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def roll(film: Film, checkpoint: str) -> tuple[np.ndarray, bool]:
        calls.append(checkpoint)
        return _pictures(40 * len(calls)), checkpoint == "b.ckpt"

    file, mp4 = tmp_path / "film.gif", tmp_path / "film.mp4"
    monkeypatch.setattr(robots_film, "rendering_backend", lambda: "egl")
    monkeypatch.setattr(robots_film, "roll_one", roll)
    for _ in range(2):
        assert make_film(_film(), file, 0) == Made((False, True), mp4, file.with_suffix(".png"))
    assert calls == ["a.ckpt", "b.ckpt"]
    pictures = iio.imread(mp4, plugin="FFMPEG")
    assert pictures.shape == iio.imread(file).shape == (3, 20 + 32, 32 + 4 + 32, 3)
    assert abs(int(pictures[0, -4, 4, 0]) - 40) < 15
    assert abs(int(pictures[0, -4, -4, 0]) - 80) < 15
    assert np.array_equal(iio.imread(file.with_suffix(".png"))[20:, :32], _pictures(40)[-1])
    # one of the files was lost, or changed: both are drawn again
    mp4.unlink()
    assert make_film(_film(), file, 0).mp4 == mp4
    assert len(calls) == 4
    make_film(_film(size=16), file, 0)
    assert len(calls) == 6


def test_without_ffmpeg_there_is_a_gif_and_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robots_film, "rendering_backend", lambda: "egl")
    monkeypatch.setattr(robots_film, "roll_one", lambda film, checkpoint: (_pictures(40), True))
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", _no_ffmpeg)
    for _ in range(2):
        made = make_film(_film(), tmp_path / "film.gif", 0)
        assert (made.solved, made.mp4) == ((True, True), None)
        assert made.reason.startswith("no MP4: there is no ffmpeg here")
    assert iio.imread(tmp_path / "film.gif").shape == (3, 52, 68, 3)
    assert not (tmp_path / "film.mp4").exists()


def _no_ffmpeg() -> str:
    raise RuntimeError("No ffmpeg exe could be found.")


@pytest.mark.parametrize("task", ["push-v3", "faucet-close-v3", "peg-unplug-side-v3"])
def test_tables_fit_a_hundred_columns(task: str) -> None:
    options = robots.Settings(tasks=(task,))
    losses = [{"updates": step, "val_loss": 0.1234} for step in options.noted_updates]
    rows = [
        {
            "task": task, "method": method, "lr": 0.0003, "seed": seed, "val_loss": losses, "successes": [True] * 10,
            "final_successes": [False] * 10, "trainable_parameters": 607236, "train_seconds": 10.25,
        }
        for method in robots.METHODS for seed in range(options.seeds)
    ]  # fmt: skip
    before = pd.DataFrame([{**row, "method": "none"} for row in rows[:2]])
    table = results_table(options, task, before, pd.DataFrame(rows))
    printed = io.StringIO()
    console = Console(width=250, file=printed)
    tables.show(table.cells, table.caption, notes=(), console=console, lines=True)
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    assert max(map(len, lines)) <= 100
    assert "607,236" in printed.getvalue()


def test_committed_configuration_is_tuned_apart_from_what_it_is_used_for() -> None:
    content = yaml.safe_load((CONFIGS / "demo_rl.yaml").read_text(encoding="utf-8"))
    tuning = content["tuning"]
    assert not set(tuning["seeds"]) & set(range(content["seeds"]))
    assert tuning["demonstrations_seed"] != 0
    assert set(content["learning_rates"]) == set(robots.METHODS)
    for method, lr in content["learning_rates"].items():
        rows = [row for row in tuning["scores"] if row["method"] == method]
        assert lr == min(rows, key=lambda row: row["loss_left"])["lr"]


def test_shipped_checkpoint_is_small_and_says_what_it_knows() -> None:
    import torch

    settings = robots.Settings()
    assert settings.init.stat().st_size < 3_000_000
    found = read_checkpoint(settings.init)
    assert sorted(found["about"]["tasks"]) == sorted(MT40)
    assert not set(settings.tasks) & set(found["about"]["tasks"])
    assert {value.dtype for value in found["state_dict"].values()} == {torch.float16}
    assert settings.init.with_suffix(".md").is_file()
