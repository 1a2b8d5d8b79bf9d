"""Settings of the robots comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eva_lightning.rl.tasks import parse_tasks
from experiments.comparisons.source_digest import ROOT
from experiments.comparisons.tuned import TunedSettings
from experiments.runner.settings import Role, option


@dataclass(frozen=True, kw_only=True)
class Settings(TunedSettings):
    """Settings of the comparison; the layout of ``configs/demo_rl.yaml``."""

    checkpoint: str = option(
        "experiments/metaworld/assets/dt_small_mt40.ckpt", "network to start from, relative to the repository",
        Role.RESULT,
    )  # fmt: skip
    tasks: tuple[str, ...] = option(("push-v3",), "tasks to fine-tune on", Role.SELECTION)
    seeds: int = option(3, "runs per task and method", Role.SELECTION, at_least=1)
    updates: int = option(50, "gradient steps", Role.RESULT, at_least=1)
    batch_size: int = option(32, "windows per step", Role.RESULT, at_least=1)
    episodes: int = option(10, "evaluation episodes after each run", Role.RESULT, at_least=1)
    demonstrations: int = option(20, "episodes of the expert to train on", Role.RESULT, at_least=1)
    held_out: int = option(4, "further ones, for the validation loss", Role.RESULT, at_least=1)
    noise: float = option(0.1, "standard deviation of the noise on the expert's actions", Role.RESULT, at_least=0)
    rank: int = option(4, "LoRA's rank and EVA's mean rank", Role.RESULT, at_least=1)
    rho: float = option(2.0, "EVA's largest rank over its mean rank", Role.RESULT, at_least=1)
    horizon: int = option(200, "steps of an episode", Role.RESULT, at_least=1)
    film_size: int = option(
        320, "height and width of the film's pictures, in pixels; 0: no film", Role.PLACE, at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tasks", parse_tasks(self.tasks))

    @property
    def init(self) -> Path:
        """The starting network."""
        return ROOT / self.checkpoint

    @property
    def shown_updates(self) -> tuple[int, ...]:
        """Steps whose loss stands in the tables: the start, a fifth, half and the end of training."""
        return tuple(sorted({0, max(1, self.updates // 5), max(1, self.updates // 2), self.updates}))

    @property
    def noted_updates(self) -> tuple[int, ...]:
        """Steps after which the loss is measured, for the curves."""
        return tuple(sorted({*range(0, self.updates + 1, max(1, self.updates // 5)), *self.shown_updates}))
