"""Comparisons of fine-tuning methods at tuned learning rates: one specification and one report each."""
