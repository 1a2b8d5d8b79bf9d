"""CorDA and LoRA-GA: what PEFT makes of the same data, and no trace left on module, data or random state."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from eva_lightning.adapters import find_adapters, inject
from eva_lightning.methods import data_driven
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.methods.data_driven import DataDrivenStart
from eva_lightning.methods.starts import KINDS as STARTS
from eva_lightning.methods.training_statistics import layer_statistics
from tests.modules import IN, Classifier, TokenNet, dataset, loader, trainer

KINDS = ("corda", "lora-ga")
TARGETS = ["q", "k", "v", "out", "narrow", "wide"]
RANK = 2


def build(**kwargs: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(TokenNet(), **kwargs)


def prepared(kind: str, module: Classifier | None = None, **options: Any) -> tuple[Classifier, list[pl.Callback]]:
    module = build(lr=0.0) if module is None else module
    torch.manual_seed(1)
    chosen = AdapterOptions(rank=RANK, alpha=3.0, bias="none", **options)
    return module, apply_method(kind, module, chosen, head="net.head", exclude=["net.embed"])


def fit(module: Classifier, callbacks: list[pl.Callback], data: Any = None, **kwargs: Any) -> pl.Trainer:
    run = trainer(*callbacks, **{"max_steps": 1, **kwargs})
    run.fit(module, DataLoader(dataset(96, tokens=4), 16) if data is None else data)
    return run


def batches(n: int) -> list[Any]:
    return list(itertools.islice(DataLoader(dataset(96, tokens=4), 16), n))


# --- what PEFT makes of the same data ---------------------------------------------------------------------------------


def test_corda_is_pefts_preprocess_corda_on_the_same_samples() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    module, callbacks = prepared("corda")
    fit(module, callbacks)
    net = build().net
    config = LoraConfig(
        r=RANK, lora_alpha=3, target_modules=TARGETS, init_lora_weights="corda", corda_config=CordaConfig()
    )
    samples = torch.cat([x for x, _ in batches(STARTS["corda"].batches)])

    def run_model() -> None:
        for sample in samples:  # PEFT's hook takes one sample at a time
            net(sample[None])

    preprocess_corda(net, config, run_model)
    theirs: Any = get_peft_model(net, config).base_model.model
    ours = find_adapters(module)
    assert {name.rsplit(".", 1)[-1] for name in ours} == set(TARGETS)
    for name, layer in ours.items():
        reference = theirs.get_submodule(name.removeprefix("net."))
        reference_a, reference_b = reference.lora_A["default"].weight, reference.lora_B["default"].weight
        torch.testing.assert_close(layer.b @ layer.a, reference_b @ reference_a, rtol=1e-3, atol=1e-4, msg=name)
        torch.testing.assert_close(layer.a.abs(), reference_a.abs(), rtol=1e-2, atol=1e-3, msg=name)
        torch.testing.assert_close(layer.base.weight, reference.base_layer.weight, rtol=1e-3, atol=1e-4, msg=name)


def test_lora_ga_peft_is_pefts_preprocess_loraga_on_the_same_batches() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    module, callbacks = prepared("lora-ga-peft")
    fit(module, callbacks)
    net = build().net
    config = LoraConfig(
        r=RANK, lora_alpha=3, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )

    def train_step() -> None:
        for x, y in batches(STARTS["lora-ga-peft"].batches):
            nn.functional.cross_entropy(net(x), y).backward()

    preprocess_loraga(net, config, train_step)
    their_gradients = {name: m._peft_loraga_grad for name, m in net.named_modules() if hasattr(m, "_peft_loraga_grad")}
    own = build()
    sums = layer_statistics(own, batches(2), {n: own.net.get_submodule(n) for n in their_gradients}, ["gradient"])
    for name, gradient in their_gradients.items():
        mean = sums[name]["gradient"]
        torch.testing.assert_close(mean.total / mean.count, gradient, msg=name)
    theirs: Any = get_peft_model(net, config).base_model.model
    for name, layer in find_adapters(module).items():
        reference = theirs.get_submodule(name.removeprefix("net."))
        # singular vectors are found up to their signs
        torch.testing.assert_close(
            layer.a.abs(), reference.lora_A["default"].weight.abs(), rtol=1e-2, atol=1e-3, msg=name
        )
        torch.testing.assert_close(
            layer.b.abs(), reference.lora_B["default"].weight.abs(), rtol=1e-2, atol=1e-5, msg=name
        )
        _, _, vh = torch.linalg.svd(their_gradients[name.removeprefix("net.")].double())
        torch.testing.assert_close(layer.a.double().abs(), vh[: layer.rank].abs(), rtol=1e-2, atol=1e-3, msg=name)


def test_second_moments_are_those_of_the_samples_each_over_its_largest_value() -> None:
    module = build()
    x = dataset(24, tokens=4).tensors[0]
    layers: Any = {"embed": module.net.embed}
    moment = layer_statistics(module, [(x[:16], 0), (x[16:], 0)], layers, ["scaled_inputs"])["embed"]["scaled_inputs"]
    expected = sum((s / s.max().abs()).T.double() @ (s / s.max().abs()).double() for s in x)
    torch.testing.assert_close(moment.total.double(), expected, rtol=1e-5, atol=1e-5)
    assert moment.count == 24


def test_tokens_that_do_not_count_change_nothing() -> None:
    class Padded(TokenNet):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(batch["x"])

    net = Padded()
    x = dataset(12, tokens=4).tensors[0]
    mask = torch.ones(12, 4, dtype=torch.bool)
    mask[:6, 2:] = False
    mask[11] = False  # a sample of padding alone
    garbage = torch.where(mask[..., None], x, torch.full_like(x, 1e4))
    layers: Any = {"embed": net.embed}

    def look(values: Tensor) -> Any:
        batch = {"x": values, "mask": mask}
        sums = layer_statistics(net, [batch], layers, ["scaled_inputs"], mask_fn=lambda b: b["mask"])
        return sums["embed"]["scaled_inputs"]

    kept = [s[m] for s, m in zip(x, mask, strict=True) if m.any()]
    expected = sum((s / s.max().abs()).T.double() @ (s / s.max().abs()).double() for s in kept)
    found = look(garbage)
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.count == 11


# --- no trace left ----------------------------------------------------------------------------------------------------


class Watched(Classifier):
    """Dropout, batch norm, a metric and logs: everything that a look at the data could disturb."""

    def __init__(self) -> None:
        super().__init__(TokenNet(), lr=0.01)
        self.net.norm = nn.BatchNorm1d(IN)
        self.net.drop = nn.Dropout(0.2)
        self.mean = MeanMetric()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.norm(x.flatten(0, 1)).view_as(x)
        return super().forward(self.net.drop(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch[0])
        loss = super().training_step(batch, batch_idx)
        self.mean(loss.detach())
        self.log("mean", self.mean, on_epoch=True)
        self.log("loss", loss)
        return loss


class Traces(pl.Callback):
    """What a training sees at its start and during it."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.rng = torch.get_rng_state()
        self.norm = copy.deepcopy(pl_module.net.norm.state_dict())
        self.updates = pl_module.mean._update_count
        self.metrics = dict(trainer.callback_metrics)
        self.modes = [m.training for n, m in pl_module.named_modules() if "lora" not in n and "base_layer" not in n]
        self.flags = {n.replace("base_layer.", ""): p.requires_grad for n, p in pl_module.named_parameters()}
        self.gradients = [n for n, p in pl_module.named_parameters() if p.grad is not None]
        pl_module.seen.clear()  # those of the look at the data

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.batches = [x.sum() for x in pl_module.seen]


