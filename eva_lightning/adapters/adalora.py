"""AdaLoRA (Zhang et al., 2023): PEFT's rank allocation, one call per optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eva_lightning.adalora_schedule import ADALORA_SCHEDULE, AdaLoRASchedule
from eva_lightning.adapters.registry import lora_layers
from eva_lightning.errors import InputError


def is_adalora(module: nn.Module) -> bool:
    """Whether `module` has AdaLoRA layers."""
    return any(hasattr(m, "lora_E") for m in module.modules())


class RankAllocation:
    """Which components of AdaLoRA layers are kept: PEFT's ``RankAllocator``, without a PeftModel around the module.

    Args:
        module: With AdaLoRA layers.
        total_steps: Optimizer steps of the whole training.
        schedule: When ranks are taken away.

    Raises:
        InputError: The module has no AdaLoRA layers, or the number of steps is not a finite number above 0.
    """

    def __init__(self, module: nn.Module, total_steps: float, schedule: AdaLoRASchedule = ADALORA_SCHEDULE) -> None:
        from peft.tuners.adalora.layer import RankAllocator

        layers = [layer for layer in lora_layers(module) if hasattr(layer.module, "lora_E")]
        if not layers:
            raise InputError(f"{type(module).__name__} has no AdaLoRA layers")
        if not 0 < total_steps < float("inf"):
            raise InputError(f"AdaLoRA's schedule needs the number of training steps, got {total_steps}: set max_steps")
        self.module = module
        self.schedule = schedule
        self.config = layers[0].config
        self.config.total_step = int(total_steps)
        self.config.tinit = int(schedule.warm_up * total_steps)
        self.config.tfinal = int(schedule.final * total_steps)
        self.config.deltaT = schedule.every
        self.config.orth_reg_weight = schedule.penalty
        self._allocator: Any = RankAllocator(module, self.config, layers[0].adapter)
        self._factors = [
            (parameter, name == "lora_A")
            for layer in layers
            for name in ("lora_A", "lora_B")
            for parameter in (getattr(layer.module, name)[layer.adapter],)
        ]

    def step(self, step: int) -> None:
        """Score components by the gradients of optimizer step `step` (from 1) and mask those beyond the budget.

        To be called while the gradients of that step are still there.
        """
        allocator, config = self._allocator, self.config
        step += self.schedule.first_step - 1
        final = config.total_step - config.tfinal
        if step < final or not allocator.exp_avg_ipt:
            _, pattern = allocator.update_and_allocate(self.module, min(step, final - 1))
            config.rank_pattern = pattern or config.rank_pattern
        if step == final:
            _, config.rank_pattern = allocator.update_and_allocate(self.module, step, force_mask=True)
        elif step > final and config.rank_pattern:
            allocator.mask_using_rank_pattern(self.module, config.rank_pattern)

    def add_penalty_gradient(self, scale: float = 1.0) -> None:
        """Add the gradient of ``weight * mean ||A A^T - I||`` (and ``B^T B``), which keeps components orthogonal.

        Added to the gradients that are there, rather than to the loss, because the loss is the user's; computed apart
        from them, because a second backward pass would upset DistributedDataParallel. Nothing where the schedule does
        not penalise.
        """
        if not self.schedule.penalises:
            return
        weight = float(self.config.orth_reg_weight) * scale / len(self._factors)
        with torch.enable_grad():
            terms: list[Tensor] = []
            for parameter, rows in self._factors:
                gram = parameter @ parameter.T if rows else parameter.T @ parameter
                terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
            parameters = [parameter for parameter, _ in self._factors]
            gradients = torch.autograd.grad(torch.stack(terms).sum() * weight, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def ranks(self) -> dict[str, int]:
        """Components left per layer, by the name of the layer's E."""
        pattern: Mapping[str, list[bool]] = self.config.rank_pattern or {}
        return {name.split(".lora_E.")[0]: sum(mask) for name, mask in pattern.items()}

    def state_dict(self) -> dict[str, Any]:
        """Running scores and masks: tensors, numbers and lists only."""
        allocator = self._allocator
        return {
            "importance": dict(allocator.exp_avg_ipt),
            "uncertainty": dict(allocator.exp_avg_unc),
            "masks": dict(self.config.rank_pattern or {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        allocator = self._allocator
        devices = {name: parameter.device for name, parameter in self.module.named_parameters()}
        for kind, target in (("importance", allocator.exp_avg_ipt), ("uncertainty", allocator.exp_avg_unc)):
            target.update({name: value.to(devices[name]) for name, value in state[kind].items()})
        allocator.ipt.update({name: torch.zeros_like(value) for name, value in allocator.exp_avg_ipt.items()})
        self.config.rank_pattern = dict(state["masks"]) or None
