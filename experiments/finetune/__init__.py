"""Fine-tuning on one's own images: ``python -m experiments.finetune --data DIR``, or ``eva-lightning finetune``."""

from experiments.finetune.settings import command_line, main, parse

__all__ = ["command_line", "main", "parse"]
