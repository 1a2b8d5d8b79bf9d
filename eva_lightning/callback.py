"""EVAInitCallback: data-driven LoRA initialisation and ranks, as one line in a Trainer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import lightning.pytorch.callbacks as pl_callbacks
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only  # type: ignore[attr-defined]
from torch import nn
from torch.nn.parameter import UninitializedParameter

from eva_lightning import checkpoint as ckpt
from eva_lightning.adapters import AdapterLayer, Injection, find_adapters, find_skipped, has_adapters, inject
from eva_lightning.adapters.quantised import kept_trainable
from eva_lightning.adapters.registry import disabled
from eva_lightning.adapters.targets import select
from eva_lightning.batch_forward import ForwardFn, MaskFn
from eva_lightning.errors import InputError
from eva_lightning.rank_plan import Plan, apply_plan, make_plan
from eva_lightning.side_effects import snapshot_rng
from eva_lightning.state import EVAState
from eva_lightning.streaming import StreamingOptions, allocation, compute_eva_state
from eva_lightning.summary import print_summary, streaming_progress
from eva_lightning.token_subsampling import TokensPerSample
from eva_lightning.training_batches import set_up_loader, training_batches
from eva_lightning.validation import check_options

# WeightAveraging came with Lightning 2.5.3
_AVERAGING_NAMES = ("StochasticWeightAveraging", "WeightAveraging")


class EVAInitCallback(pl.Callback):
    """Start LoRA on the directions that carry the variance, with ranks where they are needed (EVA).

    Before the first training step the callback streams a few training minibatches through the model, decomposes the
    inputs of every adapted layer, sets A to the top right-singular vectors and B to zero, and hands the rank budget
    (layers x r) to the components that explain most (paper: "Parameter Efficient Fine-tuning via Explained Variance
    Adaptation", Algorithm 1). The function the model computes does not change; alpha is rescaled so that alpha/r
    stays what it was (rsLoRA: alpha/sqrt(r)); layers left with rank 0 lose their adapter.

    Where the module has PEFT LoRA layers they are used, with their own r and alpha. Where it has none, LoRA goes into
    every linear layer but the output head, the rest is frozen, and the head stays trainable. Optimizers and schedulers
    are made anew for the changed parameters: ``configure_optimizers`` runs twice.

    Batch order, random state, train/eval flags, batch norm statistics and logs stay as they would be without it. A
    second ``fit`` of the same module, or one resumed from a checkpoint, keeps its adapters. If the streaming fails or
    is interrupted the module is left as it was.

    Not possible: FSDP (version 1) and DeepSpeed shard the model before it can be looked at; give them a precomputed
    ``state``. List ``ModelSummary`` after this callback if it should count the redistributed parameters.

    Example::

        trainer = L.Trainer(max_epochs=5, callbacks=[EVAInitCallback(rho=2)])
        trainer.fit(module, datamodule)

    Args:
        rho: how uneven ranks may get: a layer has at most ``round(r * rho)``; 1 means uniform (paper section 3.5).
        r: rank per layer on average, for modules without LoRA layers.
        alpha: LoRA's alpha for those modules; the paper uses 1.
        target_modules: layers to adapt (list of names or last name parts, or a regular expression); ``None``: every
            linear one (nn.Linear, quantised ones, transformers' Conv1D). Convolutions and nn.MultiheadAttention only
            if named.
        exclude: layers to leave out, matched likewise.
        head: output layers that stay trainable in full; "auto" finds them.
        bias: "none", "all" or "lora_only": biases that train, for modules without LoRA layers.
        use_dora, use_rslora, lora_dropout: variants, for modules without LoRA layers.
        rescale_alpha: alpha follows a layer's rank so that its scaling stays (paper section 4.1); if False alpha stays,
            and a layer is scaled by alpha over its own rank, as in the authors' vision code.
        tau: convergence threshold in (0, 1].
        delta: share of the layers that must have converged, in (0, 1].
        max_batches: most minibatches to stream.
        tokens_per_sample: tokens to use per sample, other ones in every minibatch; ``None``: all; "auto": at least 32
            (:func:`eva_lightning.token_subsampling.automatic`).
        engine: "exact" (covariance), "incremental" (the paper's Algorithm 2), "sketch" (randomized range finder, for
            very wide layers) or "auto": exact, and the sketch for layers that are much wider than the others (unless
            all tokens are asked for) or would not fit ``memory_budget`` (:func:`eva_lightning.svd.choose_engines`).
        stopping: "captured" (captured variance over doubling intervals), "cosine" (the paper's rule) or "auto", which
            goes with the engine.
        metric: what components are ranked by: "ratio", "eq6", "sum", "max", "raw"
            (:func:`eva_lightning.ranks.explained_variance`).
        init: "eva" or an ablation: "whiten", "rotate", "permute", "minor", "redistribute"
            (:mod:`eva_lightning.initialization`).
        forward_fn: ``forward_fn(module, batch)`` runs the forward pass where the batch's type does not tell how.
        mask_fn: ``mask_fn(batch)`` returns a bool tensor, True for tokens that count (padding left out).
        state: an :class:`EVAState` or the path of a saved one: no streaming.
        seed: for the random parts (token choice, "rotate", "permute", "redistribute").
        adapter_only_checkpoints: leave frozen weights out of Lightning checkpoints.
        memory_budget: bytes the engines' states may take together; what they will take is printed before.
        offload: keep states that do not fit the budget in the CPU's memory (slower: their tokens travel there).
        verbose: print what was done, once.

    Attributes:
        state: the :class:`EVAState` after ``on_fit_start``.

    Raises:
        InputError: an argument is out of range or of the wrong type; the message names it, what is expected and what
            was given.
    """

    def __init__(
        self,
        rho: float = 2.0,
        r: int = 16,
        alpha: float = 1.0,
        target_modules: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        *,
        head: str | Sequence[str] | None = "auto",
        bias: Literal["none", "all", "lora_only"] = "none",
        use_dora: bool = False,
        use_rslora: bool = False,
        lora_dropout: float = 0.0,
        rescale_alpha: bool = True,
        tau: float = 0.99,
        delta: float = 1.0,
        max_batches: int = 64,
        tokens_per_sample: TokensPerSample = "auto",
        engine: str = "auto",
        stopping: str = "auto",
        metric: str = "ratio",
        init: str = "eva",
        forward_fn: ForwardFn | None = None,
        mask_fn: MaskFn | None = None,
        state: EVAState | str | os.PathLike[str] | None = None,
        seed: int = 0,
        adapter_only_checkpoints: bool = False,
        memory_budget: int = 2**31,
        offload: bool = False,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        check_options(
            rho=rho, r=r, alpha=alpha, bias=bias, lora_dropout=lora_dropout, tau=tau, delta=delta,
            max_batches=max_batches, tokens_per_sample=tokens_per_sample, engine=engine, stopping=stopping,
            metric=metric, init=init, forward_fn=forward_fn, mask_fn=mask_fn, memory_budget=memory_budget,
        )  # fmt: skip
        self.rho = float(rho)
        self.metric = metric
        self.init = init
        self.rescale_alpha = rescale_alpha
        self.target_modules = _names(target_modules)
        self.exclude = _names(exclude)
        self.forward_fn = forward_fn
        self.mask_fn = mask_fn
        self.seed = seed
        self.adapter_only_checkpoints = adapter_only_checkpoints
        self.verbose = verbose
        self.state: EVAState | None = None
        self._given = EVAState.load(state) if isinstance(state, (str, os.PathLike)) else state
        self._streaming = StreamingOptions(
            k=0, tau=tau, delta=delta, max_batches=max_batches, tokens_per_sample=tokens_per_sample, engine=engine,
            stopping=stopping, seed=seed, memory_budget=memory_budget, offload=offload,
        )  # fmt: skip
        self._inject_options: dict[str, Any] = {
            "r": r, "alpha": alpha, "head": head if head is None or isinstance(head, str) else list(head), "bias": bias,
            "use_dora": use_dora, "use_rslora": use_rslora, "lora_dropout": lora_dropout,
        }  # fmt: skip
        self._injection: Injection | None = None
        self._stop_watching: Callable[[], None] = _nothing
        self._stop_waiting: Callable[[], None] = _nothing

    @property
    def state_key(self) -> str:
        # a subclass resumes from its parent's checkpoint and the other way round
        return EVAInitCallback.__qualname__

    # --- Lightning hooks, in the order they run -------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refresh = partial(refresh_averages, trainer, pl_module)
        self._stop_watching = ckpt.watch_loading(pl_module, self._injection_arguments(), changed=refresh)
        self._injection = vars(pl_module).get(_INJECTION)
        if stage != "fit":
            return
        ckpt.describe_on_save(pl_module, self._injection_arguments(), self.adapter_only_checkpoints)
        if ckpt.done(pl_module):
            return
        self._refuse_sharding(trainer)
        builds_later = is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)
        if builds_later and not isinstance(trainer.strategy, _SHARDED):
            # the module may make layers, or load weights, in hooks that run after this one
            self._stop_waiting = after_configure_model(pl_module, partial(self._prepare, trainer, pl_module))
        else:
            self._prepare(trainer, pl_module)

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with self._undone_on_failure(pl_module):
            if not has_adapters(pl_module):
                self._inject(pl_module)
            # ranks must be final before a strategy shards the parameters; a given state can be used early everywhere,
            # and then optimizers, summaries and weight averages see the final parameters from the start
            if isinstance(trainer.strategy, _SHARDED) or self._given is not None:
                self._initialise(trainer, pl_module, before_sharding=True)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._let_go()
        how = ckpt.done(pl_module)
        if how:
            if self.state is None and self.verbose:
                rank_zero_info(
                    f"EVA: the adapters of {type(pl_module).__name__} are {how} already; nothing is streamed"
                )
            return
        if trainer.limit_train_batches == 0:
            return
        with self._undone_on_failure(pl_module):
            if not has_adapters(pl_module):
                self._inject(pl_module)
            self._initialise(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()
        self._undo(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        # primitives and tensors only: Lightning reads checkpoints with weights_only=True
        return {} if self.state is None else {"state": dict(vars(self.state.without_components()))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "state" in state_dict:
            known = {f.name for f in fields(EVAState)}
            self.state = EVAState(**{k: v for k, v in state_dict["state"].items() if k in known})

    # --- what they do ---------------------------------------------------------------------------------------------

    def _inject(self, pl_module: pl.LightningModule) -> None:
        uninitialised = [n for n, p in pl_module.named_parameters() if isinstance(p, UninitializedParameter)]
        if uninitialised:
            raise InputError(
                f"parameter {uninitialised[0]!r} of a lazy layer has no shape yet; run one batch through "
                f"{type(pl_module).__name__} before fit"
            )
        self._injection = inject(pl_module, **self._injection_arguments())
        vars(pl_module)[_INJECTION] = self._injection

    def _injection_arguments(self) -> dict[str, Any]:
        return {**self._inject_options, "target_modules": self.target_modules, "exclude": self.exclude}

    def _initialise(self, trainer: pl.Trainer, pl_module: pl.LightningModule, before_sharding: bool = False) -> None:
        """Decompose, redistribute, write A and B, and give the optimizers the new parameters."""
        started = time.perf_counter()
        layers = self._layers(pl_module)
        before = _trainable(pl_module)
        if self._given is not None:
            state = self._given
        else:
            state = self._stream(trainer, pl_module, layers, before_sharding)
        plan = make_plan(layers, state, self.rho, self.metric, self.init, self.seed, given=self._given is not None)
        changed = apply_plan(pl_module, layers, plan, self._injection is not None, self.rescale_alpha)
        self.state = plan.state
        ckpt.mark_done(pl_module, "initialised")
        vars(pl_module).pop(_INJECTION, None)
        if changed and not before_sharding:
            rebuild_optimizers(trainer, pl_module)
            refresh_averages(trainer, pl_module)
        self.state.seconds = time.perf_counter() - started
        if self.verbose:
            self._report(plan, before, _trainable(pl_module), find_skipped(pl_module))

    def _layers(self, pl_module: pl.LightningModule) -> dict[str, AdapterLayer]:
        layers = find_adapters(pl_module)
        if not layers:
            reasons = [f"{n}: {why}" for n, why in list(find_skipped(pl_module).items())[:3]]
            raise InputError(
                f"{type(pl_module).__name__} has LoRA layers, but none that EVA can initialise"
                f" ({'; '.join(reasons) or 'no adapter is active'})"
            )
        names = list(layers)
        if self._injection is None:
            if self.target_modules is not None:
                names = select(names, self.target_modules, "target_modules")
            if self.exclude is not None:
                dropped = set(select(list(layers), self.exclude, "exclude"))
                names = [n for n in names if n not in dropped]
        chosen = {n: layers[n] for n in names}
        for layer in chosen.values():
            if not layer.is_fresh:
                raise InputError(
                    f"layer {layer.name!r}: its LoRA matrix B is not zero, so the adapter is trained or PiSSA-like and "
                    "EVA would erase it; use adapters as LoraConfig makes them by default"
                )
        return chosen

    def _stream(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: dict[str, AdapterLayer],
        before_sharding: bool,
    ) -> EVAState:
        limit = min(self._streaming.max_batches, set_up_loader(trainer))
        k = max(round(layer.rank * self.rho) for layer in layers.values())
        options = StreamingOptions(**{**vars(self._streaming), "k": k, "max_batches": int(limit)})
        inputs = {name: layer.inputs() for name, layer in layers.items()}
        if self.verbose:
            plan = allocation(inputs, options, self.init == "minor")
            sent = f"; processes exchange {max(plan.messages.values()):,} bytes per layer at most"
            rank_zero_info(f"EVA: {plan}{sent if trainer.world_size > 1 else ''}")
        context: Callable[[], AbstractContextManager[Any]] = (
            nullcontext if before_sharding else trainer.precision_plugin.forward_context
        )
        with (
            disabled(layers.values()),
            kept_trainable(pl_module),
            streaming_progress(trainer, int(limit)) as progress,
        ):
            return compute_eva_state(
                pl_module,
                lambda: training_batches(trainer, int(limit)),
                inputs,
                options,
                forward_fn=self.forward_fn,
                mask_fn=self.mask_fn,
                context=context,
                progress=progress,
                minor=self.init == "minor",
            )

    def _refuse_sharding(self, trainer: pl.Trainer) -> None:
        if isinstance(trainer.strategy, _OPAQUE) and self._given is None:
            raise InputError(
                f"{type(trainer.strategy).__name__} shards the model before EVA can look at it; compute the state on "
                "one device first (callback.state.save(path)) and pass EVAInitCallback(state=path), or use "
                "ModelParallelStrategy (FSDP2)"
            )

    @contextmanager
    def _undone_on_failure(self, pl_module: pl.LightningModule) -> Iterator[None]:
        restore_rng = snapshot_rng()
        try:
            yield
        except BaseException:
            self._undo(pl_module)
            restore_rng()
            raise

    def _undo(self, pl_module: pl.LightningModule) -> None:
        if ckpt.done(pl_module):
            return
        if self._injection is not None:
            self._injection.undo(pl_module)
        vars(pl_module).pop(_INJECTION, None)
        ckpt.stop_describing(pl_module)
        self._injection = None

    def _let_go(self) -> None:
        """Take back what we put on the module for the start of this run."""
        self._stop_watching()
        self._stop_waiting()
        self._stop_watching = self._stop_waiting = _nothing

    @rank_zero_only
    def _report(self, plan: Plan, before: int, after: int, skipped: dict[str, str]) -> None:
        print_summary(plan, before, after, self._injection, skipped, self._streaming.max_batches)


def after_configure_model(pl_module: pl.LightningModule, then: Callable[[], None]) -> Callable[[], None]:
    """Run ``then`` once after the module's ``setup`` and ``configure_model``; returns a function that calls it off."""
    original = pl_module.configure_model

    def stop() -> None:
        vars(pl_module).pop("configure_model", None)

    def configure_model() -> None:
        stop()
        original()
        then()

    vars(pl_module)["configure_model"] = configure_model
    return stop


def refresh_averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let callbacks that keep an average of the weights copy the module as it is now."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, _AVERAGING) and trainer.state.fn == "fit":
            callback.setup(trainer, pl_module, "fit")


def rebuild_optimizers(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Place, wrap and give optimizers to the module as it is now, through the strategy's public methods."""
    trainer.strategy.connect(pl_module)
    trainer.strategy.setup(trainer)


_INJECTION = "_eva_lightning_injection"
_AVERAGING = tuple(getattr(pl_callbacks, n) for n in _AVERAGING_NAMES if hasattr(pl_callbacks, n))
_OPAQUE = (FSDPStrategy, DeepSpeedStrategy)
_SHARDED = (*_OPAQUE, ModelParallelStrategy)


def _names(value: str | Iterable[str] | None) -> str | list[str] | None:
    return value if value is None or isinstance(value, str) else list(value)


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _nothing() -> None:
    pass
