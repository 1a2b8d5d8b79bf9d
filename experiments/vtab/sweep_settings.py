"""The settings of a sweep: its own, and those of the run command that it hands on to every run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

from eva_lightning.errors import InputError, unknown
from eva_lightning.methods.keys import MethodKey
from eva_lightning.vision.data.tasks import TASKS
from experiments.runner.settings import option, parse_settings
from experiments.vtab import run
from experiments.vtab.backends import BACKENDS
from experiments.vtab.grid import Grid, load_grid, override

#: The methods of the paper's Table 20.
TABLE_20 = "fft,lora,adalora,pissa,olora,eva,dora,eva-dora"

#: Settings of a run that the sweep sets.
_SET_HERE = (
    "root", "task", "method", "rank", "rho", "lr", "seed", "split", "eva_state", "devices", "workers", "output", "name",
    "overwrite", "progress",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a sweep is asked to do; what it hands on to the run command (``--weights``, ...) is in `handed_on`."""

    root: str = option("data/vtab-1k", "folder that holds the VTAB-1K task folders")
    tasks: str = option("all", "tasks with commas between them; natural, specialized and structured name groups")
    methods: str = option(TABLE_20, "methods with commas between them; EVA's ρ behind a colon, as eva:1 (else 2)")
    grid: str = option("paper", "paper, or a YAML file with lrs, ranks, tune_seeds and final_seeds")
    lrs: str | None = option(None, "learning rates to tune over, with commas, instead of the grid's")
    ranks: str | None = option(None, "ranks to tune over, with commas, instead of the grid's")
    tune_seeds: str | None = option(None, "tuning seeds: how many, or which ones with commas, instead of the grid's")
    final_seeds: str | None = option(None, "final seeds: how many (0: tune only), or which ones, instead of the grid's")
    state_components: int | None = option(
        None, "components per layer of the shared EVA states; as many as the grid needs if not given"
    )
    backend: str = option("local", "local (processes of this machine) or ray (GPUs of one or many machines)")
    workers: int | None = option(None, "runs at the same time; one per share of a GPU (or 4 CPU cores) if not given")
    gpus_per_run: float | None = option(None, "share of a GPU per run, such as 0.5; a whole one if not given")
    cpus_per_run: float = option(1.0, "CPU cores per run, for ray")
    threads: int | None = option(None, "CPU threads per run; CPU cores / workers if not given")
    decode_threads: int = option(4, "threads that decode a task's images, the first time")
    ray_address: str | None = option(
        None, "running Ray cluster (auto, or ray://host:port); starts its own if not given"
    )
    checkpoint_minutes: float = option(10.0, "a run longer than this is resumed, a shorter one repeated if interrupted")
    output: str = option("runs/vtab", "folder for results.sqlite, final runs, EVA states and cache")
    store: str | None = option(None, "results store; OUTPUT/results.sqlite if not given")
    retry_failed: bool = option(False, "run again what failed")
    skip_failed: bool = option(
        False, "choose among the settings without failed runs; else a failure holds the choice up"
    )
    plan: bool = option(False, "say what would run, what it takes and how long, and stop")
    progress: bool = option(True, "show progress")
    handed_on: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "settings of every run"})

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError(unknown("backend", self.backend, BACKENDS))
        for name in ("workers", "threads", "decode_threads", "state_components"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        for name in ("gpus_per_run", "cpus_per_run", "checkpoint_minutes"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"{name} must be at least 0, got {value}")
        if self.ray_address is not None and self.backend != "ray":
            raise InputError(f"ray_address goes with --backend ray, got {self.ray_address!r} with {self.backend}")
        # each of these checks its part
        _ = self.task_names, self.base, [self.components(key) for key in self.keys]

    @cached_property
    def task_names(self) -> tuple[str, ...]:
        """The tasks, in the order of the paper's tables; groups and ``all`` written out."""
        groups = {task.group for task in TASKS.values()}
        wanted = set()
        for word in _words(self.tasks):
            if word == "all":
                wanted |= set(TASKS)
            elif word in groups:
                wanted |= {name for name, task in TASKS.items() if task.group == word}
            elif word in TASKS:
                wanted.add(word)
            else:
                raise InputError(unknown("VTAB-1K task", word, ["all", *sorted(groups), *TASKS], list_all=True))
        if not wanted:
            raise InputError("tasks must name at least one task")
        return tuple(name for name in TASKS if name in wanted)

    @cached_property
    def keys(self) -> tuple[MethodKey, ...]:
        """The methods, each once."""
        keys = tuple(dict.fromkeys(MethodKey.parse(word) for word in _words(self.methods)))
        if not keys:
            raise InputError("methods must name at least one method")
        return keys

    @cached_property
    def search(self) -> Grid:
        """The grid, with what the command line says otherwise."""
        axes = {name: getattr(self, name) for name in ("lrs", "ranks", "tune_seeds", "final_seeds")}
        return override(load_grid(self.grid), **axes)

    def components(self, key: MethodKey) -> int:
        """Components per layer of the shared EVA states that the runs of `key` start from; 0 where they need none.

        One number for all methods, so that they share one state: as many as the largest rank of the grid needs by any
        of them, or as the protocol has.

        Raises:
            InputError: The grid needs more than ``--state-components``, or than the protocol has.
        """
        if not key.streams_eva:
            return 0
        rank = max(self.search.ranks)
        decomposition = self.base.rules.decomposition
        if decomposition is not None and key.state_kind == "major":
            decomposition.rho(rank, key.rho or 1.0)  # which refuses ranks beyond it
            return decomposition.components
        needed, most = max(((other.components(rank), other) for other in self.keys), key=lambda pair: pair[0])
        if self.state_components is None:
            return needed
        if needed > self.state_components:
            rho = f" and ρ = {most.rho:g}" if most.rho is not None else ""
            raise InputError(
                f"rank {rank}{rho} ({most}) needs {needed} components per layer, beyond the {self.state_components} of "
                "the EVA states: raise --state-components or leave out the larger ranks"
            )
        return self.state_components

    @cached_property
    def base(self) -> run.Settings:
        """What all runs have in common, on the first task by the first method."""
        values = dict(self.handed_on)
        values["cache"] = values.get("cache") or str(Path(self.output) / "cache")
        return run.Settings(
            root=self.root,
            task=self.task_names[0],
            method=self.keys[0].method,
            output=self.output,
            workers=self.decode_threads,
            progress=False,
            **values,
        )

    @property
    def store_path(self) -> Path:
        """The results store."""
        return Path(self.output) / "results.sqlite" if self.store is None else Path(self.store)

    def threads_for(self, slots: int) -> int:
        """CPU threads for each of so many runs at a time on this machine, or for each Ray task."""
        shared = round(self.cpus_per_run) if self.backend == "ray" else (os.cpu_count() or 1) // slots
        return self.threads or max(1, shared)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _command_line() -> type[Any]:
    """A dataclass of all options: those of the sweep, then those handed on."""
    own = [item for item in fields(Settings) if item.name != "handed_on"]
    more = [item for item in fields(run.Settings) if item.name not in _SET_HERE]
    hints = {**get_type_hints(run.Settings), **get_type_hints(Settings)}
    return make_dataclass(
        "SweepOptions",
        [(item.name, hints[item.name], field(default=item.default, metadata=item.metadata)) for item in [*own, *more]],
        frozen=True,
    )


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``.

    Raises:
        InputError, MissingInputError: A setting is wrong, or the grid file is missing.
    """
    description = "All tasks, methods, learning rates, ranks and seeds as one resumable job"
    options = asdict(parse_settings(_command_line(), "python -m experiments.vtab sweep", description, args))
    own = {item.name for item in dataclasses.fields(Settings)}
    handed_on = {name: value for name, value in options.items() if name not in own}
    return Settings(**{name: value for name, value in options.items() if name in own}, handed_on=handed_on)
