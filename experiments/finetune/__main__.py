"""``python -m experiments.finetune``."""

from __future__ import annotations

from experiments.finetune.settings import command_line
from experiments.runner.ending import leave

if __name__ == "__main__":
    leave(command_line())
