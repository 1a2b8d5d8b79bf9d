"""A small network of tokens for every method, and quiet ways to fit it."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.optim.parameter_groups import Multiplier, parameter_groups
from tests.modules import IN, Classifier, TokenNet, loader, trainer


class Heeding(Classifier):
    """A classifier with all that some method asks of a module: rates by parameter, a head that trains alone."""

    lr_multipliers: Multiplier | None = None

    def train_only_head(self) -> None:
        self.requires_grad_(False)
        self.net.head.requires_grad_(True)  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        multipliers = [] if self.lr_multipliers is None else [self.lr_multipliers]
        return torch.optim.AdamW(parameter_groups(self.named_parameters(), self.lr, 0.01, multipliers=multipliers))


def build(**kwargs: Any) -> Classifier:
    torch.manual_seed(0)
    return Heeding(TokenNet(), **kwargs)


def prepared(method: str, options: AdapterOptions, **kwargs: Any) -> tuple[Classifier, list[pl.Callback]]:
    """A module made ready for `method`: queries, keys, values and two more layers adapted, the embedding frozen."""
    module = build(**kwargs)
    torch.manual_seed(1)
    return module, apply_method(method, module, options, head="net.head", exclude=["net.embed"])


def inputs() -> Tensor:
    return torch.randn(5, 4, IN, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def outputs(module: Any) -> Tensor:
    """Logits of `inputs` in eval mode; the modes stay."""
    modes = [(m, m.training) for m in module.modules()]
    found: Tensor = module.eval()(inputs())
    for m, mode in modes:
        m.training = mode
    return found


def fit(module: Classifier, callbacks: list[pl.Callback], data: Any = None, **kwargs: Any) -> pl.Trainer:
    checkpoint = kwargs.pop("ckpt_path", None)
    run = trainer(*callbacks, **{"max_epochs": 2, **kwargs})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        run.fit(module, loader(tokens=4) if data is None else data, ckpt_path=checkpoint)
    return run
