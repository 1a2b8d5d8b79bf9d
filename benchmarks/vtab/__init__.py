"""Speed of the data pipeline and of training: ``python -m benchmarks vtab [--root DIR]``.

Each part compares what the project does with the bare work inside it; :mod:`benchmarks.vtab.train`, ``data`` and
``gpu`` say how. The last one needs a CUDA GPU and is left out where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.harness import BenchmarkSettings, Figures, measure_parts
from benchmarks.vtab import data, gpu, train
from benchmarks.vtab.images import TaskImages
from eva_lightning.vision.backbone.timm_models import resolve_model
from eva_lightning.vision.data.splits import open_task
from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, check_settings, option

PARTS = ("train", "data", "gpu")


@dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """What to measure, on which images."""

    root: str | None = option(None, "folder with the VTAB-1K task folders; made-up images if not given", Role.PLACE)
    task: str = option("caltech101", "task, with --root", Role.RESULT)
    parts: tuple[str, ...] = option(PARTS, "what to measure", Role.SELECTION, choices=PARTS)
    model: str = option("vit_tiny_patch16_224", "timm model to time training with, on random weights", Role.RESULT)
    repeats: int = option(7, "timed epochs of each kind", Role.RESULT, at_least=1)

    def __post_init__(self) -> None:
        check_settings(self)


def measure(settings: Settings) -> dict[str, Figures]:
    """Measure the parts that this machine can run; returns part -> name -> figure.

    Raises:
        MissingInputError: Something of the images is missing.
    """
    if settings.root is not None:
        open_task(settings.root, settings.task)
    if "train" in settings.parts:
        resolve_model(settings.model)
    images = TaskImages(settings.root, settings.task)
    parts: dict[str, Callable[[], Figures]] = {
        "train": lambda: train.measure(images, settings.model, settings.repeats),
        "data": lambda: data.measure(images),
        "gpu": lambda: gpu.measure(images),
    }
    return measure_parts({part: parts[part] for part in settings.parts}, settings)


COMMAND = SettingsCommand(
    Settings, "python -m benchmarks vtab", "Speed of data and training.", "benchmarks.vtab:measure"
)
main, command_line = COMMAND.main, COMMAND.command_line
