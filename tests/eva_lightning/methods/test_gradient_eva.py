"""Gradient-aware EVA against gradients of single minibatches in float64, and what docs/gradient-aware-eva.md claims."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from eva_lightning.adapters import find_adapters, inject
from eva_lightning.callback import EVAInitCallback
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.methods.gradient_eva import first_update_directions
from eva_lightning.methods.training_statistics import layer_statistics
from tests.eva_lightning.methods.three_layers import ThreeLayers
from tests.modules import HIDDEN, Classifier, correlated, dataset, trainer

NAMES = ("net.first", "net.second", "net.third")
BATCH, RANK = 8, 3


def build() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ThreeLayers(), lr=0.0)


def data() -> DataLoader[Any]:
    return DataLoader(dataset(64, tokens=4), BATCH)


def started(module: Classifier | None = None, *, rank: int = RANK, rho: float = 1.0, **run: Any) -> dict[str, Any]:
    """The adapters when training starts, at learning rate 0."""
    module = build() if module is None else module
    torch.manual_seed(1)
    options = AdapterOptions(rank=rank, alpha=1.0, rho=rho, bias="none")
    callbacks = apply_method("eva-gradient", module, options, head="net.head")
    trainer(*callbacks, **{"max_steps": 1, **run}).fit(module, data())
    return find_adapters(module)


@pytest.fixture(scope="module")
def gradients() -> dict[str, Tensor]:
    """The gradient of every minibatch with respect to each weight, shape (minibatches, out, in), float64."""
    module = build().double()
    weights = [module.get_submodule(name).weight for name in NAMES]
    found: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for x, y in data():
        loss = nn.functional.cross_entropy(module.net(x.double()), y)
        for name, gradient in zip(NAMES, torch.autograd.grad(loss, weights), strict=True):  # type: ignore[arg-type]
            found[name].append(gradient)
    return {name: torch.stack(each) for name, each in found.items()}


def step_moment(gradients: Tensor, minibatches_per_step: int) -> Tensor:
    """E[G^T G] for the mean of so many minibatches drawn independently: a sum over all tuples of them."""
    n, among = minibatches_per_step, len(gradients)
    choices = torch.cartesian_prod(*[torch.arange(among)] * n).reshape(-1, n)
    steps = gradients[choices].mean(1)
    return torch.einsum("boi,boj->ij", steps, steps) / len(steps)


def top(moment: Tensor, k: int) -> Tensor:
    return torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :k].T


def overlap(a: Tensor, b: Tensor) -> float:
    """Smallest cosine of the principal angles of two spans of orthonormal rows."""
    return float(torch.linalg.svdvals(a.double() @ b.double().T).min())


# --- formula ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_is_the_top_of_the_second_moment_of_a_steps_gradient(accumulate: int, gradients: dict[str, Tensor]) -> None:
    layers = started(accumulate_grad_batches=accumulate)
    assert set(layers) == set(NAMES)
    for name, layer in layers.items():
        expected = top(step_moment(gradients[name], accumulate), RANK)
        cosines = (layer.a.double() * expected).sum(1).abs()
        assert cosines.min() > 1 - 1e-5, name
        torch.testing.assert_close(layer.a @ layer.a.T, torch.eye(RANK), rtol=0, atol=1e-5)
        assert not layer.b.any()


def test_the_statistics_are_those_of_all_minibatches_to_fp32(gradients: dict[str, Tensor]) -> None:
    module = build()
    bases: Any = {name: module.get_submodule(name) for name in NAMES}
    sums = layer_statistics(module, data(), bases, ("gradient", "gradient_moment"))
    alone = layer_statistics(module, data(), bases, ("gradient",))
    for name, each in gradients.items():
        moment = sums[name]["gradient_moment"]
        expected = torch.einsum("boi,boj->ij", each, each)
        assert moment.count == sums[name]["gradient"].count == len(each)
        torch.testing.assert_close(moment.total.double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
        assert torch.equal(sums[name]["gradient"].total, alone[name]["gradient"].total)
    assert all(p.grad is None for p in module.parameters())


def test_a_gradient_that_comes_in_pieces_is_one(gradients: dict[str, Tensor]) -> None:
    """A block under reentrant checkpointing, run twice: each run gives a piece of the gradient."""

    class Twice(ThreeLayers):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            halves = [torch.utils.checkpoint.checkpoint(self.third, half, use_reentrant=True) for half in x.chunk(2)]
            return self.head(torch.cat(halves).mean(1))  # type: ignore[arg-type]

    torch.manual_seed(0)
    module = Classifier(Twice())
    third = module.net.third
    layers: Any = {"first": module.net.first, "third": third}
    found = layer_statistics(module, data(), layers, ("gradient_moment",))["third"]["gradient_moment"]
    expected = torch.zeros(HIDDEN, HIDDEN)
    for x, y in data():
        x = torch.tanh(module.net.first(x))  # type: ignore[operator]
        loss = nn.functional.cross_entropy(module.net.head(third(x).mean(1)), y)  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(loss, [third.weight])  # type: ignore[union-attr, list-item]
        expected += gradient.T @ gradient
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_gradients_far_below_one_have_the_same_directions() -> None:
    g = torch.randn(16, 5, 40, generator=torch.Generator().manual_seed(0))
    mean, moment = g.mean(0), torch.einsum("boi,boj->ij", g, g) / 16
    directions, shares = first_update_directions(mean, moment, 2, 4)
    small, small_shares = first_update_directions(mean * 1e-12, moment * 1e-24, 2, 4)
    assert overlap(directions, small) > 1 - 1e-5
    torch.testing.assert_close(shares, small_shares, rtol=1e-4, atol=0)


# --- what it unites ---------------------------------------------------------------------------------------------------


def test_with_many_minibatches_a_step_it_is_lora_gas_a(gradients: dict[str, Tensor]) -> None:
    for name, each in gradients.items():
        mean, moment = each.mean(0), torch.einsum("boi,boj->ij", each, each) / len(each)
        directions, _ = first_update_directions(mean, moment, 10**6, 2)
        assert overlap(directions, torch.linalg.svd(mean).Vh[:2]) > 1 - 1e-4, name


def test_with_gradients_independent_of_inputs_it_is_evas_theorem() -> None:
    """One sample a minibatch, gradients that know nothing of the inputs: the top of the inputs' second moment."""
    x = correlated(20_000)
    g = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(1))
    moment = (x * g.square().sum(1, keepdim=True)).T @ x / len(x)
    directions, shares = first_update_directions(g.T @ x / len(x), moment, 1, 3)
    second = (x.T @ x / len(x)).double()
    assert overlap(directions, top(second, 3)) > 0.999
    values = torch.linalg.eigvalsh(second).flip(0)
    torch.testing.assert_close(shares, values[:3] / values.sum(), rtol=0.05, atol=0)


