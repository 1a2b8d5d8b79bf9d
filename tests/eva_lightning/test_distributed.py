"""Several gloo processes: every rank gets the same adapters, those of the union of the data, and trains them alike.

A launch of two or four processes takes most of a minute on two cores, so one serves several tests.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from peft import PeftModel
from torch.utils.data import DataLoader, DistributedSampler

from eva_lightning import EVAInitCallback, EVAState, StreamingOptions, precompute
from eva_lightning.adapters import find_adapters, save_pretrained
from eva_lightning.gradient_norms import GradientNorms
from tests.eva_lightning import strategy_run
from tests.modules import build, dataset, trainer
from tests.paths import ROOT

pytestmark = pytest.mark.distributed

FSDP2_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # since torch 2.7
_KINDS = ["ddp", "fsdp2"] if FSDP2_ON_CPU else ["ddp"]
KINDS_OF = [(2, *_KINDS), pytest.param((4, *_KINDS), marks=pytest.mark.nightly)]


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


@dataclass(frozen=True)
class Launched:
    """What the processes of one launch of strategy_run.py left."""

    folder: Path
    devices: int

    def ranks(self, name: str) -> list[dict[str, Any]]:
        return [torch.load(self.folder / f"{name}-{rank}.pt") for rank in range(self.devices)]


def launch(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Returns when all processes have ended: they share the pipes."""
    command = [sys.executable, "-m", "tests.eva_lightning.strategy_run", "--folder", str(folder), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250)


def one_process(folder: Path) -> EVAState:
    """The state of the whole data, by the command for one process."""
    words = ["--r", "4", "--engine", "exact", "--tau", "1", "--accelerator", "cpu", "--output", str(folder / "eva")]
    assert precompute.main([f"{__name__}:whole", *words]) == 0
    return EVAState.load(folder / "eva")


def whole() -> tuple[strategy_run.Sharded, DataLoader[Any]]:
    torch.manual_seed(0)
    return strategy_run.Sharded(), DataLoader(dataset(strategy_run.SAMPLES), 16)


@pytest.fixture(scope="module", params=KINDS_OF, ids=lambda kinds: f"{kinds[0]}-{'-'.join(kinds[1:])}")
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    devices, *kinds = request.param
    folder = tmp_path_factory.mktemp("strategies")
    one_process(folder)
    done = launch(folder, "--devices", str(devices), "--state", str(folder / "eva"), "--kinds", *kinds)
    assert done.returncode == 0, done.stderr[-3000:]
    return Launched(folder, devices)


def kinds_in(launched: Launched) -> list[str]:
    return [kind for kind in ("ddp", "fsdp2") if (launched.folder / f"{kind}-0.pt").exists()]


@pytest.mark.slow
def test_every_rank_starts_with_the_directions_of_all_data_and_ends_with_the_same_parameters(
    launched: Launched,
) -> None:
    state = EVAState.load(launched.folder / "eva")
    starts = []
    for kind in kinds_in(launched):
        first, *others = launched.ranks(kind)
        starts.append(first["a"])
        assert first["sharded"] == (kind == "fsdp2")
        assert first["steps"] == strategy_run.STEPS
        assert set(first["n_samples"].values()) == {strategy_run.SAMPLES}
        assert len(set(first["ranks"].values())) > 1
        assert {n: len(a) for n, a in first["a"].items()} == {n: r for n, r in first["ranks"].items() if r}
        for other in others:
            assert other["ranks"] == first["ranks"]
            for part in ("a", "end"):
                same_bits(first[part], other[part])
        assert any(bool(p.any()) for n, p in first["end"].items() if "lora_B" in n)
        for name, a in first["a"].items():
            overlap = (a @ state.components[name][: len(a)].T).square().sum() / len(a)
            assert overlap > 0.9999, name
    if len(starts) == 2:
        same_bits(*starts)


