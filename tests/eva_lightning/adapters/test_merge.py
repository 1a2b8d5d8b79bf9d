from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations as norms
from torch.nn.utils import parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from eva_lightning.adapters import find_adapters, inject, merge_and_unload
from eva_lightning.errors import InputError

WIDTH = 8
X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))


def around(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))


def adapted(net: nn.Module, **options: Any) -> Any:
    inject(net, r=2, alpha=4.0, **options)
    torch.manual_seed(1)
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return net


def linear(**options: Any) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, WIDTH, **options)


def outputs(net: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return net.eval()(x)


def snapshot(net: nn.Module) -> tuple[Any, ...]:
    return (
        {name: value.clone() for name, value in net.state_dict().items()},
        [(n, type(m), m.training, list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in net.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in net.named_parameters()],
    )


def assert_untouched(net: nn.Module, before: tuple[Any, ...]) -> None:
    after = snapshot(net)
    assert list(after[0]) == list(before[0])
    assert all(torch.equal(after[0][name].nan_to_num(), value.nan_to_num()) for name, value in before[0].items())
    assert after[1:] == before[1:]


# --- weights that are not a parameter of one layer alone --------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def symmetric() -> nn.Module:
    return parametrize.register_parametrization(linear(), "weight", Symmetric())


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: norms.weight_norm(linear()),
    "spectral_norm": lambda: norms.spectral_norm(linear()),
    "orthogonal": lambda: norms.orthogonal(linear()),
    "two of them": lambda: norms.spectral_norm(norms.orthogonal(linear())),
    "own parametrization": symmetric,
    "weight_norm before torch 2": lambda: old_weight_norm(linear()),
    "spectral_norm before torch 2": lambda: old_spectral_norm(linear()),
    "pruning": lambda: prune.l1_unstructured(linear(), "weight", 0.5),
}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_computed_weight_becomes_a_plain_one(kind: str, use_dora: bool) -> None:
    net = adapted(around(COMPUTED[kind]()), use_dora=use_dora)
    before = outputs(net)
    with pytest.warns(UserWarning, match="plain ones"):
        merge_and_unload(net.train())
    assert set(dict(net[0].named_parameters())) == {"weight", "bias"}
    assert type(net[0]) is nn.Linear
    torch.testing.assert_close(outputs(net), before, rtol=1e-5, atol=1e-5)


def tied() -> nn.Sequential:
    net = around(linear(bias=False))
    net[2].weight = net[0].weight
    return net


def tied_by_memory() -> nn.Sequential:
    net = around(linear(bias=False))
    net[2].weight = nn.Parameter(net[0].weight.data.T)
    return net


@pytest.mark.parametrize("build", [tied, tied_by_memory])
def test_layers_that_share_a_weight_get_one_each(build: Callable[[], nn.Module]) -> None:
    net = adapted(build())
    before = outputs(net)
    with pytest.warns(UserWarning, match=r"shared by 0\.weight, 2\.weight"):
        merge_and_unload(net)
    torch.testing.assert_close(outputs(net), before, rtol=1e-5, atol=1e-5)


def test_a_weight_tied_to_something_outside_stays_there() -> None:
    net, decoder = around(linear(bias=False)), linear(bias=False)
    decoder.weight = net[0].weight
    held = decoder.weight.clone()
    adapted(net)
    merge_and_unload(net)
    assert torch.equal(decoder.weight, held)


def test_transformers_is_told_that_embeddings_are_no_longer_tied() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    adapted(model, target_modules=["c_fc", "lm_head"], head=None)
    ids = torch.arange(8)[None]
    before = model(ids).logits
    merge_and_unload(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    assert model.config.tie_word_embeddings is False


# --- refusals ---------------------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.5, self.bias)


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


class Rounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * 8).round() / 8, self.bias)


