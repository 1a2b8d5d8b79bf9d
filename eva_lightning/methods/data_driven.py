"""DataDrivenStart: CorDA and LoRA-GA in a Trainer, started from the first training minibatches."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from eva_lightning.adapters import AdapterLayer, find_adapters, refuse_trained
from eva_lightning.adapters.base_weight_init import corda, lora_ga, put_back_on_failure, start_at
from eva_lightning.adapters.registry import disabled
from eva_lightning.batch_forward import MaskFn
from eva_lightning.callback_base import Callback
from eva_lightning.done import mark_done, without_mark
from eva_lightning.errors import InputError, check_number
from eva_lightning.methods import lora
from eva_lightning.methods.apply import AdapterOptions, Where
from eva_lightning.methods.registry import METHODS
from eva_lightning.methods.training_statistics import Mean, input_moments, weight_gradients
from eva_lightning.namespaces import lightning_classes
from eva_lightning.side_effects import isolated_rng, snapshot_rng
from eva_lightning.summary import counting_progress
from eva_lightning.trainer_state import rebuild_optimizers, refresh_averages
from eva_lightning.training_batches import set_up_loader, training_batches

Kind = Literal["corda", "lora-ga"]

#: Minibatches to read by default. CorDA's paper takes 256 samples, PEFT's example of LoRA-GA 128: at the
#: VTAB protocol's 64 images a minibatch, these.
DEFAULT_BATCHES: dict[Kind, int] = {"corda": 4, "lora-ga": 2}

_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def prepare(module: pl.LightningModule, options: AdapterOptions, where: Where, kind: Kind) -> list[pl.Callback]:
    """Adapters that are plain LoRA, and the callback that starts them."""
    start = DataDrivenStart(kind, options.max_batches, where.mask_fn, options.seed)
    return [*lora.prepare(module, options, where, initialisation=kind), start]


class DataDrivenStart(Callback):
    """Gives adapters the start of CorDA or LoRA-GA before the first training step.

    The module has adapters made by ``inject(module, initialisation=kind)``, which are plain LoRA up to then. At the
    start of ``fit`` some training minibatches go through the model (CorDA: second moments of every layer's inputs;
    LoRA-GA: gradients of the module's own training loss), PEFT turns these statistics into A and B, and
    ``scaling * B A`` is subtracted from the base weight, so that the function stays. Statistics are averaged over the
    processes of a distributed job.

    Batch order, random state, train/eval flags, buffers, metrics and logs stay as they would be without it. A second
    ``fit`` of the same module, or one resumed from a checkpoint, keeps its adapters. If anything fails or is
    interrupted the module is left as it was.

    Args:
        kind: ``"corda"`` or ``"lora-ga"``.
        max_batches: Most minibatches to read; None for `DEFAULT_BATCHES`.
        mask_fn: ``mask_fn(batch)``: True for the tokens that count; CorDA only, as a loss masks its tokens itself.
        seed: Of LoRA-GA's randomized SVD.
        verbose: Print what was done, in one line.

    Raises:
        InputError: `max_batches` is below 1; in ``setup``: a strategy that shards weights.
    """

    def __init__(
        self,
        kind: Kind,
        max_batches: int | None = None,
        mask_fn: MaskFn | None = None,
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        if max_batches is not None:
            check_number("max_batches", max_batches, at_least=1, whole=True)
        self.kind = kind
        self.max_batches = DEFAULT_BATCHES[kind] if max_batches is None else max_batches
        self.mask_fn = mask_fn
        self.seed = seed
        self.verbose = verbose

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage == "fit" and isinstance(trainer.strategy, lightning_classes("strategies", *_SHARDED)):
            raise InputError(
                f"{METHODS[self.kind].label} decomposes whole base weights, which {type(trainer.strategy).__name__} "
                "shards: train it on one device or with DDP"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the minibatches and write A, B and the base weights."""
        adapters = find_adapters(pl_module)
        if not adapters:
            raise InputError(
                f"{type(pl_module).__name__} has no adapters to start: put them in with "
                f"inject(module, initialisation={self.kind!r})"
            )
        layers = without_mark(adapters)
        if not layers or trainer.limit_train_batches == 0:
            return
        refuse_trained(layers)
        started = time.perf_counter()
        restore_rng = snapshot_rng()
        try:
            # this draws random numbers too, those that training would otherwise draw here a moment later
            limit = int(min(self.max_batches, set_up_loader(trainer)))
            with isolated_rng():
                means = self._average(trainer, self._statistics(trainer, pl_module, layers, limit))
                self._write(trainer, layers, means)
        except BaseException:
            restore_rng()
            raise
        mark_done(layers.values(), "initialised")
        if trainer.world_size > 1:
            rebuild_optimizers(trainer, pl_module)  # which sends the weights of the first process to the others
        refresh_averages(trainer, pl_module)
        if self.verbose:
            untouched = f"; {len(layers) - len(means)} layers did not run and stay as they are"
            rank_zero_info(
                f"{METHODS[self.kind].label}: {len(means)} adapters started from {limit} minibatches in "
                f"{time.perf_counter() - started:.1f} s{untouched if len(means) < len(layers) else ''}"
            )

    def leave(self, pl_module: pl.LightningModule) -> dict[str, Any]:
        """In a process started by a strategy such as ``ddp_spawn``, after ``fit``: nothing but the weights."""
        return {}

    def come_home(self, pl_module: pl.LightningModule, luggage: Mapping[str, Any]) -> None:
        """In that parent process: its adapters, which are about to get the child's weights, are set."""
        mark_done(find_adapters(pl_module).values(), "restored")

    def _statistics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, layers: Mapping[str, AdapterLayer], limit: int
    ) -> dict[str, Mean]:
        batches = training_batches(trainer, limit)
        context = trainer.precision_plugin.forward_context
        description = f"{METHODS[self.kind].label}: reading minibatches"
        with disabled(layers.values()), counting_progress(trainer, description, limit) as progress:
            if self.kind == "lora-ga":
                weights: dict[str, Any] = {name: layer.base.weight for name, layer in layers.items()}
                return weight_gradients(pl_module, batches, weights, context=context, progress=progress)
            bases = {name: layer.base for name, layer in layers.items()}
            return input_moments(pl_module, batches, bases, mask_fn=self.mask_fn, context=context, progress=progress)

    @staticmethod
    def _average(trainer: pl.Trainer, sums: Mapping[str, Mean]) -> dict[str, torch.Tensor]:
        """Means over all processes; without layers that none of them ran, or that saw nothing but zeros."""
        means: dict[str, torch.Tensor] = {}
        for name, mean in sums.items():
            total: Any = trainer.strategy.reduce(mean.total, reduce_op="sum")
            count: Any = trainer.strategy.reduce(torch.tensor(float(mean.count), device=total.device), reduce_op="sum")
            if count > 0 and bool(total.any()):
                means[name] = total / count
        return means

    def _write(
        self, trainer: pl.Trainer, layers: Mapping[str, AdapterLayer], means: Mapping[str, torch.Tensor]
    ) -> None:
        make = corda if self.kind == "corda" else lora_ga
        chosen = {name: layers[name] for name in means}
        description = f"{METHODS[self.kind].label}: decomposing weights"
        with (
            counting_progress(trainer, description, len(chosen)) as progress,
            torch.autocast(trainer.strategy.root_device.type, enabled=False),
            put_back_on_failure(chosen.values()),
        ):
            for name, layer in chosen.items():
                torch.manual_seed(self.seed)  # for each: what a layer gets does not depend on the others
                start_at(layer, *make(layer, means[name]))
                progress()
