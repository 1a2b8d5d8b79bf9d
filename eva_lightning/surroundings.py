"""Where a module is initialised: what gives its minibatches and has to know of new parameters, a Trainer or nobody."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import lightning.pytorch as pl

from eva_lightning.summary import shows_progress
from eva_lightning.trainer_state import rebuild_optimizers, refresh_averages, refuses_unused_parameters
from eva_lightning.training_batches import set_up_loader, training_batches


class Surroundings(Protocol):
    """What :class:`eva_lightning.initialiser.Initialiser` needs to know beside the module.

    Attributes:
        world_size: Processes that stream together.
        shows_progress: Draw a progress bar in this process.
        refuses_unused_parameters: Training stops at parameters without a gradient.
    """

    @property
    def world_size(self) -> int: ...

    @property
    def shows_progress(self) -> bool: ...

    @property
    def refuses_unused_parameters(self) -> bool: ...

    def set_up(self) -> int | float:
        """Make the data ready; returns the minibatches there are, infinity where that is not known."""

    def batches(self, limit: int) -> Iterable[Any]:
        """The first `limit` minibatches, from the start at each call, where the module is; no side effects."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """To enter around a forward pass."""

    def renew(self, replaced: bool) -> None:
        """The adapters are set, and have new parameters if `replaced`."""


@dataclass(frozen=True)
class InTrainer:
    """A module that a Trainer is about to fit.

    Attributes:
        before_strategy: The strategy has not set the module up yet: there are no optimizers.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    before_strategy: bool

    @property
    def world_size(self) -> int:
        return self.trainer.world_size

    @property
    def shows_progress(self) -> bool:
        return shows_progress(self.trainer)

    @property
    def refuses_unused_parameters(self) -> bool:
        return refuses_unused_parameters(self.trainer)

    def set_up(self) -> int | float:
        return set_up_loader(self.trainer)

    def batches(self, limit: int) -> Iterable[Any]:
        return training_batches(self.trainer, limit)

    def forward_context(self) -> AbstractContextManager[Any]:
        if self.before_strategy:
            return nullcontext()
        context: AbstractContextManager[Any] = self.trainer.precision_plugin.forward_context()
        return context

    def renew(self, replaced: bool) -> None:
        """Give optimizers and averages of the weights the new parameters."""
        if replaced and not self.before_strategy:
            rebuild_optimizers(self.trainer, self.module)
        refresh_averages(self.trainer, self.module)
