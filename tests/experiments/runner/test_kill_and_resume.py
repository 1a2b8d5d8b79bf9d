"""Runs with dropout that are killed with SIGKILL and started again end with the weights of runs that were not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eva_lightning.rl.module import DecisionTransformerModule, save_weights
from eva_lightning.rl.trajectories import TrajectoryDataModule
from experiments.metaworld import finetune, pretrain
from experiments.vtab import settings as vtab
from tests.eva_lightning.rl.synthetic import write_synthetic
from tests.eva_lightning.vision.fakes import make_task
from tests.paths import ROOT

TASKS = ("drawer-open-v3", "reach-v3")
COMMANDS: dict[str, Any] = {"pretrain": pretrain, "finetune": finetune, "vtab": vtab}
#: Command, its own options, and the training step in which it is killed.
CASES = {
    "in an epoch": ("pretrain", "--checkpoint-every 2", 5),
    "after an epoch": ("pretrain", "--checkpoint-every {epoch}", 0),
    "eva": ("finetune", "--method eva --checkpoint-every 2", 5),
    "images": ("vtab", "--method lora", 7),
}
# one process imports what the runs need, and its forks are killed
_KILLED = """
import json, os, signal, sys
import peft
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.vision.module import ImageClassifier
from experiments.metaworld import finetune, finetune_run, pretrain, pretrain_run
from experiments.vtab import run, settings

commands = {"pretrain": pretrain, "finetune": finetune, "vtab": settings}
for command, words, step in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        for kind in (DecisionTransformerModule, ImageClassifier):
            def training_step(self, *args, original=kind.training_step):
                if self.trainer.global_step == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(self, *args)
            kind.training_step = training_step
        commands[command].main(words)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[str], int, Path]]:
    """Command, words, the step of the kill and output of each case, all of them killed."""
    folder = tmp_path_factory.mktemp("killed")
    write_synthetic(folder / "demonstrations", list(TASKS), episodes=6)
    make_task(folder / "images")
    data = TrajectoryDataModule(folder / "demonstrations", TASKS, context=4, batch_size=8, val_episodes=1)
    epoch = len(data.train_dataloader())
    network = DecisionTransformerModule(**data.statistics, width=16, layers=1, heads=2, context=4)  # type: ignore[arg-type]
    save_weights(network, folder / "init.ckpt", about={"tasks": list(TASKS)})
    rl = f"--data {folder / 'demonstrations'} --batch-size 8 --dropout 0.2 --lr 1e-2 --val-episodes 1"
    common = {
        "pretrain": f"--tasks {','.join(TASKS)} {rl} --width 16 --layers 1 --heads 2 --context 4 --val-every 4",
        "finetune": f"--task reach-v3 --init {folder / 'init.ckpt'} {rl} --seeds 1 --train-episodes 3 --val-at 2 "
        "--max-steps 8 --eval-episodes 0 --rank 2 --save false",
        "vtab": f"--root {folder / 'images'} --task kitti --model test_vit --weights none --image-size 32 "
        "--batch-size 8 --rank 4 --epochs 3 --dropout 0.2 --lr 1e-2 --plots false --save-adapter false",
    }
    found = {}
    for name, (command, own, step) in CASES.items():
        words = f"{common[command]} {own.format(epoch=epoch)} --accelerator cpu --progress false"
        if command == "pretrain":
            words += f" --max-steps {(epoch if step == 0 else step) + 3}"
        found[name] = (command, words.split(), step or epoch + 1, folder / name.replace(" ", "-"))
    jobs = [(c, [*w, "--output", str(out / "killed")], step) for c, w, step, out in found.values()]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, json.dumps(jobs)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    ends = [line for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]
    assert ends == [str(-signal.SIGKILL)] * len(jobs), done.stderr
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_with_dropout_ends_with_the_bits_of_a_whole_one(
    case: str, runs: dict[str, tuple[str, list[str], int, Path]]
) -> None:
    command, words, step, output = runs[case]
    (before,) = (output / "killed").glob("*/checkpoints/last.ckpt")
    at = torch.load(before, weights_only=True)["global_step"]
    assert 0 < at <= step, "it resumes, and does not begin again"
    weights = []
    for name in ("killed", "whole"):
        torch.manual_seed(99)  # whatever state the process is in
        COMMANDS[command].main([*words, "--output", str(output / name)])
        files = list((output / name).glob("*/checkpoints/last.ckpt"))
        weights.append(torch.load(files[0], weights_only=True)["state_dict"])
    killed, whole = weights
    assert killed.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(killed[name], whole[name])] == []
