"""One run of a sweep: its settings, its identity, and the EVA state it shares with others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from eva_lightning.methods.keys import MethodKey
from eva_lightning.vision.data.tasks import TASKS
from experiments.runner.run_folder import RunFolder
from experiments.vtab import run
from experiments.vtab.grid import Point
from experiments.vtab.store import Phase

#: Phase -> training split (paper, section D.3): tuned on 800/200, trained on all 1,000 and tested.
SPLITS: dict[Phase, str] = {"tune": "train800", "final": "train800val200"}

#: Phase -> folder in OUTPUT for its runs.
PHASE_FOLDERS: dict[Phase, str] = {"tune": "tuning", "final": "runs"}

#: What the grid sets for each run; everything else is one experiment's for all its runs.
_PER_RUN = ("task", "method", "rho", "lr", "rank", "seed", "split", "eva_state")


def digest(document: Any) -> str:
    """16 hexadecimal digits of a JSON document."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache
def weights_identity(weights: str) -> str:
    """What tells weights from others, wherever they lie: the choice itself, or a file's name, size and both ends.

    The ends hold a safetensors file's table and a .pth archive's checksums; reading the whole of a ViT-g would take
    seconds at every start.
    """
    file = Path(weights).expanduser()
    if weights in ("pretrained", "none") or not file.is_file():
        return weights
    size, span = file.stat().st_size, 1 << 20
    with file.open("rb") as handle:
        content = hashlib.sha256(handle.read(span))
        handle.seek(max(0, size - span))
        content.update(handle.read(span))
    return f"{file.name}:{size}:{content.hexdigest()[:16]}"


def experiment_settings(settings: run.Settings) -> dict[str, Any]:
    """The settings that all runs of an experiment share and that change its results."""
    shared = {k: v for k, v in asdict(settings).items() if k not in _PER_RUN and k not in run.INCIDENTAL}
    return {**shared, "weights": weights_identity(settings.weights)}


@dataclass(frozen=True)
class Job:
    """A run to be done: one row of the results store.

    Attributes:
        key: The method, with its ρ.
        phase: ``"tune"`` (train800, judged on val200) or ``"final"`` (train800val200, judged on test).
        settings: Everything, as the run command takes it, but for the shared EVA state.
        components: Components per layer that the shared EVA state of this task must hold; 0: none is used.
    """

    key: MethodKey
    phase: Phase
    settings: run.Settings
    components: int = 0

    @classmethod
    def of(
        cls, base: run.Settings, key: MethodKey, task: str, phase: Phase, point: Point, seed: int, components: int
    ) -> Job:
        """The run of a grid's `point` with the settings `base`."""
        settings = replace(
            base,
            task=task,
            method=key.method,
            rho=run.Settings.rho if key.rho is None else key.rho,
            lr=point.lr,
            rank=run.Settings.rank if point.rank is None else point.rank,
            seed=seed,
            split=SPLITS[phase],
        )
        return cls(key, phase, settings, components)

    @property
    def point(self) -> Point:
        """Learning rate and, if the method has one, rank."""
        return Point(self.settings.lr, self.settings.rank if self.key.adapts else None)

    @cached_property
    def experiment(self) -> str:
        """Identity of the experiment: same model, weights, protocol and so on, whatever task, method and grid."""
        return digest(experiment_settings(self.settings))

    @cached_property
    def run_id(self) -> str:
        """Identity of the run: the same settings give the same, in every sweep and on every machine."""
        own = [self.settings.task, self.key.key, self.phase, float(self.point.lr), self.point.rank, self.settings.seed]
        return digest([self.experiment, *own])

    def row(self) -> Mapping[str, Any]:
        """The row of the results store, before the run."""
        return {
            "run_id": self.run_id,
            "experiment": self.experiment,
            "model": self.settings.model,
            "task": self.settings.task,
            "group": TASKS[self.settings.task].group,
            "method": self.key.key,
            "phase": self.phase,
            "lr": self.point.lr,
            "rank": self.point.rank,
            "seed": self.settings.seed,
            "protocol": self.settings.protocol,
            "settings": asdict(self.settings),
        }

    def folder(self) -> RunFolder:
        """Where the run works. Final runs keep it; that of a tuning run goes when its row is written."""
        path = Path(self.settings.output) / PHASE_FOLDERS[self.phase] / f"{self.settings.run_name}-{self.run_id[:8]}"
        return RunFolder(path, asdict(self.settings), (*run.INCIDENTAL, "eva_state", "weights"))

    @property
    def keeps_folder(self) -> bool:
        """Whether the folder stays: a final run's, and any in which loggers have written."""
        return self.phase == "final" or self.settings.logger != "none"

    def __str__(self) -> str:
        return f"{self.settings.task}, {self.key}, {self.point}, seed {self.settings.seed}, {self.phase}"
