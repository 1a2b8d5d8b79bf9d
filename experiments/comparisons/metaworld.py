"""Compare methods on CW10 tasks: ``python -m experiments.metaworld compare --config configs/metaworld/compare.yaml``.

Every method is fine-tuned on every task with several seeds, at the same rank budget and at a learning rate tuned for
it alone, by validation loss, on other seeds. Noted are validation losses during training and success at the end; the
report has means with 95% intervals and paired differences between methods.

Every run is a folder below OUTPUT: safe to interrupt; rerun to resume.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from eva_lightning.errors import InputError, check_choice
from eva_lightning.methods import MethodKey, method_names
from eva_lightning.methods.registry import DEFAULT_RHO
from eva_lightning.rl.tasks import parse_tasks
from experiments.comparisons.settings import MethodSettings
from experiments.metaworld import finetune
from experiments.runner.command import SettingsCommand
from experiments.runner.gradient_norms import GRADIENT_NORMS_HELP
from experiments.runner.jobs import Phase
from experiments.runner.settings import Role, option


@dataclass(frozen=True, kw_only=True)
class Settings(MethodSettings):
    """What to compare; the layout of ``configs/metaworld/compare.yaml``."""

    init: str = option(MISSING, "checkpoint of the pre-trained model, made by the pretrain command", Role.RESULT)
    tasks: tuple[str, ...] = option(
        ("faucet-close", "window-close", "push", "handle-press-side"), "tasks, or cw10", Role.SELECTION
    )
    methods: tuple[str, ...] = option(
        ("scratch", "fft", "lora", "dora", "eva:1", "eva", "eva-dora"), "methods; EVA's ρ behind a colon",
        Role.SELECTION,
    )  # fmt: skip
    train_episodes: int = option(20, "demonstrations to train on", Role.RESULT)
    val_episodes: int = option(8, "held-out demonstrations for the validation loss", Role.RESULT)
    max_steps: int = option(500, "optimizer steps", Role.RESULT)
    batch_size: int = option(8, "windows per step", Role.RESULT)
    val_at: tuple[int, ...] = option(
        (10, 25, 50, 150, 500), "steps after which the validation loss is noted", Role.RESULT
    )
    eval_episodes: int = option(50, "episodes rolled out at the end of each run; 0 for none", Role.RESULT)
    horizon: int = option(200, "steps of an evaluation episode, at most 500", Role.RESULT)
    tune: bool = option(True, "tune learning rates that rates does not name; false: all must be named", Role.SELECTION)
    grid: tuple[float, ...] = option(
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "learning rates to try when tuning", Role.SELECTION, above=0
    )
    tune_steps: int = option(100, "steps of a tuning run", Role.RESULT, at_least=1)
    gradient_norms: int = option(0, GRADIENT_NORMS_HELP, Role.PLACE, at_least=0)
    data: str = option("data/metaworld", "folder of demonstrations, made by the collect command", Role.PLACE)
    cache: str | None = option(None, "folder for memory-mapped data; DATA/cache if not given", Role.PLACE)
    output: str = option("runs/metaworld-compare", "folder for runs and report", Role.PLACE)

    def __post_init__(self) -> None:
        super().__post_init__()
        unnamed = [key for key in self.labels if key not in self.given_rates]
        if unnamed and not self.tune:
            message = f"rates must name every method when tune is false; {unnamed[0]} is missing"
            raise InputError(message, setting="rates")
        self.run(self.task_names[0], next(iter(self.labels)), "final", 1e-3, 0)  # checks the other settings

    def key_and_label(self, text: str) -> tuple[str, str]:
        """A method of the Meta-World half."""
        key = MethodKey.parse(text)
        check_choice("method", key.method, method_names("rl"))
        return key.key, key.label

    @property
    def task_names(self) -> tuple[str, ...]:
        """Full names of the tasks."""
        return parse_tasks(self.tasks)

    @property
    def val_steps(self) -> tuple[int, ...]:
        """Steps after which the validation loss is noted, the last included, without the start of training."""
        return tuple(sorted({step for step in self.val_at if 0 < step < self.max_steps} | {self.max_steps}))

    def run(self, task: str, method: str, phase: Phase, lr: float, seed: int) -> finetune.Settings:
        """Settings of one run."""
        key = MethodKey.parse(method)
        own: dict[str, Any] = {
            "task": (task,), "method": key.method, "rho": key.rho or DEFAULT_RHO, "lr": lr, "seeds": 1,
            "first_seed": seed, "accelerator": "cpu", "checkpoint_every": 0, "save": False, "progress": False,
        }  # fmt: skip
        if phase == "tune":
            own |= {"max_steps": self.tune_steps, "val_at": (), "eval_episodes": 0}
        shared = [item.name for item in fields(finetune.Settings) if hasattr(self, item.name)]
        return finetune.Settings(**{name: getattr(self, name) for name in shared} | own)


COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.metaworld compare",
    "Compare fine-tuning methods on Meta-World tasks, at tuned learning rates.",
    "experiments.comparisons.metaworld_comparison:run",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
