"""Two gloo processes: every rank gets the same adapters, those of the union of the data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from eva_lightning import EVAInitCallback, EVAState, StreamingOptions
from eva_lightning.adapters import find_adapters
from tests.modules import build, dataset, trainer
from tests.paths import ROOT

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
    callback = Saving(rho=2, r=4, streaming=StreamingOptions(engine=engine, tau=1.0), verbose=False)
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

    single = EVAInitCallback(rho=2, r=4, streaming=StreamingOptions(engine=engine, tau=1.0), verbose=False)
    trainer(single, max_epochs=0).fit(build(), DataLoader(dataset(96), 8, shuffle=False))
    assert isinstance(single.state, EVAState)
    for name, a in first["a"].items():
        v = single.state.components[name][: len(a)]
        overlap = (a @ v.T).square().sum() / len(a)
        assert overlap > (0.9999 if engine == "exact" else 0.98), name


SHARDED = """
import json, sys
import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from tests.modules import Classifier, dataset, mlp
from eva_lightning import EVAInitCallback, StreamingOptions

class Sharded(Classifier):
    def configure_model(self):
        for layer in self.net:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

torch.manual_seed(0)
module = Sharded(mlp())
module.net[1] = torch.nn.Identity()
callback = EVAInitCallback(rho=2, r=4, streaming=StreamingOptions(tau=1.0), verbose=False)
strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, logger=False, callbacks=[callback],
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(module, DataLoader(dataset(96), 8))
found = {
    "ranks": callback.state.ranks,
    "n_samples": callback.state.n_samples,
    "sharded": {type(p).__name__ for p in module.parameters()} == {"DTensor"},
    "shapes": {n: list(p.shape) for n, p in module.named_parameters() if "lora_A" in n},
    "moved": any(bool(p.full_tensor().any()) for n, p in module.named_parameters() if "lora_B" in n),
}
with open(f"{sys.argv[1]}-{trainer.global_rank}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 on the CPU needs torch 2.7: CPU streams record events"
)
def test_fsdp2_gets_its_ranks_before_sharding(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"out-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["sharded"]
    assert first["moved"]
    assert set(first["n_samples"].values()) == {96}
    assert len(set(first["ranks"].values())) > 1
    shapes = {n.split(".lora_A")[0]: s[0] for n, s in first["shapes"].items()}
    assert shapes == first["ranks"]
