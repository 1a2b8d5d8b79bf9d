"""Engines by name, the choice of "auto", and memory known before it is taken."""

from __future__ import annotations

import pytest
import torch

from eva_lightning.svd import (
    ExactSVD,
    IncrementalSVD,
    SketchSVD,
    StreamingSVD,
    choose_engines,
    estimate_bytes,
    make_engine,
    message_bytes,
    place_engines,
    total_bytes,
)


def test_factory_builds_engines_by_name() -> None:
    engines: list[StreamingSVD] = [make_engine(name, 8, 2) for name in ("exact", "incremental", "sketch")]
    assert [type(engine) for engine in engines] == [ExactSVD, IncrementalSVD, SketchSVD]
    with pytest.raises(ValueError, match="unknown engine 'exakt': did you mean exact"):
        make_engine("exakt", 8, 2)


def test_auto_sketches_the_layers_that_dominate_the_cost() -> None:
    block = {"qkv": 384, "proj": 384, "fc1": 384, "fc2": 1536}
    assert choose_engines(block, 32, "auto", 2**40) == {**dict.fromkeys(block, "exact"), "fc2": "sketch"}
    assert set(choose_engines(block, 32, "auto", 2**40, device="cuda").values()) == {"exact"}
    assert set(choose_engines(block, 32, "auto", 2**40, thrifty=False).values()) == {"exact"}
    narrow = {"qkv": 96, "proj": 96, "fc1": 96, "fc2": 384}
    assert set(choose_engines(narrow, 32, "auto", 2**40).values()) == {"exact"}
    equal = dict.fromkeys(("a", "b", "c"), 4096)
    assert set(choose_engines(equal, 32, "auto", 2**40).values()) == {"exact"}
    assert choose_engines({}, 32, "auto", 0) == {}


def test_auto_makes_narrow_layers_exact_while_they_fit_the_budget() -> None:
    dims = {"wide": 4096, "narrow": 512, "middle": 2048}
    assert set(choose_engines(dims, 32, "auto", 2**40).values()) == {"exact"}
    budget = total_bytes(dict.fromkeys(dims, "sketch"), dims, 32) + 20 * 1024**2
    chosen = choose_engines(dims, 32, "auto", budget)
    assert chosen == {"wide": "sketch", "narrow": "exact", "middle": "exact"}
    assert list(chosen) == list(dims)
    assert total_bytes(chosen, dims, 32) <= budget


def test_a_budget_too_small_for_the_smallest_states_is_refused_with_both_numbers() -> None:
    dims = {"wide": 4096, "narrow": 512}
    with pytest.raises(ValueError, match=r"at least 5\.0 MiB for 2 layers with k=32.*budget is 1\.0 MiB"):
        choose_engines(dims, 32, "auto", 2**20)
    assert choose_engines(dims, 32, "auto", 2**20, offload=True)["wide"] == "sketch"
    assert set(choose_engines(dims, 32, "exact", 0).values()) == {"exact"}
    with pytest.raises(ValueError, match="unknown engine 'fast'"):
        choose_engines(dims, 32, "fast", 0)
    with pytest.raises(ValueError, match="-1"):
        choose_engines(dims, 32, "auto", -1)


def test_states_that_do_not_fit_the_device_go_to_the_cpu() -> None:
    dims = {"wide": 4096, "narrow": 512, "middle": 1024}
    names = dict.fromkeys(dims, "exact")
    gpu = dict.fromkeys(dims, torch.device("cuda", 0))
    budget = total_bytes({"narrow": "exact", "middle": "exact"}, dims, 32)
    placed = place_engines(names, dims, 32, budget, gpu)
    assert placed == {**gpu, "wide": torch.device("cpu")}
    assert place_engines(names, dims, 32, 2**40, gpu) == gpu


@pytest.mark.parametrize("name", ["exact", "incremental", "sketch"])
def test_sizes_follow_from_the_width(name: str) -> None:
    assert estimate_bytes(name, 2048, 16) == make_engine(name, 2048, 16).state_bytes
    growth = estimate_bytes(name, 4096, 16) / estimate_bytes(name, 2048, 16)
    assert growth == pytest.approx(4 if name == "exact" else 2, rel=0.05)
    assert message_bytes(name, 4096, 16) <= 4 * 4096 * 2 * (16 + 16)
    assert total_bytes({"a": name, "b": name}, {"a": 8, "b": 8}, 32) == 2 * estimate_bytes(name, 8, 8)
