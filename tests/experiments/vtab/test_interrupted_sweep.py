"""A small grid, tiny, by real processes: killed in the middle, resumed, the same by both backends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from experiments.vtab.sweep_settings import command_line
from tests.experiments.runner.test_interruption import is_running, journal, wait_for
from tests.experiments.vtab.sweep_fakes import all_runs, make_tasks, sweep, words
from tests.paths import ROOT

CHECKOUT = ROOT
GRID = (
    "--tasks kitti,dmlab --methods eva --lrs 1e-3,1e-2 --ranks 2,4 --rhos 2 --tune-seeds 3 --final-seeds 2 "
    "--grid configs/vtab/grid_paper.yaml"
)
RUNS = 2 * (2 * 2 * 3 + 2)


def killed_and_resumed(root: Path, output: Path, backend: str) -> None:
    """A sweep that loses a worker, then its own life, and is resumed with another number of workers."""
    arguments = words(root, output, f"{GRID} --backend {backend}")
    command = [sys.executable, "-m", "experiments.vtab", "sweep", *arguments]
    first = subprocess.Popen(
        [*command, "--workers", "2"], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for(lambda: len(journal(output, "end")) >= 4 or first.poll() is not None, 600)
        victim = journal(output, "begin")[-1][1]
        os.kill(victim, signal.SIGKILL)
        # another process has taken its place, and the runs go on
        wait_for(lambda: len({pid for _, pid in journal(output, "begin")}) >= 3 or first.poll() is not None, 600)
        wait_for(lambda: len(journal(output, "end")) >= 12 or first.poll() is not None, 600)
        assert first.poll() is None, first.communicate()[0]
        assert command_line([*arguments, "--workers", "1"]) == 2  # in use
    finally:
        first.kill()
        out, _ = first.communicate()
    assert re.search(r"a worker process was .*; its run starts again", out), out
    workers = {pid for _, pid in journal(output, "begin")}
    wait_for(lambda: not any(map(is_running, workers)), 60)  # the workers die with the sweep
    assert 11 <= len(list(output.glob("*/*/metrics.json"))) < RUNS
    second = subprocess.run([*command, "--workers", "1"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"taking over from process {first.pid} on " in second.stdout
    assert f"{RUNS} of {RUNS} runs are done" in second.stdout


def finished(root: Path, output: Path) -> pd.DataFrame:
    """All runs of the sweep, by asking for its report."""
    return all_runs(sweep(words(root, output, f"{GRID} --report")))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_sweep_by_both_backends_killed_and_resumed(tmp_path: Path) -> None:
    make_tasks(tmp_path / "data")
    results = {}
    for backend in ("local", "ray"):
        output = tmp_path / backend
        killed_and_resumed(tmp_path / "data", output, backend)
        runs = finished(tmp_path / "data", output)
        assert Counter(zip(runs["task"], runs["phase"], strict=True)) == {
            ("kitti", "tune"): 12, ("kitti", "final"): 2, ("dmlab", "tune"): 12, ("dmlab", "final"): 2,
        }  # fmt: skip
        # Each run was brought to its end once. Only those that a signal hit were begun again: one by the worker's, two
        # by the sweep's.
        ends = Counter(run for run, _ in journal(output, "end"))
        begins = Counter(run for run, _ in journal(output, "begin"))
        assert set(begins) == set(runs["id"])
        assert max(ends.values()) == 1
        assert sum(begins.values()) - RUNS <= 3
        assert RUNS - sum(ends.values()) <= 3  # killed after the metrics, before the line
        # one EVA state per task and training split
        computed = [line.split()[0] for line in (output / "states/computed.log").read_text().splitlines()]
        assert len(computed) == len(set(computed)) == 4
        assert len(list((output / "tuning").iterdir())) == 24
        assert len(list((output / "runs").iterdir())) == 4
        results[backend] = {run["id"]: (run["accuracy"], run["loss"], run["ranks"]) for run in runs.to_dict("records")}
    assert results["local"] == results["ray"]