# --- the claim of optimality ------------------------------------------------------------------------------------------


def first_updates(a: dict[str, Tensor], scaling: float, lr: float) -> dict[str, float]:
    """Mean over minibatches of the squared norm of what one step of SGD makes of each layer's weight."""
    norms = dict.fromkeys(a, 0.0)
    batches = list(data())
    for x, y in batches:
        module = build()
        inject(module, r=RANK, alpha=scaling * RANK, head="net.head", bias="none")
        layers = find_adapters(module)
        for name, layer in layers.items():
            layer.write(a[name])
        optimizer = torch.optim.SGD([p for layer in layers.values() for p in (layer.a, layer.b)], lr)
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
        for name, layer in layers.items():
            update = scaling * layer.b.double() @ layer.a.double()
            norms[name] += float(update.square().sum()) / len(batches)
    return norms


def test_no_other_start_has_larger_first_updates_at_equal_rank(gradients: dict[str, Tensor]) -> None:
    """Over the minibatches seen, with orthonormal rows of A, B = 0 and SGD."""
    scaling, lr = 0.5, 1e-3  # short, so that B A is not rounded away and A does not move
    ours = {name: layer.a.detach() for name, layer in started().items()}
    module = build()
    eva = EVAInitCallback(rho=1, r=RANK, head="net.head", tokens_per_sample=None, verbose=False)
    trainer(eva, max_steps=1).fit(module, data())
    others = {
        "EVA": {name: layer.a.detach() for name, layer in find_adapters(module).items()},
        "LoRA-GA": {name: torch.linalg.svd(each.mean(0)).Vh[:RANK].float() for name, each in gradients.items()},
    }
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        others[f"random {seed}"] = {
            name: torch.linalg.qr(torch.randn(each.shape[2], RANK, generator=generator)).Q.T
            for name, each in gradients.items()
        }
    best = first_updates(ours, scaling, lr)
    for name, each in gradients.items():
        optimum = float(torch.linalg.eigvalsh(step_moment(each, 1))[-RANK:].sum())
        assert best[name] == pytest.approx(lr**2 * scaling**4 * optimum, rel=1e-3)
    for kind, a in others.items():
        norms = first_updates(a, scaling, lr)
        for name in NAMES:
            assert norms[name] <= best[name] * (1 + 1e-4), (kind, name)
            if kind != "LoRA-GA":
                assert norms[name] < 0.99 * best[name], (kind, name)


