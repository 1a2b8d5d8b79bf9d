"""What initialisations from data ask of the training data: moments of layers' inputs, gradients of their weights.

One pass over minibatches collects all of it, and leaves the model as it was: modes, buffers, metrics,
``requires_grad``, gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn

from eva_lightning.batch_forward import MaskFn, no_grad_forward, training_loss
from eva_lightning.errors import InputError
from eva_lightning.layer_inputs import LayerInputs, fit_mask
from eva_lightning.side_effects import observing
from eva_lightning.token_masks import TokenMasks

Context = Callable[[], AbstractContextManager[Any]]

Statistic = Literal["gradient", "gradient_moment", "inputs", "scaled_inputs", "output_gradients"]
"""What can be collected for a layer of weight (out, in), and what it is the mean of:

- ``gradient``: of the training loss with respect to the weight, over minibatches. Shape of the weight.
- ``gradient_moment``: ``G^T G``, G being a minibatch's gradient as ``(out, in)``, over minibatches. ``(in, in)``.
- ``inputs``: the second moment ``x x^T`` of the layer's inputs, over tokens that count. ``(in, in)``.
- ``scaled_inputs``: CorDA's ``X^T X`` of a sample that was divided by its largest value, over samples. ``(in, in)``.
- ``output_gradients``: the square of the loss's gradient with respect to the layer's outputs, over tokens that count.
  ``(out,)``. Of a sample's own loss, as if it had gone through the model alone: the gradient of the minibatch's loss is
  multiplied by the number of samples, a loss being their mean.
"""

FROM_LOSS: frozenset[Statistic] = frozenset({"gradient", "gradient_moment", "output_gradients"})
"""Statistics that need the training loss and a backward pass."""


@dataclass
class Mean:
    """A running sum and the number of what was summed.

    Attributes:
        total: On the device of the layer.
        count: 0 where nothing was seen.
    """

    total: Tensor
    count: int = 0

    def add(self, amount: Tensor, count: int) -> None:
        """Take `amount`, the sum over `count` more."""
        self.total += amount
        self.count += count

    def add_moment(self, rows: Tensor, count: int | None = None) -> None:
        """Take ``rows^T rows``, of as many as there are rows unless said otherwise."""
        rows = rows.to(self.total.dtype)
        self.total.addmm_(rows.T, rows)
        self.count += len(rows) if count is None else count


Sums = dict[str, dict[Statistic, Mean]]
"""By name of the layer."""


def layer_statistics(
    module: Any,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    needs: Collection[Statistic],
    *,
    mask_fn: MaskFn | None = None,
    context: Context = nullcontext,
    progress: Callable[[], None] = lambda: None,
    dtype: torch.dtype = torch.float32,
) -> Sums:
    """Walk over minibatches once and collect what is asked for, for all layers together.

    If a statistic of the loss is asked for, every minibatch goes through ``training_step`` and back, in the modes that
    the module has in training (dropout is on). What it logs and the metrics it updates are discarded, no other
    parameter gets a gradient, and ``grad`` is not touched. Otherwise minibatches go through the model in eval mode
    without gradients.

    Memory: for every layer the floats of what is asked for, ``out * in`` (gradient), ``in * in`` (gradient moment, each
    kind of inputs) and ``out`` (output gradients), and with the gradient that of one more weight: gradients are added
    up and dropped as the backward pass finds them, and never all held at once, unless their moment is asked for: then
    they are held until the minibatch ends, as in full fine-tuning.

    Args:
        module: The LightningModule; any module where no statistic of the loss is asked for.
        batches: Minibatches, on the module's device.
        layers: Name -> linear layer that is called on the inputs.
        needs: What to collect.
        mask_fn: ``mask_fn(batch)``: True for the tokens that count in inputs and output gradients. The gradient is the
            loss's, which masks its tokens itself.
        context: Entered around each forward pass (autocast).
        progress: Called after every minibatch.
        dtype: Of the sums; float32 on devices without float64 (MPS).

    Returns:
        Sums per layer and statistic, and of how many: 0 for layers that never ran or that the loss does not depend on.

    Raises:
        FloatingPointError: NaN or infinite inputs or gradients; names the layer.
        InputError, InputTypeError: ``training_step`` gives no loss; the number of samples of a minibatch is unknown.
    """
    collector = _Collector(layers, needs, dtype)
    masks = TokenMasks(mask_fn if set(needs) - {"gradient"} else None)
    with ExitStack() as stack:
        modes = [(m, m.training) for m in module.modules()]
        stack.enter_context(observing(module))
        if FROM_LOSS.intersection(needs):
            stack.enter_context(_only_these_require_grad(module, collector.weights))
            for m, mode in modes:
                m.training = mode
        stack.enter_context(collector.watching())
        for batch in stack.enter_context(_closed(batches)):
            collector.mask = masks.begin(batch)
            if FROM_LOSS.intersection(needs):
                collector.samples = samples_in(batch) if "output_gradients" in needs else 0
                with torch.enable_grad(), torch.compiler.set_stance("force_eager"), context():
                    loss = training_loss(module, batch)
                loss.backward()  # of no other parameter: none requires a gradient now
                collector.end_of_batch()
                del loss
            else:
                with context():
                    no_grad_forward(None, module, batch)
            masks.end()
            progress()
    collector.check_finite()
    return collector.sums


def samples_in(batch: Any) -> int:
    """The number of samples of a minibatch: the first dimension of its tensors.

    Raises:
        InputError: it has no tensor.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensors that disagree: Lightning takes the first, and so do we
        try:
            return extract_batch_size(batch)
        except Exception:
            raise InputError(
                f"the number of samples of a minibatch of type {type(batch).__name__} is unknown: it holds no tensor"
            ) from None


