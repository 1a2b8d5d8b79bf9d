"""Gradient norms of A and B: pinned to ``dL/dB = s G A^T`` and ``dL/dA = s B^T G`` of a plain network in float64."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from eva_lightning import EVAInitCallback
from eva_lightning.adapters import find_adapters
from eva_lightning.gradient_norms import GradientNorms
from eva_lightning.methods import METHODS
from eva_lightning.methods.apply import AdapterOptions, apply_method
from tests.modules import HIDDEN, IN, Classifier, dataset, trainer

ALPHA, RANK, BATCH = 6.0, 3, 16
NAMES = ("net.0", "net.2")


class Net(Classifier):
    """Two layers with adapters and a head, without dropout and batch norm."""

    lr_multipliers = None

    def __init__(self, fused: bool = False, manual: bool = False) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 3))
        )
        self.fused = fused
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def train_only_head(self) -> None:
        self.requires_grad_(False)
        self.net[4].requires_grad_(True)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=0.05, fused=self.fused)


class Seen(pl.Callback):
    """Every minibatch, with A, B, W and biases as they were."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Any], Any]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        state = {n: v.detach().double().clone() for n, v in pl_module.state_dict().items()}
        state["scaling"] = {n: x.alpha / x.rank for n, x in find_adapters(pl_module).items()}
        self.steps.append((state, batch))


def expected(minibatches: list[tuple[dict[str, Any], Any]]) -> dict[str, float]:
    """Of one optimizer step over some minibatches, by the plain network with W + s B A."""
    state = minibatches[0][0]
    a, b = ([state[f"{n}.lora_{x}.default.weight"] for n in NAMES] for x in "AB")
    weights = [
        (state[f"{n}.base_layer.weight"] + state["scaling"][n] * b[i] @ a[i]).requires_grad_()
        for i, n in enumerate(NAMES)
    ]
    losses = []
    for _, (x, y) in minibatches:
        hidden = x.double()
        for n, weight in zip(NAMES, weights, strict=True):
            hidden = torch.tanh(hidden @ weight.T + state[f"{n}.base_layer.bias"])
        losses.append(nn.functional.cross_entropy(hidden @ state["net.4.weight"].T + state["net.4.bias"], y))
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, weights)
    scales = [state["scaling"][n] for n in NAMES]
    of_b = [s * g @ x.T for s, g, x in zip(scales, gradients, a, strict=True)]
    of_a = [s * x.T @ g for s, g, x in zip(scales, gradients, b, strict=True)]
    norm_a, norm_b = (math.sqrt(sum(float(g.square().sum()) for g in gs)) for gs in (of_a, of_b))
    return {"a": norm_a, "b": norm_b, "norm": math.hypot(norm_a, norm_b), "train_loss": float(loss.detach())}


def batches() -> DataLoader[Any]:
    return DataLoader(dataset(96), BATCH)


def fit(method: str, norms: GradientNorms, *more: pl.Callback, module: Any = None, **options: Any) -> Net:
    module = module or Net()
    rank = RANK + 1 if method == "orthogonal" else RANK  # whose rank is even
    callbacks = apply_method(method, module, AdapterOptions(rank=rank, alpha=ALPHA, bias="none"), head="net.4")
    ckpt = options.pop("ckpt_path", None)
    trainer(*callbacks, norms, *more, **{"max_steps": 4, "max_epochs": -1, **options}).fit(
        module, batches(), ckpt_path=ckpt
    )
    return module


FP16 = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "fp32": ({}, 1e-4),
    "accumulation": ({"accumulate_grad_batches": 3}, 1e-4),
    "clipping": ({"gradient_clip_val": 1e-3}, 1e-4),
    "bf16-mixed": ({"precision": "bf16-mixed"}, 0.05),
    "fp16, with its loss scale": (FP16, 0.01),
    "fp16, accumulation": ({**FP16, "accumulate_grad_batches": 3, "gradient_clip_val": 1e-3}, 0.01),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("method", ["lora", "eva"])
