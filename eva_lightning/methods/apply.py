"""Fine-tuning methods for any LightningModule: what to do to the module, and which callbacks to train with.

One protocol for all: ``apply_method("eva", module, AdapterOptions(rank=4), head="model.predict_action")`` prepares the
module and returns the callbacks for its Trainer. Methods that PEFT has come from PEFT; EVA is
:class:`~eva_lightning.callback.EVAInitCallback`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import lightning as L

from eva_lightning.adalora_schedule import ADALORA_SCHEDULE, AdaLoRASchedule
from eva_lightning.batch_forward import MaskFn
from eva_lightning.callback import EVAInitCallback
from eva_lightning.errors import InputError, check_choice, check_number
from eva_lightning.methods.registry import DEFAULT_RHO, METHODS
from eva_lightning.state import EVAState
from eva_lightning.streaming_options import StreamingOptions


@dataclass(frozen=True)
class AdapterOptions:
    """What the adapter methods need; the defaults are the paper's (section D.2).

    Attributes:
        rank: LoRA rank r; EVA's mean rank per layer; AdaLoRA's at the end.
        alpha: LoRA's α; the update is scaled by α/r.
        target_modules: Layers to adapt (:class:`~eva_lightning.callback.EVAInitCallback`); None for every linear one.
        bias: ``"all"`` trains every bias of the model too, ``"lora_only"`` those of adapted layers, or ``"none"``.
        dropout: Dropout on the adapters' inputs.
        rho: EVA's ρ ≥ 1; 1 keeps ranks uniform.
        rescale_alpha: α follows a layer's rank under EVA, so that α/r stays; if False α stays.
        init, metric, algorithm, tau, delta: See :class:`~eva_lightning.callback.EVAInitCallback`.
        lora_plus_ratio: LoRA+: learning rate of B over that of A and everything else (its authors' λ = 2⁴).
        max_batches: Most minibatches that EVA streams, or CorDA, LoRA-GA and the like read; None for their defaults.
        state: An :class:`~eva_lightning.state.EVAState` to start EVA from instead of streaming, or its path.
        seed: Seed of the random parts of initialisations, and of scratch's weights.
        keep_function: Methods whose adapters move the function when they start (`Method.moves_function`) take
            ``scaling * B A`` out of the base weight, so that it stays; the others keep it anyway.
        knowledge: Minibatches, such as a DataLoader's, of the data that a model adapted by "corda-kpm" (CorDA's
            knowledge-preserving mode) is to remain good at; of `max_batches` of them layers' inputs are read, labels
            are not. None: the training data, of which its directions are then the least.
        dora_by_column: DoRA of the authors' vision code (:mod:`eva_lightning.adapters.column_dora`) instead of PEFT's.
        adalora: When AdaLoRA takes ranks away, and its penalty.

    Raises:
        InputError, InputTypeError: A value is out of range.
    """

    rank: int = 16
    alpha: float = 1.0
    target_modules: Sequence[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "all"
    dropout: float = 0.0
    rho: float = DEFAULT_RHO
    rescale_alpha: bool = True
    init: str = "eva"
    metric: str = "ratio"
    algorithm: str = "fast"
    tau: float = 0.99
    delta: float = 1.0
    lora_plus_ratio: float = 16.0
    max_batches: int | None = None
    state: EVAState | str | os.PathLike[str] | None = None
    seed: int = 0
    keep_function: bool = False
    knowledge: Iterable[Any] | None = None
    dora_by_column: bool = False
    adalora: AdaLoRASchedule = ADALORA_SCHEDULE

    def __post_init__(self) -> None:
        self._callback(Where())  # which checks its values; a state is read when it is used
        check_number("lora_plus_ratio", self.lora_plus_ratio, above=0)

    def callback(self, where: Where, use_dora: bool = False) -> EVAInitCallback:
        """EVA's callback with these options.

        Raises:
            MissingInputError, InputError: The file of the given state is missing or damaged.
        """
        return self._callback(where, use_dora, self.state)

    def dora(self) -> dict[str, Any]:
        """The argument of :func:`eva_lightning.adapters.inject` that makes LoRA layers DoRA's."""
        return {"dora_by_column": True} if self.dora_by_column else {"use_dora": True}

    def _callback(self, where: Where, use_dora: bool = False, state: Any = None) -> EVAInitCallback:
        return EVAInitCallback(
            rho=self.rho,
            r=self.rank,
            alpha=self.alpha,
            target_modules=self.target_modules,
            exclude=where.exclude,
            lora={"bias": self.bias, "lora_dropout": self.dropout, **(self.dora() if use_dora else {})},
            head=where.head,
            streaming=StreamingOptions(
                algorithm=self.algorithm,
                tau=self.tau,
                delta=self.delta,
                max_batches=self.max_batches,
                seed=self.seed,
            ),
            metric=self.metric,
            init=self.init,
            rescale_alpha=self.rescale_alpha,
            state=state,
            adapter_only_checkpoints=True,
            mask_fn=where.mask_fn,
        )


