"""The streaming options check themselves, with the sentences that every other place uses too."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from eva_lightning import StreamingOptions
from eva_lightning.errors import InputError
from eva_lightning.svd import make_engine, make_stopping_rule


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, "tau must be a number above 0 and of at most 1, got 0.0"),
        ({"tau": 1.5}, ValueError, "tau must be a number above 0 and of at most 1, got 1.5"),
        ({"delta": 0}, ValueError, "delta must be a number above 0 and of at most 1, got 0"),
        ({"delta": 2}, ValueError, "delta must be a number above 0 and of at most 1, got 2"),
        ({"max_batches": 0}, ValueError, "max_batches must be a whole number of at least 1, got 0"),
        ({"max_batches": 2.0}, TypeError, "max_batches must be a whole number of at least 1, got 2.0"),
        ({"tokens_per_sample": 0}, ValueError, "tokens_per_sample must be a whole number of at least 1, got 0"),
        ({"tokens_per_sample": "all"}, TypeError, "tokens_per_sample must be a whole number of at least 1, got 'all'"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be a whole number of at least 1, got 0"),
        ({"algorithm": "exact"}, ValueError, "unknown algorithm 'exact'"),
        (
            {"algorithm": "paper", "max_batches": 0},
            ValueError,
            "max_batches must be a whole number of at least 1, got 0",
        ),
        ({"stopping": "cos"}, ValueError, "unknown stopping 'cos': did you mean cosine?"),
    ],
)
def test_out_of_range(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        StreamingOptions(**options)
    assert isinstance(caught.value, InputError)


def test_one_sentence_for_one_mistake() -> None:
    sentence = "unknown engine 'exakt': did you mean exact?"
    with pytest.raises(InputError, match=re.escape(sentence)):
        StreamingOptions(engine="exakt")
    with pytest.raises(InputError, match=re.escape(sentence)):
        make_engine("exakt", 8, 2)
    sentence = "tau must be a number above 0 and of at most 1, got 2"
    with pytest.raises(InputError, match=re.escape(sentence)):
        make_stopping_rule("cosine", tau=2)


def test_they_cannot_change_after_the_check() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        StreamingOptions().tau = 2.0  # type: ignore[misc]
