from __future__ import annotations

from dataclasses import fields, replace

import pytest

from eva_lightning.vision.protocol import AUTHORS_CODE, PAPER, PROTOCOLS, explain, get_protocol, module_options


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


def test_authors_values() -> None:
    """As read in pipelines/peft/*.yaml and peft_trainer.py of BenediktAlkin/vtab1k-pytorch, commit 007fd7b."""
    rules = AUTHORS_CODE
    assert rules.batch_size == {"fft": 32, "lora": 32, "dora": 32, "eva-dora": 32}
    assert rules.alpha == {"adalora": 8, "pissa": 8, "olora": 8}
    assert set(rules.target_modules) == {"adalora", "pissa", "olora"}
    assert rules.exclude == {"eva-dora": ("blocks.0.attn.qkv",)}
    schedule = rules.adalora
    assert (schedule.warm_up, schedule.final, schedule.every, schedule.penalty) == (0.1, 0.2, 10, 0.1)
    assert not schedule.penalises
    assert (rules.head_init, rules.dora_by_column) == ("truncated", True)


@pytest.mark.parametrize(
    ("method", "alpha", "batch", "layers", "words"),
    [
        ("eva", None, None, False, None),
        ("lora", None, None, False, "batch 32 and the learning rate times 2"),
        ("lora", None, 8, False, "batch 8 and the learning rate as given, instead of 32"),
        ("pissa", 1.0, None, True, "alpha 1 as given, instead of 8; layers as given, instead of qkv.q"),
        ("eva-dora", None, None, False, "none on blocks.0.attn.qkv; a frozen magnitude and norms per input column"),
        ("adalora", None, None, False, "tinit 0.1 T, tfinal 0.2 T, deltaT 10, orthogonality weight 0.1"),
    ],
)
def test_what_a_protocol_means_is_said(
    method: str, alpha: float | None, batch: int | None, layers: bool, words: str | None
) -> None:
    assert explain(PAPER, method, 1.0, 64, layers) == []
    said = explain(AUTHORS_CODE, method, alpha, batch, layers)
    assert (said == []) == (words is None)
    assert words is None or words in said[0]
