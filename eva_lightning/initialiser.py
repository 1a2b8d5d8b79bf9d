"""What EVAInitCallback does to a module, apart from when: adapters in, minibatches through, ranks and A written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from eva_lightning import checkpoint as ckpt
from eva_lightning.adapters import (
    AdapterLayer,
    Injection,
    count_trainable,
    find_adapters,
    find_skipped,
    has_adapters,
    inject,
    refuse_frozen,
    refuse_merged,
    refuse_trained,
    wanted_adapters,
)
from eva_lightning.adapters.injection import INJECTION
from eva_lightning.adapters.quantised import kept_trainable
from eva_lightning.adapters.registry import disabled, restored_on_failure
from eva_lightning.adapters.weight_reads import WeightReads, mark_read_elsewhere
from eva_lightning.batch_forward import ForwardFn, MaskFn
from eva_lightning.done import done, mark_done, unmark, unmark_reset, without_mark
from eva_lightning.engine_plan import Allocation
from eva_lightning.output import say
from eva_lightning.rank_plan import Plan, apply_plan, make_plan, refuse_other_algorithm, selection_of
from eva_lightning.side_effects import snapshot_rng
from eva_lightning.state import EVAState
from eva_lightning.streaming import compute_eva_state
from eva_lightning.streaming_options import StreamingOptions
from eva_lightning.summary import say_summary, streaming_progress
from eva_lightning.surroundings import Surroundings
from eva_lightning.training_checks import warn_of_layers_not_run, warn_of_weights_read


@dataclass
class Initialiser:
    """EVA for the modules of one callback; the attributes are its arguments, see there.

    Attributes:
        injection_arguments: For :func:`eva_lightning.adapters.inject`, where a module has no adapters.
        given: A precomputed state, instead of streaming.
        injection: What was put into the module at hand, if anything was.
        not_run: Its layers that did not run when they were to be initialised, which was said.
    """

    rho: float
    metric: str
    init: str
    rescale_alpha: bool
    streaming: StreamingOptions
    injection_arguments: Mapping[str, Any]
    forward_fn: ForwardFn | None = None
    mask_fn: MaskFn | None = None
    given: EVAState | None = None
    injection: Injection | None = field(default=None, init=False)
    not_run: list[str] = field(default_factory=list, init=False)

    @property
    def found_heads(self) -> list[str]:
        """The output layers of the module at hand that train because "auto" took them for such."""
        if self.injection is None or self.injection_arguments["head"] != "auto":
            return []
        return self.injection.head

    def take_up(self, pl_module: nn.Module) -> None:
        """Turn to a module; adapters that an earlier ``fit`` put in, and did not initialise, count as put in now."""
        injection = vars(pl_module).get(INJECTION)
        self.injection = injection if injection is not None and injection.is_in(pl_module) else None
        self.not_run = []

    def forget_reset(self, pl_module: nn.Module) -> None:
        """Let adapters that were made new in place be initialised again."""
        unmark_reset(find_adapters(pl_module).values())

    def to_do(self, pl_module: nn.Module) -> dict[str, AdapterLayer] | None:
        """The LoRA layers still to be initialised: none when all are; ``None`` if the module has no adapter at all.

        Beside layers that are set already, those that somebody trained are set too.

        Raises:
            InputError: The module has adapters, but none that EVA can initialise, one is merged, or a name matches
                nothing.
        """
        if not has_adapters(pl_module):
            return None
        layers = wanted_adapters(pl_module)
        refuse_merged(layers)
        if self.injection is None and without_mark(layers):
            arguments = self.injection_arguments
            layers = wanted_adapters(pl_module, arguments["target_modules"], arguments["exclude"])
        new = without_mark(layers)
        return new if len(new) == len(layers) else {name: layer for name, layer in new.items() if layer.is_fresh}

    def inject(self, pl_module: nn.Module) -> dict[str, AdapterLayer]:
        """Put adapters in; returns their layers.

        Raises:
            InputError: See :func:`eva_lightning.adapters.inject`.
        """
        self.injection = inject(pl_module, **self.injection_arguments)
        vars(pl_module)[INJECTION] = self.injection
        return wanted_adapters(pl_module)

    def undo(self, pl_module: nn.Module) -> None:
        """Leave a module that has not been initialised as it was before."""
        if done(pl_module):
            return
        if self.injection is not None:
            self.injection.undo(pl_module)
        vars(pl_module).pop(INJECTION, None)
        ckpt.stop_describing(pl_module)
        self.injection = None

    @contextmanager
    def undone_on_failure(self, pl_module: nn.Module) -> Iterator[None]:
        """Undo everything, the random state included, if the body raises."""
        restore_rng = snapshot_rng()
        try:
            yield
        except BaseException:
            self.undo(pl_module)
            restore_rng()
            raise

    def initialise(
        self,
        where: Surroundings,
        pl_module: nn.Module,
        layers: Mapping[str, AdapterLayer],
        *,
        injected: bool,
        verbose: bool,
    ) -> EVAState:
        """Decompose, redistribute, write A and B, and give optimizers and averages the new parameters.

        Args:
            where: Gives the minibatches.
            pl_module: With adapters.
            layers: Those to initialise.
            injected: The adapters were put in a moment ago: optimizers do not know them.
            verbose: Say what is done.

        Returns:
            The state, with the ranks that the layers have now.

        Raises:
            InputError: An adapter is trained or was frozen since it was put in, there is no training data, or a given
                state does not fit.
        """
        started = time.perf_counter()
        refuse_trained(layers)
        if self.injection is not None:
            refuse_frozen(layers)
        if self.given is not None and self.streaming.algorithm == "paper":
            refuse_other_algorithm(self.given, selection_of(layers, self.rho, self.metric, self.init))
        before = count_trainable(pl_module)
        state = self.given or self._stream(where, pl_module, layers, verbose)
        with restored_on_failure(pl_module), _unmarked_on_failure(layers):
            plan = self._apply(where, pl_module, layers, state)
            where.renew(plan.replaces_parameters or injected)
            plan.state.seconds = time.perf_counter() - started
            if verbose:
                after, skipped = count_trainable(pl_module), find_skipped(pl_module)
                say_summary(plan, pl_module, before, after, self.injection, skipped, self.streaming.limit)
            return plan.state

    def _apply(
        self, where: Surroundings, pl_module: nn.Module, layers: Mapping[str, AdapterLayer], state: EVAState
    ) -> Plan:
        # an adapter that takes no part in training ends a fit with DistributedDataParallel
        stops = where.refuses_unused_parameters
        drop_idle = stops and self.injection is not None
        plan = make_plan(
            layers,
            state,
            self.rho,
            self.metric,
            self.init,
            self.streaming.seed,
            given=self.given is not None,
            drop_idle=drop_idle,
        )
        apply_plan(pl_module, layers, plan, self.injection is not None, self.rescale_alpha)
        mark_done((layer for name, layer in layers.items() if plan.state.ranks[name] > 0), "initialised")
        vars(pl_module).pop(INJECTION, None)
        self.not_run = plan.untouched
        if plan.untouched:
            warn_of_layers_not_run(plan.untouched, len(layers), removed=drop_idle, stops=stops)
        return plan

    def _stream(
        self, where: Surroundings, pl_module: nn.Module, layers: Mapping[str, AdapterLayer], verbose: bool
    ) -> EVAState:
        options = self.streaming.resolved()
        limit = int(min(options.limit, where.set_up()))
        if options.algorithm == "fast":  # which does not start over
            options = replace(options, max_batches=limit)
        k = max(round(layer.rank * self.rho) for layer in layers.values())
        inputs = {name: layer.inputs() for name, layer in layers.items()}
        if verbose:
            plan = Allocation.plan(inputs, k, options, self.init == "minor")
            sent = f"; processes exchange {max(plan.messages.values()):,} bytes per layer at most"
            say(f"EVA: {plan}{sent if where.world_size > 1 else ''}")
        reads = WeightReads(pl_module, layers)
        with (
            disabled(layers.values()),
            kept_trainable(pl_module),
            streaming_progress(where.shows_progress, options) as progress,
        ):
            state = compute_eva_state(
                pl_module,
                lambda: where.batches(limit),
                inputs,
                k,
                options,
                forward_fn=self.forward_fn,
                mask_fn=self.mask_fn,
                context=reads.in_first(where.forward_context),
                progress=progress,
                minor=self.init == "minor",
                selection=selection_of(layers, self.rho, self.metric, self.init),
            )
        # where a layer did not run, that is said, and its adapter changes nothing
        found = [name for name in reads.found if name in state.components]
        mark_read_elsewhere(layers[name] for name in found)
        if found:
            warn_of_weights_read(found, len(layers))
        return state


@contextmanager
def _unmarked_on_failure(layers: Mapping[str, AdapterLayer]) -> Iterator[None]:
    """Count the layers as not initialised if the body raises, so that everything about them can be undone."""
    try:
        yield
    except BaseException:
        unmark(layers.values())
        raise
