from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from eva_lightning.processes import process_pool, start_worker

ROOT = Path(__file__).parents[2]


def square(pipe: Connection, offset: int) -> None:
    """A worker: numbers in, squares out, until the pipe closes."""
    while True:
        try:
            pipe.send(pipe.recv() ** 2 + offset)
        except EOFError:
            return


def threads_of_torch() -> int:
    import torch

    return torch.get_num_threads()


def variable(pipe: Connection, name: str) -> None:
    pipe.send(os.environ.get(name))


def sleep_and_say(file: Path, seconds: float = 60.0) -> None:
    file.with_suffix(f".{os.getpid()}").touch()
    time.sleep(seconds)


def serve_for_ever(pipe: Connection, file: Path) -> None:
    sleep_and_say(file)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # a child that nobody waited for is no running process
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


PARENT = """
import sys, time
from pathlib import Path
from eva_lightning.processes import process_pool, start_worker
from tests.eva_lightning.test_processes import serve_for_ever, sleep_and_say

if __name__ == "__main__":
    file = Path(sys.argv[1])
    worker = start_worker(serve_for_ever, file)
    with process_pool(2) as pool:
        futures = [pool.submit(sleep_and_say, file) for _ in range(2)]
        for future in futures:
            future.result()
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process with a worker and a pool of two, all of them busy, and the ids of those three."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "started")], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: process.poll() is not None or len(list(tmp_path.glob("started.*"))) == 3)
        yield process, [int(file.suffix[1:]) for file in tmp_path.glob("started.*")]
    finally:
        process.kill()
        process.communicate()


def test_killing_the_parent_ends_its_processes(parent: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, children = parent
    assert len(children) == 3
    assert all(map(alive, children))
    process.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(map(alive, children)), seconds=10)


def test_ctrl_c_ends_them_at_once_and_the_parent_with_its_own_traceback(
    parent: tuple[subprocess.Popen[str], list[int]],
) -> None:
    process, children = parent
    for pid in (process.pid, *children):  # a terminal sends it to all of them
        with suppress(ProcessLookupError):  # the parent was quick to end them
            os.kill(pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode != 0
    assert stderr.count("Traceback") == 1
    assert "KeyboardInterrupt" in stderr
    assert not any(map(alive, children))


def test_an_error_ends_the_pool_without_waiting_for_its_work(tmp_path: Path) -> None:
    def children() -> list[int]:
        return [int(file.suffix[1:]) for file in tmp_path.glob("started.*")]

    def fail() -> None:
        with process_pool(2) as pool:
            for _ in range(2):
                pool.submit(sleep_and_say, tmp_path / "started")
            wait_for(lambda: len(children()) == 2)
            raise ValueError("the parent's own")

    with pytest.raises(ValueError, match="the parent's own"):
        fail()
    assert not any(map(alive, children()))


def test_a_pool_computes_with_the_threads_asked_for() -> None:
    before = dict(os.environ)
    with process_pool(1, threads=2) as pool:
        assert pool.submit(threads_of_torch).result() == 2
    assert dict(os.environ) == before


def test_a_worker_answers_until_its_pipe_closes_and_says_how_it_ended() -> None:
    worker = start_worker(square, 1)
    worker.pipe.send(3)
    assert worker.pipe.recv() == 10
    worker.pipe.close()
    assert worker.exit_text() == "ended with exit status 0"
    worker = start_worker(square, 1)
    worker.end()
    assert worker.exit_text() == "killed by signal 9, SIGKILL (out of memory?)"


def test_a_worker_has_its_environment_from_the_start() -> None:
    worker = start_worker(variable, "EVA_TEST_VARIABLE", environment={"EVA_TEST_VARIABLE": "set"})
    assert worker.pipe.recv() == "set"
    assert "EVA_TEST_VARIABLE" not in os.environ
    worker.end()
