"""Layers whose weight the model reads besides calling them: merged silently, they would change the function."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from eva_lightning import EVAInitCallback
from eva_lightning.adapters import find_adapters, merge_and_unload, save_pretrained
from eva_lightning.errors import EVAWarning, InputError
from tests.modules import CLASSES, HIDDEN, IN, Classifier, correlated, loader, trainer

X = correlated(8)


class Net(nn.Module):
    """An encoder, a head on what it gives, and ``then`` on what is done besides."""

    def __init__(self, then: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.head, self.then = nn.Linear(IN, HIDDEN), nn.Linear(IN, CLASSES), then

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.encoder(x))
        return self.head(self.then(self, x, h) + h[:, :IN])


def decode(net: Any, _: Tensor, h: Tensor) -> Tensor:
    return F.linear(h, net.encoder.weight.T)


def tied(build: Callable[[nn.Linear], nn.Module] = lambda layer: layer) -> Net:
    net = Net(decode)
    net.encoder = build(net.encoder)  # type: ignore[assignment]
    return net


class TiedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Conv1d(1, 4, 3), nn.Linear(IN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv_transpose1d(torch.relu(self.encoder(x[:, None])), self.encoder.weight)[:, 0])


READ: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "tied decoder": (tied, {}),
    "tied decoder, weight_norm": (lambda: tied(parametrizations.weight_norm), {}),
    "tied decoder, weight_norm before torch 2": (lambda: tied(torch.nn.utils.weight_norm), {}),
    "tied convolution": (TiedConvolution, {"target_modules": ["encoder"]}),
    "norm": (lambda: Net(lambda net, x, h: x + net.encoder.weight.norm()), {}),
    "inside PEFT's layer": (lambda: Net(lambda net, x, h: F.linear(h, _base(net.encoder).weight.T)), {}),
}


def _base(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def fitted(net: nn.Module, **options: Any) -> tuple[Classifier, list[str]]:
    module = Classifier(net)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        eva = EVAInitCallback(r=2, alpha=8, verbose=False, **options)
        trainer(eva).fit(module, loader())
    return module.eval(), [str(w.message) for w in seen if issubclass(w.category, EVAWarning)]


@pytest.mark.parametrize("kind", READ)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_is_read_is_said_and_not_merged(kind: str) -> None:
    build, options = READ[kind]
    module, said = fitted(build(), **options)
    assert len(said) == 1
    assert said[0].startswith("EVA: 1 of 1 adapted layers ('net.encoder') have a weight that the model also reads")
    before = module(X)
    with pytest.raises(InputError, match=r"'net\.encoder' cannot be merged: its weight is also read.*example="):
        merge_and_unload(module)
    assert torch.equal(module(X), before)
    assert find_adapters(module)


def shared_with_the_parent() -> nn.Module:
    net = Net(lambda net, x, h: F.linear(h, net.weight.T))
    net.weight = net.encoder.weight
    return net


def shared_with_a_layer() -> nn.Module:
    net = Net(lambda net, x, h: F.linear(net.other(x), net.encoder.weight.new_zeros(IN, HIDDEN)) + x)
    net.other = nn.Linear(IN, HIDDEN)
    net.other.weight = net.encoder.weight
    return net


HARMLESS: dict[str, Callable[[], nn.Module]] = {
    "precision and shape": lambda: Net(lambda net, x, h: x.to(net.encoder.weight.dtype) * len(net.encoder.weight)),
    "precision of a tensor": lambda: Net(lambda net, x, h: x.to(net.encoder.weight) + x.type_as(net.encoder.weight)),
    "a parameter of its own": shared_with_the_parent,
    "a layer of its own": shared_with_a_layer,
    "bias": lambda: Net(lambda net, x, h: x + net.encoder.bias.sum()),
}


@pytest.mark.parametrize("kind", HARMLESS)
@pytest.mark.filterwarnings("ignore:merging gave layers that shared")
def test_what_is_no_use_of_its_values_is_merged(kind: str) -> None:
    module, said = fitted(HARMLESS[kind]())
    assert said == []
    before = module(X)
    merge_and_unload(module)
    torch.testing.assert_close(module(X), before, rtol=1e-4, atol=1e-5)


def test_attention_reads_its_own_weights() -> None:
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(IN, 2, HIDDEN, dropout=0.0, batch_first=True), 2)
    net = nn.Sequential(nn.Unflatten(1, (1, IN)), layers, nn.Flatten(), nn.Linear(IN, CLASSES))
    module, said = fitted(net, target_modules=["self_attn", "linear1"])
    assert said == []
    before = module(X)
    merge_and_unload(module)
    torch.testing.assert_close(module(X), before, rtol=1e-4, atol=1e-5)


def test_the_note_is_in_checkpoints_and_copies(tmp_path: Path) -> None:
    class Tied(Classifier):
        def __init__(self) -> None:
            super().__init__(tied())

    module = Tied()
    eva, saving = EVAInitCallback(r=2, verbose=False), ModelCheckpoint(tmp_path, save_last=True)
    with pytest.warns(EVAWarning, match="also reads"):
        trainer(eva, saving, enable_checkpointing=True).fit(module, loader())
    for again in (Tied.load_from_checkpoint(tmp_path / "last.ckpt"), copy.deepcopy(module)):
        with pytest.raises(InputError, match="also read elsewhere"):
            merge_and_unload(again)


class WithExample(Classifier):
    def __init__(self, net: nn.Module, example: Any) -> None:
        super().__init__(net)
        self.example_input_array = example


@pytest.mark.filterwarnings("ignore:EVA. 1 of 1 adapted layers.*also reads")
@pytest.mark.parametrize("example", [X, (X,), {"x": X}])
def test_the_example_of_a_module_decides(example: Any) -> None:
    for factor in (0, 1):
        net = Net(lambda net, x, h, factor=factor: x + factor * net.encoder.weight.sum(0))  # type: ignore[misc]
        module = WithExample(net, example)
        trainer(EVAInitCallback(r=2, alpha=8, verbose=False)).fit(module, loader())
        before = module.eval()(X)
        if factor:
            with pytest.raises(InputError, match="used elsewhere"):
                merge_and_unload(module)
            assert torch.equal(module(X), before)
        else:
            merge_and_unload(module)
            torch.testing.assert_close(module(X), before, rtol=1e-4, atol=1e-5)


def test_an_example_that_does_not_fit_is_passed_over() -> None:
    module = WithExample(Net(lambda net, x, h: x), torch.zeros(2, 99))
    trainer(EVAInitCallback(r=2, verbose=False)).fit(module, loader())
    assert not find_adapters(merge_and_unload(module))


def test_half_precision_does_not_fail_the_example() -> None:
    module = WithExample(Net(lambda net, x, h: x), X.bfloat16())
    trainer(EVAInitCallback(r=2, alpha=8, verbose=False)).fit(module, loader())
    assert not find_adapters(merge_and_unload(module.bfloat16()))


def test_the_export_reloads_in_peft(tmp_path: Path) -> None:
    base = tied()
    module, _ = fitted(copy.deepcopy(base))
    save_pretrained(module.net, tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(loaded(X), module(X), rtol=1e-5, atol=1e-5)
