"""PEFT's own EVA initialisation, on the same backbone and minibatches as ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.eva import SVDHook, initialize_lora_eva_weights
from torch import Tensor, nn

from benchmarks.clock import Stopwatch
from benchmarks.initialisation.runner import Outcome, Runner, autocast, fingerprint
from eva_lightning.adapters import find_adapters


def initialise(runner: Runner, max_batches: int, targets: Sequence[str], tau: float = 0.99) -> Outcome:
    """PEFT's ``get_eva_state_dict`` and ``initialize_lora_eva_weights`` on the same backbone and minibatches.

    PEFT has no cap on minibatches and loops until every component of every layer has converged. At `max_batches`
    its hooks are told that they have, which makes it finish in its own way with what it has. Batches are plain
    image tensors on the device already, hooks need no mask, and no progress bar is shown.
    """
    classifier, dtype = runner.bare_copy()
    prefix = "model."
    config = LoraConfig(
        r=runner.r,
        lora_alpha=1,
        target_modules=[name.removeprefix(prefix) for name in targets],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=runner.rho, tau=tau),
    )
    model: Any = get_peft_model(cast(Any, classifier.model), config, low_cpu_mem_usage=True)
    images = [images.to(runner.device, dtype) for images, _ in runner.batches]
    loader = CappedLoader(images, model, max_batches)
    forwards = 0

    def forward(module: nn.Module, batch: Tensor) -> None:
        nonlocal forwards
        forwards += 1
        with autocast(runner.device, runner.precision), torch.no_grad():
            module(batch)

    watch = Stopwatch(runner.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        initialize_lora_eva_weights(
            model,
            loader,
            forward_fn=forward,
            prepare_model_inputs_fn=lambda *_: None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    timing = watch.read()
    components = {
        prefix + name.removeprefix("base_model.model."): hook.svd.components_.cpu()
        for name, hook in loader.hooks.items()
    }
    given = {prefix + name: layer.rank for name, layer in find_adapters(model).items()}
    ranks = {name: given.get(name, 0) for name in targets}  # those of rank 0 are gone
    return Outcome(timing, forwards - 1, forwards, not loader.capped, components, ranks, fingerprint(model, {}))


class CappedLoader:
    """A loader for PEFT that ends its loop after a number of minibatches, and keeps an eye on its hooks.

    PEFT iterates twice: once for the minibatch that tells which inputs are equal, once for the decompositions, where it
    starts over whenever the minibatches end.
    """

    def __init__(self, images: Sequence[Tensor], model: nn.Module, cap: int) -> None:
        self._images = images
        self._model = model
        self._cap = cap
        self._passes = 0
        self.hooks: dict[str, Any] = {}
        self.capped = False

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Tensor]:
        self._passes += 1
        if self._passes == 1:
            return iter(self._images[:1])
        return self._endless()

    def _endless(self) -> Iterator[Tensor]:
        n = 0
        while True:
            self._find_hooks()
            if n >= self._cap:
                self.capped = True
                for hook in self.hooks.values():
                    hook.converged = torch.ones_like(hook.converged)
            yield self._images[n % len(self._images)]
            n += 1

    def _find_hooks(self) -> None:
        for module in self._model.modules():
            for hook in module._forward_hooks.values():
                if isinstance(hook, SVDHook):
                    self.hooks[hook.name] = hook
