"""Speed and memory, each beside the bare work inside it: ``python -m benchmarks NAME``."""

from experiments.runner.ending import quiet_while_starting

quiet_while_starting()
