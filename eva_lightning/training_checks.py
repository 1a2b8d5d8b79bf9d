"""Adapters that do not train, said once in a fit, as soon as it can be known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from eva_lightning.adapters import AdapterLayer, find_adapters
from eva_lightning.divergence import DivergenceCallback
from eva_lightning.output import warn
from eva_lightning.trainer_state import refuses_unused_parameters

_PATIENCE = 8
"""Batches in which a layer may get its first gradient: experts, dropped layers and alternating losses skip some."""


def warn_of_layers_not_run(names: Collection[str], total: int, *, removed: bool, stops: bool) -> None:
    """Say that layers did not run on the streamed minibatches, and what became of their adapters.

    Args:
        names: Of those layers.
        total: Of all that were to be initialised.
        removed: Their adapters were taken out.
        stops: Training will stop at parameters without gradient.
    """
    fate = "keep a random A, and DDP will stop where they get no gradient" if stops else "keep a random A"
    if removed:
        fate = "were removed, as DDP would stop at parameters without gradient"
    warn(
        f"{_some(names, total)} did not run on the minibatches that EVA streamed: their adapters {fate}. Where a model "
        "reads a layer's weight instead of calling it (BEiT's and Swin V2's qkv), an adapter has no effect: leave such "
        "layers out with exclude=[...]; where forward_fn or the eval mode skips layers, give a forward_fn that runs "
        "them"
    )


def warn_of_weights_read(names: Collection[str], total: int) -> None:
    """Say that the model also reads the weights of adapted layers."""
    warn(
        f"{_some(names, total)} have a weight that the model also reads elsewhere, as a tied decoder does: the adapter "
        "has no effect there, and will not be merged into the weight unless an example shows that outputs stay; leave "
        "such layers out with exclude=[...], or keep them as LoRA layers"
    )


class TrainingChecks:
    """Everything that is looked at while one ``fit`` trains: the adapters in its first batches, the loss in all."""

    def __init__(self) -> None:
        self._adapters: AdapterChecks | None = None
        self._divergence = DivergenceCallback()

    def start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        passed_over: Collection[str],
        found_heads: Collection[str] = (),
    ) -> None:
        """Before the first batch; see :class:`AdapterChecks`."""
        self.close()
        self._adapters = AdapterChecks(trainer, pl_module, passed_over, found_heads)

    def after_backward(self) -> None:
        """Note that gradients were computed."""
        if self._adapters is not None:
            self._adapters.after_backward()

    def after_batch(self, trainer: pl.Trainer, outputs: Any) -> None:
        """Look at gradients and loss; ``outputs`` is what ``training_step`` returned."""
        if self._adapters is not None and self._adapters.after_batch():
            self._adapters = None
        if not _has_own_watch(trainer):
            self._divergence.look_at_loss(trainer, outputs)

    def after_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is known by now, and look at the parameters."""
        if self._adapters is not None:
            self._adapters.conclude()
            self._adapters = None
        if not _has_own_watch(trainer):
            self._divergence.on_train_epoch_end(trainer, pl_module)

    def after_error(self, error: BaseException) -> None:
        """Explain an error of the first batch that speaks of gradients."""
        if self._adapters is not None and isinstance(error, RuntimeError) and "grad" in str(error):
            self._adapters.conclude()

    def close(self) -> None:
        """Take the hooks off."""
        if self._adapters is not None:
            self._adapters.close()
            self._adapters = None


