"""What an EVA initialisation costs and how good it is, against the plain forward, PEFT and the exact SVD, in one run.

    python -m benchmarks init --models vit_small_patch16_224 --batches 16
    python -m benchmarks init --models tiny,small,base --images data/vtab-1k/caltech101/images

Interleaved and repeated: the plain forward of the same minibatches on the Trainer's path; our callback's whole
``on_fit_start`` in a real ``Trainer.fit`` (streaming with hooks, SVD, ranks, resize, optimizer rebuild); PEFT's
``initialize_lora_eva_weights``. LoRA layers exist before either starts. Captured variance is measured against dense
eigenvalues of the full covariances of all tokens, of the minibatches a method streamed and of held-out ones that none
did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.initialisation.settings import Settings
from experiments.runner.cli import in_terminal
from experiments.runner.settings import parse_settings


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line `args` (``sys.argv`` for None) and return the JSON document.

    Raises:
        InputError: An argument is wrong; the message is one sentence.
    """
    description = "The whole initialisation beside the plain forward, PEFT and exact SVDs."
    settings = parse_settings(Settings, "python -m benchmarks init", description, args)
    from benchmarks.initialisation.measure import measure  # torch and timm, which --help need not wait for

    return measure(settings)


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal; returns the exit status."""
    return in_terminal(main, args)