class TwoArguments(nn.Linear):
    def forward(self, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale


def hooked(hook: Callable[..., Any]) -> nn.Module:
    layer = linear()
    layer.register_forward_hook(hook)
    return layer


OWN_WAYS: dict[str, Callable[[], nn.Module]] = {
    "scaled": lambda: Scaled(WIDTH, WIDTH),
    "transposed": lambda: Transposed(WIDTH, WIDTH),
    "quantised in its forward": lambda: Rounded(WIDTH, WIDTH),
    "two arguments": lambda: TwoArguments(WIDTH, WIDTH),
    "hook that doubles": lambda: hooked(lambda m, i, o: o * 2),
    "hook that fails": lambda: hooked(lambda m, i, o: o.view(7, 7)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", OWN_WAYS)
def test_what_cannot_be_merged_is_refused_and_nothing_is_changed(kind: str, training: bool) -> None:
    net = adapted(nn.Sequential(norms.spectral_norm(linear()), OWN_WAYS[kind](), nn.Linear(WIDTH, 3))).train(training)
    before, rng = snapshot(net), torch.get_rng_state()
    with pytest.raises(InputError, match="layer '1' cannot be merged"):
        merge_and_unload(net)
    assert_untouched(net, before)
    assert torch.equal(torch.get_rng_state(), rng)


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def test_a_convolution_with_its_own_forward_is_refused() -> None:
    net = nn.Sequential(StandardisedConv(3, 4, 3), nn.Flatten(), nn.Linear(4, 3))
    adapted(net, target_modules=["0"])
    with pytest.raises(InputError, match="StandardisedConv"):
        merge_and_unload(net)


def test_diverged_and_overflowing_weights_are_named() -> None:
    net = adapted(around(linear()))
    net[2].lora_B.default.weight.data[0, 0] = float("nan")
    before = snapshot(net)
    with pytest.raises(InputError, match=r"layer '2' cannot be merged: lora_B.*NaN or infinite.*checkpoint"):
        merge_and_unload(net)
    assert_untouched(net, before)
    net = adapted(around(linear())).half()
    for name in ("lora_A", "lora_B"):
        getattr(net[2], name).default.weight.data.fill_(500)
    with pytest.raises(InputError, match=r"torch\.float16"):
        merge_and_unload(net)


class Autoencoder(nn.Module):
    """Reads an adapted layer's weight besides calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = linear(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T))


def test_an_example_finds_weights_that_are_used_elsewhere() -> None:
    net = adapted(Autoencoder())
    before = snapshot(net)
    with pytest.raises(InputError, match="used elsewhere"):
        merge_and_unload(net, example=X)
    assert_untouched(net, before)
    net = adapted(around(linear()))
    expected = outputs(net)
    torch.testing.assert_close(outputs(merge_and_unload(net, example=X)), expected, rtol=1e-5, atol=1e-5)


# --- hooks, several adapters ------------------------------------------------------------------------------------------


def test_hooks_stay_in_their_order_and_their_handles_work() -> None:
    calls: list[str] = []
    net = around(hooked(lambda m, i, o: calls.append("inner")))
    adapted(net)
    net[0].register_forward_hook(lambda m, i, o: calls.append("outer"))
    doubling = net[2].register_forward_hook(lambda m, i, o: o * 2)
    before = outputs(net)
    merge_and_unload(net)
    calls.clear()
    torch.testing.assert_close(outputs(net), before, rtol=1e-5, atol=1e-5)
    assert calls == ["inner", "outer"]
    doubling.remove()
    assert not torch.allclose(outputs(net), before)


def test_the_active_one_of_several_adapters_is_merged_and_all_are_gone() -> None:
    config: dict[str, Any] = {"init_lora_weights": False}
    net = get_peft_model(around(linear()), LoraConfig(r=2, target_modules=["0", "2"], **config))
    net.add_adapter("b", LoraConfig(r=3, target_modules=["2"], **config))
    net.set_adapter("b")
    before = outputs(net)
    merge_and_unload(net)
    torch.testing.assert_close(outputs(net), before, rtol=1e-5, atol=1e-5)
    assert not any("lora" in name for name in net.state_dict())


def test_an_adapter_that_peft_has_merged_is_not_added_twice() -> None:
    net = get_peft_model(around(linear()), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    before = outputs(net)
    net.merge_adapter()
    merge_and_unload(net)
    torch.testing.assert_close(outputs(net), before, rtol=1e-5, atol=1e-5)
    assert not find_adapters(net)


def test_switched_off_adapters_are_not_merged() -> None:
    net = get_peft_model(around(linear()), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    net.base_model.disable_adapter_layers()
    before = outputs(net)
    with pytest.raises(InputError, match="switched off"):
        merge_and_unload(net)
    assert torch.equal(outputs(net), before)


def test_a_projection_that_attention_never_calls_changes_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(WIDTH, 2, batch_first=True), linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.attention(x[:, None], x[:, None], x[:, None])[0])

    net = get_peft_model(Net(), LoraConfig(r=2, target_modules=["out_proj", "last"], init_lora_weights=False)).train()
    before = net(X)
    merge_and_unload(net)
    torch.testing.assert_close(net(X), before, rtol=1e-5, atol=1e-5)


def test_merged_weights_are_new_and_the_rest_is_kept() -> None:
    net = adapted(around(linear()), bias="all")
    bias, weight = net[0].base_layer.bias, net[0].base_layer.weight
    merge_and_unload(net)
    assert net[0].bias is bias
    assert net[0].weight is not weight
    assert bias.requires_grad
    assert not net[0].weight.requires_grad
    copy.deepcopy(net)
