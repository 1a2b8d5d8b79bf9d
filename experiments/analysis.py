"""The paper's analyses of EVA's initialisation, on a small model that needs no download.

    python -m experiments.analysis --output runs/analysis

pre-trains the Vision Transformer of the demo on the digits 0-4 and looks at its adaptation to the digits 5-9:
convergence for batch sizes 4 to 32 (Figure 11), similarity of components across batch orders and batch sizes (Figures
12 and 5), ranks for rho from 1 to 3 (Figures 13 and 14), and distances between adapters before and after training
(Tables 5 and 6). Writes one PNG each and ``analysis.json`` with the numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.runner.cli import in_terminal
from experiments.runner.settings import Role, check_settings, option, parse_settings

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


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line `args` (``sys.argv`` for None) and return what ``analysis.json`` holds.

    Raises:
        InputError: An option is out of range; the message is one sentence.
    """
    description = "The paper's analyses of EVA's initialisation, on a small model that needs no download."
    settings = parse_settings(Settings, "python -m experiments.analysis", description, args)
    from experiments.analysis_run import analyse

    return analyse(settings)


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal; returns the exit status."""
    return in_terminal(main, args)


if __name__ == "__main__":
    sys.exit(command_line())
