"""Meta-World experiments: ``python -m experiments.metaworld COMMAND``; each command is a module of this package."""
