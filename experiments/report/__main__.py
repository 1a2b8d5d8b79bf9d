"""``python -m experiments.report RUN...``."""

from __future__ import annotations

from experiments.report import command_line
from experiments.runner.ending import leave

if __name__ == "__main__":
    leave(command_line())
