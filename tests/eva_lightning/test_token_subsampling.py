"""Which tokens are used: enough of them, every position equally often, of masked ones those that count."""

from __future__ import annotations

import pytest
import torch

from eva_lightning.token_subsampling import TokenChoice, automatic

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tokens", "samples", "width", "expected"),
    [
        (197, 16, 192, 32),
        (197, 64, 192, 32),  # never fewer of a sample
        (197, 4, 192, 197),  # 128 would be more than half
        (512, 4, 192, 128),  # at least 512 of a minibatch
        (197, 16, 768, 96),  # two per dimension of wide models
        (257, 64, 1536, 48),
        (40, 32, 128, 40),
        (17, 1, 64, 17),
    ],
)
def test_automatic_numbers(tokens: int, samples: int, width: int, expected: int) -> None:
    assert automatic(tokens, samples, width) == expected


def test_goes_round_all_positions() -> None:
    choice, seen = TokenChoice(5, seed=3), torch.zeros(20)
    for _ in range(8):
        choice.begin()
        index = choice.positions(20, 2, CPU)
        assert index is not None
        assert len(index.unique()) == 5
        assert choice.positions(20, 2, CPU) is index  # the same for all layers of a minibatch
        seen[index] += 1
    assert seen.eq(2).all()


def test_rows_of_a_mask_are_drawn_anew_in_every_minibatch() -> None:
    choice = TokenChoice(4)
    draws = []
    for _ in range(2):
        choice.begin()
        rows = choice.rows(50, 20, 3, CPU)
        assert rows is not None
        assert len(rows.unique()) == 12
        assert int(rows.max()) < 50
        draws.append(rows)
    assert not torch.equal(*draws)
    assert choice.rows(12, 20, 3, CPU) is None  # no more than wanted


@pytest.mark.parametrize("per_sample", [None, 20, 30])
def test_all_tokens(per_sample: int | None) -> None:
    choice = TokenChoice(per_sample)
    choice.begin()
    assert choice.positions(20, 2, CPU) is None
