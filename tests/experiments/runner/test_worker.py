"""What every process does around its runs."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from experiments.runner.jobs import Job, attempt
from experiments.runner.run_folder import RunFolder, Work
from experiments.runner.settings import Role, option

_ALIVE: list[weakref.ref[Any]] = []


@dataclass(frozen=True)
class Settings:
    """Of a run in this file."""

    seed: int = option(0, "seed", Role.RESULT)
    fails: bool = option(False, "whether it fails", Role.RESULT)


@dataclass(eq=False)
class Trainer:
    """Held by its module, which it holds."""

    module: dict[str, Any] = field(default_factory=dict)


def build(job: Job) -> Work:
    trainer = Trainer()
    trainer.module["trainer"] = trainer
    _ALIVE.append(weakref.ref(trainer))

    def work(folder: RunFolder) -> dict[str, Any]:
        if folder.settings.fails:
            raise RuntimeError(f"after {trainer}")
        return {"trainers": sum(reference() is not None for reference in _ALIVE)}

    return work


@pytest.mark.parametrize("fails", [False, True])
def test_a_runs_memory_is_given_back_after_each_run(tmp_path: Path, fails: bool) -> None:
    _ALIVE.clear()
    gc.disable()  # as where a run allocates few, but large things
    try:
        for seed in range(4):
            outcome = attempt(Job(build, Settings(seed, fails), str(tmp_path), "final", {}, f"seed {seed}"))
            assert outcome.kind == ("failed" if fails else "done")
            assert outcome.metrics is None or outcome.metrics["trainers"] == 1
            assert not any(reference() for reference in _ALIVE)
    finally:
        gc.enable()


def finished(metrics: dict[str, Any]) -> Callable[[Job], Work]:
    return lambda job: lambda folder: metrics


def test_a_finished_run_is_handed_in_and_checkpoints_go(tmp_path: Path) -> None:
    job = Job(finished({"loss": 1.0}), Settings(), str(tmp_path), "final", {}, "method ρ = 2, lr 0.1")
    assert job.path.name == f"method-rho2-lr-0.1-{job.id[:8]}"
    checkpoints = job.folder.checkpoints
    job.folder.start()
    checkpoints.mkdir()
    (checkpoints / "last.ckpt").touch()
    first = attempt(job)
    assert first.metrics is not None
    assert first.metrics["loss"] == 1.0
    assert not checkpoints.exists()
    assert attempt(job) == first
    lines = (tmp_path / "journal.log").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["begin", "end"]
    assert lines[0].endswith(": method ρ = 2, lr 0.1")


def sleeping(job: Job) -> Work:
    def work(folder: RunFolder) -> dict[str, Any]:
        started = time.perf_counter()
        time.sleep(0.05)
        return {"slept": time.perf_counter() - started}

    return work


def test_the_time_of_the_work_counts(tmp_path: Path) -> None:
    outcome = attempt(Job(sleeping, Settings(), str(tmp_path), "final", {}, "one"))
    assert outcome.metrics is not None
    assert outcome.metrics["seconds"] >= outcome.metrics["slept"] >= 0.05


def test_seconds_of_the_work_itself_count(tmp_path: Path) -> None:
    job = Job(finished({"seconds": 7.0}), Settings(), str(tmp_path), "final", {}, "one")
    outcome = attempt(job)
    assert outcome.metrics is not None
    assert outcome.metrics["seconds"] == 7.0
