"""Which forward pass to run on a batch, so that a LightningModule needs no change."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eva_lightning.errors import InputError, InputTypeError
from eva_lightning.namespaces import lightning_classes

ForwardFn = Callable[[nn.Module, Any], Any]
MaskFn = Callable[[Any], "Tensor | None"]


def run_forward(module: nn.Module, batch: Any) -> Any:
    """Run ``module`` on the inputs in ``batch``.

    A ``forward`` whose first argument is called ``batch`` gets the batch. Otherwise a tensor goes in as it is; of a
    sequence (image, label) the first element, recursively; of a mapping, or a named tuple with such names, the keys
    that ``forward``'s signature names (all of them if it also takes ``**kwargs``), or if none does, the only
    floating-point tensor among the values. A LightningModule that defines no ``forward`` runs its ``training_step``,
    with logging muted.

    Raises:
        InputTypeError: there is no way to tell; the message says what to pass as ``forward_fn``.
    """
    try:
        return _run(module, batch)
    except Exception as error:
        # what to do about it belongs to any error of a forward pass that we, not the user, chose
        if hasattr(error, "add_note") and "forward_fn" not in str(error):
            error.add_note(f"(EVA ran the forward pass of {type(module).__name__} by the batch's type; if it chose the "
                           "wrong inputs, pass forward_fn=lambda module, batch: ...)")  # fmt: skip
        raise


def _run(module: nn.Module, batch: Any) -> Any:
    if _has_no_forward(module):
        return _run_training_step(module, batch)
    if _takes_whole_batch(module):
        return module(batch)
    if isinstance(batch, Tensor):
        return module(batch)
    if hasattr(batch, "_asdict") and set(batch._fields) & set(inspect.signature(module.forward).parameters):
        batch = batch._asdict()
    if isinstance(batch, Mapping):
        return module(**_arguments(module, batch))
    if isinstance(batch, (list, tuple)) and batch:
        if len(_required(module)) > 1:
            what = f"a {type(batch).__name__} of {len(batch)}: forward needs {_required(module)}"
            raise InputTypeError(_help(module, what))
        return _run(module, batch[0])
    raise InputTypeError(_help(module, f"a batch of type {type(batch).__name__}"))


def _takes_whole_batch(module: nn.Module) -> bool:
    first = next(iter(inspect.signature(module.forward).parameters), "")
    return first == "batch"


def _required(module: nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters
    return [k for k, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


def _arguments(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters
    named = {k: batch[k] for k in parameters if k in batch}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if named:
        missing = [
            k
            for k, p in parameters.items()
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and k not in named
        ]
        if missing:
            raise InputTypeError(_help(module, f"a batch with keys {list(batch)}, but forward also needs {missing}"))
    if takes_any:
        return dict(batch)
    if named:
        return named
    required = _required(module)
    floats = [v for v in batch.values() if isinstance(v, Tensor) and v.is_floating_point()]
    if len(required) == 1 and len(floats) == 1:
        return {required[0]: floats[0]}
    raise InputTypeError(_help(module, f"a batch with keys {list(batch)}, none of which is an argument of forward"))


def _has_no_forward(module: nn.Module) -> bool:
    bases: tuple[Any, ...] = lightning_classes("core.module", "LightningModule")
    unimplemented = [nn.Module.forward, *(base.forward for base in bases)]
    return getattr(type(module), "forward", None) in unimplemented and hasattr(module, "training_step")


def _run_training_step(module: Any, batch: Any) -> Any:
    if not module.automatic_optimization:
        raise InputTypeError(_help(module, "manual optimisation and no forward method (its training_step would train)"))
    return _muted_training_step(module, batch)


def _muted_training_step(module: Any, batch: Any) -> Any:
    arguments = [batch, 0][: len(inspect.signature(module.training_step).parameters)]
    with _muted(module):
        return module.training_step(*arguments)


def training_loss(module: Any, batch: Any) -> Tensor:
    """What ``training_step`` of a LightningModule gives to be minimised, with logging muted; gradients as they are set.

    Raises:
        InputTypeError: the module optimises manually, so that its ``training_step`` would train.
        InputError: it returned no loss.
    """
    if not module.automatic_optimization:
        raise InputTypeError(f"{type(module).__name__} optimises manually: its training_step returns no loss")
    result = _muted_training_step(module, batch)
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor):
        raise InputError(f"training_step of {type(module).__name__} returned no loss, got {type(loss).__name__}")
    return loss


@contextmanager
def _muted(module: nn.Module) -> Iterator[None]:
    names = ("log", "log_dict")
    kept = {n: vars(module)[n] for n in names if n in vars(module)}
    for n in names:
        object.__setattr__(module, n, lambda *_, **__: None)
    try:
        yield
    finally:
        for n in names:
            object.__delattr__(module, n)
        vars(module).update(kept)


def _help(module: nn.Module, what: str) -> str:
    return (
        f"EVA cannot tell how to run {type(module).__name__} on {what}; pass forward_fn=lambda module, batch: ... that "
        "runs the forward pass"
    )


def attention_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """``mask_fn`` for tokenised text: True where ``attention_mask`` is set and, if there are labels of the same
    shape, where the label is not -100 (the value losses ignore).

    Raises:
        InputTypeError: the batch is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise InputTypeError(
            f"attention_mask reads batches that are mappings, got a {type(batch).__name__}: leave mask_fn out, or give "
            "mask_fn=lambda batch: ... that returns one bool per token",
            setting="mask_fn",
        )
    mask: Tensor | None = None
    if isinstance(batch.get("attention_mask"), Tensor):
        mask = batch["attention_mask"].bool()
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and mask is not None and labels.shape == mask.shape:
        mask = mask & labels.ne(-100)
    return mask


def no_grad_forward(forward_fn: ForwardFn | None, module: nn.Module, batch: Any) -> None:
    """Run the forward pass for its side effect on hooks: no gradients, no compiled graphs (those skip hooks)."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        (forward_fn or run_forward)(module, batch)
