"""What every initialisation costs: seconds, peak memory and share of the training time (the paper's Figure 5, left).

    python -m benchmarks costs
    python -m benchmarks costs --model dinov2_s14 --root data/vtab-1k --task caltech101 --batch-size 16
    python -m benchmarks costs --checkpoint experiments/metaworld/assets/dt_small_mt40.ckpt --task push-v3

Each method of the registry that prepares something runs in a fresh process: its whole preparation, from the plain
pre-trained module to the first training step, and some training steps after it. LoRA's row is what adapters cost by
themselves. What is measured is kept: rerun to resume, or to draw again.
"""

from __future__ import annotations

from benchmarks.costs.settings import Settings
from experiments.runner.command import SettingsCommand

COMMAND = SettingsCommand(
    Settings,
    "python -m benchmarks costs",
    "Seconds, peak memory and share of the training time of every initialisation.",
    "benchmarks.costs.measure:measure",
)
main, command_line = COMMAND.main, COMMAND.command_line
