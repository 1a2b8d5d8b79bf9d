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

from benchmarks.initialisation.settings import Settings
from experiments.runner.command import SettingsCommand

COMMAND = SettingsCommand(
    Settings,
    "python -m benchmarks init",
    "The whole initialisation beside the plain forward, PEFT and exact SVDs.",
    "benchmarks.initialisation.measure:measure",
)
main, command_line = COMMAND.main, COMMAND.command_line
