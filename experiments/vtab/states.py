"""Shared EVA states: one decomposition per task, training split, model and number of components serves many runs.

Learning rate, seed, rank and ρ do not change what a layer's inputs look like, and a run of rank r needs the first
``round(r * rho)`` components only: so the first run that needs a state computes it, with as many components as any
run of the sweep needs, and all others read it. Two per task: tuning sees train800, final runs all 1,000 images (the
protocol of the authors' code decomposes train800 for both: one per task).

With ``--algorithm paper`` the stream stops by the components that get a rank, so each rank, ρ and metric has a state of
its own, which serves its learning rates, seeds and variants of EVA.

How a run with a shared state differs from one that streams itself: the shared one is streamed in the data order of
seed 0, and until *its* components have converged, which for a smaller number of components can be sooner or later.
Where both see the same minibatches (seed 0, the same number of components, or training data of one minibatch) the
results are equal to the last bit.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
from filelock import FileLock

from eva_lightning.callback import EVAInitCallback
from eva_lightning.errors import InputError
from eva_lightning.files import digest
from eva_lightning.sealed import set_aside
from eva_lightning.state import EVAState
from experiments.runner.jobs import Shared
from experiments.runner.lightning_runs import trainer_precision
from experiments.runner.settings import Role, identity
from experiments.vtab import run
from experiments.vtab.settings import Settings

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedState(Shared):
    """An EVA state that a sweep needs.

    Attributes:
        path: Common stem of its two files.
        settings: Those of a run that would stream it: its rank is the number of components, ρ is 1, the seed 0. With
            the paper's algorithm rank and ρ are the run's.
    """

    settings: Settings

    @classmethod
    def of(cls, single: Settings, components: int) -> SharedState | None:
        """The state of so many components that a run starts from, or None for methods without."""
        kind = single.key.state_kind
        if kind is None or not components:
            return None
        method = "eva" if kind == "major" else "eva-minor"
        settings = replace(single, method=method, init=Settings.init, seed=0, eva_state=None)
        stops_by: dict[str, Any] = {}
        if single.algorithm == "paper":
            components = single.key.components(single.rank)
            stops_by = {"rank": settings.rank, "rho": settings.rho, "metric": settings.metric}
        else:
            settings = replace(settings, rank=components, rho=1.0)
        decomposition = settings.rules.decomposition
        if decomposition is not None and kind == "major":
            settings = replace(settings, split=decomposition.split)
        model = settings.model.replace("/", "_").replace(":", "_")
        inputs = digest(identity(settings, Role.INITIALISATION) | stops_by)
        stem = f"{settings.task}-{settings.split}-{model}-{kind}-{inputs}-k{components}"
        return cls(str(Path(settings.output) / "states" / stem), settings)

    def exists(self) -> bool:
        """Whether there is a complete one."""
        return self.find() is not None

    def find(self) -> Path | None:
        """A complete state of at least as many components: the smallest one, or None."""
        path = Path(self.path)
        stem, _, components = path.name.rpartition("-k")
        found = []
        for file in path.parent.glob(f"{stem}-k*.safetensors"):
            number = file.stem.rpartition("-k")[2]
            if number.isdigit() and int(number) >= int(components):
                found.append((int(number), file.with_suffix("")))
        return min(found)[1] if found else None

    def obtain(self) -> Path:
        """The state's path, computed first if it does not exist yet; other processes that want it wait.

        Raises:
            MissingInputError, InputError, UnreachableError: As :func:`experiments.vtab.run.build`.
            OSError: The disk is full.
        """
        found = self.find()
        if found is not None and _damage(found) is None:
            return found
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            found = self.find()
            reason = None if found is None else _damage(found)
            if found is None or reason is not None:
                # a damaged one is computed again under its own name
                found = path if found is None else _aside(found, reason)
                _compute(self._with_components(int(found.name.rpartition("-k")[2])), found)
        return found

    def _with_components(self, components: int) -> Settings:
        """The settings of a run that streams so many; those of the paper's algorithm have one number of them."""
        return self.settings if self.settings.algorithm == "paper" else replace(self.settings, rank=components)


_SOUND: set[tuple[str, int, int]] = set()


def _files(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.safetensors"), path.with_name(f"{path.name}.json")


def _damage(path: Path) -> str | None:
    """Why the state cannot be read, or None; each file is checked once per process."""
    try:
        times = [file.stat().st_mtime_ns if file.is_file() else 0 for file in _files(path)]
        stamp = (str(path.absolute()), times[0], times[1])
        if stamp not in _SOUND:
            EVAState.load(path)
            _SOUND.add(stamp)
    except InputError as error:
        return str(error)
    return None


def _aside(path: Path, reason: str | None) -> Path:
    """Rename the files of a damaged state."""
    for file in _files(path):
        if file.is_file():
            set_aside(file, reason or "", "computing it again")
    return path


def _compute(settings: Settings, path: Path) -> None:
    """Stream the training data through the model as a run of these settings would, and save what comes out."""
    data, module, callbacks = run.assemble(settings)
    (callback,) = (c for c in callbacks if isinstance(c, EVAInitCallback))
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=trainer_precision(settings.precision, settings.accelerator),  # type: ignore[arg-type]
        max_epochs=0,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data)
    assert callback.state is not None
    callback.state.save(path)
    with (path.parent / "computed.log").open("a", encoding="utf-8") as log:
        log.write(f"{path.name} process {os.getpid()} {callback.state.seconds:.2f} s\n")
