"""EVAInitCallback in real fits: what it does to a module, and what it leaves alone."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from eva_lightning import EVAInitCallback, EVAState, StreamingOptions
from eva_lightning.adapters import find_adapters
from tests.modules import HIDDEN, IN, Classifier, TokenNet, build, correlated, dataset, loader, mlp, trainer


class FreezeAfterInit(EVAInitCallback):
    """Stops the fit right after the initialisation, to look at it."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self.trainable = [n for n, p in pl_module.named_parameters() if p.requires_grad]
        self.optimizer_parameters = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
        self.missing = [
            n for n, p in pl_module.named_parameters() if p.requires_grad and id(p) not in self.optimizer_parameters
        ]
        self.snapshot = {n: p.detach().clone() for n, p in pl_module.named_parameters()}


def exact_components(x: torch.Tensor, k: int) -> torch.Tensor:
    centred = x.double() - x.double().mean(0)
    return torch.linalg.svd(centred, full_matrices=False).Vh[:k].float()


def same_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.T).diagonal().abs()


def test_one_line_gives_eva_on_a_plain_module() -> None:
    module = build()
    callback = FreezeAfterInit(rho=1.5, r=4, streaming=StreamingOptions(max_batches=6, tau=1.0))
    trainer(callback).fit(module, loader())
    state = callback.state
    assert isinstance(state, EVAState)
    assert list(state.ranks) == ["net.0", "net.3", "net.5"]
    assert sum(state.ranks.values()) == 3 * 4
    assert max(state.ranks.values()) <= 6
    layers = find_adapters(module)
    assert {n: layer.rank for n, layer in layers.items()} == {n: r for n, r in state.ranks.items() if r}
    assert isinstance(module.net[7], nn.Linear), "the head gets no adapter"
    assert callback.missing == []
    assert all("lora_" in n or n.startswith("net.7.") for n in callback.trainable)


