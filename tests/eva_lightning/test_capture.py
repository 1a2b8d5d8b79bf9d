"""Inputs out of a forward pass: sharing, splitting, masks, token choice, hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from eva_lightning import StreamingOptions, attention_mask, compute_eva_state
from eva_lightning.adapters.targets import linear_layers
from tests.modules import HIDDEN, IN, Attention, TokenNet, correlated


def exact(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values and right-singular vectors of the centred tokens, in fp64."""
    x = x.reshape(-1, x.shape[-1]).double()
    _, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return s[:k].float(), v[:k].float()


def stream(net: nn.Module, batches: list[Any], k: int = 4, **options: Any) -> Any:
    forward_fn = options.pop("forward_fn", None)
    mask_fn = options.pop("mask_fn", None)
    settings = StreamingOptions(tau=1.0, **options)
    return compute_eva_state(
        net, lambda: iter(batches), linear_layers(net), k, settings, forward_fn=forward_fn, mask_fn=mask_fn
    )


def assert_decomposes(state: Any, layer: str, tokens: torch.Tensor, k: int = 4) -> None:
    s, v = exact(tokens, k)
    assert state.n_samples[layer] == tokens.numel() // tokens.shape[-1]
    torch.testing.assert_close(state.singular_values[layer][:k], s, rtol=1e-4, atol=1e-4)
    overlap = (state.components[layer][:k] @ v.T).square().sum() / k
    assert overlap > 1 - 1e-4


def test_all_layers_against_the_exact_svd_of_their_inputs() -> None:
    torch.manual_seed(0)
    net = TokenNet().eval()
    x = correlated(64 * 6).view(64, 6, IN)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: seen.__setitem__(n, args[0].detach()))
        for n, m in linear_layers(net).items()
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    state = stream(net, list(x.split(16)))
    for name, tokens in seen.items():
        assert_decomposes(state, name, tokens)


