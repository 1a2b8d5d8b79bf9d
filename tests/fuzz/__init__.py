"""Damaged and hostile files for every reader of the project: ``python -m tests.fuzz --seconds 60 --seed 0``."""
