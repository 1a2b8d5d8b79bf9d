"""AdaLoRA in a Trainer."""

from __future__ import annotations

from typing import Any

import lightning as L

from eva_lightning.adalora_schedule import ADALORA_SCHEDULE, AdaLoRASchedule, start_rank
from eva_lightning.adapters.adalora import RankAllocation
from eva_lightning.callback_base import Callback
from eva_lightning.methods import lora
from eva_lightning.methods.apply import AdapterOptions, Where


def prepare(module: L.LightningModule, options: AdapterOptions, where: Where) -> list[L.Callback]:
    """Adapters of four more ranks than are asked for, and the callback that prunes them."""
    # the number of steps is known, and set, when fit starts
    schedule = {"target_r": options.rank, "total_step": 1}
    callbacks = lora.prepare(module, options, where, r=start_rank(options.rank), adalora=schedule)
    return [*callbacks, AdaLoRACallback(options.adalora)]


class AdaLoRACallback(Callback):
    """AdaLoRA's schedule in a Trainer: ranks shrink from r + 4 to r where gradients show that they matter least.

    Warm-up, the cubic schedule and the orthogonality penalty are laid over the number of optimizer steps of this
    ``fit``.

    Args:
        schedule: When ranks are taken away; by default the first tenth of training keeps all components, after half of
            it the choice is final, and the penalty has weight 0.5, as in PEFT.

    Attributes:
        allocation: What is being allocated, from ``on_fit_start``.
    """

    def __init__(self, schedule: AdaLoRASchedule = ADALORA_SCHEDULE) -> None:
        self.schedule = schedule
        self.allocation: RankAllocation | None = None
        self._restored: dict[str, Any] = {}
        self._last_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay the schedule over the steps of this ``fit``."""
        self.allocation = RankAllocation(pl_module, trainer.estimated_stepping_batches, self.schedule)
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
