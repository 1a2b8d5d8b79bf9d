"""Command lines, each callable in-process: ``python -m experiments.<name>``."""

from experiments.runner.ending import quiet_while_starting

quiet_while_starting()
