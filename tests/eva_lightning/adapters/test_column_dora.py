"""DoRA with norms per input column, against its formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from eva_lightning.adapters import find_adapters, inject, merge_and_unload, save_pretrained


def _net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _adapted() -> Any:
    """With adapters whose B is not 0."""
    net = _net()
    inject(net, r=2, alpha=3.0, target_modules=["0"], head=None, dora_by_column=True)
    net.double()
    with torch.no_grad():
        next(iter(find_adapters(net).values())).b.normal_()
    return net


def _dense(net: Any, a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> Any:
    """``m V / ||V||`` column by column (adapters/dora_linear.py of the authors' code), gradients through the norm."""
    base = _net()[0]
    moved = base.weight.detach() + 3.0 / 2 * b @ a
    columns = [moved[:, j] * base.weight[:, j].detach().square().sum().sqrt() / moved[:, j].square().sum().sqrt()
               for j in range(moved.shape[1])]  # fmt: skip
    return net[2](torch.tanh(x @ torch.stack(columns, 1).T + base.bias.detach()))


def test_function_and_gradients_are_those_of_the_formula() -> None:
    net, x = _adapted(), torch.randn(4, 6, dtype=torch.float64)
    (layer,) = find_adapters(net).values()
    a, b = (p.detach().clone().requires_grad_() for p in (layer.a, layer.b))
    expected = _dense(net, a, b, x)
    torch.testing.assert_close(net(x), expected)
    net(x).square().sum().backward()
    of_a, of_b = torch.autograd.grad(_dense(net, a, b, x).square().sum(), (a, b))
    torch.testing.assert_close(layer.a.grad, of_a)
    torch.testing.assert_close(layer.b.grad, of_b)
    # the magnitude is frozen: nothing but A and B trains in the layer
    assert {name.split(".")[0] for name, p in layer.module.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B",
    }  # fmt: skip


def test_function_at_the_start_is_the_base_layers_also_after_a_new_rank() -> None:
    net, x = _net(), torch.randn(4, 6, dtype=torch.float64)
    inject(net, r=2, target_modules=["0"], head=None, dora_by_column=True)
    net.double()
    torch.testing.assert_close(net(x), _net()(x))
    (layer,) = find_adapters(net).values()
    layer.resize(3)
    with torch.no_grad():
        layer.b.normal_()
    length = torch.linalg.vector_norm(
        (net[0](torch.eye(6, dtype=torch.float64)) - net[0](torch.zeros(1, 6, dtype=torch.float64))).T, dim=0
    )
    torch.testing.assert_close(length, torch.linalg.vector_norm(_net()[0].weight.detach(), dim=0))


def test_merges_and_goes_to_stock_peft_as_whole_layers(tmp_path: Path) -> None:
    net, x = _adapted(), torch.randn(4, 6, dtype=torch.float64)
    expected = net(x)
    with pytest.warns(UserWarning, match="DoRA by columns"):
        save_pretrained(net, tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(_net(), str(tmp_path)).double()(x), expected)
    torch.testing.assert_close(merge_and_unload(net)(x), expected)
    assert not find_adapters(net)


def test_a_layer_it_is_not_for_is_named() -> None:
    with pytest.raises(ValueError, match=r"dora_by_column is for linear layers without dropout.*but '0' is none"):
        inject(_net(), r=2, target_modules=["0"], head=None, dora_by_column=True, lora_dropout=0.1)