@pytest.mark.slow
def test_gradient_norms_are_those_of_one_process_on_the_union(launched: Launched) -> None:
    torch.manual_seed(0)
    module, norms = strategy_run.Sharded(), GradientNorms(steps=3)
    streaming = StreamingOptions(tau=1.0, engine="exact")
    callback = EVAInitCallback(rho=2, r=4, metric=strategy_run.METRIC, streaming=streaming, verbose=False)
    data, devices = dataset(strategy_run.SAMPLES), launched.devices
    of_ranks: list[list[int]] = [list(DistributedSampler(data, devices, rank)) for rank in range(devices)]
    size = 16 // devices
    union = [[j for one in of_ranks for j in one[i : i + size]] for i in range(0, len(of_ranks[0]), size)]
    trainer(callback, norms, max_steps=3).fit(module, DataLoader(data, batch_sampler=union))
    for kind in kinds_in(launched):
        for rank in launched.ranks(kind):
            for row, expected in zip(rank["gradient_norms"], norms.rows, strict=True):
                assert row == pytest.approx(expected, rel=1e-3), kind


@pytest.mark.slow
def test_resumed_equals_uninterrupted_under_a_strategy(launched: Launched) -> None:
    for kind in kinds_in(launched):
        for rank, resumed in zip(launched.ranks(kind), launched.ranks(f"{kind}-resumed"), strict=True):
            assert resumed["steps"] == strategy_run.STEPS
            same_bits(rank["end"], resumed["end"])


@pytest.mark.slow
def test_a_precomputed_state_starts_every_strategy_alike(launched: Launched, tmp_path: Path) -> None:
    module, data = whole()
    given = EVAInitCallback(rho=2, r=4, metric=strategy_run.METRIC, state=launched.folder / "eva", verbose=False)
    trainer(given, max_epochs=0).fit(module, data)
    expected = {name: adapter.a for name, adapter in find_adapters(module).items()}
    for kind in kinds_in(launched):
        for rank in launched.ranks(f"{kind}-given"):
            same_bits(expected, rank["a"])


@pytest.mark.slow
def test_one_consolidated_adapter_folder_from_the_checkpoint_of_many(launched: Launched, tmp_path: Path) -> None:
    for kind in kinds_in(launched):
        module = strategy_run.Sharded.load_from_checkpoint(launched.folder / f"{kind}-step={strategy_run.STEPS}.ckpt")
        same_bits({n: p.detach() for n, p in module.named_parameters()}, launched.ranks(kind)[0]["end"])
        save_pretrained(module.net, tmp_path / kind)
        assert [p.name for p in (tmp_path / kind).glob("*.safetensors")] == ["adapter_model.safetensors"]
        reloaded = PeftModel.from_pretrained(whole()[0].net, str(tmp_path / kind)).eval()
        x = dataset(16).tensors[0]
        with torch.no_grad():
            assert torch.equal(reloaded(x), module.eval()(x))


@pytest.mark.slow
def test_processes_of_one_machine_meet_on_its_loopback_interface(launched: Launched) -> None:
    found = [(launched.folder / f"listening-{rank}.txt").read_text() for rank in range(launched.devices)]
    addresses = re.findall(r"LISTEN +\d+ +\d+ +(\S+):\d+ ", "\n".join(found))
    assert len(addresses) > launched.devices  # gloo's in every process, and the rendezvous server
    assert set(addresses) <= {"127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rank", "how", "when"),
    [("ddp", 1, "raise", "streaming"), ("ddp", 0, "kill", "training"), ("fsdp2", 1, "kill", "training")],
)
def test_a_rank_that_fails_ends_the_others(tmp_path: Path, kind: str, rank: int, how: str, when: str) -> None:
    if kind == "fsdp2" and not FSDP2_ON_CPU:
        pytest.skip("FSDP2 on the CPU needs torch 2.7")
    done = launch(tmp_path, "--devices", "2", "--kinds", kind, "--fail", str(rank), how, when)
    ended = time.time()
    assert ended - float((tmp_path / "failed.txt").read_text()) < 60
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.pt"))
    if how == "raise":
        assert f"ValueError: rank {rank} found a bad sample" in done.stderr
    else:
        assert re.search(r"Connection closed by peer|Connection reset|SIGKILL|exit code: -9", done.stderr)


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