def test_norms_are_those_of_the_formula(method: str, name: str) -> None:
    options, tolerance = SETTINGS[name]
    norms, seen = GradientNorms(3), Seen()
    fit(method, norms, seen, **options)
    size = options.get("accumulate_grad_batches", 1)
    assert [row["step"] for row in norms.rows] == [1, 2, 3]
    for i, row in enumerate(norms.rows):
        wanted = expected(seen.steps[i * size : (i + 1) * size])
        assert {k: v for k, v in row.items() if k != "step"} == pytest.approx(wanted, rel=tolerance, abs=1e-6), i
    assert norms.rows[0]["a"] == 0 < min(row["a"] for row in norms.rows[1:])


@pytest.mark.parametrize(
    ("module", "options"),
    [({"fused": True}, {}), ({"fused": True}, FP16), ({"manual": True}, {}), ({"manual": True}, FP16)],
    ids=["fused", "fused in fp16, which divides the scale out itself", "manual", "manual in fp16"],
)
def test_optimizers_of_other_kinds(module: dict[str, bool], options: dict[str, Any]) -> None:
    norms, seen = GradientNorms(2), Seen()
    fit("lora", norms, seen, module=Net(**module), **options)
    for i, row in enumerate(norms.rows):
        wanted = expected(seen.steps[i : i + 1])
        assert row["norm"] == pytest.approx(wanted["norm"], rel=0.01)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("scratch", "ailora")])  # which needs attentions
def test_every_method_has_rows_but_linear(method: str) -> None:
    norms = GradientNorms(2)
    module = fit(method, norms)
    if method == "linear":
        assert norms.rows == []
        return
    assert [row["step"] for row in norms.rows] == [1, 2]
    assert all(0 < row["norm"] < math.inf and row["train_loss"] > 0 for row in norms.rows)
    assert ("a" in norms.rows[0]) == METHODS[method].adapts == bool([n for n in module.state_dict() if "lora_" in n])


def test_without_adapters_it_is_the_weights_adapters_would_be_at() -> None:
    norms, seen = GradientNorms(1), Seen()
    fit("fft", norms, seen)
    plain = Net().double()
    x, y = seen.steps[0][1]
    nn.functional.cross_entropy(plain(x.double()), y).backward()
    wanted = math.sqrt(sum(float(plain.net[i].weight.grad.square().sum()) for i in (0, 2)))  # type: ignore[union-attr,operator,index]
    assert norms.rows == [{"step": 1, "norm": pytest.approx(wanted, rel=1e-5), "train_loss": pytest.approx(1, abs=9)}]
    narrower = GradientNorms(1, exclude=["net.0"])
    fit("fft", narrower)
    assert narrower.rows[0]["norm"] < norms.rows[0]["norm"]


def test_training_is_the_same_with_and_without() -> None:
    def train(*callbacks: pl.Callback) -> list[float]:
        module = Net()
        trainer(EVAInitCallback(r=RANK, verbose=False), *callbacks, max_steps=5).fit(module, batches())
        return module.losses

    assert train() == train(GradientNorms(3))


def test_a_resumed_run_keeps_its_rows_and_goes_on(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                raise RuntimeError("power cut")

    whole, half, resumed = GradientNorms(4), GradientNorms(4), GradientNorms(4, tmp_path / "norms.csv")
    fit("eva", whole)
    with pytest.raises(RuntimeError, match="power cut"):
        fit("eva", half, Stop())
    seen = Seen()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        fit("eva", resumed, seen, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.rows[:2] == whole.rows[:2]
    assert [row["step"] for row in resumed.rows] == [1, 2, 3, 4]
    # this loader begins anew
    assert resumed.rows[2]["norm"] == pytest.approx(expected(seen.steps[:1])["norm"], rel=1e-4)
    with (tmp_path / "norms.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == resumed.rows


def test_every_row_goes_to_the_loggers(tmp_path: Path) -> None:
    norms = GradientNorms(3)
    fit("lora", norms, logger=CSVLogger(tmp_path), log_every_n_steps=50)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        logged = [row for row in csv.DictReader(file) if row["gradient_norm/all"]]
    assert [float(row["gradient_norm/b"]) for row in logged] == [row["b"] for row in norms.rows]
    assert [int(row["step"]) for row in logged] == [0, 1, 2]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
        GradientNorms(0)
    run = trainer()
    run.strategy.__class__ = DeepSpeedStrategy
    with pytest.raises(ValueError, match="DeepSpeedStrategy keeps gradients to itself"):
        GradientNorms(1).setup(run, Net(), "fit")