class _Collector:
    """The hooks on layers and weights, and what they add up."""

    def __init__(self, layers: Mapping[str, nn.Module], needs: Collection[Statistic], dtype: torch.dtype) -> None:
        self.layers = layers
        self.needs = needs
        self.inputs = {name: LayerInputs(layer) for name, layer in layers.items()}
        self.weights: list[Any] = [layer.weight for layer in layers.values()]
        self.sums: Sums = {name: {} for name in layers}
        self.mask: Tensor | None = None
        self.samples = 0
        self._seen: set[str] = set()
        self._transposed = {name for name, layer in layers.items() if hasattr(layer, "nx")}  # transformers' Conv1D
        for (name, of_layer), weight in zip(self.sums.items(), self.weights, strict=True):
            width = self.inputs[name].width
            for need in needs:
                shapes = {"gradient": tuple(weight.shape), "output_gradients": (weight.numel() // width,)}
                exact = torch.float32 if weight.device.type == "mps" else dtype
                of_layer[need] = Mean(torch.zeros(shapes.get(need, (width, width)), dtype=exact, device=weight.device))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up what the layers do in the body; ``grad`` of the weights is as before afterwards."""
        before = [weight.grad for weight in self.weights]
        handles = []
        try:
            for (name, layer), weight in zip(self.layers.items(), self.weights, strict=True):
                if {"inputs", "scaled_inputs"}.intersection(self.needs):
                    handles.append(layer.register_forward_pre_hook(partial(self._see_inputs, name), with_kwargs=True))
                if "output_gradients" in self.needs:
                    handles.append(layer.register_forward_hook(partial(self._see_output, name)))
                if FROM_LOSS.intersection(self.needs):
                    weight.grad = None
                    handles.append(weight.register_post_accumulate_grad_hook(partial(self._see_gradient, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for weight, gradient in zip(self.weights, before, strict=True):
                weight.grad = gradient

    def end_of_batch(self) -> None:
        """Count the minibatch for the weights that had a gradient: checkpointed blocks give theirs in pieces."""
        for name, weight in zip(self.layers, self.weights, strict=True):
            if name not in self._seen:
                continue
            if "gradient" in self.needs:
                self.sums[name]["gradient"].count += 1
            if "gradient_moment" in self.needs:
                if "gradient" in self.needs:
                    self.sums[name]["gradient"].total += weight.grad
                rows = weight.grad.T if name in self._transposed else weight.grad
                self.sums[name]["gradient_moment"].add_moment(rows, count=1)
                weight.grad = None
        self._seen.clear()

    def check_finite(self) -> None:
        """Make sure that all sums are numbers.

        Raises:
            FloatingPointError: One is not; names the layer.
        """
        for name, of_layer in self.sums.items():
            for statistic, mean in of_layer.items():
                if not torch.isfinite(mean.total).all():
                    what = "gradients" if statistic in FROM_LOSS else "inputs"
                    raise FloatingPointError(
                        f"layer {name!r}: its {what} are NaN or infinite; check the data and the precision"
                    )

    def _see_inputs(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            x, mask = self.inputs[name].read(name, args, kwargs, self.mask)
            mask = fit_mask(mask, x.shape[:-1], x.device)
            with torch.autocast(x.device.type, enabled=False):
                if "inputs" in self.needs:
                    self.sums[name]["inputs"].add_moment(_counted_tokens(x, mask))
                if "scaled_inputs" in self.needs:
                    _add_samples(self.sums[name]["scaled_inputs"], x, mask)

    def _see_output(self, name: str, _: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:  # not so where a checkpointed block runs ahead without gradients
            output.register_hook(partial(self._see_output_gradient, name))

    def _see_output_gradient(self, name: str, gradient: Tensor) -> None:
        mean = self.sums[name]["output_gradients"]
        mask = fit_mask(self.mask, gradient.shape[:-1], gradient.device)
        tokens = _counted_tokens(gradient, mask).to(mean.total.dtype)
        mean.add((self.samples * tokens).square().sum(0), len(tokens))

    def _see_gradient(self, name: str, weight: Tensor) -> None:
        if weight.grad is not None:
            self._seen.add(name)
            if "gradient_moment" in self.needs:
                return  # which is of the whole gradient, not of its pieces
            if "gradient" in self.needs:
                self.sums[name]["gradient"].total += weight.grad
        weight.grad = None  # of the next layer only when this one's memory is free


def _counted_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens that count, as rows."""
    tokens = x.detach().reshape(-1, x.shape[-1])
    return tokens if mask is None else tokens[mask.reshape(-1)]


def _add_samples(moment: Mean, x: Tensor, mask: Tensor | None) -> None:
    """``X^T X`` of every sample over its largest value, as PEFT's CorDA takes it; the mean is not taken off.

    PEFT goes through the samples one by one (its hook takes minibatches of one only); here they come together.
    """
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
    moment.add_moment(samples.flatten(0, 1), count=len(samples))


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
