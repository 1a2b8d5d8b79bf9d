"""The paper's analyses of EVA's initialisation: on a small model that needs no download, or on one of yours.

    python -m experiments.analysis --output runs/analysis
    python -m experiments.analysis --model dinov2_s14 --root data/vtab-1k --task caltech101 --image-size 112
    python -m experiments.analysis --checkpoint experiments/metaworld/assets/dt_small_mt40.ckpt --task push-v3

Convergence for batch sizes 4 to 32 (Figure 11), similarity of components across batch orders and batch sizes (Figures
12 and 5), ranks for rho from 1 to 3, by layer and by type (Figures 13 and 14), and distances between adapters before
and after training (Tables 5 and 6). Writes one PNG each and ``analysis.json`` with the numbers. Every part is kept in
OUTPUT/parts: safe to interrupt; rerun to resume, or to draw again what is done.

    python -m experiments.analysis gradients --runs runs/vtab     Figure 4, from runs with --gradient-norms
"""

from __future__ import annotations

from experiments.analysis.settings import Settings
from experiments.runner.command import SettingsCommand

COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.analysis",
    "The paper's analyses of EVA's initialisation, on digits, a timm backbone or a Decision Transformer. "
    "(python -m experiments.analysis gradients: Figure 4 from runs.)",
    "experiments.analysis.run:analyse",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