def traces(method: str) -> Traces:
    torch.manual_seed(0)
    module = Watched()
    module.net.drop.eval()  # the user's choice
    torch.manual_seed(1)
    options = AdapterOptions(rank=RANK, bias="none")
    found = Traces()
    callbacks = apply_method(method, module, options, head="net.head", exclude=["net.embed"])
    fit(module, [*callbacks, found], DataLoader(dataset(96, tokens=4), 16, shuffle=True), max_steps=9)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_no_trace(kind: str) -> None:
    ours, plain = traces(kind), traces("lora")
    assert torch.equal(ours.rng, plain.rng)
    assert torch.equal(torch.stack(ours.batches), torch.stack(plain.batches))
    for name, value in plain.norm.items():
        assert torch.equal(ours.norm[name], value), name
    assert ours.updates == plain.updates == 0
    assert ours.metrics == plain.metrics == {}
    assert ours.modes == plain.modes
    assert ours.flags == plain.flags
    assert ours.gradients == []


def test_lora_ga_is_deterministic_with_dropout() -> None:
    starts = []
    for _ in range(2):
        torch.manual_seed(0)
        module = Watched()
        torch.manual_seed(1)
        fit(module, apply_method("lora-ga", module, AdapterOptions(rank=RANK), head="net.head"), max_steps=1)
        starts.append({n: layer.module.initial_lora_B for n, layer in find_adapters(module).items()})
    for name, value in starts[0].items():
        assert value.any()
        assert torch.equal(value, starts[1][name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_holds_the_final_parameters(kind: str) -> None:
    module, callbacks = prepared(kind, build(lr=0.1))
    before: dict[str, Tensor] = {}

    class Snapshot(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            before.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    fit(module, [*callbacks, Snapshot()], max_steps=2)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("kind", [*KINDS, "gora", "gora --keep-function"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_bad_ending_leaves_the_module_as_it_was(
    kind: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, callbacks = prepared(kind.split()[0], keep_function="--keep-function" in kind)
    before = copy.deepcopy(module.state_dict())
    flags = {n: p.requires_grad for n, p in module.named_parameters()}
    modes = {n: m.training for n, m in module.named_modules()}
    real, calls = data_driven.start_at, itertools.count()

    def failing(*args: Any) -> None:
        real(*args)
        if next(calls) == 2:
            raise error("half way")

    rng = torch.get_rng_state()
    monkeypatch.setattr(data_driven, "start_at", failing)
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        fit(module, callbacks)
    monkeypatch.setattr(data_driven, "start_at", real)
    assert next(calls) == 3
    assert torch.equal(torch.get_rng_state(), rng)
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert flags == {n: p.requires_grad for n, p in module.named_parameters()}
    assert modes == {n: m.training for n, m in module.named_modules()}
    assert not any(m._forward_pre_hooks for n, m in module.named_modules() if n.endswith("base_layer"))
    fit(module, callbacks)
    assert all(layer.b.any() for layer in find_adapters(module).values())


@pytest.mark.parametrize("kind", KINDS)
def test_looks_at_the_data_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    real = DataDrivenStart._statistics

    def counting(self: DataDrivenStart, *args: Any) -> Any:
        looks.append(self.kind)
        return real(self, *args)

    monkeypatch.setattr(DataDrivenStart, "_statistics", counting)
    module, callbacks = prepared(kind, build(lr=0.1))
    fit(module, callbacks, max_steps=4).save_checkpoint(tmp_path / "a.ckpt")
    fit(module, callbacks, max_steps=4)
    resumed, callbacks = prepared(kind)
    trainer(*callbacks, max_steps=4).fit(resumed, loader(tokens=4), ckpt_path=tmp_path / "a.ckpt")
    assert len(looks) == 1, "neither a second fit nor a resumed one looks again"
    fit(*prepared(kind))
    assert len(looks) == 2


def test_a_layer_that_never_runs_stays_plain_lora() -> None:
    module = build(lr=0.0)
    module.net.unused = nn.Linear(IN, IN)
    for kind in KINDS:
        tried, callbacks = prepared(kind, copy.deepcopy(module))
        fit(tried, callbacks)
        layers = find_adapters(tried)
        assert not layers["net.unused"].b.any()
        assert layers["net.wide"].b.any()


class Saving(pl.Callback):
    """Keeps what each process has when training starts, and what LoRA-GA would see then."""

    def __init__(self, folder: Path, max_batches: int) -> None:
        self.folder, self.max_batches = folder, max_batches

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = find_adapters(pl_module)
        found = {f"A of {n}": layer.module.initial_lora_A for n, layer in layers.items()}
        found |= {f"B of {n}": layer.module.initial_lora_B for n, layer in layers.items()}
        found |= {f"weight of {n}": layer.base.weight.detach() for n, layer in layers.items()}
        other = DataDrivenStart("lora-ga")
        gradients = other._average(trainer, other._statistics(trainer, pl_module, layers, self.max_batches))
        found |= {f"gradient of {n}": means["gradient"] for n, means in gradients.items()}
        torch.save(found, self.folder / f"{trainer.global_rank}-of-{trainer.world_size}.pt")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["corda", "lora-da", "gora"])
def test_two_processes_agree_with_one_on_the_union(kind: str, tmp_path: Path) -> None:
    module, callbacks = prepared(kind, max_batches=6, keep_function=True)
    two = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    run = trainer(*callbacks, Saving(tmp_path, 6), strategy=two, devices=2, max_steps=1)
    run.fit(module, DataLoader(dataset(96, tokens=4), 8, shuffle=False))
    module, callbacks = prepared(kind, max_batches=6, keep_function=True)
    fit(module, [*callbacks, Saving(tmp_path, 6)])
    first, second, single = (torch.load(tmp_path / f"{name}.pt") for name in ("0-of-2", "1-of-2", "0-of-1"))
    assert len(single) == 4 * len(find_adapters(module))
    for name, value in single.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name].abs(), value.abs(), rtol=1e-2, atol=1e-4, msg=name)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="max_batches must be a whole number of at least 1, got 0"):
        DataDrivenStart("corda", max_batches=0)
    sharded: Any = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match="CorDA decomposes whole base weights, which ModelParallelStrategy shards"):
        DataDrivenStart("corda").setup(sharded, build(), "fit")


class Manual(Classifier):
    automatic_optimization = False


class Lossless(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize(
    ("kind", "error", "sentence"),
    [(Manual, TypeError, "optimises manually"), (Lossless, ValueError, "no loss, got None")],
)
def test_lora_ga_needs_a_loss(kind: type[Classifier], error: type[Exception], sentence: str) -> None:
    module, callbacks = prepared("lora-ga", kind(TokenNet()))
    with pytest.raises(error, match=sentence):
        fit(module, callbacks)


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_data_are_named(kind: str) -> None:
    module, callbacks = prepared(kind)
    x, y = dataset(32, tokens=4).tensors
    data = DataLoader(torch.utils.data.TensorDataset(torch.full_like(x, float("nan")), y), 16)
    with pytest.raises(FloatingPointError, match=r"layer 'net.attention.q': its .* are NaN or infinite"):
        fit(module, callbacks, data)


def test_quantised_weights_cannot_give_up_a_part() -> None:
    module = build()
    layer: Any = module.net.narrow
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"lora-ga takes .* of 'net.narrow' is quantised \(torch.int8\)"):
        inject(module, head="net.head", initialisation="lora-ga")


# --- CorDA's knowledge-preserving mode --------------------------------------------------------------------------------


def knowledge() -> DataLoader[Any]:
    """Other data than the training's, in minibatches of which the default reads four."""
    return DataLoader(dataset(40, tokens=4, seed=9), 8)


def test_knowledge_preserving_corda_is_pefts_on_the_knowledge_data() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    module, callbacks = prepared("corda-kpm", knowledge=knowledge())
    fit(module, callbacks)
    net = build().net
    config = LoraConfig(
        r=RANK, lora_alpha=3, target_modules=TARGETS, init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
    )  # fmt: skip
    preprocess_corda(net, config, lambda: [net(sample[None]) for x, _ in list(knowledge())[:4] for sample in x])
    theirs: Any = get_peft_model(net, config).base_model.model
    for name, layer in find_adapters(module).items():
        reference = theirs.get_submodule(name.removeprefix("net."))
        a, b = reference.lora_A["default"].weight, reference.lora_B["default"].weight
        torch.testing.assert_close(layer.b @ layer.a, b @ a, rtol=1e-2, atol=1e-4, msg=name)
        torch.testing.assert_close(layer.base.weight, reference.base_layer.weight, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("given", [True, False], ids=["knowledge data", "training data"])
def test_knowledge_preserving_corda_takes_the_least_of_what_the_weight_does_on_the_data(given: bool) -> None:
    """In float64 from the paper's formula: svd(W C) C^-1, of which the adapter has the smallest r."""
    module, callbacks = prepared("corda-kpm", knowledge=knowledge() if given else None)
    fit(module, callbacks)
    net = build().net.double()
    seen: list[Tensor] = []
    q: Any = net.get_submodule("attention.q")
    q.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for x, _ in list(knowledge())[:4] if given else batches(STARTS["corda-kpm"].batches):
        net(x.double())
    c = torch.stack([(x / x.max().abs()).T @ (x / x.max().abs()) for x in torch.cat(seen)]).mean(0)
    c += 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(q.weight @ c)
    least = u[:, -RANK:] @ torch.diag(s[-RANK:]) @ vh[-RANK:] @ torch.linalg.inv(c)
    layer = find_adapters(module)["net.attention.q"]
    scale = float(least.detach().abs().max())
    torch.testing.assert_close((3 / RANK * layer.b @ layer.a).double(), least, rtol=0, atol=1e-3 * scale)
    torch.testing.assert_close((layer.base.weight + 3 / RANK * layer.b @ layer.a).double(), q.weight, rtol=0, atol=1e-6)


def test_knowledge_data_are_read_no_further_and_stay_as_they_were() -> None:
    data, generator = dataset(40, tokens=4, seed=9), torch.Generator().manual_seed(3)
    state = generator.get_state()
    module, callbacks = prepared("corda-kpm", knowledge=DataLoader(data, 8, shuffle=True, generator=generator))
    fit(module, callbacks)
    assert torch.equal(generator.get_state(), state)
    endless = prepared("corda-kpm", knowledge=itertools.cycle(batches(1)), max_batches=2)
    fit(*endless)
    with pytest.raises(ValueError, match=r"the data given \(list\) hold no minibatch"):
        fit(*prepared("corda-kpm", knowledge=[]))
