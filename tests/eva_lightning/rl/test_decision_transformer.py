from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eva_lightning.rl.decision_transformer import (
    TOKENS_PER_STEP,
    DecisionTransformer,
    Normalisation,
    token_mask,
)

SMALL: dict[str, Any] = {"width": 32, "layers": 3, "heads": 4, "context": 6, "dropout": 0.1}


def small(**changes: Any) -> DecisionTransformer:
    torch.manual_seed(0)
    return DecisionTransformer(39, 4, **{**SMALL, **changes}).eval()


def inputs(b: int = 3, k: int = 6, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"states": (b, k, 39), "actions": (b, k, 4), "rewards": (b, k), "returns_to_go": (b, k)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**made, "timesteps": torch.arange(k).expand(b, k) + 7}


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_papers_architecture_is_the_default_and_has_the_stated_size() -> None:
    model = DecisionTransformer(39, 4)
    assert parameters(model) == 12_741_124
    assert parameters(model.blocks) == 12_609_536  # "12M"
    documented = " ".join((DecisionTransformer.__doc__ or "").split())
    assert "12,741,124 parameters" in documented
    assert "12,609,536 of them" in documented
    assert parameters(DecisionTransformer(39, 4, 128, 3, 4, 10)) == 607_236
    # with the larger tables of Schmied et al.
    assert round((parameters(model) + (1024 - 200 + 1000) * 512) / 1e6, 1) == 13.7


@pytest.mark.parametrize("positions", ["global", "timestep"])
@pytest.mark.parametrize("name", ["states", "actions", "rewards", "returns_to_go"])
def test_a_prediction_sees_its_state_and_the_past_and_nothing_else(name: str, positions: str) -> None:
    model = small(positions=positions)
    given = inputs()
    with torch.no_grad():
        before = model(**given)
        changed = {**given, name: given[name].clone()}
        changed[name][:, 3] += 1.0
        moved = (model(**changed) - before).abs().amax(dim=(0, 2))
    first = 3 if name in ("states", "returns_to_go") else 4  # action and reward of a step come after its prediction
    assert moved[:first].max() == 0
    assert moved[first:].min() > 1e-6


@pytest.mark.parametrize("positions", ["global", "timestep"])
def test_padding_changes_nothing_and_is_predicted_as_zero(positions: str) -> None:
    model = small(positions=positions)
    long = inputs()
    short = {name: value[:, :4] for name, value in long.items()}
    mask = torch.arange(6).expand(3, 6) < 4
    with torch.no_grad():
        padded, exact = model(**long, mask=mask), model(**short)
    torch.testing.assert_close(padded[:, :4], exact, rtol=0, atol=1e-6)
    assert padded[:, 4:].abs().max() == 0
    assert token_mask(mask).tolist() == [[True] * 16 + [False] * 8] * 3


@pytest.mark.parametrize("positions", ["global", "timestep"])
@pytest.mark.parametrize("pieces", [[2, 4, 4, 4, 4, 4], [10, 4, 8], [22]])
def test_cached_tokens_give_the_full_forward(positions: str, pieces: list[int]) -> None:
    model = small(positions=positions)
    given = inputs()
    steps = {name: value for name, value in given.items() if name != "timesteps"}
    with torch.no_grad():
        expected = model(**given)
        tokens = model.place(model.embed_steps(**steps).flatten(1, 2), given["timesteps"])
        cache, done = model.new_cache(3), 0
        for piece in pieces:
            action = model.act(tokens[:, done : done + piece], cache)
            done += piece
            torch.testing.assert_close(action, expected[:, (done - 2) // TOKENS_PER_STEP], rtol=0, atol=1e-6)
            assert cache.length == done
        # whole windows need no cache
        torch.testing.assert_close(model.act(tokens[:, :22]), expected[:, 5], rtol=0, atol=1e-6)
        cache.clear()
        torch.testing.assert_close(model.act(tokens[:, :10], cache), expected[:, 2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("positions", ["global", "timestep"])
def test_pieces_are_placed_as_the_whole(positions: str) -> None:
    model = small(positions=positions)
    tokens, steps = torch.zeros(1, 24, 32), torch.arange(6)[None] + 3
    whole = model.place(tokens, steps)
    torch.testing.assert_close(model.place(tokens[:, 6:14], steps[:, 1:], 6), whole[:, 6:14])


def test_windows_longer_than_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 6 steps, got 7"):
        small()(**inputs(k=7))
    with pytest.raises(ValueError, match="needs the timesteps"):
        small(positions="timestep")(**{**inputs(), "timesteps": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "heads must divide width 32, got 5"),
        ({"layers": 0}, "layers must be a whole number of at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be a number of at least 0 and below 1"),
        ({"positions": "globl"}, "did you mean global"),
    ],
)
def test_bad_sizes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_normalisation_floors_and_clips() -> None:
    normalise = Normalisation([1.0, 0.0], [2.0, 0.0])
    states = normalise.states(torch.tensor([[3.0, 0.1], [1e6, -1e6]]))
    torch.testing.assert_close(states, torch.tensor([[1.0, 5.0], [10.0, -10.0]]))
    assert normalise.returns(torch.tensor(1500.0)) == 1.5
    assert normalise.rewards(torch.tensor(5.0)) == 0.5
    assert not normalise.state_dict()
    with pytest.raises(ValueError, match="of one length"):
        Normalisation([0.0], [1.0, 1.0])


def test_training_flops_count_the_matrix_products() -> None:
    model = small()
    with torch.no_grad():
        counted = FlopCounterMode(display=False)
        given = inputs(b=2)
        with counted, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(**given)
    # twice as much again for the backward pass; the counter knows of the same products
    assert model.training_flops(2) == pytest.approx(3 * counted.get_total_flops(), rel=0.02)
    assert DecisionTransformer(39, 4).training_flops(128) == pytest.approx(2.066e12, rel=0.01)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.slow
def test_compiles_to_the_same_function() -> None:
    model = small(layers=1)
    given = inputs()
    with torch.no_grad():
        expected = model(**given)
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(**given), expected, rtol=0, atol=1e-5)


def test_acting_has_gpt2s_gelu_in_any_precision() -> None:
    model = small().eval().double()
    tokens = torch.randn(2, 6, model.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    for block in model.blocks:
        torch.nn.init.normal_(block.fc1.weight, std=2.0)  # type: ignore[union-attr, arg-type]
    expected = model.act(tokens)  # with gradients, so by torch's gelu
    with torch.inference_mode():
        torch.testing.assert_close(model.act(tokens), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(model.float().act(tokens.float()).double(), expected, rtol=1e-4, atol=1e-5)
