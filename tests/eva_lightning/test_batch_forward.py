"""Which forward pass is run on which batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from eva_lightning.batch_forward import run_forward


class Probe(nn.Module):
    """Remembers what it was called with."""

    def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        self.called = (x, mask)
        return x


class Keywords(nn.Module):
    def forward(self, **kwargs: Any) -> None:
        self.called = kwargs


class Pair(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X, 1),
        [X, 1],
        ((X, "path"), 1),
        Pair(X, torch.zeros(2)),
        {"x": X, "label": 1},
        [{"x": X}, 1],
        {"image": X, "id": 3},
    ],
    ids=lambda b: type(b).__name__,
)
def test_inputs_are_found(batch: Any) -> None:
    probe = Probe()
    run_forward(probe, batch)
    assert probe.called[0] is X


def test_mapping_passes_all_arguments_forward_names() -> None:
    probe = Probe()
    run_forward(probe, {"x": X, "mask": 5, "label": 1})
    assert probe.called == (X, 5)


def test_mapping_goes_whole_into_keyword_arguments() -> None:
    probe = Keywords()
    run_forward(probe, {"a": 1, "b": 2})
    assert probe.called == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"mask": 1}, r"forward also needs \['x'\]"),
        ({"a": X, "b": X}, r"keys \['a', 'b'\], none of which is an argument of forward"),
        ("text", "a batch of type str"),
        ([], "a batch of type list"),
    ],
)
def test_what_cannot_be_told_is_said(batch: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"cannot tell how to run Probe on .*{message}.*pass forward_fn="):
        run_forward(Probe(), batch)


def test_manual_optimisation_without_forward_is_refused() -> None:
    class Manual(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any) -> None:
            raise AssertionError("would have trained")

    with pytest.raises(TypeError, match="manual optimisation and no forward method"):
        run_forward(Manual(), X)


def test_forward_that_takes_the_batch_gets_it() -> None:
    class Whole(nn.Module):
        def forward(self, batch: Any) -> Any:
            self.called = batch
            return batch[0]

    module, batch = Whole(), (X, torch.zeros(2))
    run_forward(module, batch)
    assert module.called is batch


def test_named_tuple_with_forwards_names_is_a_mapping() -> None:
    class Masked(NamedTuple):
        mask: int
        x: torch.Tensor

    probe = Probe()
    run_forward(probe, Masked(mask=7, x=X))
    assert probe.called == (X, 7)


def test_keyword_arguments_receive_the_mask_beside_named_inputs() -> None:
    class Wrapper(nn.Module):
        def forward(self, x: torch.Tensor, **kwargs: Any) -> None:
            self.called = kwargs

    module = Wrapper()
    run_forward(module, {"x": X, "attention_mask": 1})
    assert module.called == {"attention_mask": 1}


def test_forward_with_two_inputs_is_not_guessed() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, z: torch.Tensor) -> None:
            raise AssertionError("guessed")

    with pytest.raises(TypeError, match=r"on a tuple of 2: forward needs \['x', 'z'\].*pass forward_fn="):
        run_forward(Two(), (X, X))


def test_errors_of_a_guessed_forward_mention_forward_fn() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit") as info:
        run_forward(Broken(), (X, 1))
    assert any("forward_fn=" in note for note in getattr(info.value, "__notes__", ["forward_fn="]))
