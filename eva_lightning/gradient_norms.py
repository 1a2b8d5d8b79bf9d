"""How large the gradients of A and B are over the first steps of training: the EVA paper's Figure 4."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from eva_lightning.adapters import find_targets
from eva_lightning.adapters.registry import lora_layers
from eva_lightning.callback_base import Callback
from eva_lightning.errors import InputError, check_number
from eva_lightning.files import replacing
from eva_lightning.namespaces import lightning_classes
from eva_lightning.output import say

#: Columns of a row. Norms are Euclidean, over all layers together; ``a`` and ``b`` are empty without adapters.
COLUMNS = ("step", "a", "b", "norm", "train_loss")

_HIDDEN = ("FSDPStrategy", "DeepSpeedStrategy")


class GradientNorms(Callback):
    """Records the norm of the gradients of A and B, and the training loss, at each of the first optimizer steps.

    One row per optimizer step, whatever `accumulate_grad_batches` is: of the gradient that the step uses, after the
    mean over processes and after fp16's loss scale is divided out, before any clipping. A norm that is not finite is
    kept: fp16 skips that step. Each row also goes to the Trainer's loggers at once, as ``gradient_norm/a``,
    ``gradient_norm/b`` and ``gradient_norm/all``, whatever ``log_every_n_steps`` says. Random states, gradients and
    results stay as they would be; reading the norms waits for the device, in these steps only.

    Without adapters (full fine-tuning) it is the gradient of the weights of the layers that adapters would be at. Where
    those do not train either (linear probing) there is nothing to record, which is said once.

    Limits: FSDP1 and DeepSpeed hide gradients and are refused. Steps of optimizers that have none of these parameters
    are passed over.

    Example::

        norms = GradientNorms(steps=100)
        L.Trainer(callbacks=[EVAInitCallback(rho=2), norms]).fit(module, data)
        norms.rows[0]  # {"step": 1, "a": 0.0, "b": 0.31, "norm": 0.31, "train_loss": 4.6}

    Args:
        steps: Optimizer steps to record, from the first of training.
        file: CSV file with the columns `COLUMNS`, written when the last of them is done and when training ends.
        exclude: Without adapters: layers that adapters would leave out besides the head, by name.

    Attributes:
        rows: One mapping per step: ``step``, counted from 1; ``a`` and ``b``; ``norm``, of A and B together (with
            AdaLoRA also of its singular values), or of the weights; ``train_loss``, the mean over the step's
            minibatches and processes, where ``training_step`` returns one. They travel in checkpoints.

    Raises:
        InputError: `steps` is below 1; in ``setup``: a strategy that hides gradients.
    """

    def __init__(
        self, steps: int = 100, file: str | os.PathLike[str] | None = None, exclude: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        check_number("steps", steps, at_least=1, whole=True)
        self.steps = steps
        self.file = None if file is None else Path(file)
        self.exclude = None if exclude is None else list(exclude)
        self.rows: list[dict[str, float]] = []
        self._groups: dict[str, list[nn.Parameter]] = {}
        self._losses: list[Tensor] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage == "fit" and isinstance(trainer.strategy, lightning_classes("strategies", *_HIDDEN)):
            raise InputError(
                f"{type(trainer.strategy).__name__} keeps gradients to itself, so that their norms cannot be recorded: "
                "train on one device, with DDP or with ModelParallelStrategy, or leave GradientNorms out"
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the parameters, now that adapters are in and have their ranks."""
        self._losses = []
        self._groups = _adapter_parameters(pl_module) or _weights(pl_module, self.exclude)
        if not self._groups:
            say(
                f"gradient norms: {type(pl_module).__name__} trains neither adapters nor the layers they would be at; "
                "nothing is recorded"
            )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Read the norms; Lightning clips after this."""
        if trainer.global_step >= self.steps:
            return
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        scale = _loss_scale(trainer, optimizer)
        norms = {
            name: _norm(p for p in parameters if id(p) in trained) / scale
            for name, parameters in self._groups.items()
            if any(id(p) in trained for p in parameters)
        }
        if not norms:
            return
        row: dict[str, float] = {
            "step": trainer.global_step + 1,
            **{name: norms[name] for name in ("a", "b") if name in norms},
        }
        row["norm"] = sum(norm**2 for norm in norms.values()) ** 0.5
        self.rows.append(row)
        logged = {f"gradient_norm/{'all' if name == 'norm' else name}": row[name] for name in row if name != "step"}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step's loss to its row."""
        if not self._groups or trainer.global_step > self.steps:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach().float())
        if self.rows and self.rows[-1]["step"] == trainer.global_step and "train_loss" not in self.rows[-1]:
            if self._losses:
                # Lightning has divided each by the number of minibatches that the step accumulates
                mean: Any = trainer.strategy.reduce(torch.stack(self._losses).sum(), reduce_op="mean")
                self.rows[-1]["train_loss"] = float(mean)
            self._losses = []
            if trainer.global_step == self.steps:
                self._write(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what there is."""
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, so that a resumed run keeps them."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the rows of the checkpoint."""
        self.rows = [dict(row) for row in state_dict["rows"]]

    def _write(self, trainer: pl.Trainer) -> None:
        if self.file is None or not self.rows or not trainer.is_global_zero:
            return
        with replacing(self.file) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)


def _adapter_parameters(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Those of A, of B and, for AdaLoRA, of the singular values between them (``e``), that train."""
    groups: dict[str, list[nn.Parameter]] = {"a": [], "b": [], "e": []}
    for layer in lora_layers(module):
        for name, attribute in (("a", "lora_A"), ("b", "lora_B"), ("e", "lora_E")):
            held: Any = getattr(layer.module, attribute, {})
            if layer.adapter in held:
                part = held[layer.adapter]
                groups[name].append(part if isinstance(part, nn.Parameter) else part.weight)
    return _trained(groups)


def _weights(module: nn.Module, exclude: Sequence[str] | None) -> dict[str, list[nn.Parameter]]:
    head: Any = getattr(module, "head_name", "auto")
    try:
        names, _ = find_targets(module, exclude=exclude, head=head)
    except InputError:  # no layer that an adapter could be at
        return {}
    weights: list[Any] = [module.get_submodule(name).weight for name in names]
    return _trained({"weights": weights})


def _trained(groups: Mapping[str, list[nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    found = {name: [p for p in parameters if p.requires_grad] for name, parameters in groups.items()}
    return {name: parameters for name, parameters in found.items() if parameters}


def _norm(parameters: Iterable[nn.Parameter]) -> float:
    """Euclidean norm of all their gradients together; parameters without a gradient count as 0."""
    norms: list[Any] = []
    for parameter in parameters:
        if parameter.grad is not None:
            norm: Any = torch.linalg.vector_norm(parameter.grad.detach().float())
            # of a tensor that is sharded (FSDP2) each process holds a part
            norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return float(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))) if norms else 0.0


def _loss_scale(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> float:
    """What gradients are still multiplied by: fused optimizers divide fp16's loss scale out themselves, after this."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
