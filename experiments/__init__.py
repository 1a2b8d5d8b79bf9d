"""Command lines, each callable in-process: ``python -m experiments.<name>``."""
