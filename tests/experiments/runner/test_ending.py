"""Real processes that are asked to end: what they end with, and what they leave."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.paths import ROOT

BEGIN = """
import signal, sys, time
from experiments.runner import ending
from experiments.runner.cli import in_terminal

def main(args):
    {work}

ending.leave(in_terminal(main))
"""
WAITS = "print('ready', flush=True); time.sleep(100)"
#: What becomes of the exception inside of libraries.
SWALLOWED = """ending.SECONDS_TO_END = 0.3
    while True:
        try:
            {waits}
        except BaseException:
            pass
"""
CHANGED = """try:
        {waits}
    finally:
        raise RuntimeError("a worker was killed")
"""
SLOW_TO_CLEAN_UP = """try:
        {waits}
    finally:
        time.sleep(0.8)
        print("in order", flush=True)
"""
IN_EXEC = """exec("{waits}", dict(time=time))
"""
LEFT = """try:
        {waits}
    except KeyboardInterrupt:
        sys.exit(1)
"""


def started(work: str, *words: str) -> subprocess.Popen[str]:
    program = BEGIN.format(work=work.format(waits=WAITS))
    process = subprocess.Popen(
        [*words, sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def run_module(name: str, path: Path) -> subprocess.Popen[str]:
    """``python -m NAME`` with modules in the folder `path`, once it has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", name], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, error


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("work", [WAITS, CHANGED, LEFT], ids=["waits", "another error", "exits"])
def test_the_status_is_128_and_the_signal_whatever_it_leads_to(how: signal.Signals, work: str) -> None:
    process = started(work)
    process.send_signal(how)
    assert ended(process) == (128 + how, "", "")


def test_the_status_is_the_same_where_the_signal_came_in_an_exec_of_an_import(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(BEGIN.format(work=IN_EXEC.format(waits=WAITS)))
    process = run_module("program", tmp_path)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "", "")


def test_a_second_signal_does_not_disturb_the_cleaning_up() -> None:
    process = started(SLOW_TO_CLEAN_UP)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "in order\n", "")


def test_what_does_not_end_by_itself_is_ended() -> None:
    process = started(SWALLOWED)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143


def test_a_signal_that_is_ignored_stays_so() -> None:
    process = started(WAITS, "nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["experiments.vtab", "experiments.demo", "benchmarks", "tools.vtab.prepare"])
def test_a_signal_while_a_command_is_still_importing_ends_it_in_silence(
    tmp_path: Path, how: signal.Signals, command: str
) -> None:
    (tmp_path / "jsonargparse.py").write_text("import time; print('ready', flush=True); time.sleep(100)")
    process = run_module(command, tmp_path)
    process.send_signal(how)
    assert ended(process) == (128 + how, "", "")


def test_importing_the_commands_leaves_the_handlers_of_others_alone() -> None:
    handlers = "(signal.getsignal(2), signal.getsignal(15))"
    program = f"import signal; before = {handlers}; import experiments, benchmarks, tools; assert before == {handlers}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


FIT = """
import sys
from dataclasses import dataclass
import lightning as L
from experiments.runner import ending
from experiments.runner.cli import in_terminal
from experiments.runner.lightning_runs import fit
from experiments.runner.run_folder import RunFolder, perform
from experiments.runner.settings import Role, option
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.modules import build, loader

@dataclass(frozen=True)
class Settings:
    lr: float = option(1.0, "learning rate", Role.RESULT)

class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader(16)
    val_dataloader = train_dataloader

class Says(L.Callback):
    def on_train_epoch_end(self, trainer, module):
        print("epoch", trainer.current_epoch, flush=True)

def work(folder):
    trainer = L.Trainer(max_epochs=int(sys.argv[2]), accelerator="cpu", logger=False, enable_progress_bar=False,
        callbacks=[Says(), ModelCheckpoint(folder.checkpoints, "last", enable_version_counter=False)])
    fit(trainer, build(), Data(), folder.last_checkpoint(), lambda: str(trainer.current_epoch))
    return {"epochs": trainer.current_epoch}

ending.leave(in_terminal(lambda args: perform(RunFolder(sys.argv[1], Settings()), lambda: work)))
"""


@pytest.mark.slow  # two processes that import torch and Lightning
def test_a_fit_that_is_asked_to_end_is_pending_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FIT, str(tmp_path / "run")]
    process = subprocess.Popen([*command, "100000"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "epoch 3\n":
            break
    process.send_signal(signal.SIGTERM)
    status, out, _ = ended(process)
    assert status == 143
    assert re.search(r"interrupted after \d+; rerun to resume", out)
    assert {"error.txt", "metrics.json"}.isdisjoint(file.name for file in (tmp_path / "run").iterdir())
    reached = int(re.search(r"interrupted after (\d+)", out)[1])  # type: ignore[index]
    done = subprocess.run([*command, str(reached + 2)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    epochs = [int(number) for number in re.findall(r"^epoch (\d+)$", done.stdout, flags=re.MULTILINE)]
    assert epochs
    assert epochs[0] >= reached - 1
