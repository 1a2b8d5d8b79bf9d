"""The paper's analyses of EVA's initialisation, on a small model that needs no download.

    python -m experiments.analysis --output runs/analysis

pre-trains the Vision Transformer of the demo on the digits 0-4 and looks at its adaptation to the digits 5-9:
convergence for batch sizes 4 to 32 (Figure 11), similarity of components across batch orders and batch sizes (Figures
12 and 5), ranks for rho from 1 to 3 (Figures 13 and 14), and distances between adapters before and after training
(Tables 5 and 6). Writes one PNG each and ``analysis.json`` with the numbers.
"""

from __future__ import annotations

from experiments.analysis.settings import Settings
from experiments.runner.command import SettingsCommand

COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.analysis",
    "The paper's analyses of EVA's initialisation, on a small model that needs no download.",
    "experiments.analysis.run:analyse",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
