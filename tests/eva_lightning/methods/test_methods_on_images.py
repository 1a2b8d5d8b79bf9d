"""Methods on a small vision transformer: start, training, merging, export to stock PEFT, resuming."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from eva_lightning.adapters import find_adapters, merge_and_unload, save_pretrained
from eva_lightning.callback import EVAInitCallback
from eva_lightning.methods import METHODS, method_names
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.vision.data.datamodule import VTAB1K
from eva_lightning.vision.epoch_csv import EpochHistory
from eva_lightning.vision.module import ImageClassifier
from tests.eva_lightning.methods.image_fits import fit, plain
from tests.eva_lightning.vision.fakes import make_task

#: One of every way in which a module is prepared; test_every_method.py has all methods on a smaller network.
IMAGE_METHODS = ("linear", "fft", "dora", "lora+", "adalora", "milora", "lora-ga", "eva", "eva-dora")
ADAPTERS = [method for method in IMAGE_METHODS if METHODS[method].adapts]
EDIT_BASE_WEIGHTS = [m for m in method_names("vision") if METHODS[m].adapts and METHODS[m].changes_base]
OPTIONS = AdapterOptions(rank=4)


def build(method: str, options: AdapterOptions = OPTIONS, **of_module: Any) -> tuple[ImageClassifier, list[L.Callback]]:
    module = plain(**of_module)
    return module, apply_method(method, module, options)


@torch.no_grad()
def logits(module: nn.Module) -> Tensor:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    modes = [(m, m.training) for m in module.modules()]
    found: Tensor = module.eval()(images)
    for m, mode in modes:
        m.training = mode
    return found


class AtStart(L.Callback):
    """Notes what the module computes and holds when training starts."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.logits = logits(pl_module)
        self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        in_optimizer = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        self.forgotten = [n for n, p in pl_module.named_parameters() if p.requires_grad and id(p) not in in_optimizer]


@pytest.fixture(scope="module")
def make_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], VTAB1K]:
    root = tmp_path_factory.mktemp("vtab")
    make_task(root)
    return lambda: VTAB1K(root, "kitti", image_size=32, batch_size=8, progress=False)


@pytest.fixture
def data(make_data: Callable[[], VTAB1K]) -> VTAB1K:
    return make_data()


@pytest.fixture(scope="module")
def trained(make_data: Callable[[], VTAB1K]) -> Callable[[str], tuple[ImageClassifier, AtStart, EpochHistory]]:
    @cache
    def train(method: str) -> tuple[ImageClassifier, AtStart, EpochHistory]:
        module, callbacks = build(method)
        start, history = AtStart(), EpochHistory()
        fit(module, [*callbacks, start, history], make_data(), max_epochs=6)
        return module, start, history

    return train


Trained = Callable[[str], tuple[ImageClassifier, AtStart, EpochHistory]]


@pytest.mark.parametrize("method", IMAGE_METHODS)
def test_starts_from_the_pretrained_function(method: str, trained: Trained) -> None:
    _, start, _ = trained(method)
    expected = logits(plain())
    assert expected.abs().max() > 1
    if METHODS[method].moves_function:
        assert not torch.allclose(start.logits, expected, rtol=0, atol=1e-4)
    elif method in EDIT_BASE_WEIGHTS:
        # W x is computed as (W - sBA) x + sBA x: equal up to rounding in fp32
        torch.testing.assert_close(start.logits, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))
    else:
        torch.testing.assert_close(start.logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", IMAGE_METHODS)
def test_trains_what_the_method_trains_and_nothing_else(method: str, trained: Trained) -> None:
    module, start, history = trained(method)
    assert history.rows[-1]["train_loss"] < 0.8 * history.rows[0]["train_loss"]
    after = dict(module.named_parameters())
    named = {name for name, p in after.items() if p.requires_grad}
    kinds = {
        "head" if ".head." in n else "lora" if "lora_" in n else "bias" if n.endswith("bias") else "rest" for n in named
    }
    adapters = {"head", "lora", "bias"}
    assert kinds == {"linear": {"head"}, "fft": {"head", "bias", "rest"}}.get(method, adapters)
    assert ("lora_magnitude_vector" in " ".join(named)) == ("dora" in method)
    assert start.forgotten == []
    assert start.weights.keys() == after.keys()
    changed = {name for name, p in after.items() if not torch.equal(p, start.weights[name])}
    # AdaLoRA masks components and a key's bias cancels in the softmax, so not all that may change does
    assert changed <= named
    assert {kind for kind in kinds if any(kind in n for n in changed)} >= kinds - {"rest"}


@pytest.mark.parametrize("method", ADAPTERS)
def test_merges_and_exports_to_stock_peft(method: str, trained: Trained, tmp_path: Path) -> None:
    from peft import PeftModel

    module = copy.deepcopy(trained(method)[0]).eval()
    expected = logits(module)
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * float(expected.abs().max())}
    assert not torch.allclose(expected, logits(plain()), atol=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_pretrained(module.model, tmp_path)
        loaded = PeftModel.from_pretrained(plain().model, tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, **tolerance)
    merged = merge_and_unload(module)
    assert not any("lora_" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), expected, **tolerance)


