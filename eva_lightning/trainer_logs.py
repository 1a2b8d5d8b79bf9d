"""What EVA found, in the Trainer's loggers: scalars, hyper-parameters, and figures where a logger takes them."""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from typing import Any

import lightning.pytorch as pl

from eva_lightning.errors import MissingPackageError
from eva_lightning.namespaces import lightning_classes
from eva_lightning.output import say
from eva_lightning.state import EVAState

GROUP = "eva"


def summary_scalars(state: EVAState) -> dict[str, float]:
    """What an initialisation took and gave, as a few numbers.

    Returns:
        ``eva/seconds``, ``eva/batches``, ``eva/rank_mean`` (over all layers, the removed ones as 0), ``eva/rank_min``,
        ``eva/rank_max``, ``eva/layers_removed`` (rank 0) and ``eva/explained_variance``: the share of their inputs'
        variance that the kept components explain, on average over the layers that ran.
    """
    ranks = list(state.ranks.values())
    values: dict[str, float] = {
        "seconds": state.seconds,
        "batches": state.n_batches,
        "rank_mean": statistics.fmean(ranks),
        "rank_min": min(ranks),
        "rank_max": max(ranks),
        "layers_removed": ranks.count(0),
    }
    if explained := _explained(state):
        values["explained_variance"] = statistics.fmean(explained.values())
    return {f"{GROUP}/{key}": float(value) for key, value in values.items()}


def layer_scalars(state: EVAState) -> dict[str, float]:
    """``eva_rank/LAYER`` and, for layers that ran, ``eva_explained_variance/LAYER``."""
    ranks = {f"{GROUP}_rank/{layer}": float(rank) for layer, rank in state.ranks.items()}
    return ranks | {f"{GROUP}_explained_variance/{layer}": share for layer, share in _explained(state).items()}


def hyperparameters(state: EVAState) -> dict[str, str | int | float]:
    """How a state was computed, and :func:`summary_scalars` without their group."""
    return {**state.meta, **{key.partition("/")[2]: value for key, value in summary_scalars(state).items()}}


class TrainerLogs:
    """Writes a state to a Trainer's loggers, once: at the start of training, when they have what is the module's own.

    Hyper-parameters become one entry ``eva`` beside the module's, in the one call of ``log_hyperparams`` that Lightning
    makes: TensorBoard shows no others than those of the first call. An entry ``eva`` of the module's own stays.

    Args:
        state: What is to be written; None for nothing.
        verbose: Say why there are no figures.
    """

    def __init__(self, state: EVAState | None = None, verbose: bool = False) -> None:
        self._state = state if state is not None and state.ranks else None
        self._verbose = verbose
        self._joined: list[_Joined] = []

    def forget(self) -> None:
        """Write nothing."""
        self._state = None

    def join_hyperparameters(self, trainer: pl.Trainer) -> None:
        """Have the hyper-parameters that Lightning is about to log joined by ours."""
        if self._state is not None and trainer.is_global_zero:
            ours = {GROUP: hyperparameters(self._state)}
            self._joined = [_Joined(logger, ours) for logger in trainer.loggers]

    def let_go(self) -> None:
        """Leave the loggers as they were."""
        for joined in self._joined:
            joined.undo()
        self._joined = []

    def write(self, trainer: pl.Trainer) -> None:
        """Write everything, in the first process."""
        if all(isinstance(logger, lightning_classes("loggers.logger", "DummyLogger")) for logger in trainer.loggers):
            return  # none, or those of the learning rate finder
        state, joined, self._state, self._joined = self._state, self._joined, None, []
        if state is None or not trainer.is_global_zero:
            return
        for each in joined:
            each.finish()
        values = summary_scalars(state) | layer_scalars(state)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        drawing: list[Any] = [x for x in trainer.loggers if isinstance(x, lightning_classes("loggers", *_DRAWING))]
        if drawing:
            self._draw(state, drawing, trainer.global_step)

    def _draw(self, state: EVAState, loggers: list[Any], step: int) -> None:
        try:
            figures = {f"{GROUP}/ranks": state.plot_ranks()}
            if state.explained_variance_ratio:
                figures[f"{GROUP}/spectra"] = state.plot_spectra()
        except MissingPackageError as error:
            if self._verbose:
                say(f"EVA: the loggers get no figures ({error})")
            return
        for logger in loggers:
            for name, figure in figures.items():
                if hasattr(logger, "log_image"):
                    logger.log_image(name, [figure], step=step)
                else:
                    # close=True would ask pyplot, which knows nothing of our figures
                    logger.experiment.add_figure(name, figure, global_step=step, close=False)


#: What takes figures: wandb by ``log_image``, the other by its writer.
_DRAWING = ("TensorBoardLogger", "WandbLogger")


class _Joined:
    """Stands for a logger's ``log_hyperparams`` until it is called once."""

    def __init__(self, logger: Any, ours: dict[str, Any]) -> None:
        self._logger, self._ours = logger, ours
        self._before = vars(logger).get("log_hyperparams")
        self._inner = logger.log_hyperparams
        vars(logger)["log_hyperparams"] = self

    def __call__(self, params: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.undo()
        given = vars(params) if isinstance(params, Namespace) else dict(params or {})
        return self._inner({**self._ours, **given}, *args, **kwargs)

    def finish(self) -> None:
        """Log ours alone where nobody has logged any meanwhile."""
        if not self.undo():
            return
        if isinstance(self._logger, lightning_classes("loggers", "TensorBoardLogger")) and self._logger.hparams:
            self._logger.hparams.update(self._ours)  # logged before fit: a second call would not be shown
        else:
            self._logger.log_hyperparams(self._ours)

    def undo(self) -> bool:
        """Give the logger its own back; whether it had ours still."""
        if vars(self._logger).get("log_hyperparams") is not self:
            return False
        del vars(self._logger)["log_hyperparams"]
        if self._before is not None:
            vars(self._logger)["log_hyperparams"] = self._before
        return True


def _explained(state: EVAState) -> dict[str, float]:
    """The share of the variance of each layer's inputs that its kept components explain, for layers that ran."""
    rows = {str(row["layer"]): float(row["explained"]) for row in state.describe()}
    return {layer: share for layer, share in rows.items() if not math.isnan(share)}