def test_a_is_the_exact_svd_of_the_inputs_and_b_is_zero() -> None:
    module = build()
    data = dataset(96)
    # one epoch of 6 batches without a second look: the streamed tokens are the whole data set
    callback = FreezeAfterInit(rho=1, r=4, streaming=StreamingOptions(max_batches=6, tau=1.0))
    trainer(callback).fit(module, DataLoader(data, 16))
    a = callback.snapshot["net.0.lora_A.default.weight"]
    assert same_rows(a, exact_components(data.tensors[0], 4)).min() > 1 - 1e-5
    torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-5, rtol=0)
    assert not callback.snapshot["net.0.lora_B.default.weight"].any()
    assert callback.state is not None
    assert callback.state.n_samples["net.0"] == 96
    exact = torch.linalg.svdvals((data.tensors[0] - data.tensors[0].mean(0)).double())
    torch.testing.assert_close(callback.state.singular_values["net.0"], exact[:4].float(), rtol=1e-4, atol=1e-5)
    ratio = exact.square()[:4] / exact.square().sum()
    torch.testing.assert_close(callback.state.explained_variance_ratio["net.0"], ratio.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_output_is_bit_identical_before_and_after(use_dora: bool, use_rslora: bool, precision: Any) -> None:
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    x = correlated(32, seed=3).to(dtype)
    module = build().eval()
    before = copy.deepcopy(module).to(dtype)(x)

    class Look(EVAInitCallback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_fit_start(trainer, pl_module)
            flag = pl_module.training
            pl_module.eval()
            self.after = pl_module(x)
            pl_module.train(flag)

    callback = Look(rho=2, r=4, lora={"use_dora": use_dora, "use_rslora": use_rslora})
    # built in fp32 and rounded by the precision plugin, as Lightning does
    trainer(callback, precision=precision).fit(module, loader())
    assert callback.state is not None
    assert len(set(callback.state.ranks.values())) > 1, "ranks were redistributed"
    assert torch.equal(before, callback.after)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_is_preserved_when_ranks_change(use_rslora: bool) -> None:
    module = build()
    trainer(EVAInitCallback(rho=2, r=4, alpha=3.0, lora={"use_rslora": use_rslora})).fit(module, loader())
    expected = 3.0 / (2.0 if use_rslora else 4.0)
    for layer in find_adapters(module).values():
        assert layer.module.scaling["default"] == pytest.approx(expected)
        assert layer.alpha == pytest.approx(expected * (layer.rank**0.5 if use_rslora else layer.rank))


def test_existing_lora_layers_are_used_with_their_own_rank() -> None:
    torch.manual_seed(0)
    net = get_peft_model(mlp(), LoraConfig(r=3, lora_alpha=6, target_modules=["0", "3"], modules_to_save=["7"]))
    module = Classifier(net)
    callback = EVAInitCallback(rho=2, r=16)
    trainer(callback).fit(module, loader())
    assert callback.state is not None
    assert set(callback.state.ranks) == {"net.0", "net.3"}, "names without PEFT's wrappers"
    assert sum(callback.state.ranks.values()) == 6
    for layer in find_adapters(module).values():
        assert layer.module.scaling["default"] == pytest.approx(2.0)


def test_layer_with_constant_input_is_removed() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.dead, self.head = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.head(x + self.dead(torch.zeros_like(x)))

    module = build(net=Dead())
    callback = EVAInitCallback(rho=1, r=4)
    trainer(callback).fit(module, loader())
    assert callback.state is not None
    assert callback.state.ranks == {"net.first": 4, "net.dead": 0}
    assert type(module.net.dead) is nn.Linear


def test_r_times_rho_above_the_width_is_capped_and_said(caplog: pytest.LogCaptureFixture) -> None:
    module = build(net=TokenNet())
    callback = EVAInitCallback(rho=2, r=8)
    trainer(callback).fit(module, loader(tokens=5))
    assert callback.state is not None
    assert callback.state.ranks["net.wide"] <= 4
    assert sum(callback.state.ranks.values()) == 6 * 8 + 4, (
        "the budget is the uniform ranks': 4 for the layer of width 4"
    )
    assert "narrower than r * rho" in caplog.text


def test_summary_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    module = build()
    callback = EVAInitCallback(rho=2, r=4)
    trainer(callback).fit(module, loader())
    trainer(callback).fit(module, loader())
    out = caplog.text
    assert out.count("EVA initialisation") == 1
    for word in ("layers", "ranks min/median/max", "trainable parameters", "minibatches", "seconds"):
        assert word in out


def test_shared_inputs_are_decomposed_once() -> None:
    module = build(net=TokenNet())
    callback = EVAInitCallback(rho=2, r=4)
    trainer(callback).fit(module, loader(tokens=5))
    assert callback.state is not None
    assert callback.state.shared_with == {"net.attention.k": "net.attention.q", "net.attention.v": "net.attention.q"}
    a, b = callback.state.components["net.attention.q"], callback.state.components["net.attention.v"]
    assert a.data_ptr() == b.data_ptr()


# --- nothing else changes -------------------------------------------------------------------------------------------


class Recorder(Classifier):
    """Records the batches it trains on and the random state it sees; learns nothing."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(lr=0.0)
        self.seen: list[torch.Tensor] = []
        self.random: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        batch = batch["a"] if isinstance(batch, dict) else batch
        self.seen.append(batch[0].clone())
        self.random.append(torch.get_rng_state())
        return super().training_step(batch, batch_idx)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(x + torch.rand(1), y) for x, y in dataset(40)])


class Bare:
    """An iterable that is no DataLoader and has no length."""

    def __iter__(self) -> Any:
        return ((torch.rand(8, IN), torch.zeros(8, dtype=torch.long)) for _ in range(5))


LOADERS: dict[str, Any] = {
    "shuffled by the global generator": lambda: loader(generator=None),
    "own generator": loader,
    "two workers": lambda: loader(generator=None, num_workers=2),
    "persistent workers": lambda: loader(num_workers=1, persistent_workers=True),
    "iterable data set": lambda: DataLoader(Stream(), 8),
    "no DataLoader": Bare,
    "several loaders": lambda: {"a": loader(), "b": loader(batch_size=8)},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in LOADERS]
    + [("own generator", {"overfit_batches": 2}), ("own generator", {"accumulate_grad_batches": 2})],
    ids=str,
)
def test_batches_and_random_state_are_those_of_a_run_without(name: str, options: dict[str, Any]) -> None:
    runs = []
    for callbacks in (
        [],
        [EVAInitCallback(rho=2, r=4, streaming=StreamingOptions(max_batches=3), forward_fn=run_first, verbose=False)],
    ):
        module = Recorder()
        torch.manual_seed(1)
        trainer(*callbacks, max_epochs=2, **options).fit(module, LOADERS[name](), DataLoader(dataset(16), 8))
        runs.append(module)
    without, with_eva = runs
    assert len(without.seen) == len(with_eva.seen) > 0
    assert all(torch.equal(a, b) for a, b in zip(without.seen, with_eva.seen, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(without.random, with_eva.random, strict=True))


def run_first(module: nn.Module, batch: Any) -> Any:
    return module((batch["a"] if isinstance(batch, dict) else batch)[0])


def test_modes_and_batch_norm_statistics_are_untouched() -> None:
    class Stubborn(nn.BatchNorm1d):
        """Stays in train mode whatever it is told."""

        def train(self, mode: bool = True) -> Stubborn:
            return super().train(True)

    net = mlp()
    net[1] = Stubborn(HIDDEN)
    module = build(net=net)
    module.net[3].eval()
    seen: dict[str, Any] = {}

    class Look(EVAInitCallback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            seen["modes before"] = {n: m.training for n, m in pl_module.named_modules()}
            super().on_fit_start(trainer, pl_module)
            seen["modes"] = {n: m.training for n, m in pl_module.named_modules()}
            seen["mean"] = pl_module.net[1].running_mean.clone()
            seen["count"] = int(pl_module.net[1].num_batches_tracked)

    trainer(Look(rho=2, r=4)).fit(module, loader())
    assert seen["modes"] == {n: seen["modes before"].get(n, True) for n in seen["modes"]}
    assert seen["modes"]["net.3.base_layer"] is False
    assert not seen["mean"].any()
    assert seen["count"] == 0


def test_seeded_runs_are_bit_identical() -> None:
    runs = []
    for _ in range(2):
        module = build(net=TokenNet())
        callback = EVAInitCallback(rho=2, r=4, streaming=StreamingOptions(tokens_per_sample=3))
        trainer(callback).fit(module, loader(tokens=5))
        runs.append((callback.state, module.losses))
    (a, losses_a), (b, losses_b) = runs
    assert losses_a == losses_b
    assert a is not None
    assert b is not None
    assert a.ranks == b.ranks
    assert all(torch.equal(a.components[n], b.components[n]) for n in a.components)


def test_second_fit_skips_and_a_new_module_does_not() -> None:
    callback = EVAInitCallback(rho=2, r=4)
    module = build()
    trainer(callback).fit(module, loader())
    first = callback.state
    weights = {n: p.clone() for n, p in module.named_parameters() if "lora_B" in n}
    assert any(w.any() for w in weights.values())
    trainer(callback).fit(module, loader())
    assert callback.state is first
    trainer(EVAInitCallback(rho=2, r=4)).fit(module, loader())
    other = build(seed=1)
    trainer(callback).fit(other, loader())
    assert callback.state is not first
    assert len(find_adapters(other)) > 0


# --- batches of any shape -------------------------------------------------------------------------------------------


class DictModule(Classifier):
    def forward(self, inputs: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.net(inputs * scale)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch["inputs"]), batch["label"])


class TensorModule(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch).square().mean()


class StepOnly(Classifier):
    """No forward: everything happens in training_step, which logs."""

    forward = None  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss


def test_mapping_batches() -> None:
    data = [{"inputs": x, "label": y} for x, y in dataset(48)]
    callback = EVAInitCallback(rho=2, r=4)
    trainer(callback).fit(DictModule(), DataLoader(data, 16))
    assert callback.state is not None
    assert callback.state.n_samples["net.0"] > 0


def test_tensor_batches() -> None:
    callback = EVAInitCallback(rho=2, r=4)
    trainer(callback).fit(TensorModule(), DataLoader([x for x, _ in dataset(48)], 16))
    assert callback.state is not None


def test_module_without_forward_uses_a_muted_training_step() -> None:
    del StepOnly.forward
    StepOnly.forward = nn.Module.forward  # type: ignore[method-assign]
    callback = EVAInitCallback(rho=2, r=4)
    run = trainer(callback)
    run.fit(StepOnly(), loader())
    assert callback.state is not None
    assert "loss" in run.callback_metrics, "logging works again in training"


def test_custom_forward_fn() -> None:
    callback = EVAInitCallback(rho=2, r=4, forward_fn=lambda module, batch: module.net(batch["x"]["deep"]))

    class Deep(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self(batch["x"]["deep"]).square().mean()

    trainer(callback).fit(Deep(), DataLoader([{"x": {"deep": x}} for x, _ in dataset(48)], 16))
    assert callback.state is not None


# --- ways to train --------------------------------------------------------------------------------------------------


class LoraPlus(Classifier):
    """A larger learning rate for B, and a schedule that reads the parameter groups."""

    def configure_optimizers(self) -> Any:
        a = [p for n, p in self.named_parameters() if "lora_A" in n]
        b = [p for n, p in self.named_parameters() if "lora_B" in n]
        rest = [p for n, p in self.named_parameters() if p.requires_grad and "lora_" not in n]
        optimizer = torch.optim.AdamW([{"params": a}, {"params": b, "lr": 0.16}, {"params": rest}], lr=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.01, 0.16, 0.01], total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr,call-arg]
        return loss


class Checkpointed(Classifier):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.utils.checkpoint.checkpoint(self.net[:3], x, use_reentrant=False)
        return self.net[3:](x)


class Cosine(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)]


WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA+ groups with OneCycle": (LoraPlus, {}),
    "cosine": (Cosine, {}),
    "manual optimisation": (Manual, {}),
    "gradient checkpointing": (Checkpointed, {}),
    "gradient accumulation": (Classifier, {"accumulate_grad_batches": 3}),
    "bf16-mixed": (Classifier, {"precision": "bf16-mixed"}),
    "bf16-true": (Classifier, {"precision": "bf16-true"}),
    "64-true": (Classifier, {"precision": "64-true"}),
    "barebones": (Classifier, {"barebones": True}),
    "fast_dev_run": (Classifier, {"fast_dev_run": 2, "max_epochs": None}),
    "overfit_batches": (Classifier, {"overfit_batches": 2}),
    "limit_train_batches": (Classifier, {"limit_train_batches": 0.5}),
    "gradient clipping": (Classifier, {"gradient_clip_val": 0.1}),
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_train(name: str) -> None:
    kind, options = WAYS[name]
    torch.manual_seed(0)
    module = kind()
    if options.get("barebones"):
        options = {**options, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None}
        options["enable_model_summary"] = None
    callback = FreezeAfterInit(rho=2, r=4)
    trainer(callback, **{"max_epochs": 2, **options}).fit(module, loader())
    assert callback.state is not None
    assert callback.missing == [], "every trainable parameter is in the optimizer"
    moved = [
        n
        for n, p in module.named_parameters()
        if "lora_B" in n and not torch.equal(p, callback.snapshot[n].to(p.dtype))
    ]
    assert moved, "the adapters train"
    dtype = torch.bfloat16 if options.get("precision") == "bf16-true" else None
    for layer in find_adapters(module).values():
        assert layer.a.dtype is (dtype or layer.base.weight.dtype)
    limits = {"fast_dev_run": 2, "overfit_batches": 2, "limit_train_batches": 3}
    assert callback.state.n_batches <= limits.get(name, 64)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["whole module", "part"])
def test_compiled_modules(whole: bool) -> None:
    x = correlated(16, seed=3)
    module = build()
    if not whole:
        module.net = torch.compile(module.net, backend="eager")
    module.eval()
    before = module(x)  # compiled and run: hooks set now would be skipped without a word
    module.train()
    callback = FreezeAfterInit(rho=2, r=4)
    compiled = torch.compile(module, backend="eager") if whole else module
    trainer(callback).fit(compiled, loader())
    assert callback.state is not None
    assert set(callback.state.ranks) == {"net.0", "net.3", "net.5"}
    assert callback.state.n_samples["net.3"] > 0
    module.eval()
    assert not torch.equal(module(x), before)


def test_decomposition_stays_in_fp32_under_bf16_autocast() -> None:
    data = dataset(96)
    callback = FreezeAfterInit(rho=1, r=4, streaming=StreamingOptions(tau=1.0))
    trainer(callback, precision="bf16-mixed").fit(build(), DataLoader(data, 16))
    a = callback.snapshot["net.0.lora_A.default.weight"]
    # rounding the products to bf16 turns these rows by far more than that
    assert same_rows(a, exact_components(data.tensors[0], 4)).min() > 1 - 1e-6


# --- reuse of a state -----------------------------------------------------------------------------------------------


def test_saved_state_gives_the_same_adapters_without_streaming(tmp_path: Any) -> None:
    first = FreezeAfterInit(rho=2, r=4)
    trainer(first).fit(build(), loader())
    assert first.state is not None
    first.state.save(tmp_path / "eva")

    def stream(module: nn.Module, batch: Any) -> None:
        raise AssertionError("streamed although a state was given")

    second = FreezeAfterInit(rho=2, r=4, state=tmp_path / "eva", forward_fn=stream)
    trainer(second).fit(build(), loader())
    assert second.state is not None
    assert second.state.ranks == first.state.ranks
    for name, value in first.snapshot.items():
        if "lora_A" in name:
            assert torch.equal(value, second.snapshot[name])
    smaller = FreezeAfterInit(rho=1, r=2, state=tmp_path / "eva.json", forward_fn=stream)
    trainer(smaller).fit(build(), loader())
    assert smaller.state is not None
    assert set(smaller.state.ranks.values()) == {2}
    with pytest.raises(ValueError, match=r"asks for 12 components .* holds 8"):
        trainer(EVAInitCallback(rho=3, r=4, state=first.state)).fit(build(), loader())


def test_given_state_sets_ranks_before_optimizers_exist() -> None:
    first = EVAInitCallback(rho=2, r=4)
    trainer(first).fit(build(), loader())
    calls = itertools.count()

    class Counting(Classifier):
        def configure_optimizers(self) -> Any:
            next(calls)
            return super().configure_optimizers()

    trainer(EVAInitCallback(rho=2, r=4, state=first.state)).fit(Counting(), loader())
    assert next(calls) == 1


# --- ablations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["eva", "whiten", "lora-norm", "rotate", "permute", "minor", "redistribute"])
def test_every_init_trains(init: str) -> None:
    callback = FreezeAfterInit(rho=1, r=4, init=init)
    data = dataset(96)
    trainer(callback).fit(build(), DataLoader(data, 96))
    a = callback.snapshot["net.0.lora_A.default.weight"]
    v = exact_components(data.tensors[0], IN)
    inside = (a @ v[:4].T).square().sum() / a.square().sum()
    if init in ("eva", "whiten", "lora-norm", "rotate"):
        assert inside > 1 - 1e-4, "within the span of the top components"
    if init == "minor":
        assert (a @ v[-4:].T).square().sum() / a.square().sum() > 1 - 1e-4
    if init in ("permute", "redistribute"):
        assert inside < 0.99


@pytest.mark.parametrize("metric", ["ratio", "eq6", "sum", "max", "raw"])
def test_every_metric_keeps_the_budget(metric: str) -> None:
    callback = EVAInitCallback(rho=2, r=4, metric=metric)
    trainer(callback).fit(build(), loader())
    assert callback.state is not None
    assert sum(callback.state.ranks.values()) == 12


@pytest.mark.parametrize("engine", ["exact", "incremental"])
def test_engines_agree_on_what_matters(engine: str) -> None:
    callback = FreezeAfterInit(rho=1, r=4, streaming=StreamingOptions(engine=engine, tau=1.0))
    data = dataset(96)
    trainer(callback).fit(build(), DataLoader(data, 16))
    a = callback.snapshot["net.0.lora_A.default.weight"].double()
    x = data.tensors[0].double()
    c = (x - x.mean(0)).T @ (x - x.mean(0))
    captured = torch.trace(a @ c @ a.T) / torch.linalg.eigvalsh(c)[-4:].sum()
    assert captured >= (0.9999 if engine == "exact" else 0.995)


# --- modules that are built late, and callbacks that look at the weights ---------------------------------------------


class BuiltInSetup(Classifier):
    def __init__(self) -> None:
        super().__init__(net=nn.Identity())

    def setup(self, stage: str) -> None:
        torch.manual_seed(0)
        self.net = mlp()


class BuiltInConfigureModel(Classifier):
    def __init__(self) -> None:
        super().__init__(net=nn.Identity())
        self.last = nn.Linear(3, 3)

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            torch.manual_seed(0)
            self.net = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.net(x))


class LoadsInSetup(Classifier):
    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.net.load_state_dict(mlp().state_dict())


@pytest.mark.parametrize("kind", [BuiltInSetup, BuiltInConfigureModel, LoadsInSetup])
@pytest.mark.parametrize("given", [False, True])
def test_modules_that_change_in_their_own_hooks(kind: Any, given: bool) -> None:
    module = kind()
    callback = FreezeAfterInit(rho=2, r=4)
    trainer(callback).fit(module, loader())
    if given:
        module = kind()
        callback = FreezeAfterInit(rho=2, r=4, state=callback.state)
        trainer(callback).fit(module, loader())
    assert callback.missing == []
    assert len(find_adapters(module)) == (4 if kind is BuiltInConfigureModel else 3)
    assert not any(k in vars(module) for k in ("configure_model", "on_load_checkpoint"))


class Weights(pl.Callback):
    """Every value that B of the first layer had after a step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(find_adapters(pl_module)["net.0"].b.detach().clone())


needs_weight_averaging = pytest.mark.skipif(
    not hasattr(pl.callbacks, "WeightAveraging"), reason="WeightAveraging came with Lightning 2.6"
)
AVERAGES: dict[str, dict[str, Any]] = {
    "WeightAveraging": {},
    "EMAWeightAveraging": {"decay": 0.5},
    "StochasticWeightAveraging": {"swa_lrs": 0.01, "swa_epoch_start": 1},
}


def average_of(name: str, seen: list[torch.Tensor]) -> torch.Tensor:
    """What the callback is to leave in the module, from its definition."""
    if name == "StochasticWeightAveraging":
        # at the start of each epoch of 6 steps, the first with B = 0
        return (seen[5] + seen[11]) / 3
    if name == "WeightAveraging":
        return torch.stack(seen).mean(0)
    average = seen[0]
    for value in seen[1:]:
        average = 0.5 * average + 0.5 * value
    return average


@pytest.mark.parametrize("given", [False, True], ids=["streamed", "given"])
@pytest.mark.parametrize("rho", [1, 2])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", AVERAGES)
def test_weight_averages_follow_the_adapters(name: str, first: bool, rho: int, given: bool) -> None:
    import lightning.pytorch.callbacks as callbacks

    if not hasattr(callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    average = type("Subclass", (getattr(callbacks, name),), {})(**AVERAGES[name])
    state = None
    if given:
        source = EVAInitCallback(rho=rho, r=4, verbose=False)
        trainer(source, max_epochs=0).fit(build(), loader())
        state = source.state
    eva, weights, module = EVAInitCallback(rho=rho, r=4, state=state, verbose=False), Weights(), build()
    order = [average, eva] if first else [eva, average]
    trainer(*order, weights, max_epochs=3).fit(module, loader(), DataLoader(dataset(32), 16))
    assert eva.state is not None
    layers = find_adapters(module)
    assert {n: layer.rank for n, layer in layers.items()} == {n: r for n, r in eva.state.ranks.items() if r}
    torch.testing.assert_close(layers["net.0"].b.detach(), average_of(name, weights.seen))


@pytest.mark.parametrize("name", AVERAGES)
def test_a_fresh_module_is_tested_from_a_checkpoint_under_an_averaging_callback(name: str, tmp_path: Path) -> None:
    import lightning.pytorch.callbacks as callbacks

    if not hasattr(callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    make = partial(getattr(callbacks, name), **AVERAGES[name])
    saving = ModelCheckpoint(tmp_path, save_last=True)
    trainer(make(), EVAInitCallback(r=4, verbose=False), saving, max_epochs=3, enable_checkpointing=True).fit(
        build(), loader(), DataLoader(dataset(32), 16)
    )
    file, module = str(tmp_path / "last.ckpt"), build()
    trainer(make(), EVAInitCallback(r=4, verbose=False)).validate(module, loader(), ckpt_path=file, verbose=False)
    weights = Classifier.load_from_checkpoint(file).state_dict()
    assert list(module.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())


@needs_weight_averaging
@pytest.mark.parametrize("kind", [BuiltInSetup, BuiltInConfigureModel])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_weight_averages_of_modules_that_are_built_late(kind: Any, first: bool) -> None:
    from lightning.pytorch.callbacks import WeightAveraging

    eva, average, module = EVAInitCallback(rho=1, r=4, verbose=False), WeightAveraging(), kind()
    trainer(*([average, eva] if first else [eva, average])).fit(module, loader())
    assert all(layer.b.any() for layer in find_adapters(module).values())


@needs_weight_averaging
@pytest.mark.parametrize("rho", [1, 2])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_weight_averages_are_resumed(first: bool, rho: int, tmp_path: Any) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

    def run(**options: Any) -> Any:
        module, eva, average = build(), EVAInitCallback(rho=rho, r=4, verbose=False), WeightAveraging()
        keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", enable_version_counter=False)
        order = [average, eva] if first else [eva, average]
        trainer(*order, keep, enable_checkpointing=True, max_epochs=2).fit(
            module, DataLoader(dataset(96), 16), **options
        )
        return module.state_dict()

    whole = run()
    resumed = run(ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_reused_callback_forgets_the_module_before() -> None:
    callback = EVAInitCallback(rho=2, r=4, target_modules=["3"])
    trainer(callback).fit(build(), loader())
    net = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["0", "3"]))
    module = Classifier(net)
    trainer(callback).fit(module, loader())
    assert callback.state is not None
    assert list(callback.state.ranks) == ["net.3"]
    failing = Classifier(get_peft_model(mlp(), LoraConfig(r=4, target_modules=["0", "3"])))
    with pytest.raises(ValueError, match="empty"):
        trainer(callback).fit(failing, DataLoader([]))
    assert len(find_adapters(failing)) == 2, "the user's adapters are still there"


def test_callback_and_module_can_be_pickled_and_copied_after_fit() -> None:
    import pickle

    module, callback = build(), EVAInitCallback(rho=2, r=4)
    trainer(callback).fit(module, loader())
    x = correlated(8)
    module.trainer = None  # type: ignore[assignment]
    module.eval()
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert pickle.loads(pickle.dumps(callback)).state.ranks == callback.state.ranks  # type: ignore[union-attr]


def test_random_state_is_not_touched_again_after_a_failure() -> None:
    class Failing(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError) as kept:
        trainer(EVAInitCallback(r=4)).fit(Failing(), loader())
    torch.manual_seed(123)
    expected = torch.get_rng_state()
    del kept
    import gc

    gc.collect()
    assert torch.equal(torch.get_rng_state(), expected)


def test_lazy_layers_get_a_clear_error() -> None:
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"parameter 'net.0.weight' of a lazy layer has no shape yet"):
        trainer(EVAInitCallback(r=2)).fit(Classifier(net), loader())
