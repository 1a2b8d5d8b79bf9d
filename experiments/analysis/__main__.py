"""``python -m experiments.analysis``."""

from experiments.analysis import command_line
from experiments.runner.ending import leave

if __name__ == "__main__":
    leave(command_line())
