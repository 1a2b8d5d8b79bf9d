"""Compare methods on CW10 tasks: ``python -m experiments.metaworld compare --config configs/metaworld/compare.yaml``.

Every method is fine-tuned on every task with several seeds, at the same rank budget and at a learning rate tuned for
it alone, by validation loss, on other seeds. Noted are validation losses during training and success at the end; the
report has means with 95% intervals and paired differences between methods.

``--ranks`` and ``--rhos`` are tuned as well, ``--tune-per task,rank`` tunes for each task and rank alone, and
``--select success`` chooses by rollouts: together the paper's search, ``configs/metaworld/finetune_paper.yaml``.

``--demonstrations 5,20`` compares them with each number of demonstrations, ``--look-at 25`` also measures success after
so many steps: ``configs/metaworld/few_demonstrations.yaml``.

Every run is a folder below OUTPUT: safe to interrupt; rerun to resume.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from eva_lightning.errors import InputError, check_choice
from eva_lightning.methods import MethodKey, method_names
from eva_lightning.methods.registry import DEFAULT_RHO
from eva_lightning.rl.tasks import parse_tasks
from experiments.comparisons.search import SearchSettings, check_axis
from experiments.comparisons.settings import FIRST_TUNING_SEED, Part
from experiments.metaworld import finetune
from experiments.metaworld.before import RolloutSettings
from experiments.metaworld.success import DEFINITIONS, HEADLINE
from experiments.runner.command import SettingsCommand
from experiments.runner.jobs import Phase, Point
from experiments.runner.settings import Role, option

SELECTION = Role.SELECTION

#: What the network before fine-tuning is called among the methods.
BEFORE = "none"


@dataclass(frozen=True, kw_only=True)
class Settings(SearchSettings, finetune.SharedOptions):
    """What to compare; the layout of ``configs/metaworld/compare.yaml`` and ``finetune_paper.yaml``."""

    tasks: tuple[str, ...] = option(
        ("faucet-close", "window-close", "push", "handle-press-side"), "tasks, or cw10", SELECTION
    )
    methods: tuple[str, ...] = option(
        ("scratch", "fft", "lora", "dora", "eva:1", "eva", "eva-dora"), "methods; EVA's ρ behind a colon",
        SELECTION,
    )  # fmt: skip
    demonstrations: tuple[int, ...] | None = option(
        None, "numbers of demonstrations, each tuned and compared alone; none: train_episodes", SELECTION, at_least=1
    )
    val_episodes: int = option(8, "held-out demonstrations for the validation loss", Role.RESULT, at_least=1)
    max_steps: int = option(500, "optimizer steps (the paper: 100,000)", Role.RESULT, at_least=1)
    batch_size: int = option(8, "windows per step (the paper: 128)", Role.RESULT, at_least=1)
    success: str = option(
        HEADLINE.name, "definition of success that leads in the report, which has both: any (step) or final",
        SELECTION, choices=DEFINITIONS,
    )  # fmt: skip
    tune: bool = option(True, "tune learning rates that rates does not name; false: all must be named", SELECTION)
    grid: tuple[float, ...] = option(
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "learning rates to try when tuning", SELECTION, above=0
    )
    tune_tasks: tuple[str, ...] | None = option(
        None, "tasks to tune on, with all others at the same settings; none: tasks", SELECTION
    )
    zero_shot: bool = option(False, "roll out the network before fine-tuning as well", SELECTION)
    tune_steps: int = option(100, "steps of a tuning run", Role.RESULT, at_least=1)
    accelerator: str = option("cpu", "Lightning accelerator of each run: cpu, gpu, auto, ...", Role.PLACE)
    output: str = option("runs/metaworld-compare", "folder for runs and report", Role.PLACE)

    def __post_init__(self) -> None:
        super().__post_init__()
        unnamed = [key for key in self.labels if key not in self.given_rates]
        if unnamed and not self.tune:
            message = f"rates must name every method when tune is false; {unnamed[0]} is missing"
            raise InputError(message, setting="rates")
        if self.select != "loss" and not self.eval_episodes:
            raise InputError(f"select {self.select} needs eval_episodes, which is 0", setting="select")
        check_axis("demonstrations", self.demonstrations)
        if self.tune_tasks is not None and "task" in self.tune_per:
            raise InputError(
                "tune_tasks goes with one choice for all tasks, not with tune_per task", setting="tune_tasks"
            )
        if self.zero_shot and not self.eval_episodes:
            raise InputError("zero_shot needs eval_episodes, which is 0", setting="zero_shot")
        if self.zero_shot and None in self.numbers:
            raise InputError("zero_shot needs the number of demonstrations, train_episodes", setting="zero_shot")
        self.run(self.parts[0], "final", Point.of(lr=1e-3), 0, self.task_names[0])  # checks the other settings

    @property
    def uses_gpus(self) -> bool:
        """Whether runs may use GPUs."""
        return self.gpus_per_run != 0 and self.accelerator != "cpu"

    def key_and_label(self, text: str) -> tuple[str, str]:
        """A method of the Meta-World half."""
        check_choice("method", MethodKey.parse(text).method, method_names("rl"))
        return super().key_and_label(text)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Full names of the tasks."""
        return parse_tasks(self.tasks)

    @property
    def tuning_tasks(self) -> tuple[str, ...]:
        """Full names of the tasks that settings are tuned on, where there is one choice for all."""
        return self.task_names if self.tune_tasks is None else parse_tasks(self.tune_tasks)

    @property
    def searches(self) -> bool:
        """Whether anything but one learning rate per method is tuned."""
        return super().searches or bool(self.demonstrations)

    @property
    def looks(self) -> bool:
        """Whether success is compared at several times, with several numbers of demonstrations or before training."""
        return bool(self.eval_episodes and (self.demonstrations or self.look_at or self.zero_shot))

    @property
    def numbers(self) -> tuple[int | None, ...]:
        """Numbers of demonstrations to train on, in order; None for all others."""
        return tuple(sorted(self.demonstrations)) if self.demonstrations else (self.train_episodes,)

    @property
    def parts(self) -> list[Part]:
        """What is tuned alone: with each number of demonstrations, what is without."""
        parts = super().parts
        if not self.demonstrations:
            return parts
        return [replace(part, demonstrations=number) for number in self.numbers for part in parts]

    @property
    def look_steps(self) -> tuple[int, ...]:
        """Steps after which success is measured, the last included."""
        return tuple(sorted({step for step in self.look_at if step < self.max_steps} | {self.max_steps}))

    @property
    def val_steps(self) -> tuple[int, ...]:
        """Steps after which the validation loss is noted, the last included, without the start of training."""
        return tuple(sorted({step for step in self.val_at if 0 < step < self.max_steps} | {self.max_steps}))

    def before(self, task: str, number: int) -> RolloutSettings:
        """Rollouts of the network before fine-tuning, on the goals of every run, asked for the same return."""
        return RolloutSettings(
            task=task, seed=self.eval_seed, init=self.init, data=self.data, train_episodes=number,
            target_return=self.target_return, episodes=self.eval_episodes, horizon=self.horizon, mode=self.mode,
        )  # fmt: skip

    def run(self, part: Part, phase: Phase, point: Point, seed: int, task: str) -> finetune.Settings:
        """Settings of one run of `part` at `point`.

        Tuning runs that are chosen by success are rolled out on goals of their own.
        """
        key = MethodKey.parse(part.method)
        own: dict[str, Any] = {
            "task": (task,), "method": key.method, "rank": self.rank_of(part, point),
            "rho": self.rho_of(part, point) or DEFAULT_RHO, "lr": point.get("lr"), "seeds": 1, "first_seed": seed,
            "checkpoint_every": 0, "checkpoint_minutes": self.checkpoint_minutes, "save": False, "progress": False,
        }  # fmt: skip
        if part.demonstrations is not None:
            own["train_episodes"] = part.demonstrations
        if phase == "tune":
            own |= {"max_steps": self.tune_steps, "val_at": (), "look_at": ()}
            own |= {"eval_episodes": 0} if self.select == "loss" else {"eval_seed": self.eval_seed + FIRST_TUNING_SEED}
        shared = [item.name for item in fields(finetune.SharedOptions)]
        return finetune.Settings(**{name: getattr(self, name) for name in shared} | own)


COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.metaworld compare",
    "Compare fine-tuning methods on Meta-World tasks, at tuned learning rates.",
    "experiments.comparisons.metaworld_comparison:run",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
