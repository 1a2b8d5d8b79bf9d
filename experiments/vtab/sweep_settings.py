"""All tasks, methods, learning rates, ranks and seeds, safe to interrupt: ``python -m experiments.vtab sweep``.

Per task and method: tuning on train800/val200 over the grid, choice of learning rate and rank by mean validation
accuracy over the seeds, then final runs on all 1,000 images and the test set, which start as soon as this choice is
made. Rerun to resume, also after ``kill -9``, with another number of workers or another backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from eva_lightning.errors import InputError, unknown
from eva_lightning.methods.registry import METHODS, MethodKey
from eva_lightning.names import check_name
from eva_lightning.vision.data.own_tasks import find_task
from eva_lightning.vision.data.tasks import TASKS, VTABTask
from experiments.runner.command import SettingsCommand
from experiments.runner.options import RunnerOptions
from experiments.runner.settings import Role, option
from experiments.vtab import settings as of_a_run
from experiments.vtab.grid import SELECTED_BY, Grid, load_grid

#: The methods of the paper's Table 20.
TABLE_20 = ("fft", "lora", "adalora", "pissa", "olora", "eva", "dora", "eva-dora")

PLACE, SELECTION = Role.PLACE, Role.SELECTION


@dataclass(frozen=True)
class Contender:
    """What is tuned alone on a task: a method, with every ρ to choose from.

    Attributes:
        keys: The method with each ρ; one key where it has none, or is to have one only.
        always: Those that get final runs with their own best learning rate and rank, whichever ρ is chosen.
    """

    keys: tuple[MethodKey, ...]
    always: tuple[MethodKey, ...] = ()

    @property
    def searches_rho(self) -> bool:
        """Whether ρ is chosen, too."""
        return len(self.keys) > 1

    @property
    def name(self) -> str:
        """What users type for it."""
        return self.keys[0].method if self.searches_rho else self.keys[0].key

    @property
    def adapts(self) -> bool:
        """Whether it has a rank."""
        return self.keys[0].adapts

    def key_at(self, rho: float | None) -> MethodKey:
        """Its method at a ρ that was chosen, or at the only one."""
        return MethodKey(self.keys[0].method, rho) if self.searches_rho else self.keys[0]


@dataclass(frozen=True, kw_only=True)
class Settings(RunnerOptions, of_a_run.SharedOptions):
    """What a sweep is asked to do: which runs, how they are run, and what they have in common."""

    root: str = option("data/vtab-1k", "folder that holds the VTAB-1K task folders", PLACE)
    output: str = option("runs/vtab", "folder for tuning and final runs, EVA states and decoded images", PLACE)
    tasks: tuple[str, ...] = option(("all",), "tasks; natural, specialized and structured name groups", SELECTION)
    methods: tuple[str, ...] = option(
        TABLE_20,
        "methods; EVA's ρ behind a colon, as eva:1 (else eva and eva-dora search it, others have 2)",
        SELECTION,
    )
    grid: str = option("paper", "paper, or a YAML file with lrs, ranks, rhos, tune_seeds and final_seeds", SELECTION)
    lrs: tuple[float, ...] | None = option(None, "learning rates to tune over, instead of the grid's", SELECTION)
    ranks: tuple[int, ...] | None = option(None, "ranks to tune over, instead of the grid's", SELECTION)
    rhos: tuple[float, ...] | None = option(None, "ρ to tune EVA over, instead of the grid's 1 and 2", SELECTION)
    tune_seeds: int | tuple[int, ...] | None = option(
        None, "tuning seeds: how many, or which ones, instead of the grid's", SELECTION
    )
    final_seeds: int | tuple[int, ...] | None = option(
        None, "final seeds: how many (0: tune only), or which ones, instead of the grid's", SELECTION
    )
    final_each_rho: bool = option(
        False, "final runs of every ρ at its own best learning rate and rank, not of the better one alone", SELECTION
    )
    select: str = option(
        "accuracy", "choose learning rate, rank and ρ by the accuracy on validation images (the paper) or the loss, "
        "which is steadier where they are few", SELECTION, choices=SELECTED_BY,
    )  # fmt: skip
    validate: bool = option(
        False, "evaluate val200 after every epoch of the tuning runs, for curves of the held-out loss", PLACE
    )
    state_components: int | None = option(
        None, "components per layer of the shared EVA states; as many as the grid needs if not given", PLACE,
        at_least=1,
    )  # fmt: skip
    decode_threads: int = option(4, "threads that decode a task's images, the first time", PLACE, at_least=1)

    def __post_init__(self) -> None:
        RunnerOptions.__post_init__(self)
        of_a_run.SharedOptions.__post_init__(self)
        # each of these checks its part
        _ = self.task_names, self.search, [self.components(key) for key in self.keys]

    @property
    def uses_gpus(self) -> bool:
        """Whether runs may use GPUs."""
        return self.gpus_per_run != 0 and self.accelerator != "cpu"

    @cached_property
    def task_names(self) -> tuple[str, ...]:
        """The tasks, in the order of the paper's tables, then other folders; groups and ``all`` written out."""
        groups = {word: {name for name, task in TASKS.items() if word in (task.group, "all", name)}
                  for word in ("all", *sorted({task.group for task in TASKS.values()}), *TASKS)}  # fmt: skip
        own = tuple(dict.fromkeys(word for word in self.tasks if word not in groups))
        for word in own:
            check_name("tasks", word, setting="tasks")
            if not (Path(self.root) / word).is_dir():
                message = f"{unknown('VTAB-1K task', word, groups)} (nor is it a folder of images in {self.root})"
                raise InputError(message, setting="tasks")
        wanted = set().union(*(groups.get(word, set()) for word in self.tasks))
        if not wanted and not own:
            raise InputError("tasks must name at least one task", setting="tasks")
        return (*(name for name in TASKS if name in wanted), *own)

    def task(self, name: str) -> VTABTask:
        """What is known of one of the tasks.

        Raises:
            MissingInputError, InputError: A folder that is none of VTAB-1K's tasks cannot be used.
        """
        return find_task(self.root, name)

    @cached_property
    def contenders(self) -> tuple[Contender, ...]:
        """What is tuned alone, each once; ``eva:1`` beside ``eva`` asks for final runs at ρ = 1 in any case."""
        named = tuple(dict.fromkeys((word.strip(), MethodKey.parse(word)) for word in self.methods))
        if not named:
            raise InputError("methods must name at least one method", setting="methods")
        searched = {
            word: tuple(MethodKey(word, rho) for rho in sorted(self.search.rhos))
            for word, _ in named
            if word in METHODS and METHODS[word].searches_rho
        }
        self._refuse_equal_rhos(searched)
        every = self.search.rhos if self.final_each_rho else ()
        found: dict[Contender, None] = {}
        for word, key in named:
            keys = searched.get(word)
            if keys is not None:
                asked = {other for text, other in named if text != word and other in keys}
                found[Contender(keys, tuple(each for each in keys if each.rho in every or each in asked))] = None
            elif key not in searched.get(key.method, ()):
                found[Contender((key,))] = None
        return tuple(found)

    def _refuse_equal_rhos(self, searched: Mapping[str, tuple[MethodKey, ...]]) -> None:
        """Under a protocol where all components compete, every ρ above 1 is the same."""
        uneven = [rho for rho in self.search.rhos if rho > 1]
        if searched and self.rules.decomposition is not None and len(uneven) > 1:
            raise InputError(
                f"protocol {self.protocol} lets all {self.rules.decomposition.components} components of a layer "
                f"compete whatever ρ above 1 is, so rhos may hold one such value, got {', '.join(map(str, uneven))}",
                setting="rhos",
            )

    @cached_property
    def keys(self) -> tuple[MethodKey, ...]:
        """The methods with every ρ they run with, each once."""
        return tuple(dict.fromkeys(key for contender in self.contenders for key in contender.keys))

    @cached_property
    def search(self) -> Grid:
        """The grid, with what the command line says otherwise."""
        return load_grid(
            self.grid, lrs=self.lrs, ranks=self.ranks, rhos=self.rhos, tune_seeds=self.tune_seeds,
            final_seeds=self.final_seeds,
        )  # fmt: skip

    def components(self, key: MethodKey) -> int:
        """Components per layer of the shared EVA states that the runs of `key` start from; 0 where they need none.

        One number for all methods, so that they share one state: as many as the largest rank of the grid needs by any
        of them, or as the protocol has. (With the paper's algorithm each rank has a state of its own, at most
        this large.)

        Raises:
            InputError: The grid needs more than ``--state-components``, or than the protocol has.
        """
        if key.state_kind is None:
            return 0
        self.check_algorithm(key)
        if self.algorithm == "paper" and self.state_components is not None:
            raise InputError(
                "state_components has no meaning with algorithm=paper, where each rank, rho and metric has an EVA "
                "state of its own: leave it out",
                setting="state_components",
            )
        rank = max(self.search.ranks)
        decomposition = self.rules.decomposition
        if decomposition is not None and key.state_kind == "major":
            decomposition.rho(rank, key.rho or 1.0)  # which refuses ranks beyond it
            return decomposition.components
        needed, most = max(((other.components(rank), other) for other in self.keys), key=lambda pair: pair[0])
        if needed > (self.state_components or needed):
            rho = f" and ρ = {most.rho:g}" if most.rho is not None else ""
            raise InputError(
                f"rank {rank}{rho} ({most}) needs {needed} components per layer, beyond the {self.state_components} of "
                "the EVA states: raise --state-components or leave out the larger ranks"
            )
        return self.state_components or needed

    def states(self) -> list[int]:
        """Components of each EVA state that one task and split needs: one per kind, and with the paper's algorithm
        one per rank and ρ."""
        keys = [key for key in self.keys if key.state_kind is not None]
        if self.algorithm == "paper":
            pairs = {(rank, key.rho): key.components(rank) for key in keys for rank in self.search.ranks}
            return list(pairs.values())
        return list({key.state_kind: self.components(key) for key in keys}.values())

    def run(self, task: str, key: MethodKey, **changes: object) -> of_a_run.Settings:
        """The settings of a run on `task` by `key`, as the run command takes them."""
        shared = {item.name: getattr(self, item.name) for item in fields(of_a_run.SharedOptions)}
        rho = {} if key.rho is None else {"rho": key.rho}
        own = {"root": self.root, "output": self.output, "workers": self.decode_threads, "progress": False}
        return of_a_run.Settings(**shared, **rho, **own, task=task, method=key.method, **changes)  # type: ignore[arg-type]

    @cached_property
    def base(self) -> of_a_run.Settings:
        """A run on the first task by the first method: what all runs have in common."""
        return self.run(self.task_names[0], self.keys[0])


COMMAND = SettingsCommand(
    Settings, "python -m experiments.vtab sweep", (__doc__ or "").splitlines()[0], "experiments.vtab.sweep:run_sweep"
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
