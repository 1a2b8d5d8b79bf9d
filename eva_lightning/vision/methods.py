"""The fine-tuning methods, each as "what to do to the module" and "which callbacks to train with"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import lightning as L

from eva_lightning._suggest import unknown

from .module import ImageClassifier

if TYPE_CHECKING:
    from eva_lightning.callback import EVAInitCallback

#: Layer-wise learning-rate decay of full fine-tuning (EVA paper, section D.2).
FFT_LAYER_DECAY = 0.75


@dataclass(frozen=True)
class AdapterOptions:
    """What the adapter methods need; the defaults are the paper's (section D.2).

    Attributes:
        rank: LoRA rank r; EVA's mean rank per layer.
        alpha: LoRA's α; the update is scaled by α/r.
        bias: ``"all"`` trains every bias of the model too, ``"lora_only"`` those of adapted layers, or ``"none"``.
        dropout: Dropout on the adapters' inputs.
        rho: EVA's ρ ≥ 1; 1 keeps ranks uniform.
        init, metric, tau, delta: See :class:`~eva_lightning.callback.EVAInitCallback`.
        max_batches: Most minibatches EVA streams; None for the callback's default.
        seed: Seed of the random parts of EVA's initialisations.

    Raises:
        ValueError, TypeError: A value is out of range.
    """

    rank: int = 16
    alpha: float = 1.0
    bias: Literal["none", "all", "lora_only"] = "all"
    dropout: float = 0.0
    rho: float = 2.0
    init: str = "eva"
    metric: str = "ratio"
    tau: float = 0.99
    delta: float = 1.0
    max_batches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.callback()  # which checks every value

    def callback(self, head: str = "auto", use_dora: bool = False) -> EVAInitCallback:
        """The callback with these options, for a module whose output layer is called `head`."""
        from eva_lightning.callback import EVAInitCallback

        optional: dict[str, Any] = {} if self.max_batches is None else {"max_batches": self.max_batches}
        return EVAInitCallback(
            rho=self.rho,
            r=self.rank,
            alpha=self.alpha,
            head=head,
            bias=self.bias,
            use_dora=use_dora,
            lora_dropout=self.dropout,
            tau=self.tau,
            delta=self.delta,
            metric=self.metric,
            init=self.init,
            seed=self.seed,
            adapter_only_checkpoints=True,
            **optional,
        )


class AdapterCheckpoints(L.Callback):
    """Leave the frozen weights out of a plain LoRA run's checkpoints: 30 copies of a ViT-g are 140 GB written."""

    def __init__(self, bias: str) -> None:
        self.injection = {"bias": bias}
        self._stop_watching: Callable[[], None] = lambda: None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Fill the frozen weights in again when a checkpoint is restored."""
        from eva_lightning.checkpoint import watch_loading

        self._stop_watching = watch_loading(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module's own loading as it was."""
        self._stop_watching()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write adapters, head, biases and a fingerprint of the rest."""
        from eva_lightning.checkpoint import describe, save_into

        save_into(checkpoint, pl_module, describe(pl_module, self.injection, adapter_only=True))


def _linear(module: ImageClassifier, options: AdapterOptions) -> list[L.Callback]:
    module.train_only_head()
    return []


def _fft(module: ImageClassifier, options: AdapterOptions) -> list[L.Callback]:
    module.layer_decay = FFT_LAYER_DECAY
    return []


def _lora(module: ImageClassifier, options: AdapterOptions, use_dora: bool = False) -> list[L.Callback]:
    from eva_lightning.adapters import inject

    inject(
        module,
        r=options.rank,
        alpha=options.alpha,
        head=module.head_name,
        bias=options.bias,
        use_dora=use_dora,
        lora_dropout=options.dropout,
    )
    return [AdapterCheckpoints(options.bias)]


def _dora(module: ImageClassifier, options: AdapterOptions) -> list[L.Callback]:
    return _lora(module, options, use_dora=True)


def _eva(module: ImageClassifier, options: AdapterOptions) -> list[L.Callback]:
    return [options.callback(module.head_name)]


def _eva_dora(module: ImageClassifier, options: AdapterOptions) -> list[L.Callback]:
    return [options.callback(module.head_name, use_dora=True)]


METHODS: dict[str, Callable[[ImageClassifier, AdapterOptions], list[L.Callback]]] = {
    "linear": _linear,
    "fft": _fft,
    "lora": _lora,
    "dora": _dora,
    "eva": _eva,
    "eva-dora": _eva_dora,
}


def apply_method(method: str, module: ImageClassifier, options: AdapterOptions) -> list[L.Callback]:
    """Prepare `module` for `method` and return the callbacks to train with.

    ``"linear"`` trains the head alone, ``"fft"`` everything with layer-wise learning-rate decay 0.75; ``"lora"`` and
    ``"dora"`` inject adapters at once, ``"eva"`` and ``"eva-dora"`` leave that to the callback at the start of ``fit``.

    Raises:
        ValueError: Unknown method; names the nearest.
    """
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    return METHODS[method](module, options)
