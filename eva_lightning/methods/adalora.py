"""AdaLoRA in a Trainer."""

from __future__ import annotations

from typing import Any

import lightning as L

from eva_lightning.adapters.adalora import RankAllocation, start_rank
from eva_lightning.callback_base import Callback
from eva_lightning.methods import lora
from eva_lightning.methods.apply import AdapterOptions, Where


def prepare(module: L.LightningModule, options: AdapterOptions, where: Where) -> list[L.Callback]:
    """Adapters of 1.5 times the rank, and the callback that prunes them."""
    # the number of steps is known, and set, when fit starts
    schedule = {"target_r": options.rank, "total_step": 1}
    callbacks = lora.prepare(module, options, where, r=start_rank(options.rank), adalora=schedule)
    return [*callbacks, AdaLoRACallback()]


class AdaLoRACallback(Callback):
    """AdaLoRA's schedule in a Trainer: ranks shrink from 1.5 r to r where gradients show that they matter least.

    Warm-up, the cubic schedule and the orthogonality penalty (weight 0.5, as in PEFT) are laid over the number of
    optimizer steps of this ``fit``: the first tenth keeps all components, after half of them the choice is final.

    Attributes:
        allocation: What is being allocated, from ``on_fit_start``.
    """

    def __init__(self) -> None:
        self.allocation: RankAllocation | None = None
        self._restored: dict[str, Any] = {}
        self._last_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay the schedule over the steps of this ``fit``."""
        self.allocation = RankAllocation(pl_module, trainer.estimated_stepping_batches)
        self._last_step = trainer.global_step
        if self._restored:
            self.allocation.load_state_dict(self._restored)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the penalty's gradient, once per optimizer step."""
        assert self.allocation is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        self.allocation.add_penalty_gradient(scale / trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Allocate after an optimizer step, while its gradients are still there."""
        if self.allocation is not None and trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            self.allocation.step(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Scores and masks, so that a resumed run allocates as an uninterrupted one."""
        return self._restored if self.allocation is None else self.allocation.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them for ``on_fit_start``."""
        self._restored = dict(state_dict)
