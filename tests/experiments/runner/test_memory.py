"""Many runs in one process: nothing of them stays."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import pytest

from experiments.runner.run_folder import RunFolder, Work, perform
from experiments.runner.settings import Role, option
from experiments.runner.worker import free_memory
from tests.modules import build, loader
from tests.modules import trainer as quiet_trainer

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux shows them")


@dataclass(frozen=True)
class Settings:
    """Of a run in this file."""

    seed: int = option(0, "seed", Role.RESULT)


class OpenFile(L.Callback):
    """Keeps a file open for as long as it lives, as memory-mapped data does."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")


def prepare(folder: RunFolder) -> Work:
    """A run with a trainer and a module, which hold each other, and with files."""
    module = build(folder.settings.seed)
    callback = OpenFile(folder.path.with_name("opened"))
    trainer = quiet_trainer(callback, max_steps=1)

    def work(folder: RunFolder) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader(16))
        return {"steps": trainer.global_step}

    return work


def living() -> tuple[int, int, int]:
    """Trainers, modules and open files of this process."""
    things = gc.get_objects()
    count = tuple(sum(isinstance(thing, kind) for thing in things) for kind in (L.Trainer, L.LightningModule))
    return *count, len(os.listdir("/proc/self/fd"))  # type: ignore[return-value]  # noqa: PTH208


def resident() -> int:
    """Bytes of memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def do_runs(folder: Path, start: int, stop: int) -> None:
    for seed in range(start, stop):
        run = RunFolder(folder / str(seed), Settings(seed))
        assert perform(run, lambda run=run: prepare(run), terminal=False) == {"steps": 1}


@pytest.fixture
def _garbage_only_by_hand() -> Iterator[None]:
    # as where a run allocates few, but large things
    free_memory()
    # as worker processes do: collecting need not look at what is imported
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.usefixtures("_garbage_only_by_hand")
def test_runs_in_one_process_leave_no_trainer_no_module_and_no_open_file(tmp_path: Path) -> None:
    do_runs(tmp_path, 0, 2)
    before = living()
    do_runs(tmp_path, 2, 22)
    assert living() == before


@pytest.mark.slow  # a minute: 300 runs are the point
@pytest.mark.usefixtures("_garbage_only_by_hand")
def test_300_runs_in_one_process_stay_flat(tmp_path: Path) -> None:
    do_runs(tmp_path, 0, 20)
    before, memory = living(), resident()
    do_runs(tmp_path, 20, 320)
    assert living() == before
    assert resident() - memory < 2**24
