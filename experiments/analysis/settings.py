"""Settings of ``python -m experiments.analysis``."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.runner.settings import Role, check_settings, option

BATCH_SIZES = (4, 8, 16, 32)


@dataclass(frozen=True)
class Settings:
    """How much to stream and to train."""

    output: str = option("runs/analysis", "folder", Role.PLACE)
    r: int = option(4, "rank per layer, Tables 5 and 6", Role.RESULT, at_least=1)
    components: int = option(16, "per layer, Figures 5, 11 and 12", Role.RESULT, at_least=1)
    orders: int = option(10, "random batch orders, Figure 12", Role.RESULT, at_least=2)
    images: int = option(448, "images to stream", Role.RESULT, at_least=max(BATCH_SIZES))
    # the same for both methods, as in the paper: a larger one moves A further whatever its start
    lr: float = option(1e-2, "learning rate of both methods, Tables 5 and 6", Role.RESULT, above=0)
    epochs: int = option(10, "of fine-tuning, Tables 5 and 6", Role.RESULT, at_least=1)
    seeds: int = option(3, "runs per method, Tables 5 and 6", Role.RESULT, at_least=1)
    pretrain_epochs: int = option(30, "of pre-training", Role.RESULT, at_least=1)

    def __post_init__(self) -> None:
        check_settings(self)
