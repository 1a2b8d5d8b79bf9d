"""A LoraConfig given to the callback: what is honoured, what is refused, and that PEFT agrees on the outcome."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, TaskType, inject_adapter_in_model

from eva_lightning import EVAInitCallback
from eva_lightning.adapters import find_adapters
from eva_lightning.adapters.lora_options import injection_arguments
from tests.modules import build, loader, trainer


def test_defaults_are_the_papers() -> None:
    assert injection_arguments() == {
        "r": 16, "alpha": 1.0, "target_modules": None, "exclude": None, "head": "auto", "bias": "none",
    }  # fmt: skip


def test_a_lora_config_says_its_rank_and_alpha() -> None:
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["0", "3"], use_dora=True, task_type="FEATURE_EXTRACTION")
    assert injection_arguments(config) == {
        "r": 4, "alpha": 2, "target_modules": ["0", "3"], "exclude": None, "head": "auto", "bias": "none",
        "use_dora": True, "task_type": "FEATURE_EXTRACTION",
    }  # fmt: skip
    assert injection_arguments(LoraConfig())["r"] == LoraConfig().r


def test_checkpoints_can_hold_them(tmp_path: Path) -> None:
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, rank_pattern={"0": 2}, target_modules={"0", "3"})
    arguments = injection_arguments(config)
    torch.save(arguments, tmp_path / "arguments")
    assert torch.load(tmp_path / "arguments", weights_only=True) == arguments


def test_a_mapping_says_only_what_it_holds() -> None:
    arguments = injection_arguments({"bias": "all", "modules_to_save": ["7"]}, r=4, exclude=("5",))
    assert (arguments["r"], arguments["alpha"], arguments["bias"]) == (4, 1.0, "all")
    assert (arguments["exclude"], arguments["head"]) == (["5"], ["7"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8, "lora": LoraConfig(r=4)}, "r=8 contradicts lora's r=4"),
        ({"alpha": 1.0, "lora": {"lora_alpha": 2}}, "alpha=1.0 contradicts lora's lora_alpha=2"),
        (
            {"target_modules": ["0"], "lora": LoraConfig(target_modules=["3"])},
            "contradicts lora's target_modules=['3']",
        ),
        ({"exclude": "0", "lora": {"exclude_modules": ["3"]}}, "contradicts lora's exclude_modules=['3']"),
        ({"head": ["0"], "lora": {"modules_to_save": ["7"]}}, "contradicts lora's modules_to_save=['7']"),
        ({"lora": LoraConfig(init_lora_weights="pissa")}, "init_lora_weights='pissa' cannot be combined with EVA"),
        ({"lora": LoraConfig(layers_to_transform=[0], layers_pattern="blocks")}, "option 'layers_to_transform'"),
        ({"lora": {"use_dorra": True}}, "unknown option 'use_dorra': did you mean use_dora"),
        ({"lora": AdaLoraConfig(total_step=1)}, "lora must be a peft.LoraConfig or a mapping"),
        ({"lora": LoraConfig(lora_dropout=1.0)}, "lora_dropout must be a number of at least 0 and below 1, got 1.0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EVAInitCallback(**options)


def test_the_same_in_both_places_is_no_contradiction() -> None:
    config = LoraConfig(r=4, lora_alpha=1, target_modules={"3", "0"})
    assert injection_arguments(config, r=4, alpha=1.0, target_modules=["0", "3"])["r"] == 4


@pytest.mark.parametrize("key", ["3", r"^net\.3", r"net\.[35]"])
def test_layers_get_the_ranks_and_alphas_that_peft_gives_them(key: str) -> None:
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["net.0", "net.3", "net.5"], rank_pattern={key: 2}, alpha_pattern={key: 6},
        lora_dropout=0.25, use_rslora=True,
    )  # fmt: skip
    module, stock = build(), build()
    callback = EVAInitCallback(rho=1, lora=config, verbose=False)
    trainer(callback).fit(module, loader())
    expected = find_adapters(inject_adapter_in_model(config, stock))
    assert callback.state is not None
    layers = find_adapters(module)
    assert {n: (x.rank, x.alpha) for n, x in layers.items()} == {n: (x.rank, x.alpha) for n, x in expected.items()}
    assert {n: x.module.scaling for n, x in layers.items()} == {n: x.module.scaling for n, x in expected.items()}
    assert all(x.module.lora_dropout["default"].p == 0.25 for x in layers.values())


def test_modules_to_save_train_in_full_and_get_no_adapter() -> None:
    module = build()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    trainer(EVAInitCallback(lora={"r": 4, "modules_to_save": ["5", "7"]}, verbose=False)).fit(module, loader())
    assert list(find_adapters(module)) == ["net.0", "net.3"]
    for name in ("net.5.weight", "net.7.weight"):
        assert not torch.equal(module.get_parameter(name), before[name])