@pytest.mark.parametrize("method", IMAGE_METHODS)
def test_interrupted_and_resumed_equals_uninterrupted(
    method: str, make_data: Callable[[], VTAB1K], tmp_path: Path
) -> None:
    whole, callbacks = build(method)
    history = EpochHistory()
    fit(whole, [*callbacks, history], make_data(), max_epochs=2)

    class Interrupt(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")
            if trainer.current_epoch == 0:
                raise RuntimeError("power cut")

    first, callbacks = build(method)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(first, [*callbacks, EpochHistory(), Interrupt()], make_data(), max_epochs=2)
    second, callbacks = build(method)
    resumed = EpochHistory(tmp_path / "metrics.csv")
    fit(second, [*callbacks, resumed], make_data(), max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    ours, theirs = second.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert [row["train_loss"] for row in resumed.rows] == [row["train_loss"] for row in history.rows]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    weights = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    frozen = [key for key in weights if key.endswith("base_layer.weight")]
    assert bool(frozen) == (method in EDIT_BASE_WEIGHTS)


@pytest.mark.parametrize("method", EDIT_BASE_WEIGHTS)
def test_in_bfloat16_what_leaves_the_weight_is_what_the_adapter_gives_back(method: str, data: VTAB1K) -> None:
    module, callbacks = build(method, split_fused=True)
    before = {n: layer.weight.detach().clone() for n, layer in linear_layers(plain(split_fused=True)).items()}
    fit(module, callbacks, data, max_steps=1, precision="bf16-true")
    layers = find_adapters(module)
    assert layers
    for name, layer in layers.items():
        weight: Any = layer.base.weight
        assert weight.dtype == layer.a.dtype == torch.bfloat16
        start_a, start_b = layer.module.initial_lora_A, layer.module.initial_lora_B
        whole = weight.float() + layer.module.scaling[layer.adapter] * start_b.float() @ start_a.float()
        # one rounding to 8 bits of mantissa, of a weight and of what is left of it
        largest = float(before[name].abs().max()) + float(weight.abs().max())
        torch.testing.assert_close(whole, before[name], rtol=0, atol=2**-8 * largest)


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


def test_eva_keeps_the_rank_budget_and_alpha_over_r(data: VTAB1K) -> None:
    module, callbacks = build("eva", AdapterOptions(rank=4, rho=2.0))
    fit(module, callbacks, data, max_epochs=1)
    (callback,) = callbacks
    assert isinstance(callback, EVAInitCallback)
    assert callback.state is not None
    assert len(callback.state.ranks) == 4 * len(module.model.blocks)  # type: ignore[arg-type]
    assert sum(callback.state.ranks.values()) == 4 * len(callback.state.ranks)
    assert "model.head" not in callback.state.ranks
    scalings = {m.scaling["default"] for m in module.modules() if hasattr(m, "lora_A")}
    assert scalings == {0.25}


def test_lora_plus_composes_with_weight_decay_of_matrices_only(data: VTAB1K) -> None:
    module = plain(lr=0.5)
    module.decay_matrices_only = True
    callbacks = apply_method("lora+", module, AdapterOptions(rank=4, lora_plus_ratio=4.0))
    groups = fit(module, callbacks, data, max_steps=1).optimizers[0].param_groups
    named = {id(p): name for name, p in module.named_parameters()}
    found = {
        (group["initial_lr"], group["weight_decay"], "lora_B" in named[id(p)], p.ndim > 1)
        for group in groups
        for p in group["params"]
    }
    assert found == {(0.5, 0.05, False, True), (0.5, 0.0, False, False), (2.0, 0.05, True, True)}


def test_plain_lora_checkpoints_leave_frozen_weights_out(data: VTAB1K, tmp_path: Path) -> None:
    module, callbacks = build("lora", AdapterOptions(rank=4))
    trainer = fit(module, callbacks, data, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    keys = torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"].keys()
    assert any("lora_A" in key for key in keys)
    assert not any(key.endswith("base_layer.weight") for key in keys)


def test_unknown_method_suggests() -> None:
    with pytest.raises(ValueError, match="unknown method 'eva-dra': did you mean eva-dora"):
        apply_method("eva-dra", plain(), AdapterOptions())


@pytest.mark.parametrize(
    ("option", "value"), [("rank", 0), ("rho", 0.5), ("rho", float("nan")), ("tau", 0.0), ("metric", "ratios")]
)
def test_bad_options_are_named(option: str, value: object) -> None:
    with pytest.raises(ValueError, match="r must be" if option == "rank" else option):
        AdapterOptions(**{option: value})  # type: ignore[arg-type]


def test_ablations_have_their_initialisation_set() -> None:
    with pytest.raises(ValueError, match="eva-whiten has an initialisation of its own: leave init='rotate' to eva"):
        apply_method("eva-whiten", plain(), AdapterOptions(init="rotate"))