class SharedThenNot(nn.Module):
    """q and k share their input in the first minibatches, later they do not."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(IN, IN), nn.Linear(IN, IN)
        self.calls, self.since = 0, since

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        other = x.flip(-1) if self.calls % 4 >= self.since else x
        return self.q(x) + self.k(other)


def test_layers_that_stop_sharing_are_decomposed_apart() -> None:
    x = correlated(80)
    batches = list(x.split(20))
    net = SharedThenNot(since=3)
    state = stream(net, batches)
    # the stream starts over once it is known that the layers do not share: the net's calls then go on from 3
    assert state.shared_with == {}
    inputs = [b.flip(-1) if (3 + i + 1) % 4 >= 3 else b for i, b in enumerate(batches)]
    assert_decomposes(state, "q", x)
    assert_decomposes(state, "k", torch.cat(inputs))


def test_equal_values_in_other_storage_are_shared() -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(IN, IN) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x.clone()) + self.c(x + 1e-3)

    state = stream(Copies(), [correlated(32)])
    assert state.shared_with == {"b": "a"}


def test_input_changed_in_place_is_not_taken_for_shared() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(IN, IN), nn.Linear(IN, IN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            y = self.a(x)
            x.mul_(torch.linspace(1, 3, IN))
            return y + self.b(x)

    x = correlated(40)
    state = stream(InPlace(), [x])
    assert state.shared_with == {}
    assert_decomposes(state, "b", x * torch.linspace(1, 3, IN))


def test_layer_called_twice_counts_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(IN, IN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + self.layer(2 * x)

    x = correlated(30)
    assert_decomposes(stream(Twice(), list(x.split(10))), "layer", torch.cat([x, 2 * x]))


@pytest.mark.parametrize("engine", ["exact", "incremental"])
def test_masked_tokens_do_not_count(engine: str) -> None:
    torch.manual_seed(0)
    x = correlated(24 * 5).view(24, 5, IN)
    mask = torch.rand(24, 5) > 0.4
    poisoned = x.masked_fill(~mask[..., None], 1e4)
    net = nn.Sequential(nn.Linear(IN, IN))
    batches = list(zip(poisoned.split(8), mask.split(8), strict=True))
    state = stream(net, batches, mask_fn=lambda b: b[1], engine=engine, k=3)
    assert state.n_samples["0"] == int(mask.sum())
    if engine == "exact":
        assert_decomposes(state, "0", x[mask], k=3)
    assert_captures(state.components["0"], x[mask], 0.995)


def assert_captures(v: torch.Tensor, tokens: torch.Tensor, share: float) -> None:
    centred = (tokens - tokens.mean(0)).double()
    c = centred.T @ centred
    best = torch.linalg.eigvalsh(c)[-len(v) :].sum()
    assert torch.trace(v.double() @ c @ v.double().T) / best >= share


def test_mask_fits_flattened_tokens_and_leaves_pooled_inputs_alone() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.pooled = nn.Linear(IN, IN), nn.Linear(IN, IN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.tokens(x.reshape(-1, IN)).view_as(x)
            return self.pooled(y.mean(1))

    x, mask = correlated(60).view(12, 5, IN), torch.arange(60).view(12, 5) % 3 > 0
    state = stream(Flat(), [(x, mask)], mask_fn=lambda b: b[1])
    assert state.n_samples == {"tokens": int(mask.sum()), "pooled": 12}
    assert_decomposes(state, "tokens", x[mask])


def test_attention_mask_leaves_out_padding_and_ignored_labels() -> None:
    batch = {
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, 5, 7, -100]]),
    }
    assert attention_mask(batch).tolist() == [[False, True, True, False]]
    assert attention_mask({"attention_mask": batch["attention_mask"]}).tolist() == [[True, True, True, False]]
    sequence_labels = {"attention_mask": batch["attention_mask"], "labels": torch.tensor([1])}
    assert attention_mask(sequence_labels).tolist() == [[True, True, True, False]]
    assert attention_mask({"pixels": torch.ones(1)}) is None


def test_tokens_per_sample() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, IN))
    x = correlated(64 * 20).view(64, 20, IN)
    batches = list(x.split(16))
    few = stream(net, batches, tokens_per_sample=5)
    assert few.n_samples["0"] == 64 * 5
    again = stream(net, batches, tokens_per_sample=5)
    assert torch.equal(few.components["0"], again.components["0"])
    other = stream(net, batches, tokens_per_sample=5, seed=1)
    assert not torch.equal(few.components["0"], other.components["0"])
    assert_captures(few.components["0"], x.reshape(-1, IN), 0.99)
    # five of twenty tokens in four minibatches: every position once
    position = torch.arange(20.0).view(1, 20, 1).expand(16, 20, IN)
    even = stream(net, [position] * 4, tokens_per_sample=5)
    assert even.total_variance["0"] == pytest.approx(float((position[:1] - 9.5).square().sum()) * 16, rel=1e-4)
    whole = stream(net, batches, tokens_per_sample=100)
    assert whole.n_samples["0"] == 64 * 20


def test_mask_and_token_choice_together_are_exact() -> None:
    x = correlated(32 * 10).view(32, 10, IN)
    mask = torch.arange(320).view(32, 10) % 4 > 0
    net = nn.Sequential(nn.Linear(IN, IN))
    poisoned = x.masked_fill(~mask[..., None], 1e4)
    state = stream(net, [(poisoned, mask)], mask_fn=lambda b: b[1], tokens_per_sample=6)
    # as many as 6 of each sample, of those that count
    index = torch.randperm(240, generator=torch.Generator().manual_seed(1))[:192].sort().values
    assert state.n_samples["0"] == 192
    assert_decomposes(state, "0", x[mask][index])


def test_no_hook_is_left_behind_and_grad_mode_is_restored() -> None:
    net = Attention(HIDDEN)

    def broken(module: nn.Module, batch: Any) -> Any:
        module(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(net, [torch.rand(4, 3, HIDDEN)], forward_fn=broken)
    assert all(not m._forward_pre_hooks for m in net.modules())
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32


def test_stop_is_for_all_layers_at_once() -> None:
    """A layer with a simple spectrum converges at once; it must go on accumulating while the other does not."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.easy, self.hard = nn.Linear(IN, IN), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            easy = x[:, :1] * torch.linspace(1, 2, IN)
            return self.easy(easy).sum() + self.hard(x).sum()

    batches = list(torch.randn(160, 32).split(10))
    settings = StreamingOptions(tau=0.9, max_batches=16)
    net = Two()
    state = compute_eva_state(net, lambda: iter(batches), linear_layers(net), 2, settings)
    assert state.convergence["easy"][0][1] > 0.999
    assert state.convergence["hard"][0][1] < 0.9
    assert state.n_samples["easy"] == state.n_samples["hard"] == state.n_batches * 10
    lenient = StreamingOptions(tau=0.9, delta=0.5, max_batches=16)
    assert compute_eva_state(net, lambda: iter(batches), linear_layers(net), 2, lenient).n_batches == 8
