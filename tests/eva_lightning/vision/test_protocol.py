from __future__ import annotations

from dataclasses import fields, replace

import pytest

from eva_lightning.vision.protocol import AUTHORS_CODE, PAPER, PROTOCOLS, get_protocol, module_options


def test_the_two_protocols_differ_in_every_field() -> None:
    assert PROTOCOLS == {"paper": PAPER, "authors-code": AUTHORS_CODE}
    for field in fields(PAPER):
        assert getattr(PAPER, field.name) != getattr(AUTHORS_CODE, field.name), field.name


@pytest.mark.parametrize(("images", "paper", "authors"), [(800, 13, 12), (1000, 16, 15), (64, 1, 1)])
def test_steps_per_epoch_at_batch_64(images: int, paper: int, authors: int) -> None:
    assert PAPER.batches_per_epoch(images, 64) == paper
    assert AUTHORS_CODE.batches_per_epoch(images, 64) == authors


def test_dropping_the_only_batch_is_refused() -> None:
    assert PAPER.batches_per_epoch(10, 64) == 1
    with pytest.raises(ValueError, match="10 training images are fewer than batch_size 64: choose a smaller"):
        AUTHORS_CODE.batches_per_epoch(10, 64)


def test_unknown_protocol_suggests() -> None:
    with pytest.raises(ValueError, match="unknown protocol 'author-code': did you mean authors-code"):
        get_protocol("author-code")


def test_a_protocol_of_ones_own() -> None:
    mixed = replace(PAPER, split_fused=True)
    assert module_options(mixed) == {
        "split_fused": True, "schedule": "cosine", "decay_matrices_only": False, "head_init": "normal",
    }  # fmt: skip
