from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from eva_lightning import EVAInitCallback
from eva_lightning.adapters import find_adapters
from eva_lightning.adapters.registry import materialise
from eva_lightning.errors import InputError
from tests.modules import Classifier, loader, mlp, trainer

OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"use_rslora": True},
    {"lora_dropout": 0.1},
    {"lora_bias": True},
]


def model(low_cpu_mem_usage: bool, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["0", "3"], **options)
    return get_peft_model(mlp().bfloat16(), config, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_adapters_on_the_meta_device_start_as_pefts_do(options: dict[str, Any]) -> None:
    ours, reference, rng = model(True, **options), model(False, **options), torch.get_rng_state()
    assert materialise(ours) == ["0", "3"]
    assert torch.equal(torch.get_rng_state(), rng)
    there = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.shape, parameter.dtype, parameter.device) == (
            there[name].shape,
            there[name].dtype,
            there[name].device,
        )
        assert parameter.requires_grad == there[name].requires_grad
        if "lora_A" in name:
            assert bool(parameter.any())
        else:
            torch.testing.assert_close(parameter, there[name])
    assert materialise(ours) == []


def test_other_kinds_of_layers_and_inactive_adapters() -> None:
    net = nn.ModuleDict(
        {"a": nn.MultiheadAttention(8, 2), "c": nn.Conv1d(8, 8, 3), "e": nn.Embedding(10, 8), "h": nn.Linear(8, 3)}
    )
    wrapped = get_peft_model(net, LoraConfig(r=2, target_modules=["a", "c", "e", "h"]), low_cpu_mem_usage=True)
    wrapped.add_adapter("other", LoraConfig(r=3, target_modules=["c"]), low_cpu_mem_usage=True)
    materialise(wrapped)
    assert not any(p.is_meta for p in wrapped.parameters())
    assert wrapped.get_base_model()["c"].lora_A["other"].weight.shape[0] == 3


def test_eva_fits_them() -> None:
    module = Classifier(get_peft_model(mlp(), LoraConfig(r=4, target_modules=["0", "3"]), low_cpu_mem_usage=True))
    trainer(EVAInitCallback(rho=1), max_epochs=1).fit(module, loader())
    assert all(bool(layer.b.any()) for layer in find_adapters(module).values())


def test_base_weights_without_values_are_named() -> None:
    with torch.device("meta"):
        net = mlp()
    wrapped = get_peft_model(net, LoraConfig(r=4, target_modules=["3"]), low_cpu_mem_usage=True)
    with pytest.raises(InputError, match=r"layer '3': its weights are on the meta device.*load_state_dict"):
        materialise(wrapped)


def test_a_start_that_needs_the_weights_is_refused() -> None:
    net = get_peft_model(mlp(), LoraConfig(r=4, target_modules=["3"]), low_cpu_mem_usage=True)
    net.peft_config["default"].init_lora_weights = "olora"
    with pytest.raises(InputError, match="low_cpu_mem_usage=False"):
        materialise(net)
