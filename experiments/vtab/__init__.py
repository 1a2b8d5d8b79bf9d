"""VTAB-1K: data, single runs, sweeps over all tasks and methods, tables: ``python -m experiments.vtab``."""
