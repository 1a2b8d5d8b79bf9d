"""Which tokens are used: enough of them, every position equally often, of masked ones those that count, and more in
layers that need more."""

from __future__ import annotations

import pytest
import torch

from eva_lightning.token_subsampling import Need, Price, TokenChoice, automatic
from tests.svd_helpers import decaying

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tokens", "samples", "expected"),
    [
        (197, 16, 32),
        (197, 64, 32),  # never fewer of a sample
        (197, 4, 197),  # 128 would be more than half
        (512, 4, 128),  # at least 512 of a minibatch
        (40, 32, 40),
        (17, 1, 17),
    ],
)
def test_automatic_numbers(tokens: int, samples: int, expected: int) -> None:
    assert automatic(tokens, samples) == expected


def test_goes_round_all_positions() -> None:
    choice, seen = TokenChoice(5, seed=3), torch.zeros(20)
    for _ in range(8):
        choice.begin()
        index = choice.of("a").positions(20, 2, CPU)
        assert index is not None
        assert len(index.unique()) == 5
        assert choice.of("b").positions(20, 2, CPU) is index  # the same for all layers of a minibatch
        seen[index] += 1
    assert seen.eq(2).all()


def test_rows_of_a_mask_are_drawn_anew_in_every_minibatch() -> None:
    choice = TokenChoice(4)
    draws = []
    for _ in range(2):
        choice.begin()
        rows = choice.of("a").rows(50, 20, 3, CPU)
        assert rows is not None
        assert len(rows.unique()) == 12
        assert int(rows.max()) < 50
        draws.append(rows)
    assert not torch.equal(*draws)
    assert choice.of("a").rows(12, 20, 3, CPU) is None  # no more than wanted


@pytest.mark.parametrize("per_sample", [None, 20, 30])
def test_all_tokens(per_sample: int | None) -> None:
    choice = TokenChoice(per_sample)
    choice.begin()
    assert choice.of("a").positions(20, 2, CPU) is None


def test_where_all_tokens_are_used_there_is_nothing_to_find_out() -> None:
    choice = TokenChoice()
    choice.begin()
    assert choice.of("a").positions(17, 16, CPU) is None
    assert choice.of("b").positions(257, 16, CPU) is not None
    assert [choice.is_open(layer) for layer in "ab"] == [False, True]


def flat(n: int, dim: int) -> torch.Tensor:
    return decaying(n, dim, power=0.3, mean=0.0)


@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_that_needs_more_gets_them_in_its_first_minibatch_too(masked: bool) -> None:
    choice = TokenChoice()
    tokens, samples, least = 400, 16, 32

    def chosen(added: bool = False) -> torch.Tensor:
        of = choice.of("wide", added)
        found = of.rows(tokens * samples, tokens, samples, CPU) if masked else of.positions(tokens, samples, CPU)
        assert found is not None
        return found

    choice.begin()
    before = chosen()
    assert choice.is_open("wide")
    choice.learn("wide", flat(512, 256), 8, Price())
    assert not choice.is_open("wide")
    added = chosen(added=True)
    n = len(before) + len(added)
    assert n > 1.5 * len(before)
    assert len(torch.cat([before, added]).unique()) == n  # none twice
    choice.begin()
    assert len(chosen()) == n  # as many in every minibatch: all weigh the same
    other = choice.of("narrow").positions(tokens, samples, CPU)
    assert other is not None
    assert len(other) == least


def test_needs_follow_the_spectrum_the_tails_and_the_price() -> None:
    steep, flatter = decaying(512, 256, power=1.5), flat(512, 256)
    loud = flatter * torch.where(torch.arange(512) % 16 == 0, 5.0, 1.0)[:, None]
    needs = [Need.of(x, 8, Price()) for x in (steep, flatter, loud)]
    assert needs[0].per_batch < needs[1].per_batch < needs[2].per_batch
    assert Need.of(flatter, 8, Price(token=8)).per_batch == pytest.approx(needs[1].per_batch / 2)
    assert [Need.of(flatter, 8, Price(product=p)).share for p in (0.25, 0.5)] == pytest.approx([1.2, 0.6])
    assert Need(1e9, 0.5).count(200, 4, least=32) == 100
    assert Need(1e9, 0.1).count(200, 4, least=32) == 32  # never fewer than other layers
    assert Need(400, 1.0).count(200, 4, least=32) == 100


def test_too_few_or_broken_tokens_ask_for_nothing() -> None:
    assert Need.of(flat(20, 256), 8, Price()) == Need()
    assert Need.of(torch.full((100, 64), float("nan")), 8, Price()).per_batch == 0
    assert Need.of(torch.ones(100, 64), 8, Price()).per_batch == 0
