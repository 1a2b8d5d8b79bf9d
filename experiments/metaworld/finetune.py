"""Fine-tune on one task: ``python -m experiments.metaworld finetune --task push-v3 --init CKPT --method eva``.

As the paper does it (sections 4.5 and E.2): normalisation of the pre-training data, embeddings without adapters, the
largest return of the task's demonstrations as target return, success measured by rollouts.

Each task and seed is a run in a folder of its own below OUTPUT. Safe to interrupt; rerun to resume. The run itself is
in ``finetune_run``.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, replace
from functools import lru_cache
from pathlib import Path

from eva_lightning.errors import InputError
from eva_lightning.files import file_digest
from eva_lightning.methods.registry import METHODS, MethodKey, method_identity, method_names
from eva_lightning.names import check_name
from eva_lightning.rl.protocol import PROTOCOLS
from eva_lightning.rl.tasks import MAX_HORIZON, MAX_SEED, MODES, TARGETS, parse_tasks
from eva_lightning.streaming_options import ALGORITHMS
from experiments.runner.command import SettingsCommand
from experiments.runner.gradient_norms import GRADIENT_NORMS_HELP
from experiments.runner.loggers import LOGGER_HELP, parse_loggers
from experiments.runner.options import PRECISIONS
from experiments.runner.settings import Role, check_settings, option

#: What marks a ``metrics.json`` as one of a fine-tuning.
EXPERIMENT = "metaworld-finetune"

PLACE, RESULT, SELECTION = Role.PLACE, Role.RESULT, Role.SELECTION
PER_RUN = Role.RESULT | Role.PER_RUN
HEADS = ("train", "freeze", "adapt")


def checkpoint_identity(path: str) -> str:
    """What tells checkpoints apart wherever they lie; the path itself of a file that does not exist."""
    if not Path(path).is_file():
        return path
    found = Path(path).stat()
    return _digest(path, found.st_mtime_ns, found.st_size)


@lru_cache
def _digest(path: str, changed: int, size: int) -> str:
    """Read once, not for each of the thousands of runs of a search."""
    # the end of a checkpoint has the checksums of all that is in it
    return file_digest(path, span=1 << 20)


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """What all runs of a comparison have in common: its command line hands these on to every run."""

    init: str = option(
        MISSING, "checkpoint of the pre-trained model, made by the pretrain command", RESULT,
        identity=checkpoint_identity,
    )  # fmt: skip
    protocol: str | None = option(
        None, "to make sure that init was pre-trained by it, which always decides: default or l2m", RESULT,
        choices=PROTOCOLS, omit_default=True,
    )  # fmt: skip
    algorithm: str = option(
        "fast", "EVA: fast, or paper (its Algorithms 1 and 2 to the letter: docs/engine.md)", RESULT,
        choices=ALGORITHMS, omit_default=True,
    )  # fmt: skip
    alpha: float = option(1.0, "LoRA's alpha; updates are scaled by alpha / rank", RESULT, above=0)
    bias: str = option("none", "biases to train with adapters", RESULT, choices=("all", "lora_only", "none"))
    target_modules: tuple[str, ...] | None = option(
        None, "layers to adapt, by name, last part of the name or module; none: every nn.Linear in a block",
        RESULT, omit_default=True,
    )  # fmt: skip
    keep_function: bool = option(
        False, "LoRA-DA, LoRA-One, GoRA: take B A out of the base weight, so that the start moves nothing", RESULT,
        omit_default=True,
    )  # fmt: skip
    head: str = option("train", "action head: in full, frozen, or like other layers", RESULT, choices=HEADS)
    data: str = option("data/metaworld", "folder of demonstrations, made by the collect command", PLACE)
    train_episodes: int | None = option(20, "demonstrations to train on; none: all others", RESULT, at_least=1)
    val_episodes: int = option(4, "held-out demonstrations, the last ones", RESULT, at_least=1)
    target: str = option("executed", "actions to predict; the expert's have no noise", RESULT, choices=TARGETS)
    max_steps: int = option(500, "training steps (the paper: 100,000)", RESULT, at_least=1)
    batch_size: int = option(32, "windows per step (the paper: 128)", RESULT, at_least=1)
    weight_decay: float = option(0.01, "AdamW's weight decay", RESULT, at_least=0)
    warmup_steps: int = option(4000, "steps of linear warm-up; at most a tenth of all", RESULT, at_least=0)
    min_lr: float = option(1e-6, "learning rate after the last step, at most lr", RESULT, at_least=0, omit_default=True)
    gradient_clip: float | None = option(
        None, "largest norm of the gradient; none: that of pre-training", RESULT, above=0, omit_default=True
    )
    precision: str = option(
        "32-true", "auto: bf16-mixed on a GPU, else 32-true", RESULT, choices=PRECISIONS, omit_default=True
    )
    dropout: float | None = option(None, "dropout; none: that of pre-training", RESULT, at_least=0, below=1)
    context: int | None = option(None, "steps of a window; none: those of pre-training", RESULT, at_least=1)
    val_at: tuple[int, ...] = option(
        (10, 25, 50, 150, 500), "steps after which the validation loss is measured", RESULT, at_least=0
    )
    target_return: float | None = option(None, "return to ask for; none: the largest of the data", RESULT)
    look_at: tuple[int, ...] = option(
        (), "steps after which it is rolled out during training, on the goals of the end", RESULT, at_least=1,
        omit_default=True,
    )  # fmt: skip
    eval_episodes: int = option(
        50, "episodes rolled out at the end; 0 for none (the paper: 10, and 3 seeds)", RESULT, at_least=0
    )
    eval_seed: int = option(0, "seed of the evaluation goals, in every run", RESULT, at_least=0, below=MAX_SEED)
    mode: str = option("exact", "inference; streaming is faster", RESULT, choices=MODES)
    horizon: int = option(200, "steps of an evaluation episode", RESULT, at_least=1, at_most=MAX_HORIZON)
    rollout_workers: int = option(0, "processes for rollouts; 0 for none besides this one", PLACE, at_least=0)
    gradient_norms: int = option(0, GRADIENT_NORMS_HELP, PLACE, at_least=0)
    accelerator: str = option("auto", "Lightning accelerator: auto, cpu, gpu, mps, ...", PLACE)
    logger: str = option("none", LOGGER_HELP, PLACE)
    cache: str | None = option(None, "folder for memory-mapped data; DATA/cache if not given", PLACE)


@dataclass(frozen=True, kw_only=True)
class Settings(SharedOptions):
    """Everything a fine-tuning is asked to do. With one task and one seed it is a single run."""

    task: tuple[str, ...] = option(MISSING, "tasks such as push-v3, or cw10: one run each", PER_RUN)
    method: str = option(
        "eva", ", ".join(method_names("rl")), PER_RUN, choices=method_names("rl"), identity=method_identity
    )
    rank: int = option(4, "LoRA rank; EVA's mean rank per layer; AdaLoRA's last", PER_RUN, at_least=1)
    rho: float = option(2.0, "EVA: largest rank over mean rank (1 keeps ranks uniform)", PER_RUN, at_least=1)
    lr: float = option(1e-3, "peak learning rate; tune it for each method", PER_RUN, above=0)
    seeds: int = option(3, "number of seeds, one run each", SELECTION, at_least=1)
    first_seed: int = option(0, "the first of them", PER_RUN, at_least=0)
    devices: int = option(
        1, "processes on this machine, one for each device; a batch is shared out among them", RESULT,
        at_least=1, omit_default=True,
    )  # fmt: skip
    checkpoint_every: int = option(100, "steps between checkpoints; 0 for none", PLACE, at_least=0)
    checkpoint_minutes: float | None = option(
        None, "least time between checkpoints, instead of checkpoint_every", PLACE, at_least=0
    )
    save: bool = option(True, "keep the adapter, the merged network and EVA's state", PLACE)
    output: str = option("runs/metaworld", "folder that holds the runs", PLACE)
    name: str | None = option(None, "of the run folders, before -SEED; made of the settings if not given", PLACE)
    overwrite: bool = option(False, "delete runs of these names first, instead of resuming", PLACE)
    progress: bool = option(True, "show progress bars", PLACE)

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", parse_tasks(self.task))
        check_settings(self)
        parse_loggers(self.logger)
        if self.batch_size % self.devices:
            message = f"devices must divide batch_size {self.batch_size}, got {self.devices}"
            raise InputError(message, setting="devices")
        if self.name is not None:
            check_name("name", self.name, setting="name", room=len(str(MAX_SEED)) + 1)
        if self.name is not None and len(self.task) > 1:
            raise InputError(f"name={self.name!r} is for one task, but task names {len(self.task)}", setting="name")

    @property
    def val_steps(self) -> tuple[int, ...]:
        """Steps after which the validation loss is measured: 0, those asked for, and the last."""
        return tuple(sorted({0, self.max_steps, *(step for step in self.val_at if step < self.max_steps)}))

    @property
    def look_steps(self) -> tuple[int, ...]:
        """Steps after which it is rolled out before the end."""
        return tuple(sorted({step for step in self.look_at if step < self.max_steps})) if self.eval_episodes else ()

    @property
    def key(self) -> MethodKey:
        """The method with its ρ."""
        return MethodKey(self.method, self.rho if METHODS[self.method].redistributes else None)

    @property
    def seed(self) -> int:
        """The seed of a single run."""
        return self.first_seed

    def single(self, task: str, seed: int) -> Settings:
        """The run of one task and one seed."""
        return replace(self, task=(task,), seeds=1, first_seed=seed)

    def runs(self) -> list[Settings]:
        """All runs, one after the other."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return [self.single(task, seed) for task in self.task for seed in seeds]

    @property
    def run_name(self) -> str:
        """Name of a single run's folder."""
        if self.name is not None:
            return f"{self.name}-{self.seed}"
        adapter = f"-r{self.rank}" if self.key.adapts else ""
        adapter += f"-rho{self.rho:g}" if self.key.rho is not None else ""
        return f"{self.task[0]}-{self.method}{adapter}-lr{self.lr:g}-steps{self.max_steps}-seed{self.seed}"


COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.metaworld finetune",
    "Fine-tune a pre-trained Decision Transformer on one task, and measure success.",
    "experiments.metaworld.finetune_run:run_all",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
