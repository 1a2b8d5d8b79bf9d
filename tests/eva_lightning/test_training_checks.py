"""What is said of a fit that does less than it seems to: once, with names, and nothing where all is well."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.tuner import Tuner
from peft import LoraConfig, get_peft_model
from torch import nn

from eva_lightning import EVAInitCallback
from eva_lightning.adapters import find_adapters
from eva_lightning.divergence import DivergenceCallback, DivergenceWarning
from eva_lightning.errors import EVAWarning
from tests.modules import CLASSES, IN, Classifier, TokenNet, build, loader, mlp, trainer


def said(
    module: Any, *callbacks: pl.Callback, data: Any = None, eva: dict[str, Any] | None = None, **options: Any
) -> list[str]:
    """Our warnings in a fit."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        callback = EVAInitCallback(**{"rho": 2, "r": 4, "verbose": False, **(eva or {})})
        trainer(callback, *callbacks, **options).fit(module, loader() if data is None else data)
    return [str(w.message) for w in seen if issubclass(w.category, EVAWarning)]


class InParts(Classifier):
    """A backbone and a head, run as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        if self.how == "no_grad":
            with torch.no_grad():
                h = self.net[:7](x)  # type: ignore[index]
        elif self.how == "inference_mode":
            with torch.inference_mode():
                h = self.net[:7](x)  # type: ignore[index]
            h = h.clone()
        else:
            h = self.net[:7](x)  # type: ignore[index]
            h = h.detach() if self.how == "detach" else h
        return F.cross_entropy(self.net[7](h), y)  # type: ignore[index]


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "detach"])
def test_backbone_without_gradients(how: str) -> None:
    module = InParts(how)
    [message] = said(module)
    assert message.startswith("EVA: 3 of 3 adapted layers ('net.0', 'net.3', 'net.5') got no gradient in the first ")
    assert "torch.no_grad()" in message
    assert not any(layer.b.any() for layer in find_adapters(module).values()), "it is true"


def test_a_healthy_fit_says_nothing() -> None:
    assert said(InParts("whole"), max_epochs=2) == []
    assert said(Classifier(get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0", "3"])))) == []


class HeadOnly(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[7].parameters(), lr=0.1)  # type: ignore[index,operator]


class MadeEarly(Classifier):
    """The optimizer is older than the adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.made = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> Any:
        return self.made


class NoOptimizer(Classifier):
    def configure_optimizers(self) -> Any:
        return None


class OneMissing(Classifier):
    """Two optimizers, manual optimisation, and one layer in neither."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        parts = [[p for n, p in self.named_parameters() if part in n and p.requires_grad] for part in ("t.0", "t.3")]
        return [torch.optim.SGD(part, lr=0.1) for part in parts]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


@pytest.mark.parametrize(
    ("kind", "count"), [(HeadOnly, "3 of 3"), (MadeEarly, "3 of 3"), (NoOptimizer, "3 of 3"), (OneMissing, "1 of 3")]
)
def test_adapters_in_no_optimizer(kind: Any, count: str) -> None:
    [message] = said(kind())
    assert message.startswith(f"EVA: {count} adapted layers ('net.")
    assert "are in no optimizer and will not train: make the optimizer in configure_optimizers" in message


def test_manual_optimisation_with_optimizers_of_its_own_is_no_fault() -> None:
    class Own(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return None

        def on_fit_start(self) -> None:
            self.own = [torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            F.cross_entropy(self(batch[0]), batch[1]).backward()
            self.own[0].step()
            self.own[0].zero_grad()

    module = Own()
    assert said(module) == []
    assert all(layer.b.any() for layer in find_adapters(module).values())


def test_adapters_frozen_or_disabled_before_the_first_step() -> None:
    class Frozen(Classifier):
        def on_fit_start(self) -> None:
            self.net[:7].requires_grad_(False)  # type: ignore[index,operator]

    [message] = said(Frozen())
    assert "have adapters that are frozen (requires_grad is False) and will not train" in message
    module: Any = Classifier(get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0", "3"])))
    module.net.disable_adapter_layers()
    module.net.base_model.model[7].requires_grad_(True)
    [message] = said(module)
    assert "have adapters that are disabled and will not train: call enable_adapter_layers()" in message


class Branches(nn.Module):
    """``b`` runs as `when` says."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(IN, 8), nn.Linear(IN, 8), nn.Linear(8, CLASSES)
        self.when, self.calls = when, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        runs = {"never": False, "eval": not self.training, "every second time": self.calls % 2 == 0}[self.when]
        return self.head(self.a(x) + self.b(x)) if runs else self.head(self.a(x))


