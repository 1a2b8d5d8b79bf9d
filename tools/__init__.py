"""Preparation of data and weights; run once, not part of an experiment."""

from experiments.runner.ending import quiet_while_starting

quiet_while_starting()
