"""Compute an EVA state on one device for runs on many: ``python -m eva_lightning.precompute train:build --output eva``.

``train:build`` is a function without arguments that returns a LightningModule and its training data (a
LightningDataModule or a loader), and, where the options below do not suffice, an EVAInitCallback to compute it with. A
project that uses LightningCLI gives its configuration instead: ``--config config.yaml``. With
``EVAInitCallback(state="eva")`` a run under any strategy then starts from the state, for any r * rho up to the state's
own, and nothing is streamed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from eva_lightning.callback import EVAInitCallback
from eva_lightning.errors import InputError
from eva_lightning.state import EVAState


def precompute(
    module: pl.LightningModule, data: Any, callback: EVAInitCallback | None = None, **trainer_options: Any
) -> EVAState:
    """The state that `callback` computes for `module` on one device, before any training step.

    Args:
        module: On the CPU; gets adapters.
        data: A LightningDataModule, or what ``Trainer.fit`` takes as training loaders.
        callback: How to compute it; default ``EVAInitCallback()``.
        trainer_options: For the Trainer, such as ``accelerator`` and ``precision``.

    Raises:
        InputError: See :class:`EVAInitCallback`.
    """
    callback = EVAInitCallback() if callback is None else callback
    trainer = pl.Trainer(
        devices=1, num_nodes=1, strategy="auto", max_epochs=0, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=[callback], **trainer_options,
    )  # fmt: skip
    given = {"datamodule": data} if isinstance(data, pl.LightningDataModule) else {"train_dataloaders": data}
    trainer.fit(module, **given)
    if callback.state is None or not callback.state.components:
        raise InputError(
            f"no state was computed for {type(module).__name__}: its adapters are initialised already; build it anew"
        )
    return callback.state


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    words = _parser().parse_args(arguments)
    try:
        if (words.source is None) == (words.config is None):
            raise InputError("give either a function as MODULE:FUNCTION or --config, one of the two")
        built = _from_config(words.config) if words.source is None else _from_function(words.source)
        module, data, *callback = built
        options = {"accelerator": words.accelerator, "precision": words.precision}
        state = precompute(module, data, callback[0] if callback else _callback(words), **options)
        path = state.save(words.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(state.components)} layers, {state.n_batches} minibatches -> {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eva_lightning.precompute", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", nargs="?", metavar="MODULE:FUNCTION", help="returns (module, data[, callback])")
    parser.add_argument("--output", required=True, help="file to write the state to; its folder is created")
    parser.add_argument("--config", help="a LightningCLI configuration with model and data, instead of a function")
    parser.add_argument("--rho", type=float, default=2.0, help="how uneven ranks may get (default: %(default)g)")
    parser.add_argument("--r", type=int, help="rank per layer on average (default: 16)")
    parser.add_argument("--target-modules", help="names with commas between them, or a regular expression")
    parser.add_argument("--exclude", help="layers to leave out, written likewise")
    parser.add_argument(
        "--algorithm", help="fast (default), or paper: Algorithms 1 and 2 of the paper, for just this r, rho and metric"
    )
    parser.add_argument("--metric", default="ratio", help="what components are ranked by (default: %(default)s)")
    parser.add_argument("--tau", type=float, help="convergence threshold")
    parser.add_argument("--delta", type=float, help="share of the layers (paper: components) that must have converged")
    parser.add_argument("--max-batches", type=int, help="most minibatches to stream")
    parser.add_argument("--tokens-per-sample", type=int, help="tokens to use of each sample (default: chosen by width)")
    parser.add_argument("--engine", help="exact, incremental, sketch or auto")
    parser.add_argument("--seed", type=int, help="of the random parts")
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu or auto (default)")
    parser.add_argument("--precision", default="32-true", help="as of Lightning's Trainer (default: %(default)s)")
    return parser


def _callback(words: argparse.Namespace) -> EVAInitCallback:
    names = ("algorithm", "tau", "delta", "max_batches", "tokens_per_sample", "engine", "seed")
    streaming = {name: getattr(words, name) for name in names if getattr(words, name) is not None}
    return EVAInitCallback(
        words.rho,
        words.r,
        target_modules=_names(words.target_modules),
        exclude=_names(words.exclude),
        metric=words.metric,
        **streaming,
    )


def _names(text: str | None) -> str | list[str] | None:
    """A list of plain names, or a regular expression."""
    if text is None or not all(part.replace(".", "").replace("_", "").isalnum() for part in text.split(",")):
        return text
    return text.split(",")


def _from_function(source: str) -> Sequence[Any]:
    name, colon, function_name = source.partition(":")
    if not colon:
        raise InputError(f"give a function as MODULE:FUNCTION, got {source!r}")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it, also where the command is started by its file
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise InputError(f"there is no module {name!r}: start the command in the project's folder") from error
    function: Callable[[], Any] | None = getattr(found, function_name, None)
    if not callable(function):
        raise InputError(f"{name} has no function {function_name!r}")
    built = function()
    if not isinstance(built, Sequence) or len(built) not in (2, 3) or not isinstance(built[0], pl.LightningModule):
        raise InputError(f"{source} must return (module, data) or (module, data, callback), got {type(built).__name__}")
    return built


def _from_config(path: str) -> Sequence[Any]:
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}")
    try:
        from lightning.pytorch.cli import LightningCLI
    except ModuleNotFoundError as error:
        raise InputError("--config needs jsonargparse: pip install 'jsonargparse[signatures]'") from error
    # what the file says of devices, loggers and callbacks is for the runs on many devices
    alone = ["devices=1", "num_nodes=1", "strategy=auto", "logger=false", "callbacks=null", "accelerator=cpu"]
    try:
        cli = LightningCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            run=False,
            args=["--config", path, *(f"--trainer.{each}" for each in alone)],
        )
    except SystemExit as error:  # the parser has printed what is wrong
        raise InputError(f"{path} is not a configuration of LightningCLI with model and data") from error
    return cli.model, cli.datamodule


if __name__ == "__main__":
    sys.exit(main())
