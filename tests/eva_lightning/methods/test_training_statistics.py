"""Statistics of training minibatches: what autograd and dense float64 sums say, sample by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eva_lightning.errors import InputError
from eva_lightning.methods.training_statistics import Statistic, layer_statistics, samples_in
from tests.modules import CLASSES, HIDDEN, IN, Classifier, TokenNet, dataset

EVERYTHING: tuple[Statistic, ...] = ("gradient", "inputs", "output_gradients")
LAYERS = ("attention.q", "narrow", "wide")


def build(net: nn.Module | None = None) -> Classifier:
    torch.manual_seed(0)
    return Classifier(TokenNet() if net is None else net)


def minibatches() -> list[Any]:
    x, y = dataset(24, tokens=4).tensors
    return [(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:], y[16:])]


def layers_of(module: Classifier, names: tuple[str, ...] = LAYERS) -> dict[str, nn.Module]:
    return {name: module.net.get_submodule(name) for name in names}


def sample_by_sample(name: str) -> dict[str, Tensor]:
    """Mean gradient, second moment and mean square of output gradients, from one sample at a time in float64."""
    module = build().double()
    layer: Any = module.net.get_submodule(name)
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: Any, output: Tensor) -> None:
        seen["x"], seen["y"] = args[0], output

    handle = layer.register_forward_hook(keep)
    gradients, moments, squares = [], [], []
    for x, y in minibatches():
        for i in range(len(x)):
            loss = nn.functional.cross_entropy(module.net(x[i : i + 1].double()), y[i : i + 1])
            of_weight, of_output = torch.autograd.grad(loss, [layer.weight, seen["y"]])
            gradients.append(of_weight)
            moments += [t.outer(t) for t in seen["x"][0].detach()]
            squares += [g.square() for g in of_output[0]]
    handle.remove()
    means = (torch.stack(values).mean(0) for values in (gradients, moments, squares))
    return dict(zip(EVERYTHING, means, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_one_pass_finds_what_single_samples_say(name: str) -> None:
    module = build()
    sums = layer_statistics(module, minibatches(), layers_of(module), EVERYTHING)[name]
    assert [mean.count for mean in sums.values()] == [3, 96, 96]
    for statistic, expected in sample_by_sample(name).items():
        mean: Any = sums[statistic]  # type: ignore[index]
        torch.testing.assert_close((mean.total / mean.count).double(), expected, rtol=1e-4, atol=1e-7, msg=statistic)


def test_each_statistic_alone_is_the_same() -> None:
    module = build()
    together = layer_statistics(module, minibatches(), layers_of(module), EVERYTHING)
    for statistic in EVERYTHING:
        alone = layer_statistics(module, minibatches(), layers_of(module), [statistic])
        for name, of_layer in alone.items():
            assert list(of_layer) == [statistic]
            torch.testing.assert_close(of_layer[statistic].total, together[name][statistic].total)


def test_sums_in_float64_on_request() -> None:
    module = build()
    sums = layer_statistics(module, minibatches(), layers_of(module), EVERYTHING, dtype=torch.float64)
    assert {mean.total.dtype for of_layer in sums.values() for mean in of_layer.values()} == {torch.float64}


class Masked(Classifier):
    """The loss sees the tokens that count alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, mask = batch["x"], batch["mask"]
        out = self.net(x) * mask[..., None]
        return out.square().sum((1, 2)).div(mask.sum(1)).mean()


def test_tokens_that_do_not_count_change_nothing() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
    module = Masked(net)
    x = dataset(8, tokens=4).tensors[0]
    mask = torch.ones(8, 4, dtype=torch.bool)
    mask[:4, 2:] = False
    found = []
    for filler in (0.0, 100.0):
        batch = {"x": torch.where(mask[..., None], x, torch.full_like(x, filler)), "mask": mask}
        layers = {"0": net[0], "2": net[2]}
        found.append(layer_statistics(module, [batch], layers, EVERYTHING, mask_fn=lambda b: b["mask"]))
    for name in ("0", "2"):
        for statistic in ("inputs", "output_gradients"):
            one, other = found[0][name][statistic], found[1][name][statistic]  # type: ignore[index]
            assert one.count == other.count == 24
            torch.testing.assert_close(one.total, other.total)


class Checkpointed(TokenNet):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x)).requires_grad_()
        x = checkpoint(lambda h: h + self.attention(h), x, use_reentrant=self.reentrant)
        x = x + self.wide(torch.relu(self.narrow(x)))
        return self.head(x.mean(1))

    reentrant = False


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_seen_once(reentrant: bool) -> None:
    net = Checkpointed()
    net.reentrant = reentrant
    module, plain = build(net), build()
    net.load_state_dict(plain.net.state_dict())
    found = layer_statistics(module, minibatches(), layers_of(module), EVERYTHING)
    expected = layer_statistics(plain, minibatches(), layers_of(plain), EVERYTHING)
    for name in LAYERS:
        for statistic in EVERYTHING:
            one, other = found[name][statistic], expected[name][statistic]
            torch.testing.assert_close(one.total / one.count, other.total / other.count)


def test_gradients_that_are_there_stay() -> None:
    module = build()
    layer: Any = module.net.get_submodule("narrow")
    layer.weight.grad = before = torch.ones_like(layer.weight)
    flags = [p.requires_grad for p in module.parameters()]
    layer_statistics(module, minibatches(), layers_of(module), EVERYTHING)
    assert layer.weight.grad is before
    assert torch.equal(before, torch.ones_like(before))
    assert [p.grad is None for p in module.parameters()].count(False) == 1
    assert flags == [p.requires_grad for p in module.parameters()]
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_gradients_are_never_all_held_at_once() -> None:
    module = build()
    layers = layers_of(module)
    most = 0

    class Watching(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            for layer in layers.values():
                layer.weight.register_post_accumulate_grad_hook(count)
            return loss

    def count(_: Tensor) -> None:
        nonlocal most
        held: list[Any] = [layer for layer in layers.values() if layer.weight.grad is not None]
        most = max(most, len(held))

    watching = Watching(module.net)
    sums = layer_statistics(watching, minibatches(), layers, ["gradient"])
    assert all(of_layer["gradient"].total.any() for of_layer in sums.values())
    assert most == 0, "the statistics' hook, registered first, has taken each gradient already"


def test_a_layer_the_loss_does_not_need_has_no_count() -> None:
    net = TokenNet()
    net.unused = nn.Linear(IN, IN)  # type: ignore[assignment]
    module = build(net)
    sums = layer_statistics(module, minibatches(), layers_of(module, ("unused", "narrow")), EVERYTHING)
    assert [mean.count for mean in sums["unused"].values()] == [0, 0, 0]
    assert sums["narrow"]["gradient"].count == 3


def test_a_minibatch_without_tensors_is_named() -> None:
    with pytest.raises(InputError, match="number of samples of a minibatch of type list is unknown"):
        samples_in([object()])
    assert samples_in({"x": torch.zeros(5, 2), "y": torch.zeros(5)}) == 5