def test_layers_that_never_ran_are_named() -> None:
    [message] = said(Classifier(Branches("never")))
    assert message.startswith("EVA: 1 of 2 adapted layers ('net.b') did not run on the minibatches that EVA streamed")
    [message] = said(Classifier(Branches("eval")), max_epochs=2)
    assert message.startswith("EVA: 1 of 2 adapted layers ('net.b') got no gradient in the first 6 batches")
    assert said(Classifier(Branches("every second time"))) == []


@pytest.mark.parametrize("shape", [(16, 4), (5, 16), (16, 5, 2)])
def test_mask_that_fits_no_layer(shape: tuple[int, ...]) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    [message] = said(build(net=TokenNet()), data=loader(tokens=5), eva={"mask_fn": lambda batch: mask})
    assert message.startswith(f"EVA: mask_fn gave a mask of shape {shape}, which is that of no adapted layer's tokens")


def test_mask_that_fits_says_nothing_and_no_mask_at_all_is_an_error() -> None:
    mask = torch.ones(16, 5, dtype=torch.bool)
    assert said(build(net=TokenNet()), data=loader(tokens=5), eva={"mask_fn": lambda batch: mask}) == []
    with pytest.raises(TypeError, match="mask_fn must return a bool tensor or None, got list"):
        said(build(net=TokenNet()), data=loader(tokens=5), eva={"mask_fn": lambda batch: [True]})


# --- divergence -----------------------------------------------------------------------------------------------------


class NaNAt(Classifier):
    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == self.batch else 1.0)


def test_diverged_run_is_said_once_with_the_step() -> None:
    [message] = said(NaNAt(2), max_epochs=2)
    assert message.startswith("training has diverged: the loss is nan at step 3. Lower the learning rate")


def test_parameters_that_diverge_without_a_loss_to_look_at() -> None:
    class Silent(OneMissing):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=float("inf"))]

        def optimizers(self, use_pl_optimizer: bool = True) -> Any:
            return [super().optimizers(use_pl_optimizer)]

    [message] = said(Silent())
    assert "has NaN or infinite values after epoch 0" in message


def test_divergence_callback_of_its_own_keeps_the_sentence() -> None:
    watch = DivergenceCallback()
    assert said(NaNAt(0), watch) == [watch.diverged]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DivergenceWarning)
        trainer(watch).fit(Classifier(), loader())
    assert watch.diverged is None, "of this fit, not of the one before"


def test_learning_rate_finder_may_diverge(tmp_path: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", EVAWarning)
        run = trainer(EVAInitCallback(rho=2, r=4, verbose=False), default_root_dir=tmp_path)
        Tuner(run).lr_find(
            Classifier(), loader(), max_lr=1e30, num_training=20, early_stop_threshold=None, update_attr=False
        )


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu() -> None:
    watch, run = DivergenceCallback(), trainer()
    losses = torch.full((50,), 1.0, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for loss in losses:
            watch.look_at_loss(run, {"loss": loss})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    watch.look_at_loss(run, {"loss": losses[0]})  # reads the last of those, or this one
    torch.cuda.synchronize()
    watch.look_at_loss(run, {"loss": losses[0] * float("nan")})
    torch.cuda.synchronize()
    with pytest.warns(DivergenceWarning, match="the loss is nan"):
        watch.look_at_loss(run, {"loss": losses[0] * float("nan")})


class Spare(Classifier):
    """A layer that nothing runs, defined last."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(7, 7)


class FeaturesOnly(Classifier):
    """``forward`` gives features; the head runs in ``training_step`` alone."""

    def __init__(self) -> None:
        super().__init__(mlp()[:-1])
        self.head = nn.Linear(24, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.head(self(batch[0])), batch[1])


def test_an_output_layer_that_was_guessed_and_never_runs_is_named() -> None:
    [message] = said(Spare(), max_epochs=2)
    assert message.startswith("EVA: 'spare' got no gradient")
    assert "head=[...]" in message
    assert said(Spare(), eva={"head": "net.7", "exclude": ["spare"]}) == []
    assert said(FeaturesOnly()) == []
