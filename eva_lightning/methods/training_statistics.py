"""What CorDA and LoRA-GA ask of the training data: second moments of layers' inputs, gradients of their weights.

Both walk over minibatches and leave the model as it was: modes, buffers, metrics, ``requires_grad``, gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eva_lightning.batch_forward import MaskFn, no_grad_forward, training_loss
from eva_lightning.layer_inputs import LayerInputs, fit_mask
from eva_lightning.side_effects import observing
from eva_lightning.token_masks import TokenMasks

Context = Callable[[], AbstractContextManager[Any]]


@dataclass
class Mean:
    """A running sum of matrices and the number of what was summed.

    Attributes:
        total: fp32, on the device of the layer.
        count: 0 where nothing was seen.
    """

    total: Tensor
    count: int = 0


def input_moments(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    *,
    mask_fn: MaskFn | None = None,
    context: Context = nullcontext,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Mean]:
    """Second moments ``X^T X`` of the inputs of linear layers, summed over samples, as PEFT's CorDA takes them.

    Every sample is divided by its largest value first, and the mean is not taken off. PEFT goes through the samples one
    by one (its hook takes minibatches of one only); here they go through the model together.

    Args:
        model: Run in eval mode without gradients.
        batches: Minibatches, on the model's device.
        layers: Name -> the layer that is called on the inputs.
        mask_fn: ``mask_fn(batch)``: True for the tokens that count.
        context: Entered around each forward pass (autocast).
        progress: Called after every minibatch.

    Returns:
        Per layer the sum, shape ``(in_features, in_features)``, and the number of samples: 0 for layers that never ran.

    Raises:
        FloatingPointError: NaN or infinite inputs; names the layer.
    """
    moments: dict[str, Mean] = {}
    mask: Tensor | None = None

    def observe(name: str, inputs: LayerInputs) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, counted = inputs.read(name, args, kwargs, mask)
            _add_samples(moments[name], x, fit_mask(counted, x.shape[:-1], x.device))

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            inputs = LayerInputs(layer)
            weight: Any = layer.weight
            moments[name] = Mean(torch.zeros(inputs.width, inputs.width, device=weight.device))
            stack.enter_context(_hooked(layer, observe(name, inputs)))
        stack.enter_context(observing(model))
        masks = TokenMasks(mask_fn)
        for batch in stack.enter_context(_closed(batches)):
            mask = masks.begin(batch)
            with context():
                no_grad_forward(None, model, batch)
            masks.end()
            progress()
    for name, moment in moments.items():
        _check_finite(name, moment.total, "inputs")
    return moments


def weight_gradients(
    module: Any,
    batches: Iterable[Any],
    weights: Mapping[str, nn.Parameter],
    *,
    context: Context = nullcontext,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Mean]:
    """Gradients of a LightningModule's training loss with respect to `weights`, summed over minibatches.

    The module computes as in training, in the modes it has; what ``training_step`` logs, and metrics it updates, are
    discarded. No other parameter gets a gradient, and ``grad`` is not touched.

    Args:
        module: The LightningModule.
        batches: Minibatches, on the module's device.
        weights: Name -> parameter.
        context: Entered around each forward pass (autocast).
        progress: Called after every minibatch.

    Returns:
        Per weight the sum, in its shape, and the number of minibatches: 0 where the loss does not depend on it.

    Raises:
        FloatingPointError: NaN or infinite gradients; names the layer.
        InputError, InputTypeError: ``training_step`` gives no loss.
    """
    gradients = {name: Mean(torch.zeros_like(p, dtype=torch.float32)) for name, p in weights.items()}
    modes = [(m, m.training) for m in module.modules()]
    parameters = list(weights.values())
    with observing(module), _only_these_require_grad(module, parameters), _closed(batches) as iterator:
        for m, mode in modes:
            m.training = mode
        for batch in iterator:
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"), context():
                loss = training_loss(module, batch)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for mean, gradient in zip(gradients.values(), found, strict=True):
                if gradient is not None:
                    mean.total += gradient
                    mean.count += 1
            progress()
    for name, mean in gradients.items():
        _check_finite(name, mean.total, "gradients")
    return gradients


@torch.no_grad()
def _add_samples(moment: Mean, x: Tensor, mask: Tensor | None) -> None:
    with torch.autocast(x.device.type, enabled=False):
        samples = x.detach().float().reshape(1 if x.dim() == 1 else len(x), -1, x.shape[-1])
        if mask is not None:
            counted = mask.reshape(samples.shape[:2])
            samples = samples[counted.any(1)]
            left_out = ~counted[counted.any(1)].unsqueeze(-1)
            # tokens that do not count neither set the scale nor add to the sum
            largest = samples.masked_fill(left_out, -torch.inf).flatten(1).amax(1).abs()
            samples = samples.masked_fill(left_out, 0.0)
        else:
            largest = samples.flatten(1).amax(1).abs()
        samples = samples / torch.where(largest > 0, largest, 1.0)[:, None, None]
        tokens = samples.flatten(0, 1)
        moment.total.addmm_(tokens.T, tokens)
        moment.count += len(samples)


@contextmanager
def _hooked(layer: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _closed(batches: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """Close a generator now: the garbage collector would do it, and restore random states, during training."""
    iterator = iter(batches)
    with closing(iterator) if hasattr(iterator, "close") else nullcontext():  # type: ignore[type-var]
        yield iterator


@contextmanager
def _only_these_require_grad(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    flags = [(p, p.requires_grad) for p in module.parameters()]
    try:
        module.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _check_finite(name: str, total: Tensor, what: str) -> None:
    if not torch.isfinite(total).all():
        raise FloatingPointError(f"layer {name!r}: its {what} are NaN or infinite; check the data and the precision")
