"""Single options beside `streaming` and `lora`: the short calls that the documentation shows."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig

from eva_lightning import EVAInitCallback, StreamingOptions
from eva_lightning.errors import InputError


def injected(**arguments: Any) -> Any:
    return EVAInitCallback(**arguments).initialiser.injection_arguments


def test_single_options_are_those_of_the_whole_objects() -> None:
    single = EVAInitCallback(tokens_per_sample=None, memory_budget=2**33, offload=True)
    assert single.initialiser.streaming == StreamingOptions(tokens_per_sample=None, memory_budget=2**33, offload=True)
    assert EVAInitCallback(streaming={"tau": 0.9}, seed=3).initialiser.streaming == StreamingOptions(tau=0.9, seed=3)
    assert injected(bias="all", use_dora=True) == injected(lora={"bias": "all", "use_dora": True})
    assert injected(r=8, bias="all") == injected(lora=LoraConfig(r=8, lora_alpha=1, bias="all"))


def test_single_options_stand_beside_parts_of_the_whole() -> None:
    callback = EVAInitCallback(streaming=StreamingOptions(tau=0.9), seed=3)
    assert callback.initialiser.streaming == StreamingOptions(tau=0.9, seed=3)
    assert injected(lora={"bias": "all"}, lora_dropout=0.1) == injected(lora={"bias": "all", "lora_dropout": 0.1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens_per_samples": 4}, "unknown argument 'tokens_per_samples': did you mean tokens_per_sample"),
        ({"adapter_only_checkpoint": True}, "unknown argument 'adapter_only_checkpoint': did you mean adapter_only_"),
        ({"engine": "exakt"}, "unknown engine 'exakt': did you mean exact"),
        ({"lora": LoraConfig(), "bias": "all"}, "bias belongs into the LoraConfig"),
        ({"streaming": 0.9}, "streaming must be StreamingOptions, a mapping of its options or None, got 0.9"),
        ({"streaming": {"taus": 0.9}}, "unknown option of streaming 'taus': did you mean tau"),
        ({"bias": "some"}, "unknown bias 'some'"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EVAInitCallback(**arguments)
