"""EVAInitCallback: data-driven LoRA initialisation and ranks, as one line in a Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from typing_extensions import override

from eva_lightning import checkpoint as ckpt
from eva_lightning.adapters.lora_options import injection_arguments
from eva_lightning.adapters.origin import eva_origin, note_origin
from eva_lightning.adapters.registry import find_adapters, materialise
from eva_lightning.batch_forward import ForwardFn, MaskFn
from eva_lightning.callback_base import Callback
from eva_lightning.done import done
from eva_lightning.errors import InputError, InputTypeError, check_choice, check_number
from eva_lightning.initialiser import Initialiser
from eva_lightning.initialization import INITS
from eva_lightning.launching import watch_launches
from eva_lightning.namespaces import is_overridden, lightning_classes
from eva_lightning.output import say, warn
from eva_lightning.ranks import METRICS
from eva_lightning.single_options import with_single_options
from eva_lightning.state import EVAState
from eva_lightning.streaming_options import StreamingOptions
from eva_lightning.summary import shows_progress
from eva_lightning.surroundings import InTrainer
from eva_lightning.trainer_logs import TrainerLogs
from eva_lightning.trainer_state import changes_modules_after, once_built, refresh_averages
from eva_lightning.training_checks import TrainingChecks

if TYPE_CHECKING:
    from eva_lightning.adapters.lora_options import LoraOptions

# these shard before on_fit_start; the first two so early that no whole model can be run
_OPAQUE = ("FSDPStrategy", "DeepSpeedStrategy")
_SHARDED = (*_OPAQUE, "ModelParallelStrategy")

watch_launches()


class EVAInitCallback(Callback):
    """Initialise LoRA with the directions of most variance of its inputs, and distribute ranks by it (EVA).

    Before the first training step the callback streams a few training minibatches through the model, decomposes the
    inputs of every adapted layer, sets A to the top right-singular vectors and B to zero, and gives the rank budget
    (layers x r) to the components that explain most (paper: "Parameter Efficient Fine-tuning via Explained Variance
    Adaptation", Algorithm 1). The function the model computes does not change; alpha is rescaled so that alpha/r
    stays what it was (rsLoRA: alpha/sqrt(r)); layers left with rank 0 lose their adapter.

    Where the module has PEFT LoRA layers they are used, with their own r and alpha. Where it has none, LoRA goes into
    every linear layer but the output head, the rest is frozen, and the head stays trainable; layers that were frozen
    before ``fit`` are left alone if other layers than the head train, and adapted if none does. Optimizers and
    schedulers are rebuilt for the changed parameters: ``configure_optimizers`` runs twice.

    Batch order, random state, train/eval flags, batch norm statistics and what the module logs stay as they would be
    without it; loggers get EVA's numbers beside that (:mod:`eva_lightning.trainer_logs`). A second ``fit`` of the same
    module, or one resumed from a checkpoint, keeps its adapters. If the streaming fails or is interrupted the module is
    left as it was.

    FSDP (version 1) and DeepSpeed shard the model before EVA can run it: give them a precomputed ``state``. List
    ``ModelSummary`` after this callback if it should count the redistributed parameters.

    Example::

        trainer = L.Trainer(max_epochs=5, callbacks=[EVAInitCallback(rho=2)])
        trainer.fit(module, datamodule)

    Args:
        rho: how uneven ranks may get: a layer has at most ``round(r * rho)``; 1 means uniform (paper section 3.5).
        r: rank per layer on average, for modules without LoRA layers; default: ``lora``'s, or 16.
        alpha: LoRA's alpha for those modules; default: ``lora``'s, or the paper's 1.
        target_modules: layers to adapt (list of names or last name parts, or a regular expression); ``None``: every
            linear one (nn.Linear, quantised ones, transformers' Conv1D). Convolutions and nn.MultiheadAttention only
            if named.
        exclude: layers to leave out, matched likewise, or modules with everything in them: ``"teacher"``.
        lora: a ``peft.LoraConfig``, or a mapping of some of its options (``{"bias": "all", "use_dora": True}``), for
            modules without LoRA layers. Honoured: rank, alpha, their patterns, targets, bias, dropout, DoRA, rsLoRA,
            ``lora_bias`` and ``modules_to_save`` (the same as ``head``). For anything else, make the adapters with
            PEFT before ``fit``.
        head: output layers that train in full; "auto" finds them, among those that train if some are frozen.
        adapt_frozen: adapt layers frozen before ``fit`` also if others than the head train, such as a frozen tower.
        streaming: how minibatches are streamed and decomposed, a :class:`StreamingOptions` or a mapping of some of its
            options (as in LightningCLI's YAML); default: ``StreamingOptions()``. The paper's algorithm to the letter is
            ``EVAInitCallback(algorithm="paper")``, a single option of it.
        metric: what components are ranked by: "ratio", "eq6", "sum", "max", "raw"
            (:func:`eva_lightning.ranks.explained_variance`).
        init: "eva" or an ablation: "whiten", "lora-norm", "rotate", "permute", "minor", "redistribute"
            (:mod:`eva_lightning.initialization`).
        rescale_alpha: alpha follows a layer's rank so that its scaling stays (paper section 4.1); if False alpha stays,
            and a layer is scaled by alpha over its own rank, as in the authors' vision code.
        state: an :class:`EVAState` or the path of a saved one: no streaming.
        adapter_only_checkpoints: leave frozen weights out of Lightning checkpoints.
        forward_fn: ``forward_fn(module, batch)`` runs the forward pass where the batch's type does not tell how.
        mask_fn: ``mask_fn(batch)`` returns a bool tensor, True for tokens that count (padding left out).
        verbose: say what was done, once, as records of the logger ``eva_lightning`` (:mod:`eva_lightning.output`);
            "auto": only where the Trainer shows progress bars (not with ``enable_progress_bar=False``).
        log: write ranks, explained variances, minibatches and seconds to the Trainer's loggers, once
            (:mod:`eva_lightning.trainer_logs`).
        options: single options of ``streaming`` and ``lora`` by their own names, where one or two are all that is
            wanted: ``EVAInitCallback(tokens_per_sample=None)``, ``EVAInitCallback(bias="all", use_dora=True)``.

    Attributes:
        state: the :class:`EVAState` after ``on_fit_start``.

    Raises:
        InputError: an argument is out of range or of the wrong type, or contradicts another.
        MissingInputError: there is no saved state at ``state``.
    """

    def __init__(
        self,
        rho: float = 2.0,
        r: int | None = None,
        alpha: float | None = None,
        target_modules: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        *,
        lora: LoraOptions | None = None,
        head: str | Sequence[str] | None = "auto",
        adapt_frozen: bool = False,
        streaming: StreamingOptions | Mapping[str, Any] | None = None,
        metric: str = "ratio",
        init: str = "eva",
        rescale_alpha: bool = True,
        state: EVAState | str | os.PathLike[str] | None = None,
        adapter_only_checkpoints: bool = False,
        forward_fn: ForwardFn | None = None,
        mask_fn: MaskFn | None = None,
        verbose: bool | Literal["auto"] = True,
        log: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        watch_launches()  # of a copy of Lightning that was imported since, too
        own = [name for name in EVAInitCallback.__init__.__annotations__ if name not in ("options", "return")]
        streaming, lora = with_single_options(streaming, lora, options, own)
        check_number("rho", rho, at_least=1)
        check_choice("metric", metric, METRICS)
        check_choice("init", init, INITS)
        for name, function in (("forward_fn", forward_fn), ("mask_fn", mask_fn)):
            if function is not None and not callable(function):
                raise InputTypeError(f"{name} must be a function or None, got {function!r}", setting=name)
        for name, flag in (
            ("rescale_alpha", rescale_alpha),
            ("adapter_only_checkpoints", adapter_only_checkpoints),
            ("log", log),
        ):
            if not isinstance(flag, bool):
                raise InputTypeError(f"{name} must be True or False, got {flag!r}", setting=name)
        if not isinstance(verbose, bool) and verbose != "auto":
            raise InputTypeError(f"verbose must be True, False or 'auto', got {verbose!r}", setting="verbose")
        engine = streaming.resolved().engine
        if init == "minor" and engine not in ("auto", "exact"):
            by = "algorithm='paper'" if streaming.algorithm == "paper" else f"engine={engine!r}"
            raise InputError(
                f"init='minor' needs the whole spectrum, which {by} does not keep; "
                + ("leave it out" if streaming.algorithm == "paper" else "use 'exact'")
            )
        self.initialiser = Initialiser(
            rho=float(rho),
            metric=metric,
            init=init,
            rescale_alpha=rescale_alpha,
            streaming=streaming,
            injection_arguments=injection_arguments(lora, r, alpha, target_modules, exclude, head, adapt_frozen),
            forward_fn=forward_fn,
            mask_fn=mask_fn,
            given=EVAState.load(state) if isinstance(state, (str, os.PathLike)) else state,
        )
        self.adapter_only_checkpoints = adapter_only_checkpoints
        self.verbose = verbose
        self._is_logged = log  # Lightning gives every callback the `log` of the module
        self.state: EVAState | None = None
        self._logs = TrainerLogs()
        self._stop_watching: Callable[[], None] = _nothing
        self._stop_waiting: Callable[[], None] = _nothing
        # none before on_fit_start: Lightning's learning rate finder trains earlier, up to divergence
        self._checks: TrainingChecks | None = None

    @property
    def rho(self) -> float:
        """How uneven ranks may get."""
        return self.initialiser.rho

    @property
    @override
    def state_key(self) -> str:
        # a subclass resumes from its parent's checkpoint and the other way round
        return EVAInitCallback.__qualname__

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare the module for a checkpoint that may be loaded; put adapters in where it has none.

        Where the strategy shards the model, or a state was given, the adapters are initialised here too: ranks must be
        final before parameters are sharded, and early is better for optimizers, summaries and weight averages.

        Raises:
            InputError: The strategy shards the model before EVA can run it, or see :class:`Initialiser`.
        """
        arguments = self.initialiser.injection_arguments
        refresh = partial(refresh_averages, trainer, pl_module)
        self._stop_watching = ckpt.watch_loading(pl_module, arguments, changed=refresh)
        self.initialiser.take_up(pl_module)
        if stage != "fit":
            return
        self.initialiser.forget_reset(pl_module)
        ckpt.describe_on_save(pl_module, arguments, self.adapter_only_checkpoints)
        builds_later = is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)
        if (builds_later or changes_modules_after(self, trainer)) and not _shards(trainer):
            # the module may make layers, load weights or freeze in hooks that run after this one; so may callbacks
            self._stop_waiting = once_built(pl_module, partial(self._prepare, trainer, pl_module))
        else:
            self._prepare(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Initialise the adapters, unless that was done in ``setup``, in an earlier ``fit`` or by a checkpoint.

        Raises:
            InputError: See :class:`Initialiser`.
            FloatingPointError: Activations are NaN or infinite; names layer and minibatch.
        """
        self._let_go()
        if self.initialiser.to_do(pl_module) == {}:
            if self.state is None and self._says(trainer):
                say(
                    f"EVA: the adapters of {type(pl_module).__name__} are {done(pl_module)} already; nothing is "
                    "streamed"
                )
        elif trainer.limit_train_batches != 0:
            self._start(trainer, pl_module, initialise=True)
        self._logs.join_hyperparameters(trainer)
        if not _is_opaque(trainer):  # whose parameters are not the module's
            self._checks = TrainingChecks()
            if self.state is not None:  # that of a resumed run too
                note_origin(find_adapters(pl_module).values(), eva_origin(self.state))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write to the loggers, now that they have the module's own; warn of adapters that cannot train."""
        self._logs.write(trainer)
        if self._checks is not None:
            self._checks.start(trainer, pl_module, self.initialiser.not_run, self.initialiser.found_heads)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that there are gradients."""
        if self._checks is not None:
            self._checks.after_backward()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Warn of adapters without gradients in the first batches, and of a loss that is NaN or infinite."""
        if self._checks is not None:
            self._checks.after_batch(trainer, outputs)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of what can be known after an epoch, however short."""
        if self._checks is not None:
            self._checks.after_epoch(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave a module that was not initialised yet as it was."""
        if self._checks is not None:
            self._checks.after_error(exception)
        self._let_go()
        self.initialiser.undo(pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take back what was put on the module for the start of this run."""
        self._let_go()

    def leave(self, pl_module: pl.LightningModule) -> dict[str, Any]:
        """In a process started by a strategy such as ``ddp_spawn``, after ``fit``: what the parent process needs."""
        description = ckpt.describe(pl_module, self.initialiser.injection_arguments, adapter_only=False, built_with={})
        return {ckpt.KEY: description, "state": None if self.state is None else dict(vars(self.state))}

    def come_home(self, pl_module: pl.LightningModule, luggage: Mapping[str, Any]) -> None:
        """In that parent process: give its module the adapters of the child, and this callback its state."""
        if luggage["state"] is not None:
            self.state = EVAState(**luggage["state"])
        description = luggage[ckpt.KEY]
        if not description["adapters"]:
            return
        ckpt.describe_on_save(pl_module, description["injection"], self.adapter_only_checkpoints)
        try:
            ckpt.fit_to_checkpoint(pl_module, dict(luggage))
        except InputError as error:  # the training is done, and must not be lost with it
            ckpt.stop_describing(pl_module)
            warn(
                f"EVA: the module in this process does not have the trained adapters ({error}); load a checkpoint of "
                "the fit, or make the layers in __init__"
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state without its components: primitives and tensors only, as ``weights_only`` loading needs."""
        return {} if self.state is None else {"state": dict(vars(self.state.without_components()))}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a resumed run; entries of other versions are passed over."""
        if "state" in state_dict:
            known = {f.name for f in fields(EVAState)}
            state = EVAState(**{k: v for k, v in state_dict["state"].items() if k in known})
            if self.state is None or state.seconds != self.state.seconds:
                self._logs.forget()  # the interrupted run has written them; the learning rate finder's has not
            self.state = state

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.initialiser.to_do(pl_module) == {}:
            return
        if _is_opaque(trainer) and self.initialiser.given is None:
            raise InputError(
                f"{type(trainer.strategy).__name__} shards the model before EVA can run it; compute the state on one "
                "device first (python -m eva_lightning.precompute) and pass EVAInitCallback(state=path), or use "
                "ModelParallelStrategy (FSDP2)"
            )
        early = _shards(trainer) or self.initialiser.given is not None
        self._start(trainer, pl_module, initialise=early, before_strategy=True)

    def _start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, initialise: bool, before_strategy: bool = False
    ) -> None:
        with self.initialiser.undone_on_failure(pl_module):
            materialise(pl_module)
            layers = self.initialiser.to_do(pl_module)
            injected = layers is None
            if layers is None:
                layers = self.initialiser.inject(pl_module)
            if initialise:
                where = InTrainer(trainer, pl_module, before_strategy)
                self.state = self.initialiser.initialise(
                    where, pl_module, layers, injected=injected, verbose=self._says(trainer)
                )
        if initialise and self._is_logged and self.state is not None:
            self._logs = TrainerLogs(self.state, self._says(trainer))

    def _says(self, trainer: pl.Trainer) -> bool:
        return shows_progress(trainer) if self.verbose == "auto" else bool(self.verbose)

    def _let_go(self) -> None:
        self._stop_watching()
        self._stop_waiting()
        self._stop_watching = self._stop_waiting = _nothing
        self._logs.let_go()
        if self._checks is not None:
            self._checks.close()
            self._checks = None


def _is_opaque(trainer: pl.Trainer) -> bool:
    return isinstance(trainer.strategy, lightning_classes("strategies", *_OPAQUE))


def _shards(trainer: pl.Trainer) -> bool:
    return isinstance(trainer.strategy, lightning_classes("strategies", *_SHARDED))


def _nothing() -> None:
    pass  # a lambda could not be pickled
