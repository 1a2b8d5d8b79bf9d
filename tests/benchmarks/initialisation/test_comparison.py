"""Layers beside PEFT's, and real weights wherever they can be had."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks.initialisation.comparison import ahead_in_words, compare_layers, layers_in_words
from benchmarks.initialisation.weights import RANDOM, choose_weights
from eva_lightning.errors import UnreachableError


def rows(n_batches: int) -> list[dict[str, Any]]:
    ours = {"a": 0.99, "b": 0.98, "c": 0.97}
    theirs = {"a": 0.98, "b": 0.99, "c": 0.96}
    return [
        {"name": "ours", "n_batches": 4, "captured_per_layer": ours, "heldout_per_layer": ours},
        {"name": "PEFT", "n_batches": n_batches, "captured_per_layer": theirs, "heldout_per_layer": theirs},
    ]


def test_layers_ahead_and_behind_are_counted_and_named() -> None:
    found = rows(4)
    compare_layers(found)
    assert ahead_in_words(found[0]) == "2 / 2 of 3"
    assert ahead_in_words(found[1]) == ""
    lines = layers_in_words(found[0])
    assert "worst layers, captured: c 0.9700, b 0.9800, a 0.9900" in lines[0]
    assert "behind PEFT, captured: b -0.01000" in lines[1]


def test_other_minibatches_are_compared_on_those_held_out_only() -> None:
    found = rows(5)
    compare_layers(found)
    assert ahead_in_words(found[0]) == "- / 2 of 3"


def tool(monkeypatch: pytest.MonkeyPatch, find: Any) -> None:
    module = ModuleType("tools.dinov2_small")
    module.find_weights = find  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tools.dinov2_small", module)


def test_real_weights_are_found_for_their_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tool(monkeypatch, lambda say: SimpleNamespace(weights="file", description="real ones"))
    assert choose_weights("dinov2_s14", None) == ("file", "real ones")
    assert choose_weights("test_vit", None) == (None, RANDOM)
    assert choose_weights("dinov2_s14", "folder/mine.safetensors") == (
        "folder/mine.safetensors",
        "weights of mine.safetensors",
    )


def test_random_weights_take_their_place_with_the_reason_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find(say: Any) -> Any:
        raise UnreachableError("nothing answers")

    tool(monkeypatch, find)
    assert choose_weights("dinov2_s14", None) == (None, RANDOM)
    assert f"dinov2_s14: {RANDOM}, for nothing answers" in capsys.readouterr().err
