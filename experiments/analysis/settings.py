"""Settings of ``python -m experiments.analysis``."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields

from eva_lightning.errors import InputError
from eva_lightning.rl.tasks import resolve_task
from experiments.metaworld.finetune import checkpoint_identity
from experiments.runner.settings import Role, check_settings, option
from experiments.vtab.settings import WEIGHTS_HELP, weights_identity

BATCH_SIZES = (4, 8, 16, 32)

#: What is analysed -> the settings that it depends on, besides those of model and data.
PARTS: dict[str, tuple[str, ...]] = {
    "convergence": ("components", "images"),
    "batch-sizes": ("components", "images"),
    "batch-orders": ("components", "images", "orders"),
    "ranks": ("images", "map_rank"),
    "distances": ("images", "r", "lr", "epochs"),
}

_SOURCE = ("model", "weights", "task", "image_size", "checkpoint", "pretrain_epochs")


@dataclass(frozen=True, kw_only=True)
class ModelAndData:
    """What is looked at: a timm backbone on images, a Decision Transformer on demonstrations, or the digits' ViT."""

    model: str | None = option(
        None, "timm name, or dinov2_s14 ...: on a VTAB-1K task or another folder; the digits' small ViT if not given",
        Role.RESULT,
    )  # fmt: skip
    weights: str = option("pretrained", f"of --model: {WEIGHTS_HELP}", Role.RESULT, identity=weights_identity)
    root: str = option("data/vtab-1k", "with --model: folder that holds the task folders", Role.PLACE)
    image_size: int = option(224, "with --model: height and width of the images", Role.RESULT, at_least=1)
    checkpoint: str | None = option(
        None, "a pre-trained Decision Transformer: on a Meta-World task", Role.RESULT,
        identity=lambda path: None if path is None else checkpoint_identity(path),
    )  # fmt: skip
    data: str = option("data/metaworld", "with --checkpoint: folder of demonstrations", Role.PLACE)
    task: str | None = option(None, "task of --model or --checkpoint, such as caltech101 or push-v3", Role.RESULT)

    @property
    def source(self) -> str:
        """Which model and data: ``"digits"``, ``"vision"`` or ``"robots"``."""
        if self.checkpoint is not None:
            return "robots"
        return "digits" if self.model is None else "vision"


@dataclass(frozen=True, kw_only=True)
class Settings(ModelAndData):
    """Which model and data, and how much to stream and to train."""

    output: str = option("runs/analysis", "folder", Role.PLACE)
    parts: tuple[str, ...] = option(tuple(PARTS), "what to analyse", Role.SELECTION, choices=PARTS)
    r: int = option(4, "rank per layer, Tables 5 and 6", Role.RESULT, at_least=1)
    components: int = option(16, "per layer, Figures 5, 11 and 12", Role.RESULT, at_least=1)
    map_rank: int = option(16, "rank of Figures 13 and 14, whose largest rho is 3", Role.RESULT, at_least=1)
    orders: int = option(10, "random batch orders, Figure 12", Role.RESULT, at_least=2)
    images: int = option(448, "images, or windows of demonstrations, to use", Role.RESULT, at_least=max(BATCH_SIZES))
    # the same for both methods, as in the paper: a larger one moves A further whatever its start
    lr: float | None = option(
        None, "learning rate of both methods, Tables 5 and 6; 1e-2 on the digits, else 1e-3 if not given", Role.RESULT,
        above=0,
    )  # fmt: skip
    epochs: int = option(10, "of fine-tuning on these images, Tables 5 and 6", Role.RESULT, at_least=1)
    seeds: int = option(3, "runs per method, Tables 5 and 6", Role.SELECTION, at_least=1)
    pretrain_epochs: int = option(30, "of the digits' pre-training", Role.RESULT, at_least=1)
    accelerator: str = option("auto", "Lightning accelerator: auto, cpu, gpu, mps, ...; digits: the CPU", Role.PLACE)
    overwrite: bool = option(False, "do everything again; else what is done already is reused", Role.PLACE)
    progress: bool = option(True, "show progress bars", Role.PLACE)

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.parts:
            raise InputError("parts must name at least one analysis", setting="parts")
        if self.model is not None and self.checkpoint is not None:
            raise InputError(
                "model is a vision backbone and checkpoint a Decision Transformer: give one of them", setting="model"
            )
        if (self.task is None) != (self.source == "digits"):
            needed = "the digits have no tasks" if self.source == "digits" else "name a task of the data"
            raise InputError(f"task goes with --model and --checkpoint: {needed}, got {self.task}", setting="task")
        if self.source == "robots":
            object.__setattr__(self, "task", resolve_task(str(self.task)))

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.lr if self.lr is not None else 1e-2 if self.source == "digits" else 1e-3


@dataclass(frozen=True, kw_only=True)
class PartSettings(Settings):
    """One analysis, or one training of it: what :class:`~experiments.runner.run_folder.RunFolder` tells apart."""

    part: str = option("", "what is analysed", Role.RESULT)
    method: str | None = option(None, "of a training", Role.RESULT)
    seed: int = option(0, "of a training", Role.RESULT)


def part_settings(settings: Settings, part: str, method: str | None = None, seed: int = 0) -> PartSettings:
    """The settings that a part depends on; the others as they are by default, so that they do not count."""
    kept = {*_SOURCE, *PARTS[part], "root", "data", "output", "accelerator", "progress"}
    defaults = {item.name: item.default for item in fields(Settings) if item.default is not MISSING}
    changed = {name: value if name not in kept else getattr(settings, name) for name, value in defaults.items()}
    if "lr" in kept:
        changed["lr"] = settings.rate
    if settings.source != "vision":
        changed |= {name: defaults[name] for name in ("weights", "image_size")}
    if settings.source != "digits":
        changed["pretrain_epochs"] = defaults["pretrain_epochs"]
    return PartSettings(**changed, part=part, method=method, seed=seed)