def _has_own_watch(trainer: pl.Trainer) -> bool:
    return any(isinstance(callback, DivergenceCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]


class AdapterChecks:
    """Watches the first batches of one ``fit``; healthy adapters cost a hook each until their first gradient.

    Args:
        trainer, pl_module: About to train.
        passed_over: Layers that something was said about already.
        found_heads: Output layers that nobody named: a guess.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        passed_over: Collection[str] = (),
        found_heads: Collection[str] = (),
    ) -> None:
        self._trainer = trainer
        layers = find_adapters(pl_module)
        self._total = len(layers)
        self._open = {name: layer for name, layer in layers.items() if name not in passed_over}
        self._batches = 0
        self._ran_backward = False
        self._check_flags()
        self._check_optimizers(pl_module)
        self._handles = [_first_gradient(layer, self._open, name) for name, layer in self._open.items()]
        heads = {name: list(pl_module.get_submodule(name).parameters()) for name in found_heads}
        self._heads = {n: own for n, own in heads.items() if any(p.requires_grad for p in own)}
        for name, own in self._heads.items():
            self._handles += [_when_graded(p, self._heads, name) for p in own if p.requires_grad]

    def after_backward(self) -> None:
        """Note that gradients were computed."""
        self._ran_backward = True

    def after_batch(self) -> bool:
        """Say which adapters got no gradient, if that can be known by now; returns whether it was."""
        self._batches += 1
        for name in [n for n, layer in self._open.items() if any(p.grad is not None for p in (layer.a, layer.b))]:
            del self._open[name]
        for name in [n for n, own in self._heads.items() if any(p.grad is not None for p in own)]:
            del self._heads[name]
        none_yet = len(self._open) == self._total and self._ran_backward
        # the second forward of DDP ends with Lightning's error on unused parameters
        stops = refuses_unused_parameters(self._trainer)
        if not (self._open or self._heads) or none_yet or stops or self._batches >= _PATIENCE:
            self.conclude()
            return True
        return False

    def conclude(self) -> None:
        """Say it now: no batch follows."""
        when = "batch" if self._batches <= 1 else f"{self._batches} batches"
        if self._heads and self._ran_backward:
            warn(
                f"EVA: {', '.join(map(repr, self._heads))} got no gradient in the first {when}, but was taken for an "
                "output layer, which trains in full and has no adapter. Name the output layers with head=[...], and "
                "leave layers that do not run out with exclude=[...]"
            )
        if self._open:
            warn(
                f"{_some(self._open, self._total)} got no gradient in the first {when}: training_step does not run "
                "them, runs them under torch.no_grad() or torch.inference_mode(), or detaches their outputs. Run them "
                "with gradients, or leave them out with exclude=[...]"
            )
        self._open.clear()
        self._heads.clear()
        self.close()

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _check_flags(self) -> None:
        """Disabled and frozen adapters: no optimizer changes that."""
        for is_so, what in _FLAGS:
            names = [name for name, layer in self._open.items() if is_so(layer)]
            if names:
                warn(f"{_some(names, self._total)} {what}")
            for name in names:
                del self._open[name]

    def _check_optimizers(self, pl_module: pl.LightningModule) -> None:
        optimizers = [*self._trainer.optimizers, *_own_optimizers(pl_module)]
        known = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        names = [n for n, x in self._open.items() if not any(id(p) in known for p in (x.a, x.b) if p.requires_grad)]
        if names:
            warn(
                f"{_some(names, self._total)} have adapters that are in no optimizer and will not train: make the "
                "optimizer in configure_optimizers, which runs after the adapters are put in, from all parameters with "
                "requires_grad"
            )
        for name in names:
            del self._open[name]


_DISABLED = "have adapters that are disabled and will not train: call enable_adapter_layers() before fit"
_FROZEN = (
    "have adapters that are frozen (requires_grad is False) and will not train: something froze them after they were "
    "put in, such as freeze() in a hook of the module or a finetuning callback"
)
_FLAGS: tuple[tuple[Callable[[AdapterLayer], bool], str], ...] = (
    (lambda layer: layer.module.disable_adapters, _DISABLED),
    (lambda layer: not (layer.a.requires_grad or layer.b.requires_grad), _FROZEN),
)


def _first_gradient(layer: AdapterLayer, waiting: dict[str, AdapterLayer], name: str) -> Any:
    return _when_graded(layer.b if layer.b.requires_grad else layer.a, waiting, name)


def _when_graded(parameter: Any, waiting: dict[str, Any], name: str) -> Any:
    """A hook that takes a name off a waiting list; for optimizers of the user's own that clear gradients at once."""

    def seen(_: Tensor) -> None:
        waiting.pop(name, None)

    return parameter.register_post_accumulate_grad_hook(seen)


def _own_optimizers(module: nn.Module) -> Iterator[Any]:
    """Optimizers that a module keeps as attributes, for manual optimisation without the Trainer's."""
    for value in vars(module).values():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, Optimizer):
                yield one


def _some(names: Collection[str], total: int) -> str:
    few = ", ".join(repr(name) for name in list(names)[:3])
    return f"EVA: {len(names)} of {total} adapted layers ({few}{', ...' if len(names) > 3 else ''})"
