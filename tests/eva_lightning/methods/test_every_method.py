"""What holds for every method in the table, new ones included: what differs between them are their traits."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from eva_lightning.adapters import find_adapters, merge_and_unload, save_pretrained
from eva_lightning.checkpoint import load_from_checkpoint
from eva_lightning.methods import METHODS
from eva_lightning.methods.apply import AdapterOptions
from tests.eva_lightning.methods.token_fits import build, fit, outputs, prepared
from tests.modules import Classifier, loader

ADAPTERS = [name for name, method in METHODS.items() if method.adapts]
MOVING = [name for name, method in METHODS.items() if method.moves_function]
#: W x is computed as (W - sBA) x + sBA x by methods that change W: equal up to rounding
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
EPOCHS = 3
OPTIONS = AdapterOptions(rank=4, seed=5)


class Seen(pl.Callback):
    """What a training sees: at its start outputs, weights and random state; then minibatches, and optimizer steps."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rng = torch.get_rng_state()
        self.outputs = outputs(pl_module)
        self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.batches: list[Tensor] = []
        self.steps_before = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0].sum())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps = trainer.global_step - self.steps_before


def run(method: str, keep_function: bool = False, **trainer_options: Any) -> tuple[Classifier, Seen, pl.Trainer]:
    module, callbacks = prepared(method, replace(OPTIONS, keep_function=keep_function), lr=0.01)
    seen = Seen()
    return module, seen, fit(module, [*callbacks, seen], **{"max_epochs": EPOCHS, **trainer_options})


@cache
def trained(method: str) -> tuple[Classifier, Seen, pl.Trainer]:
    """One training per method for all tests that do not change it."""
    return run(method)


@cache
def pretrained() -> Classifier:
    return build()


def base_weight(weights: dict[str, Tensor], name: str) -> Tensor:
    return weights.get(f"{name}.base_layer.weight", weights.get(f"{name}.weight", torch.empty(0)))


@pytest.mark.parametrize("method", METHODS)
def test_starts_from_the_pretrained_function_unless_it_says_so(method: str) -> None:
    entry, start = METHODS[method], trained(method)[1]
    moves = entry.moves_function or (entry.changes_base and not entry.adapts)
    if moves:
        assert not torch.allclose(start.outputs, outputs(pretrained()), **CLOSE)
    else:
        torch.testing.assert_close(start.outputs, outputs(pretrained()), **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_base_weights_change_at_the_start_where_the_table_says_so(method: str) -> None:
    before = dict(pretrained().named_parameters())
    after = trained(method)[1].weights
    same = {name: torch.equal(base_weight(after, name), base_weight(before, name)) for name in ("net.attention.q",)}
    assert set(same.values()) == {not METHODS[method].changes_base}
    if METHODS[method].adapts:
        assert torch.equal(base_weight(after, "net.embed"), base_weight(before, "net.embed"))


@pytest.mark.parametrize("method", MOVING)
def test_methods_that_move_the_function_keep_it_on_request(method: str) -> None:
    module, start, _ = run(method, keep_function=True, max_steps=1)
    torch.testing.assert_close(start.outputs, outputs(pretrained()), **CLOSE)
    assert any(layer.b.any() for layer in find_adapters(module).values())


@pytest.mark.parametrize("method", METHODS)
def test_trains_what_it_says_and_nothing_else(method: str) -> None:
    module, start, fitted = trained(method)
    per_epoch = len(module.losses) // EPOCHS
    assert sum(module.losses[-per_epoch:]) < 0.97 * sum(module.losses[-EPOCHS * per_epoch :][:per_epoch])
    after = dict(module.named_parameters())
    changed = {name for name, p in after.items() if not torch.equal(p, start.weights[name])}
    may = {name for name, p in after.items() if p.requires_grad}
    held = {id(p) for group in fitted.optimizers[0].param_groups for p in group["params"]}
    assert {name for name in may if id(after[name]) not in held} == set()
    assert changed <= may
    trains = METHODS[method].trains
    allowed = {"head": "net.head", "everything": "", "adapters": ("lora_", "net.head", "bias")}[trains]
    parts = (allowed,) if isinstance(allowed, str) else allowed
    assert all(any(part in name for part in parts) for name in may)
    assert any("net.head" in name for name in changed)
    assert any("lora_A" in name for name in changed) == any("lora_B" in name for name in changed)
    assert any("lora_" in name for name in changed) == (trains == "adapters")


@pytest.mark.parametrize("method", METHODS)
def test_random_state_and_minibatches_are_those_of_plain_lora(method: str) -> None:
    ours, plain = trained(method)[1], trained("lora")[1]
    assert torch.equal(ours.rng, plain.rng)
    assert torch.equal(torch.stack(ours.batches), torch.stack(plain.batches))


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed_is_bit_equal_to_uninterrupted(method: str, tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                raise RuntimeError("power cut")

    data = loader(tokens=4)  # whose order goes on where it stopped
    first, callbacks = prepared(method, OPTIONS, lr=0.01)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(first, [*callbacks, Stop()], data, max_epochs=EPOCHS)
    second, callbacks = prepared(method, OPTIONS, lr=0.01)
    fit(second, callbacks, data, max_epochs=EPOCHS, ckpt_path=tmp_path / "last.ckpt")
    ours, theirs = second.state_dict(), trained(method)[0].state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name, value in theirs.items() if not torch.equal(ours[name], value)] == []


@pytest.mark.parametrize("method", ADAPTERS)
def test_merges_and_exports_to_stock_peft(method: str, tmp_path: Path) -> None:
    from peft import PeftModel

    module = copy.deepcopy(trained(method)[0]).eval()
    expected = outputs(module)
    assert not torch.allclose(expected, outputs(pretrained()), atol=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_pretrained(module.net, tmp_path)
        loaded = PeftModel.from_pretrained(build().net, tmp_path)
    torch.testing.assert_close(outputs(loaded), expected, **CLOSE)
    merged = merge_and_unload(module)
    assert not any("lora_" in name for name in merged.state_dict())
    torch.testing.assert_close(outputs(merged), expected, **CLOSE)


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_checkpoint_goes_into_a_fresh_module(method: str, tmp_path: Path) -> None:
    module, _, fitted = trained(method)
    fitted.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert any("base_layer.weight" in key for key in held) == METHODS[method].changes_base
    loaded = load_from_checkpoint(Classifier, tmp_path / "a.ckpt", net=build().net)
    assert torch.equal(outputs(loaded), outputs(module))


@pytest.mark.parametrize("method", METHODS)
def test_starts_and_trains_under_mixed_precision(method: str) -> None:
    module, start, _ = run(method, precision="bf16-mixed", max_epochs=1)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert module.losses[-6:] == pytest.approx(trained(method)[0].losses[-18:-12], rel=0.1)
    if not METHODS[method].moves_function and METHODS[method].adapts:
        torch.testing.assert_close(start.outputs, outputs(pretrained()), **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_takes_fewer_steps_from_the_same_start(method: str) -> None:
    module, start, _ = run(method, accumulate_grad_batches=2, max_epochs=1)
    plain = trained(method)[1]
    differ = [name for name, value in plain.weights.items() if not torch.equal(start.weights[name], value)]
    # it starts from the gradients of optimizer steps, which average two minibatches here
    assert bool(differ) == (method == "eva-gradient")
    assert (start.steps, plain.steps) == (3, 6 * EPOCHS)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, start.weights[name])}
    assert any("lora_" in name for name in changed) == METHODS[method].adapts
    assert all(torch.isfinite(p).all() for p in module.parameters())
