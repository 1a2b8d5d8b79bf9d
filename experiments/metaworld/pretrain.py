"""Pre-train a Decision Transformer: ``python -m experiments.metaworld pretrain --config configs/metaworld/...yaml``.

The defaults are the paper's (section E.2): 1M steps on MT40, batch 128, context 50, AdamW, 4,000 warm-up steps, cosine
decay from 1e-4 to 1e-6, clipping at 0.25, dropout 0.2, mixed precision where there is a GPU. Safe to interrupt; rerun
to resume. The run itself is in ``pretrain_run``.
"""

from __future__ import annotations

from dataclasses import dataclass

from eva_lightning.errors import InputError
from eva_lightning.names import check_name
from eva_lightning.rl.protocol import DEFAULT, PROTOCOLS
from eva_lightning.rl.tasks import CW10, MT40, POSITIONS, TARGETS, parse_tasks
from experiments.runner.command import SettingsCommand
from experiments.runner.loggers import LOGGER_HELP, parse_loggers
from experiments.runner.options import PRECISIONS
from experiments.runner.settings import Role, check_settings, option

PLACE, RESULT = Role.PLACE, Role.RESULT


@dataclass(frozen=True)
class Settings:
    """Everything one run is asked to do; also the layout of ``config.yaml``."""

    tasks: tuple[str, ...] = option(("mt40",), "tasks such as push-v3, mt40 or cw10", RESULT)
    data: str = option("data/metaworld", "folder of demonstrations, made by the collect command", PLACE)
    episodes: int | None = option(None, "training episodes per task; none: all others", RESULT, at_least=1)
    val_episodes: int = option(4, "held-out episodes per task, the last ones", RESULT, at_least=0)
    target: str = option("executed", "actions to predict; the expert's have no noise", RESULT, choices=TARGETS)
    dtype: str = option("float32", "states and actions in the cache", RESULT, choices=("float32", "float16"))
    drop_previous_frame: bool = option(False, "leave the repeated frame out of the cache", RESULT)
    width: int = option(512, "features of a token", RESULT, at_least=1)
    layers: int = option(4, "number of blocks", RESULT, at_least=1)
    heads: int = option(8, "attention heads", RESULT, at_least=1)
    context: int = option(50, "steps of a window; a step is four tokens", RESULT, at_least=1)
    dropout: float = option(0.2, "on embeddings, attention weights, residuals", RESULT, at_least=0, below=1)
    positions: str = option("global", "by place in the window or step of the episode", RESULT, choices=POSITIONS)
    protocol: str = option(
        DEFAULT.name, "head, scales, decay: this project's, or those of the code that the paper builds on", RESULT,
        choices=PROTOCOLS, omit_default=True,
    )  # fmt: skip
    max_steps: int = option(1_000_000, "training steps", RESULT, at_least=1)
    batch_size: int = option(128, "windows per step", RESULT, at_least=1)
    lr: float = option(1e-4, "peak learning rate", RESULT, above=0)
    min_lr: float = option(1e-6, "learning rate after the last step", RESULT, at_least=0)
    warmup_steps: int = option(4000, "steps of linear warm-up; at most a tenth of all", RESULT, at_least=0)
    weight_decay: float = option(0.01, "AdamW's weight decay", RESULT, at_least=0)
    gradient_clip: float | None = option(0.25, "largest norm of the gradient", RESULT, above=0)
    val_every: int = option(1000, "steps between validations; a line of metrics.csv each", RESULT, at_least=1)
    rollout_every: int = option(0, "steps between rollouts in the simulator; 0 for none", RESULT, at_least=0)
    rollout_episodes: int = option(10, "episodes per task and rollout", RESULT, at_least=1)
    rollout_tasks: tuple[str, ...] | None = option(None, "tasks to roll out; all trained ones if not given", RESULT)
    rollout_video: int = option(0, "episodes per task to film; the logger takes them", PLACE, at_least=0)
    checkpoint_every: int = option(1000, "steps between checkpoints", PLACE, at_least=1)
    seed: int = option(0, "seed of weights, dropout and windows", RESULT, at_least=0)
    precision: str = option("auto", "auto: bf16-mixed on a GPU, else 32-true", RESULT, choices=PRECISIONS)
    accelerator: str = option("auto", "Lightning accelerator: auto, cpu, gpu, mps, ...", PLACE)
    devices: int = option(1, "number of devices", PLACE, at_least=1)
    workers: int = option(0, "loader processes; 0 is fastest here", PLACE, at_least=0)
    compile: bool = option(False, "compile the network; takes a minute at the start", PLACE)
    cache: str | None = option(None, "folder for memory-mapped data; DATA/cache if not given", PLACE)
    export: str | None = option(None, "also write weights alone to this file, in float16", PLACE)
    logger: str = option("none", LOGGER_HELP, PLACE)
    output: str = option("runs", "folder that holds the runs", PLACE)
    name: str | None = option(None, "name of the run's folder; made of tasks, sizes and seed if not given", PLACE)
    overwrite: bool = option(False, "delete a run of this name first, instead of resuming", PLACE)
    progress: bool = option(True, "show a progress bar", PLACE)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", parse_tasks(self.tasks))
        if self.rollout_tasks is not None:
            object.__setattr__(self, "rollout_tasks", parse_tasks(self.rollout_tasks))
        check_settings(self)
        parse_loggers(self.logger)
        if self.rollout_video and self.logger == "none":
            raise InputError(
                "rollout_video needs a logger that takes videos: --logger tensorboard, wandb or wandb-offline"
            )
        if self.name is not None:
            check_name("name", self.name, setting="name")

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        if self.name is not None:
            return self.name
        tasks = {MT40: "mt40", CW10: "cw10"}.get(self.tasks, f"{len(self.tasks)}tasks")
        tasks = self.tasks[0] if len(self.tasks) == 1 else tasks
        return f"pretrain-{tasks}-w{self.width}-l{self.layers}-k{self.context}-lr{self.lr:g}-seed{self.seed}"


COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.metaworld pretrain",
    "Pre-train a Decision Transformer on demonstrations.",
    "experiments.metaworld.pretrain_run:run",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
