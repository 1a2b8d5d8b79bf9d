"""The paper's whole grid, tiny, by real processes: killed in the middle, resumed, the same by both backends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.vtab import sweep
from experiments.vtab.backend_local import LocalBackend, default_workers
from experiments.vtab.backends import open_backend
from experiments.vtab.grid import Point
from experiments.vtab.holder import StoreInUse
from experiments.vtab.jobs import Job
from experiments.vtab.store import ResultsStore
from experiments.vtab.sweep_settings import parse
from experiments.vtab.worker import WorkerOptions
from tests.experiments.vtab.sweep_fakes import make_tasks, words
from tests.paths import ROOT

CHECKOUT = ROOT
GRID = "--grid configs/vtab/grid_paper.yaml --tasks kitti,dmlab --methods eva"
RUNS = 2 * (5 * 4 * 3 + 5)


def journal(output: Path, what: str) -> list[tuple[str, int]]:
    """Runs and processes of the journal's lines of one kind."""
    file = output / "journal.log"
    if not file.is_file():
        return []
    return [(run, int(pid)) for run, pid in re.findall(rf" {what} (\w{{16}}) process (\d+) ", file.read_text())]


def wait_for(condition: Any, seconds: float = 600.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def killed_and_resumed(root: Path, output: Path, backend: str) -> list[dict[str, Any]]:
    """A sweep that loses a worker, then its own life, and is resumed with another number of workers."""
    command = [sys.executable, "-m", "experiments.vtab", "sweep", *words(root, output, f"{GRID} --backend {backend}")]
    first = subprocess.Popen(
        [*command, "--workers", "2"], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for(lambda: len(journal(output, "end")) >= 10 or first.poll() is not None)
        victim = journal(output, "begin")[-1][1]
        os.kill(victim, signal.SIGKILL)
        # another process has taken its place, and the runs go on
        wait_for(lambda: len({pid for _, pid in journal(output, "begin")}) >= 3 or first.poll() is not None)
        wait_for(lambda: len(journal(output, "end")) >= 40 or first.poll() is not None)
        assert first.poll() is None, first.communicate()[0]
        with pytest.raises(StoreInUse, match=rf"is in use by another sweep \(process {first.pid} on "):
            sweep.main([*command[4:], "--workers", "1"])
    finally:
        first.kill()
        out, _ = first.communicate()
    assert re.search(r"a worker process was .*; its run starts again", out), out
    workers = {pid for _, pid in journal(output, "begin")}
    wait_for(lambda: not any(map(is_running, workers)), 60)  # the workers die with the sweep
    states = Counter(row["status"] for row in ResultsStore(output / "results.sqlite").rows())
    assert 39 <= states["done"] < RUNS
    third = subprocess.run([*command, "--workers", "1"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert third.returncode == 0, third.stdout + third.stderr
    assert f"taking over from process {first.pid} on " in third.stdout
    assert f"{RUNS} of {RUNS} runs are done" in third.stdout
    return ResultsStore(output / "results.sqlite").rows()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_papers_grid_by_both_backends_killed_and_resumed(tmp_path: Path) -> None:
    make_tasks(tmp_path / "data")
    results = {}
    for backend in ("local", "ray"):
        output = tmp_path / backend
        rows = killed_and_resumed(tmp_path / "data", output, backend)
        assert len(rows) == RUNS
        assert {row["status"] for row in rows} == {"done"}
        assert Counter((row["task"], row["phase"]) for row in rows) == {
            ("kitti", "tune"): 60, ("kitti", "final"): 5, ("dmlab", "tune"): 60, ("dmlab", "final"): 5,
        }  # fmt: skip
        # Each run was brought to its end once. Only those that a signal hit were begun again: one by the worker's, two
        # by the sweep's.
        ends = Counter(run for run, _ in journal(output, "end"))
        begins = Counter(run for run, _ in journal(output, "begin"))
        assert set(begins) == {row["run_id"] for row in rows}
        assert max(ends.values()) == 1
        assert sum(begins.values()) - RUNS <= 3
        assert RUNS - sum(ends.values()) <= 3  # killed after the metrics, before the line
        assert sum(row["attempts"] for row in rows) - RUNS <= 3
        assert sum(row["deaths"] for row in rows) == 1
        # one EVA state per task and training split
        computed = [line.split()[0] for line in (output / "states/computed.log").read_text().splitlines()]
        assert len(computed) == len(set(computed)) == 4
        assert not list((output / "tuning").iterdir())
        assert len(list((output / "runs").iterdir())) == 10
        results[backend] = {row["run_id"]: (row["accuracy"], row["loss"], row["metrics"]["ranks"]) for row in rows}
    assert results["local"] == results["ray"]


def job(root: Path, output: Path, seed: int) -> Job:
    settings = parse(words(root, output, "--tasks kitti --methods linear"))
    return Job.of(settings.base, settings.keys[0], "kitti", "tune", Point(1e-3, None), seed, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["local", "ray"])
def test_what_a_backend_promises(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outcomes of runs that succeed, fail and die; more jobs than slots; the end of everything in the middle."""
    make_tasks(tmp_path / "data")
    output = tmp_path / "out"
    backend = open_backend(
        name, WorkerOptions(), workers=1, gpus_per_run=None, cpus_per_run=1.0, address=None,
        log_folder=str(tmp_path / "workers"),
    )  # fmt: skip
    try:
        assert backend.slots == 1
        assert backend.poll(0.01) == []
        good, bad = job(tmp_path / "data", output, 0), job(tmp_path / "elsewhere", output, 1)

        def outcome(work: Job) -> Any:
            backend.submit(work)
            found: list[Any] = []
            wait_for(lambda: found.extend(backend.poll(1.0)) or found)
            (one,) = found
            assert one.run_id == work.run_id
            return one

        done = outcome(good)
        assert done.kind == "done"
        assert 0 <= done.metrics["accuracy"] <= 1
        failed = outcome(bad)
        assert failed.kind == "failed"
        assert "Traceback" in failed.error
        assert "the VTAB-1K folder" in failed.error
        assert failed.metrics is None
        again = outcome(good)  # its folder says that it is finished
        assert again.metrics["loss"] == done.metrics["loss"]
        pids = {pid for _, pid in journal(output, "begin")}
        assert len(pids) == 1  # one process served all, which keeps what it has loaded
        (pid,) = pids
        long = job(tmp_path / "data", output, 2)
        long = replace(long, settings=replace(long.settings, epochs=10_000))
        backend.submit(long)
        wait_for(lambda: (long.run_id, pid) in journal(output, "begin"))
        os.kill(pid, signal.SIGKILL)
        found: list[Any] = []
        wait_for(lambda: found.extend(backend.poll(1.0)) or found)
        (died,) = found
        assert (died.run_id, died.kind) == (long.run_id, "died")
        assert re.search(r"SIGKILL|WorkerCrashed", died.error)
        assert outcome(job(tmp_path / "data", output, 3)).kind == "done"  # a new process
    finally:
        backend.close()
    wait_for(lambda: not any(is_running(pid) for _, pid in journal(output, "begin")), 60)


def test_ray_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tasks(tmp_path / "data")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert sweep.command_line(words(tmp_path / "data", tmp_path / "out", "--tasks kitti --backend ray")) == 2
    error = capsys.readouterr().err
    assert "needs the package ray, which is not installed: pip install -e '.[sweep]'" in error
    assert "--backend local" in error
    assert len(error.splitlines()) == 1


def test_shares_of_gpus(tmp_path: Path) -> None:
    assert default_workers(4, 1.0) == 4
    assert default_workers(4, 0.5) == 8
    assert default_workers(2, 1 / 3) == 6
    assert default_workers(0, 1.0) == max(1, (os.cpu_count() or 1) // 4)
    backend = LocalBackend(WorkerOptions(), None, 0.5, log_folder=tmp_path, gpus=["2", "5"])
    assert backend.slots == 4
    assert backend.describe() == "4 processes on 2 GPUs, 1 CPU threads each"
    with pytest.raises(ValueError, match=r"gpus_per_run must be a share of one GPU, .* got 2"):
        LocalBackend(WorkerOptions(), None, 2.0, log_folder=tmp_path)
