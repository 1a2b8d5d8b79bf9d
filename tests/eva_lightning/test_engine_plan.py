"""Engines, their places and their memory are known before anything is allocated."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from eva_lightning import EVAInitCallback, StreamingOptions
from eva_lightning import engine_plan as allocation
from eva_lightning.engine_plan import Allocation
from eva_lightning.layer_inputs import LayerInputs, inputs_of
from eva_lightning.streaming_options import TokensPerSample
from eva_lightning.svd import estimate_bytes
from tests.modules import build, loader, trainer
from tests.svd_helpers import held_bytes

WIDE, NARROW = 4096, 512


def _inputs() -> dict[str, LayerInputs]:
    return {"wide": inputs_of(nn.Linear(WIDE, 2)), "narrow": inputs_of(nn.Linear(NARROW, 2))}


def test_says_what_the_states_will_take() -> None:
    plan = Allocation.plan(_inputs(), 32, StreamingOptions())
    assert plan.kinds == {"wide": "exact", "narrow": "exact"}
    assert plan.bytes == estimate_bytes("exact", WIDE, 32) + estimate_bytes("exact", NARROW, 32)
    assert str(plan) == "the decompositions of 2 layers (2 exact) take at most 66.5 MiB"
    assert plan.messages == {"wide": 4 * WIDE * 48, "narrow": 4 * NARROW * 48}
    engines = plan.engines()
    for name, width in (("wide", WIDE), ("narrow", NARROW)):
        engines[name].update(torch.randn(64, width))
    held = sum(held_bytes(engine, NARROW) for engine in engines.values())
    assert 4 * (WIDE**2 + NARROW**2) <= held <= plan.bytes


def test_what_does_not_fit_a_gpu_gets_a_smaller_engine_and_then_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(allocation, "device_of", lambda _: gpu)
    budget = estimate_bytes("sketch", WIDE, 32) + estimate_bytes("exact", NARROW, 32)
    small = Allocation.plan(_inputs(), 32, StreamingOptions(memory_budget=budget))
    assert small.kinds == {"wide": "sketch", "narrow": "exact"}
    assert set(small.devices.values()) == {gpu}
    tiny = Allocation.plan(_inputs(), 32, StreamingOptions(memory_budget=2**21, offload=True))
    assert tiny.devices == {"wide": torch.device("cpu"), "narrow": gpu}
    assert "MiB of it on the CPU" in str(tiny)
    with pytest.raises(ValueError, match="raise the budget"):
        Allocation.plan(_inputs(), 32, StreamingOptions(memory_budget=2**21))
    exact = Allocation.plan(_inputs(), 32, StreamingOptions(engine="exact", memory_budget=2**21, offload=True))
    assert exact.devices["wide"] == torch.device("cpu")


def test_the_callback_reports_before_it_streams(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(caplog.handler)

    def forward(module: nn.Module, batch: object) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        trainer(EVAInitCallback(r=2, forward_fn=forward)).fit(build(), loader())
    logging.getLogger("lightning.pytorch.utilities.rank_zero").removeHandler(caplog.handler)
    assert any("take at most" in record.message for record in caplog.records)


@pytest.mark.parametrize(("tokens", "kind"), [(None, "exact"), ("auto", "sketch"), (8, "sketch")])
def test_all_tokens_mean_the_exact_engine(tokens: TokensPerSample, kind: str) -> None:
    layers = {name: inputs_of(nn.Linear(width, 2)) for name, width in {"a": 256, "b": 256, "wide": 1024}.items()}
    plan = Allocation.plan(layers, 8, StreamingOptions(tokens_per_sample=tokens))
    assert plan.kinds == {"a": "exact", "b": "exact", "wide": kind}


def test_a_budget_that_cannot_be_kept_is_refused_before_streaming() -> None:
    with pytest.raises(ValueError, match=r"the memory budget is 100 B"):
        trainer(EVAInitCallback(r=2, streaming=StreamingOptions(memory_budget=100), verbose=False)).fit(
            build(), loader()
        )
