"""DataDrivenStart: CorDA, LoRA-GA and the like in a Trainer, started from the first training minibatches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch

from eva_lightning.adapters import AdapterLayer, find_adapters, refuse_trained
from eva_lightning.adapters.base_weight_init import (
    INITIALISATIONS,
    put_back_on_failure,
    resize,
    start_at,
    takes_from_base,
)
from eva_lightning.adapters.registry import disabled, restored_on_failure, sync_configs
from eva_lightning.batch_forward import MaskFn
from eva_lightning.callback_base import Callback
from eva_lightning.done import mark_done, without_mark
from eva_lightning.errors import InputError, check_choice, check_number
from eva_lightning.methods import lora
from eva_lightning.methods.apply import AdapterOptions, Where
from eva_lightning.methods.registry import METHODS
from eva_lightning.methods.start_inputs import Given, Means
from eva_lightning.methods.starts import KINDS
from eva_lightning.methods.training_statistics import Statistic, Sums, layer_statistics
from eva_lightning.namespaces import lightning_classes
from eva_lightning.output import say
from eva_lightning.side_effects import isolated_rng, snapshot_rng
from eva_lightning.summary import counting_progress, shows_progress
from eva_lightning.trainer_state import rebuild_optimizers, refresh_averages
from eva_lightning.training_batches import batches_of, delivered, set_up_loader, training_batches, training_samples

_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def prepare(module: pl.LightningModule, options: AdapterOptions, where: Where, kind: str) -> list[pl.Callback]:
    """Adapters that are plain LoRA, and the callback that starts them."""
    knowledge = options.knowledge if KINDS[kind].knowledge else None
    start = DataDrivenStart(
        kind,
        options.max_batches,
        where.mask_fn,
        options.seed,
        options.keep_function,
        knowledge,
        rho=options.rho,
    )
    keep = {"keep_function": True} if options.keep_function else {}
    return [*lora.prepare(module, options, where, initialisation=kind, **keep, **KINDS[kind].injection), start]


class DataDrivenStart(Callback):
    """Gives adapters a start from data, one of :data:`eva_lightning.methods.starts.KINDS`, before training.

    The module has adapters made by ``inject(module, initialisation=kind)``, which are plain LoRA up to then. At the
    start of ``fit`` some training minibatches go through the model, which gives statistics of every layer
    (:func:`eva_lightning.methods.training_statistics.layer_statistics`), averaged over the processes of a distributed
    job. From them come A, B and, for some kinds, ranks. ``scaling * B A`` is subtracted from the base weight, so that
    the function stays, unless the kind moves it.

    Batch order, random state, train/eval flags, buffers, metrics and logs stay as they would be without it. A second
    ``fit`` of the same module, or one resumed from a checkpoint, keeps its adapters. If anything fails or is
    interrupted the module is left as it was.

    Args:
        kind: A name in ``KINDS``.
        max_batches: Most minibatches to read; None for the kind's default.
        mask_fn: ``mask_fn(batch)``: True for the tokens that count in statistics of inputs and outputs; gradients of
            weights are those of the loss, which masks its tokens itself.
        seed: Of random parts.
        keep_function: Subtract ``scaling * B A`` from the base weight for kinds that would move the function, too; as
            given to ``inject``.
        knowledge: Minibatches to read instead of training minibatches, anything that can be iterated over; every
            process of a distributed job reads the same.
        verbose: Print what was done, in one line.
        rho: Largest rank over mean rank, for kinds that redistribute ranks by it.

    Raises:
        InputError: Unknown kind, or `max_batches` is below 1; in ``setup``: a strategy that shards weights.
    """

    def __init__(
        self,
        kind: str,
        max_batches: int | None = None,
        mask_fn: MaskFn | None = None,
        seed: int = 0,
        keep_function: bool = False,
        knowledge: Iterable[Any] | None = None,
        verbose: bool = True,
        rho: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        if max_batches is not None:
            check_number("max_batches", max_batches, at_least=1, whole=True)
        self.kind = kind
        self.max_batches = KINDS[kind].batches if max_batches is None else max_batches
        self.mask_fn = mask_fn
        self.seed = seed
        self.keep_function = keep_function
        self.knowledge = knowledge
        self.verbose = verbose
        self.rho = rho

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
            limit = set_up_loader(trainer)
            limit = self.max_batches if self.knowledge is not None else int(min(self.max_batches, limit))
            samples = training_samples(trainer) if KINDS[self.kind].needs_training_size else 0
            with isolated_rng():
                means = self._average(trainer, self._statistics(trainer, pl_module, layers, limit))
                per_step = trainer.accumulate_grad_batches * trainer.world_size
                given = Given(self.seed, samples, per_step, self.rho)
                resized = self._write(trainer, pl_module, layers, means, given)
        except BaseException:
            restore_rng()
            raise
        mark_done(layers.values(), "initialised")
        if trainer.world_size > 1 or resized:
            rebuild_optimizers(trainer, pl_module)  # which sends the weights of the first process to the others
        refresh_averages(trainer, pl_module)
        if self.verbose:
            self._report(layers, len(means), limit, time.perf_counter() - started)

    def _report(self, layers: Mapping[str, AdapterLayer], started: int, minibatches: int, seconds: float) -> None:
        label, of = METHODS[self.kind].label, "" if self.knowledge is None else " of the knowledge data"
        line = f"{label}: {started} adapters started from {minibatches} minibatches{of} in {seconds:.1f} s"
        if started < len(layers):
            line += f"; {len(layers) - started} layers did not run and stay as they are"
        if KINDS[self.kind].ranks is not None:
            ranks = [layer.rank for layer in layers.values()]
            line += f"; ranks {min(ranks)} to {max(ranks)}, sum {sum(ranks)}"
        if started and INITIALISATIONS[self.kind].product == "added":
            line += (
                "; the function is as before (keep_function)"
                if self.keep_function
                else "; the function has moved by scaling * B A (keep_function=True keeps it)"
            )
        say(line)

    def leave(self, pl_module: pl.LightningModule) -> dict[str, Any]:
        """In a process started by a strategy such as ``ddp_spawn``, after ``fit``: ranks and alphas, if it set any."""
        layers = {} if KINDS[self.kind].ranks is None else find_adapters(pl_module)
        return {"adapters": {name: [layer.rank, layer.alpha] for name, layer in layers.items()}}

    def come_home(self, pl_module: pl.LightningModule, luggage: Mapping[str, Any]) -> None:
        """In that parent process: its adapters, which are about to get the child's weights, are set."""
        layers = find_adapters(pl_module)
        for name, (rank, alpha) in luggage["adapters"].items():
            if layers[name].rank != rank:
                resize(layers[name], rank, alpha)
        sync_configs(pl_module)
        mark_done(layers.values(), "restored")

    def _statistics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, layers: Mapping[str, AdapterLayer], limit: int
    ) -> Sums:
        description = f"{METHODS[self.kind].label}: reading minibatches"
        given = self.knowledge
        if given is None:
            batches = training_batches(trainer, limit)
        else:
            batches = batches_of(given, limit, partial(delivered, trainer))
        with disabled(layers.values()), counting_progress(shows_progress(trainer), description, limit) as progress:
            return layer_statistics(
                pl_module,
                batches,
                {name: layer.base for name, layer in layers.items()},
                KINDS[self.kind].needs,
                mask_fn=self.mask_fn,
                context=trainer.precision_plugin.forward_context,
                progress=progress,
                dtype=KINDS[self.kind].dtype,
            )

    @staticmethod
    def _average(trainer: pl.Trainer, sums: Sums) -> dict[str, dict[Statistic, torch.Tensor]]:
        """Means over all processes; without layers that none of them ran, or that saw nothing but zeros."""
        means: dict[str, dict[Statistic, torch.Tensor]] = {}
        for name, of_layer in sums.items():
            found: dict[Statistic, torch.Tensor] = {}
            for statistic, mean in of_layer.items():
                total: Any = trainer.strategy.reduce(mean.total, reduce_op="sum")
                count: Any = torch.tensor(mean.count, device=total.device)
                count = trainer.strategy.reduce(count, reduce_op="sum")
                if count > 0 and bool(total.any()):
                    found[statistic] = total / count
            if len(found) == len(of_layer):
                means[name] = found
        return means

    def _write(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: Mapping[str, AdapterLayer],
        means: Mapping[str, Means],
        given: Given,
    ) -> bool:
        """A, B and ranks into the layers that have statistics; returns whether any rank changed."""
        kind = KINDS[self.kind]
        take = takes_from_base(self.kind, self.keep_function)
        chosen = {name: layers[name] for name in means}
        description = f"{METHODS[self.kind].label}: decomposing weights"
        with (
            counting_progress(shows_progress(trainer), description, len(chosen)) as progress,
            torch.autocast(trainer.strategy.root_device.type, enabled=False),
            put_back_on_failure(chosen.values(), take),
            restored_on_failure(pl_module),
        ):
            ranks = {} if kind.ranks is None else kind.ranks(chosen, means, given)
            changed = {name: rank for name, rank in ranks.items() if rank != chosen[name].rank}
            for name, layer in chosen.items():
                if name in changed:
                    resize(layer, changed[name])
                torch.manual_seed(self.seed)  # for each: what a layer gets does not depend on the others
                a, b = kind.make(layer, means[name], given)
                if b is None:
                    layer.write(a)
                else:
                    start_at(layer, a, b, take)
                progress()
            if changed:
                sync_configs(pl_module)
        return bool(changed)
