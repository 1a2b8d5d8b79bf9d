"""What every pool promises, by real processes."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eva_lightning.errors import InputError
from experiments.runner.jobs import Job, Outcome, Point
from experiments.runner.local_pool import InlinePool, LocalPool, default_workers
from experiments.runner.pool import Pool, open_pool
from experiments.runner.slurm_pool import SlurmPool
from experiments.runner.worker import WorkerOptions
from tests.experiments.runner.fake_comparison import command_line, finished_runs, parse
from tests.experiments.runner.test_interruption import finish, is_running, journal, started, wait_for

BACKENDS = {"local": "--backend local", "ray": "--backend ray", "slurm": "--backend slurm --slurm cluster=local"}


@contextmanager
def opened(output: Path, words: str) -> Iterator[Pool]:
    comparison = parse(["--output", str(output), *words.split()])
    pool = open_pool(comparison.options, comparison.worker_options())
    try:
        yield pool
    finally:
        pool.close()


def job(output: Path, seed: int, wait: float = 0.0) -> Job:
    """A tuning run."""
    comparison = parse(["--output", str(output), "--tune-seeds", "9"])
    found = comparison.cells()[0].tune(Point.of(lr=1e-2))[seed]
    return replace(found, settings=replace(found.settings, wait=wait))


def outcomes(pool: Pool) -> list[Outcome]:
    found: list[Any] = []
    wait_for(lambda: found.extend(pool.poll(1.0)) or found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BACKENDS))
def test_what_a_pool_promises(tmp_path: Path, name: str) -> None:
    """Outcomes of runs that succeed, fail and die; the end of everything in the middle."""
    output = tmp_path / "out"
    with opened(output, f"{BACKENDS[name]} --workers 1") as pool:
        assert pool.slots == 1
        assert pool.poll(0.01) == []
        assert re.search("1 process|1 runs", pool.describe())

        def outcome(work: Job) -> Outcome:
            pool.submit(work)
            (one,) = outcomes(pool)
            assert one.id == work.id
            return one

        done = outcome(job(output, 0))
        assert done.kind == "done", done
        assert done.metrics is not None
        assert done.metrics["loss"] == pytest.approx(1e-4)
        assert done.metrics["pid"] != os.getpid()
        trouble = Path(f"{output}-trouble/lora-tune")
        trouble.parent.mkdir()
        trouble.write_text("raise ValueError('no such task')")
        failed = outcome(job(output, 1))
        assert (failed.kind, failed.metrics) == ("failed", None)
        assert "Traceback" in str(failed.error)
        assert failed.reason == "ValueError: no such task"
        trouble.unlink()
        again = outcome(job(output, 0))  # its folder says that it is finished
        assert again.metrics == done.metrics
        long = job(output, 2, wait=1000)
        pool.submit(long)
        assert pool.poll(0.0) == []
        wait_for(lambda: long.id in dict(journal(output, "begin")))
        pid = dict(journal(output, "begin"))[long.id]
        os.kill(pid, signal.SIGKILL)
        (died,) = outcomes(pool)
        assert (died.id, died.kind) == (long.id, "died")
        assert outcome(job(output, 3)).kind == "done"  # a new process
        last = job(output, 4, wait=1000)
        pool.submit(last)
        pool.poll(0.0)
        wait_for(lambda: last.id in dict(journal(output, "begin")))
    wait_for(lambda: not any(is_running(pid) for _, pid in journal(output, "begin")))


@pytest.mark.slow
def test_slurm_jobs_outlive_the_process_that_waits_for_them(tmp_path: Path) -> None:
    output = tmp_path / "out"
    grid = ["--methods", "eva", "--lrs", "0.001", "--tune-seeds", "1", "--seeds", "2", "--wait", "3"]
    words = ["--backend", "slurm", "--slurm", "cluster=local", *grid]
    with started(output, *words) as process:
        wait_for(lambda: journal(output, "begin") or process.poll() is not None)
        process.kill()
        process.wait()
    finish(output, *words)
    assert len(list(finished_runs(output))) == 2
    # a job that was submitted twice waited, and found the run done
    ends = [run for run, _ in journal(output, "end")]
    assert len(set(ends)) == 3
    folder_of = {run.path: run.metrics["pid"] for run in finished_runs(output, "tune")}
    assert set(folder_of.values()) == {journal(output, "begin")[0][1]}


@pytest.mark.slow
def test_a_local_process_serves_many_runs_and_does_what_it_is_told_first(tmp_path: Path) -> None:
    options = WorkerOptions(threads=3, modules=("colorsys",), start=_leave_a_mark)
    pool = LocalPool(options, 1, None, tmp_path / "workers", gpus=["5"])
    try:
        pids = set()
        for seed in range(3):
            pool.submit(job(tmp_path, seed))
            (outcome,) = outcomes(pool)
            assert outcome.metrics is not None
            pids.add(outcome.metrics["pid"])
        assert len(pids) == 1
    finally:
        pool.close()
    assert (tmp_path / "workers/worker-0.log").read_text().splitlines() == ["3 5 True"]


def _leave_a_mark() -> None:
    print(os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"], "colorsys" in sys.modules)


@pytest.mark.slow
def test_a_process_that_cannot_start_says_why(tmp_path: Path) -> None:
    pool = LocalPool(WorkerOptions(modules=("no_such_module",)), 1, 0.0, tmp_path)
    try:
        pool.submit(job(tmp_path, 0))
        with pytest.raises(RuntimeError, match=r"process 0 cannot start:(.|\n)*No module named 'no_such_module'"):
            outcomes(pool)
    finally:
        pool.close()


def test_shares_of_gpus(tmp_path: Path) -> None:
    assert default_workers(4, 1.0) == 4
    assert default_workers(4, 0.5) == 8
    assert default_workers(2, 1 / 3) == 6
    assert default_workers(0, 1.0) == max(1, (os.cpu_count() or 1) // 4)
    pool = LocalPool(WorkerOptions(), None, 0.5, tmp_path, gpus=["2", "5"])
    assert pool.slots == 4
    assert pool.describe() == "4 processes on 2 GPUs, 1 CPU threads each"
    with pytest.raises(InputError, match=r"gpus_per_run must be a share of one GPU, .* got 2"):
        LocalPool(WorkerOptions(), None, 2.0, tmp_path)


def test_in_this_process(tmp_path: Path) -> None:
    pool = InlinePool(WorkerOptions())
    pool.submit(job(tmp_path, 0))
    (outcome,) = pool.poll(0.0)
    assert outcome.metrics is not None
    assert outcome.metrics["pid"] == os.getpid()
    assert pool.poll(0.0) == []
    pool.close()


@pytest.mark.parametrize(("package", "extra"), [("ray", "sweep"), ("submitit", "slurm")])
def test_a_package_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    backend = {"ray": "ray", "submitit": "slurm"}[package]
    assert command_line(["--output", str(tmp_path / "out"), "--backend", backend]) == 2
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert f"needs the package {package}, which is not installed: pip install -e '.[{extra}]'" in error
    assert "--backend local" in error
    assert len(error.splitlines()) == 1


def test_slurm_is_asked_for_what_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Executor:
        def __init__(self, **arguments: Any) -> None:
            asked.update(arguments)

        def update_parameters(self, **arguments: Any) -> None:
            asked.update(arguments)

    monkeypatch.setattr("submitit.AutoExecutor", Executor)
    words = "--backend slurm --workers 8 --threads 4 --slurm partition=gpu,time=4:00:00,memory=32G,account=me"
    options = parse(words.split()).settings
    monkeypatch.setattr(type(options), "uses_gpus", True)
    pool = SlurmPool(WorkerOptions(threads=4), options, tmp_path)
    assert asked == {
        "folder": tmp_path,
        "cluster": "slurm",
        "name": "eva",
        "cpus_per_task": 4,
        "gpus_per_node": 1,
        "slurm_array_parallelism": 8,
        "slurm_partition": "gpu",
        "slurm_time": "4:00:00",
        "slurm_mem": "32G",
        "slurm_additional_parameters": {"account": "me"},
    }
    assert pool.slots == 8
    assert pool.describe() == "array jobs of slurm, at most 8 runs at a time, 4 CPU threads each"
    with pytest.raises(InputError, match=r"gpus_per_run must be a whole number .* got 0\.5"):
        SlurmPool(WorkerOptions(), replace(options, gpus_per_run=0.5), tmp_path)


@pytest.mark.parametrize("asked", ["cluster=nowhere", "partition=gpu"])
def test_slurm_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: str) -> None:
    assert command_line(["--output", str(tmp_path), "--backend", "slurm", "--slurm", asked]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --slurm: ")
    assert len(error.splitlines()) == 1
