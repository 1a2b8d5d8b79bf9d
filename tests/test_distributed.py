"""Two gloo processes: every rank gets the same adapters, those of the union of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from modules import build, dataset, trainer
from torch.utils.data import DataLoader

from eva_lightning import EVAInitCallback, EVAState
from eva_lightning.adapters import find_adapters

pytestmark = pytest.mark.distributed


class Saving(EVAInitCallback):
    """Keeps what each rank has right after the initialisation and after training."""

    folder: Path

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        assert self.state is not None
        torch.save(
            {
                "a": {n: x.a.detach().clone() for n, x in find_adapters(pl_module).items()},
                "ranks": self.state.ranks,
                "n_samples": self.state.n_samples,
                "wrapped": type(trainer.strategy.model).__name__,
            },
            self.folder / f"init-{trainer.global_rank}.pt",
        )

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"end-{trainer.global_rank}.pt")


def fit(strategy: str, folder: Path, engine: str) -> None:
    callback = Saving(rho=2, r=4, engine=engine, tau=1.0, verbose=False)
    callback.folder = folder
    start = DDPStrategy(start_method="spawn", process_group_backend="gloo", find_unused_parameters=strategy == "unused")
    run = trainer(callback, strategy=start, devices=2, max_epochs=2)
    run.fit(build(), DataLoader(dataset(96), 8, shuffle=False))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "engine"), [("plain", "exact"), ("unused", "incremental")])
def test_two_processes_agree_with_one_on_the_union(strategy: str, engine: str, tmp_path: Path) -> None:
    fit(strategy, tmp_path, engine)
    first, second = (torch.load(tmp_path / f"init-{rank}.pt") for rank in (0, 1))
    assert first["wrapped"] == "DistributedDataParallel"
    assert first["ranks"] == second["ranks"]
    assert first["n_samples"] == dict.fromkeys(first["n_samples"], 96)
    for name in first["a"]:
        assert torch.equal(first["a"][name], second["a"][name]), name
    ends = [torch.load(tmp_path / f"end-{rank}.pt") for rank in (0, 1)]
    for name, value in ends[0].items():
        if "lora_" in name:
            assert torch.equal(value, ends[1][name]), name
    assert any(value.any() for name, value in ends[0].items() if "lora_B" in name)

    single = EVAInitCallback(rho=2, r=4, engine=engine, tau=1.0, verbose=False)
    trainer(single, max_epochs=0).fit(build(), DataLoader(dataset(96), 8, shuffle=False))
    assert isinstance(single.state, EVAState)
    for name, a in first["a"].items():
        v = single.state.components[name][: len(a)]
        overlap = (a @ v.T).square().sum() / len(a)
        assert overlap > (0.9999 if engine == "exact" else 0.98), name
