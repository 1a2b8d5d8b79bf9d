"""Fine-tuning methods for any LightningModule: what to do to the module, and which callbacks to train with.

One protocol for all: ``apply_method("eva", module, AdapterOptions(rank=4), head="model.predict_action")`` prepares the
module and returns the callbacks for its Trainer. Methods that PEFT has come from PEFT; EVA is
:class:`~eva_lightning.callback.EVAInitCallback`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import lightning as L

from eva_lightning.errors import InputError, unknown
from eva_lightning.side_effects import isolated_rng
from eva_lightning.streaming_options import StreamingOptions

if TYPE_CHECKING:
    from eva_lightning.adapters.adalora import RankAllocation
    from eva_lightning.batch_forward import MaskFn
    from eva_lightning.callback import EVAInitCallback
    from eva_lightning.methods.data_driven import Kind
    from eva_lightning.state import EVAState


@dataclass(frozen=True)
class AdapterOptions:
    """What the adapter methods need; the defaults are the paper's (section D.2).

    Attributes:
        rank: LoRA rank r; EVA's mean rank per layer; AdaLoRA's at the end.
        alpha: LoRA's α; the update is scaled by α/r.
        bias: ``"all"`` trains every bias of the model too, ``"lora_only"`` those of adapted layers, or ``"none"``.
        dropout: Dropout on the adapters' inputs.
        rho: EVA's ρ ≥ 1; 1 keeps ranks uniform.
        rescale_alpha: α follows a layer's rank under EVA, so that α/r stays; if False α stays.
        init, metric, tau, delta: See :class:`~eva_lightning.callback.EVAInitCallback`.
        lora_plus_ratio: LoRA+: learning rate of B over that of A and everything else (its authors' λ = 2⁴).
        max_batches: Most minibatches that EVA streams, or CorDA and LoRA-GA look at; None for their defaults.
        state: An :class:`~eva_lightning.state.EVAState` to start EVA from instead of streaming, or its path.
        seed: Seed of the random parts of EVA's initialisations, and of scratch's weights.

    Raises:
        InputError, InputTypeError: A value is out of range.
    """

    rank: int = 16
    alpha: float = 1.0
    bias: Literal["none", "all", "lora_only"] = "all"
    dropout: float = 0.0
    rho: float = 2.0
    rescale_alpha: bool = True
    init: str = "eva"
    metric: str = "ratio"
    tau: float = 0.99
    delta: float = 1.0
    lora_plus_ratio: float = 16.0
    max_batches: int | None = None
    state: EVAState | str | os.PathLike[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        from eva_lightning.callback import EVAInitCallback

        EVAInitCallback(**self._for_callback())  # which checks its values
        if not 0 < self.lora_plus_ratio < math.inf:
            raise InputError(f"lora_plus_ratio must be a finite number above 0, got {self.lora_plus_ratio}")

    def callback(
        self,
        head: str | Sequence[str] | None = "auto",
        use_dora: bool = False,
        exclude: Sequence[str] | None = None,
        mask_fn: MaskFn | None = None,
    ) -> EVAInitCallback:
        """The callback with these options, for a module whose output layer is called `head`.

        Raises:
            MissingInputError, InputError: The file of the given state is missing or damaged.
        """
        from eva_lightning.callback import EVAInitCallback

        place: dict[str, Any] = {"head": head, "exclude": exclude, "mask_fn": mask_fn}
        return EVAInitCallback(**self._for_callback(use_dora), **place, state=self.state)

    def _for_callback(self, use_dora: bool = False) -> dict[str, Any]:
        optional: dict[str, Any] = {} if self.max_batches is None else {"max_batches": self.max_batches}
        return {
            "rho": self.rho,
            "rescale_alpha": self.rescale_alpha,
            "r": self.rank,
            "alpha": self.alpha,
            "lora": {"bias": self.bias, "lora_dropout": self.dropout, "use_dora": use_dora},
            "streaming": StreamingOptions(tau=self.tau, delta=self.delta, seed=self.seed, **optional),
            "metric": self.metric,
            "init": self.init,
            "adapter_only_checkpoints": True,
        }


@dataclass(frozen=True)
class Where:
    """What a method may touch in a module.

    Attributes:
        head: Output layers, which train in full and get no adapter; ``"auto"`` finds them, None for none.
        exclude: Layers that get no adapter and stay frozen.
        mask_fn: ``mask_fn(batch)``: True for the tokens that count in EVA's decomposition.
    """

    head: str | Sequence[str] | None = "auto"
    exclude: Sequence[str] | None = None
    mask_fn: MaskFn | None = None


Prepare = Callable[[L.LightningModule, AdapterOptions, Where], list[L.Callback]]
"""Do what the method does to a module before training; returns the callbacks to train with."""


class AdapterCheckpoints(L.Callback):
    """Checkpoints that say what their adapters are and, where that is enough, leave the frozen weights out.

    30 copies of a ViT-g are 140 GB written. A module without adapters, but with the same pre-trained weights, takes
    such a checkpoint.

    Args:
        injection: The arguments :func:`eva_lightning.adapters.inject` was called with.
        adapter_only: Leave the frozen weights out; not for methods that change them.
    """

    def __init__(self, injection: dict[str, Any], adapter_only: bool = True) -> None:
        self.injection = injection
        self.adapter_only = adapter_only
        self._stop_watching: Callable[[], None] = _nothing

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Fill the frozen weights in again when a checkpoint is restored."""
        from eva_lightning.checkpoint import describe_on_save, watch_loading

        describe_on_save(pl_module, self.injection, self.adapter_only)
        self._stop_watching = watch_loading(pl_module, self.injection)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module's own loading as it was."""
        self._stop_watching()


def _nothing() -> None:
    pass  # a lambda could not go to another process


class AdaLoRACallback(L.Callback):
    """AdaLoRA's schedule in a Trainer: ranks shrink from 1.5 r to r where gradients say they matter least.

    Warm-up, the cubic schedule and the orthogonality penalty (weight 0.5, as in PEFT) are laid over the number of
    optimizer steps of this ``fit``: the first tenth keeps all components, after half of them the choice is final.

    Attributes:
        allocation: What is being allocated, from ``on_fit_start``.
    """

    def __init__(self) -> None:
        self.allocation: RankAllocation | None = None
        self._restored: dict[str, Any] = {}
        self._last_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay the schedule over the steps of this ``fit``."""
        from eva_lightning.adapters.adalora import RankAllocation

        self.allocation = RankAllocation(pl_module, trainer.estimated_stepping_batches)
        self._last_step = trainer.global_step
        if self._restored:
            self.allocation.load_state_dict(self._restored)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the penalty's gradient, once per optimizer step."""
        assert self.allocation is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        self.allocation.add_penalty_gradient(scale / trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Allocate after an optimizer step, while its gradients are still there."""
        if self.allocation is not None and trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            self.allocation.step(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Scores and masks, so that a resumed run allocates as an uninterrupted one."""
        return self._restored if self.allocation is None else self.allocation.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them for ``on_fit_start``."""
        self._restored = dict(state_dict)


def _fft(module: L.LightningModule, options: AdapterOptions, where: Where) -> list[L.Callback]:
    return []


def _scratch(module: L.LightningModule, options: AdapterOptions, where: Where) -> list[L.Callback]:
    """As fft, from new weights: what pre-training is worth."""
    import torch

    own = getattr(module, "reset_parameters", None)
    layers: list[Any] = [own] if callable(own) else []
    if not layers:
        for name, layer in module.named_modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                layers.append(reset)
            elif next(layer.parameters(recurse=False), None) is not None:
                raise InputError(
                    f"scratch cannot draw new weights for {name or type(module).__name__!r}: {type(layer).__name__} "
                    "has parameters but no reset_parameters()"
                )
    with isolated_rng():
        torch.manual_seed(options.seed)
        for reset in layers:
            reset()
    return []


def _injected(**special: Any) -> Prepare:
    """Adapters put in at once, `special` being arguments for :func:`eva_lightning.adapters.inject`."""

    def prepare(module: L.LightningModule, options: AdapterOptions, where: Where) -> list[L.Callback]:
        from eva_lightning.adapters import inject

        arguments = _injection(options, where) | special
        inject(module, **arguments)
        return [AdapterCheckpoints(arguments, adapter_only="initialisation" not in special)]

    return prepare


def _lora_plus(module: L.LightningModule, options: AdapterOptions, where: Where) -> list[L.Callback]:
    if not hasattr(module, "lr_multipliers"):
        raise InputError(
            f"lora+ trains B at another rate than A, and {type(module).__name__} has no lr_multipliers by which its "
            "configure_optimizers could know"
        )
    callbacks = _injected()(module, options, where)
    heeding: Any = module
    heeding.lr_multipliers = partial(lora_plus_multiplier, ratio=options.lora_plus_ratio)
    return callbacks


def lora_plus_multiplier(name: str, ratio: float) -> float:
    """LoRA+ (Hayou et al., 2024): the factor on the learning rate of the parameter called `name`, `ratio` for every B.

    PEFT's ``create_loraplus_optimizer`` also gives biases the rate of B; the paper speaks of B alone.
    """
    return ratio if ".lora_B." in name else 1.0


def _data_driven(kind: Kind) -> Prepare:
    def prepare(module: L.LightningModule, options: AdapterOptions, where: Where) -> list[L.Callback]:
        from eva_lightning.methods.data_driven import DataDrivenStart

        start = DataDrivenStart(kind, options.max_batches, where.mask_fn, options.seed)
        return [*_injected(initialisation=kind)(module, options, where), start]

    return prepare


def _adalora(module: L.LightningModule, options: AdapterOptions, where: Where) -> list[L.Callback]:
    from eva_lightning.adapters.adalora import start_rank

    # the number of steps is known, and set, when fit starts
    schedule = {"target_r": options.rank, "total_step": 1}
    prepare = _injected(r=start_rank(options.rank), adalora=schedule)
    return [*prepare(module, options, where), AdaLoRACallback()]


def _eva(use_dora: bool = False) -> Prepare:
    def prepare(module: L.LightningModule, options: AdapterOptions, where: Where) -> list[L.Callback]:
        return [options.callback(where.head, use_dora, where.exclude, where.mask_fn)]

    return prepare


def _injection(options: AdapterOptions, where: Where) -> dict[str, Any]:
    """Arguments for :func:`eva_lightning.adapters.inject`: primitives only, for checkpoints."""
    return {
        "r": options.rank,
        "alpha": options.alpha,
        "head": where.head if where.head is None or isinstance(where.head, str) else list(where.head),
        "exclude": None if where.exclude is None else list(where.exclude),
        "bias": options.bias,
        "lora_dropout": options.dropout,
    }


METHODS: dict[str, Prepare] = {
    "scratch": _scratch,
    "fft": _fft,
    "lora": _injected(),
    "dora": _injected(use_dora=True),
    "rslora": _injected(use_rslora=True),
    "lora+": _lora_plus,
    "adalora": _adalora,
    "pissa": _injected(initialisation="pissa"),
    "milora": _injected(initialisation="milora"),
    "olora": _injected(initialisation="olora"),
    "corda": _data_driven("corda"),
    "lora-ga": _data_driven("lora-ga"),
    "eva": _eva(),
    "eva-dora": _eva(use_dora=True),
}
"""Every method by name. ``scratch`` and ``fft`` train everything; the others train adapters, head and biases."""

WITHOUT_ADAPTERS = ("scratch", "fft")


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

    All but ``"scratch"`` start from the function the module computes. ``"eva"`` and ``"eva-dora"`` put their adapters
    in at the start of ``fit``, the others at once; ``"corda"`` and ``"lora-ga"`` set theirs at the start of ``fit``.
    ``"lora+"`` needs a module whose ``configure_optimizers`` heeds its attribute ``lr_multipliers`` (name -> factor).

    Args:
        method: One of `METHODS`.
        module: Without adapters, with its pre-trained weights.
        options: For the methods with adapters.
        head: Output layers, which train in full and get no adapter; ``"auto"`` finds them. With None there is no head:
            every linear layer that is not excluded is adapted.
        exclude: Layers that get no adapter and stay frozen.
        mask_fn: ``mask_fn(batch)``: True for the tokens that count in EVA's decomposition (padding left out).

    Raises:
        InputError: Unknown method (names the nearest), or one that is not possible on this module.
    """
    if method not in METHODS:
        raise InputError(unknown("method", method, METHODS))
    return METHODS[method](module, options, Where(head, exclude, mask_fn))