def test_for_the_step_of_the_mean_gradient_lora_ga_is_better(gradients: dict[str, Tensor]) -> None:
    """The limit of the claim, as the document says: one direction more or less matters, in one layer at least."""
    ours = started()
    gains = []
    for name, each in gradients.items():
        mean = each.mean(0)
        best = float((mean @ torch.linalg.svd(mean).Vh[:RANK].T).square().sum())
        gains.append(best / float((mean @ ours[name].a.double().T).square().sum()))
    assert min(gains) >= 1 - 1e-9
    assert max(gains) > 1.0001


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_ranks_follow_the_shares_within_the_budget(gradients: dict[str, Tensor]) -> None:
    rank = 7
    layers = started(rank=rank, rho=2.0)
    shares = {}
    for name, each in gradients.items():
        values = torch.linalg.eigvalsh(step_moment(each, 1)).flip(0)
        shares[name] = (values / values.sum())[: 2 * rank]
    # one for every layer, the rest to the largest shares
    rest = sorted(((float(s), name) for name, each in shares.items() for s in each[1:]), reverse=True)
    chosen = [name for _, name in rest[: (rank - 1) * len(NAMES)]]
    expected = {name: 1 + chosen.count(name) for name in NAMES}
    assert {name: layer.rank for name, layer in layers.items()} == expected
    assert len(set(expected.values())) > 1, "nothing to redistribute: the test shows nothing"
    assert {layer.module.scaling[layer.adapter] for layer in layers.values()} == {1 / rank}


# --- in training ------------------------------------------------------------------------------------------------------


def test_under_bf16_mixed_the_directions_are_nearly_the_same() -> None:
    exact, mixed = started(), started(precision="bf16-mixed")
    for name, layer in mixed.items():
        assert layer.a.dtype == torch.float32
        assert overlap(layer.a.detach()[:1], exact[name].a.detach()[:1]) > 0.99, name


def test_where_there_is_no_gradient_adapters_stay_plain_lora() -> None:
    module = build()
    nn.init.zeros_(module.net.head.weight)  # type: ignore[union-attr, arg-type]
    plain = copy.deepcopy(module)
    torch.manual_seed(1)
    apply_method("lora", plain, AdapterOptions(rank=RANK, bias="none"), head="net.head")
    layers = started(module, rho=2.0)
    for name, layer in find_adapters(plain).items():
        assert torch.equal(layers[name].a, layer.a)


class Saving(pl.Callback):
    """Keeps what each process starts with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {name: layer.a.detach().clone() for name, layer in find_adapters(pl_module).items()}
        torch.save(found, self.folder / f"{trainer.global_rank}-of-{trainer.world_size}.pt")


class Alternating(Sampler[int]):
    """Every second sample for each of two processes; for one alone those of the first, then of the second."""

    def __iter__(self) -> Iterator[int]:
        ranks = [dist.get_rank()] if dist.is_initialized() else [0, 1]
        return iter([i for rank in ranks for i in range(rank, 64, 2)])

    def __len__(self) -> int:
        return 32 if dist.is_initialized() else 64


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_start_as_one_that_accumulates_their_minibatches(tmp_path: Path) -> None:
    two = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    for options in ({"strategy": two, "devices": 2}, {"accumulate_grad_batches": 2}):
        module = build()
        chosen = AdapterOptions(rank=RANK, rho=2.0, bias="none")
        callbacks = apply_method("eva-gradient", module, chosen, head="net.head")
        run = trainer(*callbacks, Saving(tmp_path), max_steps=1, use_distributed_sampler=False, **options)  # type: ignore[arg-type]
        run.fit(module, DataLoader(dataset(64, tokens=4), BATCH, sampler=Alternating()))
    first, second, alone = (torch.load(tmp_path / f"{name}.pt") for name in ("0-of-2", "1-of-2", "0-of-1"))
    for name, a in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert a.shape == first[name].shape
        assert overlap(a, first[name]) > 1 - 1e-4, name
