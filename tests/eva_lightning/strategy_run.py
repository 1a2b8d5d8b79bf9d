"""One rank of a run under a strategy, for test_distributed.py: ``python -m tests.eva_lightning.strategy_run ...``.

Every part of a run is written to a folder per rank: A and ranks after the initialisation, all parameters (gathered) at
the end. A second part resumes from the checkpoint that the first wrote half way.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from eva_lightning import EVAInitCallback, StreamingOptions
from eva_lightning.adapters import find_adapters
from eva_lightning.gradient_norms import GradientNorms
from experiments.runner.one_machine import one_machine
from tests.modules import Classifier, dataset, mlp

SAMPLES, STEPS = 160, 20  # two epochs of ten steps
METRIC = "raw"  # gives these layers ranks that differ


class Sharded(Classifier):
    """FSDP2 over all ranks where the strategy says so; without batch norm, whose statistics differ between ranks."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.net[1] = nn.Identity()

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None:
            return
        for layer in self.net:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh["data_parallel"])
        fully_shard(self.net, mesh=mesh["data_parallel"])


class Failing(pl.Callback):
    """One rank fails at a step, or while EVA streams."""

    def __init__(self, folder: Path, rank: int, how: str, when: str) -> None:
        self.folder, self.rank, self.how, self.when = folder, rank, how, when

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.when == "streaming" and trainer.global_rank == self.rank:
            next(pl_module.net.children()).register_forward_hook(lambda *_: self.fail())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 3:
            self.fail()

    def fail(self) -> None:
        (self.folder / "failed.txt").write_text(str(time.time()))
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError(f"rank {self.rank} found a bad sample")


def full(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, gathered."""
    found = {}
    for name, p in module.named_parameters():
        found[name] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
    return found


def a_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A of every adapter, gathered."""
    return {
        n: (x.a.full_tensor() if isinstance(x.a, DTensor) else x.a).detach().clone()
        for n, x in find_adapters(module).items()
    }


class Recording(EVAInitCallback):
    """Keeps A as it was right after the initialisation."""

    found: dict[str, torch.Tensor]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.found = a_of(pl_module)


def strategy_for(kind: str, devices: int) -> Strategy:
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(
        data_parallel_size=devices,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        save_distributed_checkpoint=False,
    )


def fit(kind: str, devices: int, folder: Path, name: str, *extra: pl.Callback, **options: Any) -> None:
    """Fit, and write what this rank has."""
    state, checkpoint = options.get("state"), options.get("checkpoint")
    torch.manual_seed(0)
    module = Sharded()
    callback = Recording(
        rho=2, r=4, metric=METRIC, state=state, streaming=StreamingOptions(tau=1.0, engine="exact"), verbose=False
    )
    norms = GradientNorms(steps=3)
    saving = ModelCheckpoint(folder, filename=f"{name}-{{step}}", save_top_k=-1, every_n_train_steps=STEPS // 2)
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy_for(kind, devices), plugins=one_machine(devices),
        max_steps=STEPS, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback, norms, saving, *extra],
    )  # fmt: skip
    trainer.fit(module, DataLoader(dataset(SAMPLES), 16 // devices), ckpt_path=checkpoint)
    assert callback.state is not None
    result = {
        "a": callback.found,
        "ranks": callback.state.ranks,
        "n_samples": callback.state.n_samples,
        "sharded": any(isinstance(p, DTensor) for p in module.parameters()),
        "end": full(module),
        "steps": trainer.global_step,
        "gradient_norms": norms.rows,
    }
    torch.save(result, folder / f"{name}-{trainer.global_rank}.pt")


def listening() -> str:
    """This process's TCP sockets that wait for connections."""
    lines = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
    return "\n".join(line for line in lines if f"pid={os.getpid()}," in line)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=["ddp", "fsdp2"])
    parser.add_argument("--state", type=Path)
    parser.add_argument("--fail", nargs=3, metavar=("RANK", "HOW", "WHEN"))
    words = parser.parse_args()
    for kind in words.kinds:
        if words.fail:
            rank, how, when = words.fail
            fit(kind, words.devices, words.folder, kind, Failing(words.folder, int(rank), how, when))
            continue
        fit(kind, words.devices, words.folder, kind)
        fit(
            kind,
            words.devices,
            words.folder,
            f"{kind}-resumed",
            checkpoint=words.folder / f"{kind}-step={STEPS // 2}.ckpt",
        )
        if words.state:
            fit(kind, words.devices, words.folder, f"{kind}-given", state=words.state)
    (words.folder / f"listening-{os.environ['LOCAL_RANK']}.txt").write_text(listening())


if __name__ == "__main__":
    main()
