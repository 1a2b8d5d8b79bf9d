"""Preparation of data and weights; run once, not part of an experiment."""
