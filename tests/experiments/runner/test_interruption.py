"""Real processes of a comparison: killed at any moment, resumed by the same command."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.experiments.runner.fake_comparison import finished_runs
from tests.paths import ROOT

COMMAND = [sys.executable, "-m", "tests.experiments.runner.fake_comparison"]
RUNS = 2 * (2 * 2 + 2)


def journal(output: Path, what: str) -> list[tuple[str, int]]:
    """Runs and processes of the journal's lines of one kind."""
    file = output / "journal.log"
    if not file.is_file():
        return []
    return [(run, int(pid)) for run, pid in re.findall(rf" {what} (\w{{16}}) process (\d+) ", file.read_text())]


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@contextmanager
def started(output: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    command = [*COMMAND, "--output", str(output), *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(output: Path, *words: str) -> str:
    command = [*COMMAND, "--output", str(output), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def no_run_was_finished_twice(output: Path) -> None:
    assert len(list(finished_runs(output))) + len(list(finished_runs(output, "tune"))) == RUNS
    ends = Counter(run for run, _ in journal(output, "end"))
    assert max(ends.values()) == 1
    assert RUNS - ends.total() <= 2  # killed after the metrics, before the line


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "moments"), [(0, (3,)), (2, (1, 7))])
def test_killed_at_any_moment_and_resumed(tmp_path: Path, workers: int, moments: tuple[int, ...]) -> None:
    output, begun = tmp_path / "out", 0
    for number in moments:
        with started(output, "--workers", str(workers), "--wait", "0.3") as process:
            wait_for(lambda number=number: len(journal(output, "end")) >= number or process.poll() is not None)
            assert process.poll() is None
            time.sleep(0.1 * number % 0.37)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        begun += max(1, workers)
        # its processes end with it
        wait_for(lambda: not any(is_running(pid) for _, pid in journal(output, "begin")))
        done = len(journal(output, "end"))
        assert done < RUNS
    out = finish(output, "--workers", "1")
    assert re.search(rf"taking over from process {process.pid} on .*, which has ended", out)
    no_run_was_finished_twice(output)
    # begun again were only those that a signal hit
    assert len(journal(output, "begin")) - RUNS <= begun


@pytest.mark.slow
def test_a_killed_worker_takes_nothing_with_it(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with started(output, "--workers", "2", "--wait", "0.5") as process:
        wait_for(lambda: len(journal(output, "end")) >= 2 or process.poll() is not None)
        victim = journal(output, "begin")[-1][1]
        os.kill(victim, signal.SIGKILL)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert re.search(r"a worker process was killed by signal 9, SIGKILL \(out of memory\?\); its run starts again", out)
    assert f"{RUNS} of {RUNS} runs are done" in out
    no_run_was_finished_twice(output)
    assert len({pid for _, pid in journal(output, "begin")}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_end_it_ends_all_its_processes(tmp_path: Path, how: signal.Signals) -> None:
    output = tmp_path / "out"
    with started(output, "--workers", "2", "--wait", "1000") as process:
        wait_for(lambda: len(journal(output, "begin")) >= 2 or process.poll() is not None)
        with started(output, "--workers", "1") as second:
            out, _ = second.communicate(timeout=120)
        assert second.returncode == 2
        assert f"is in use by another process (process {process.pid} on " in out
        process.send_signal(how)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + how, out
    assert f"interrupted: 0 of {RUNS} runs are done; rerun to resume" in out
    wait_for(lambda: not any(is_running(pid) for _, pid in journal(output, "begin")))
    assert "taking over" not in finish(output)
    no_run_was_finished_twice(output)


PROGRAM = """
import sys
from dataclasses import dataclass
import torch
from experiments.runner.cli import in_terminal
from experiments.runner.run_folder import RunFolder, perform
from experiments.runner.settings import Role, option

@dataclass(frozen=True)
class Settings:
    lr: float = option(1.0, "learning rate", Role.RESULT)

def faulty(folder):
    return {"sum": torch.zeros(2) + "x"}

def main(args):
    perform(RunFolder(args[0], Settings()), lambda: faulty)

sys.exit(in_terminal(main, sys.argv[1:]))
"""


def test_a_programming_error_of_a_command_keeps_its_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    for text in (done.stderr, (tmp_path / "run/log.txt").read_text()):
        assert "Traceback (most recent call last)" in text
        assert "in faulty" in text
        assert "TypeError" in text


def test_a_programming_error_of_a_run_keeps_its_traceback(tmp_path: Path) -> None:
    output, trouble = tmp_path / "out", tmp_path / "out-trouble"
    trouble.mkdir()
    (trouble / "eva-final").write_text("import torch\ntorch.zeros(2) + 'x'")
    command = [*COMMAND, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "2 failed, such as eva, lr 0.001, seed 0, final: TypeError" in done.stdout
    (first, second) = output.glob("runs/*/error.txt")
    for file in (first, second, first.with_name("log.txt"), second.with_name("log.txt")):
        text = file.read_text()
        assert "Traceback (most recent call last)" in text
        assert "in build" in text
        assert "TypeError" in text