@dataclass(frozen=True)
class Where:
    """What a method may touch in a module.

    Attributes:
        head: Output layers, which train in full and get no adapter; ``"auto"`` finds them, None for none.
        exclude: Layers that get no adapter and stay frozen.
        mask_fn: ``mask_fn(batch)``: True for the tokens that count in EVA's and CorDA's statistics.
    """

    head: str | Sequence[str] | None = "auto"
    exclude: Sequence[str] | None = None
    mask_fn: MaskFn | None = None


class Prepare(Protocol):
    """What the registry names for every method: do to a module what precedes training."""

    def __call__(self, module: Any, options: AdapterOptions, where: Where, **fixed: Any) -> list[L.Callback]:
        """Prepare `module`, and return the callbacks to train with.

        Args:
            module: A LightningModule without adapters, with its pre-trained weights.
            options: The user's.
            where: What may be touched.
            fixed: Of the registry's entry, so that one function serves several methods.
        """


def apply_method(
    method: str,
    module: L.LightningModule,
    options: AdapterOptions,
    *,
    head: str | Sequence[str] | None = "auto",
    exclude: Sequence[str] | None = None,
    mask_fn: MaskFn | None = None,
) -> list[L.Callback]:
    """Prepare `module` for `method` and return the callbacks to train with.

    All but ``"scratch"``, and those whose ``moves_function`` says so, start from the function the module computes.
    EVA's methods put their adapters in at the start of ``fit``, the others at once; those that start from data
    (:data:`eva_lightning.methods.starts.KINDS`) set theirs at the start of ``fit``. What else differs is in
    :data:`~eva_lightning.methods.registry.METHODS`.

    A module may have what some methods use: ``head_name``, the name of its output layer; ``train_only_head()`` for
    ``"linear"``; ``layer_decay``, a factor on the learning rate per layer, which ``"fft"`` sets; ``lr_multipliers``
    (name -> factor), which ``"lora+"`` sets and requires.

    Args:
        method: A name in :data:`~eva_lightning.methods.registry.METHODS`.
        module: Without adapters, with its pre-trained weights.
        options: For the methods with adapters.
        head: Output layers, which train in full and get no adapter; ``"auto"``: the module's ``head_name``, or found.
            With None there is no head: every linear layer that is not excluded is adapted.
        exclude: Layers that get no adapter and stay frozen.
        mask_fn: ``mask_fn(batch)``: True for the tokens that count in EVA's decomposition (padding left out).

    Raises:
        InputError: Unknown method (names the nearest), one that is not possible on this module, or options that
            contradict it.
    """
    check_choice("method", method, METHODS)
    entry = METHODS[method]
    if options.state is not None and entry.state_kind is None:
        raise InputError(f"{method} starts from no EVA state, but one is given: {options.state}")
    if options.init != "eva" and "init" in entry.fixed:
        raise InputError(f"{method} has an initialisation of its own: leave init={options.init!r} to eva and eva-dora")
    if options.metric != "ratio" and "metric" in entry.fixed:
        raise InputError(f"{method} has a metric of its own: leave metric={options.metric!r} to eva and eva-dora")
    if head == "auto":
        head = getattr(module, "head_name", "auto")
    prepare: Prepare = entry.prepare_function()
    return prepare(module, options, Where(head, exclude, mask_fn), **entry.fixed)
